"""What both stages of tiny-lumos learn with."""

from collections.abc import Callable, Sequence

import torch

from longtake.zoo.muon import Muon


def optimizers(
    module: torch.nn.Module, outer: Sequence[str], rate: float
) -> Callable[[list[torch.nn.Parameter]], list[torch.optim.Optimizer]]:
    """What a stage over `module` learns with: Muon, but AdamW for vectors and for names with a part that is `outer`."""
    others = {id(p) for name, p in module.named_parameters() if p.ndim < 2 or any(part in name for part in outer)}
    return lambda parameters: [
        Muon([p for p in parameters if id(p) not in others], lr=rate),
        torch.optim.AdamW([p for p in parameters if id(p) in others], lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
