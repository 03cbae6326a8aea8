"""Muon (K. Jordan, 2024) for matrices and convolutions: a weight's momentum is made orthogonal before it is applied.

On two cores the number of steps is what is short, and Muon needs about half as many as AdamW here.
"""

from collections.abc import Iterable

import torch

# Coefficients of the quintic Newton-Schulz iteration that pushes all singular values towards 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised over (outputs, everything else), stepping as far as AdamW at this `lr`."""

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                average = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"]).flatten(1)
                scale = 0.2 * max(ahead.shape) ** 0.5 * group["lr"]
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(_orthogonal(ahead).view_as(weight), alpha=-scale)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    x = x.to(matrix.dtype)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
