"""What a compressor is trained on: a rollout's own past, or true films, remembered in compressed form.

*Self-distillation* needs nothing but the model: at one denoising step of every chunk, the velocity under the packed
history is drawn to the velocity the same frozen model predicts when it sees the whole past.

*Distribution matching* (DMD, the published recipe) needs two many-step models, which see the clip all at once: on a
noised clip x_t, `real` says where true videos lie and `fake`, trained along the way, where the rollout's do:

    g = (f_fake − f_real) / mean|x − f_real|,   f_real = f_c + s·(f_c − f_u),   loss = ½ MSE(x, stopgrad(x − g))

Both leave the loss to the effect of the tokens downstream: nothing asks for a reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..plan import COMPRESSED
from ..samplers.chunked import Schedule
from .rollout import Rollout

Draw = Callable[[], Tensor]  # fresh noise for a chunk [B, C, f, h, w]

CRITIC_UPDATES = 5  # of the fake score per update of the compressor
LEAST, MOST = 0.02, 0.98  # noise levels at which clips are judged


def distill(
    student: Rollout, teacher: Rollout, schedule: Schedule, chunks: int, steps: Sequence[int], draw: Draw,
    films: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean squared difference of velocities at `steps` (indices into the schedule) of every chunk that sees compressed
    tokens; `teacher` is the same take with a policy that shows everything. The past of both are the student's own
    chunks, or those of `films` [B, C, chunks · f, h, w], which are then what is noised, too."""
    losses = []

    def compare(x: Tensor, t: float) -> Tensor:
        velocity = student.velocity(x, t)
        with torch.no_grad():
            goal = teacher.velocity(x, t)
        losses.append((velocity - goal).square().mean())
        return velocity.detach()

    for number in range(chunks):
        student.begin()
        teacher.begin()
        graded = steps if sees_compressed(student) else ()
        if films is not None:
            clean = films.chunk(chunks, 2)[number]
            for step in graded:
                sigma = schedule.sigmas[step]
                compare((1 - sigma) * clean + sigma * draw(), schedule.timesteps[step])
        else:
            x = draw()
            for step, (t, sigma) in enumerate(zip(schedule.timesteps, schedule.sigmas, strict=True)):
                if step in graded:
                    velocity = compare(x, t)
                else:
                    with torch.no_grad():
                        velocity = student.velocity(x, t)
                clean = x - sigma * velocity
                if step + 1 < len(schedule.sigmas):
                    x = (1 - schedule.sigmas[step + 1]) * clean + schedule.sigmas[step + 1] * draw()
        student.commit(clean)
        with torch.no_grad():
            teacher.commit(clean)
    return torch.stack(losses).mean()


def clip_of(student: Rollout, schedule: Schedule, chunks: int, exit_step: int, draw: Draw) -> Tensor:
    """A clip [B, C, F, h, w] whose chunks left the sampler at `exit_step`: only that step carries gradients (the
    self-rollout of Self-Forcing)."""
    parts = []
    for _ in range(chunks):
        student.begin()
        x = draw()
        for step in range(exit_step + 1):
            with torch.set_grad_enabled(step == exit_step and torch.is_grad_enabled()):
                clean = x - schedule.sigmas[step] * student.velocity(x, schedule.timesteps[step])
            if step < exit_step:
                x = (1 - schedule.sigmas[step + 1]) * clean + schedule.sigmas[step + 1] * draw()
        parts.append(clean)
        student.commit(clean)
    return torch.cat(parts, 2)


@dataclass
class Judged:
    """A clip at a noise level, as the two score models are shown it."""

    x: Tensor  # the noised clip
    sigma: Tensor  # [B, 1, 1, 1, 1]
    noise: Tensor


def noised(clip: Tensor, shift: float, generator: torch.Generator) -> Judged:
    """A clip at a random noise level, one per take: σ = s·u / (1 + (s − 1)·u) for uniform u, kept off both ends."""
    u = torch.rand(len(clip), 1, 1, 1, 1, generator=generator)
    sigma = (shift * u / (1 + (shift - 1) * u)).clamp(LEAST, MOST).to(clip.device)
    noise = torch.randn(clip.shape, generator=generator).to(clip.device)
    return Judged((1 - sigma) * clip.detach().float() + sigma * noise, sigma, noise)


def dmd_loss(clip: Tensor, real: Any, fake: Any, text: Tensor, no_text: Tensor, guidance: float, at: Judged) -> Tensor:
    """Half the squared distance to where distribution matching moves the clip. `real` and `fake` are many-step
    `WanTransformer3DModel`s, text and no_text [B, T, d]; guidance s (s = 3 is a conventional scale of 4)."""
    with torch.no_grad():
        with_text, without = clean_of(real, at, text), clean_of(real, at, no_text)
        true = with_text + guidance * (with_text - without)
        distance = (clip.detach() - true).abs().mean((1, 2, 3, 4), keepdim=True)
        move = torch.nan_to_num((clean_of(fake, at, text) - true) / distance)
    return 0.5 * functional.mse_loss(clip.double(), (clip.detach() - move).double())


def critic_loss(fake: Any, text: Tensor, at: Judged, clip: Tensor) -> Tensor:
    """Flow matching of the fake score on a clip of the rollout."""
    return (_velocity(fake, at, text) - (at.noise - clip.detach().float())).square().mean()


def clean_of(model: Any, at: Judged, text: Tensor) -> Tensor:
    """The clean clip a many-step model sees behind a noised one."""
    return at.x - at.sigma * _velocity(model, at, text)


def _velocity(model: Any, at: Judged, text: Tensor) -> Tensor:
    weight = model.patch_embedding.weight
    out = model(at.x.to(weight), 1000 * at.sigma.flatten(), text.to(weight), return_dict=False)[0]
    return out.float()


def sees_compressed(rollout: Rollout) -> bool:
    """Whether the chunk begun is shown compressed tokens."""
    return any(getattr(entry, "form", None) == COMPRESSED for entry in rollout.plan.entries)
