"""The masked sampler of Lumos-1 (AR-DF inference): a frame starts as masks; every step draws all that is missing and
masks the least confident draws again, fewer and fewer of them, after a cosine.

    n = ⌊v·cos(π/2·(s+1)/S)⌋ of the v codes stay masked after step s; confidence = log p(draw) + T·Gumbel

A finished frame is committed with an evenly spread part of its content masked, as history was in training; the frames
after it never see it whole.

`compat="upstream"` is the published program, token for token: T is multiplied by 1 − (s+1)/S at every step and never
reset, so that from the second frame on ranking is noiseless; a given image is committed unmasked; and the stream
without text is fed the same ids as the other. `compat="fixed"` is what its comments and the training say: T starts anew
in every frame as T₀·(1 − (s+1)/S), a given image is masked like any history, and the stream without text sees finished
frames fully masked, so that guidance is towards text and past.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LongtakeError
from ..geometry import Geometry
from ..hosts.lumos.sequence import FIXED, MASKED
from .base import Sampler, Sampling
from .chunked import NoiseSource, Schedule

COMPAT = ("fixed", "upstream")
UNCOND_HISTORY = ("masked", "same")
BLOCK_ELEMENTS = 2**25  # logits held at once: 128 MiB


@dataclass(frozen=True)
class MaskedSampler(Sampler):
    """`steps` a frame, `temperature` T₀ of the ranking noise, `history_mask` the part of a finished frame's content
    that is masked when it is committed. `uncond_history` says what the stream without text sees of finished frames:
    "masked" or the "same"; None goes by `compat`."""

    steps: int = 50
    temperature: float = 1.0
    history_mask: float = 0.7
    compat: str = "fixed"
    uncond_history: str | None = None

    commits_last: ClassVar[bool] = False  # nobody reads the K/V of the last frame
    reuses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise LongtakeError(f"{self.steps} steps: a chunk needs at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise LongtakeError(f"temperature {self.temperature:g}: give a finite number, 0 or more")
        if not 0 <= self.history_mask <= 1:
            raise LongtakeError(f"history_mask {self.history_mask:g}: give a part between 0 and 1")
        if self.compat not in COMPAT:
            raise LongtakeError(f"compat {self.compat!r}: use one of {', '.join(COMPAT)}")
        if self.uncond_history not in (None, *UNCOND_HISTORY):
            raise LongtakeError(f"uncond_history {self.uncond_history!r}: use one of {', '.join(UNCOND_HISTORY)}")

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """Thousandths of the codes that are masked before each step."""
        return Schedule(tuple(1000 * math.cos(math.pi / 2 * s / self.steps) for s in range(self.steps)))

    def noise(self, generators: Sequence[torch.Generator]) -> CodeNoise:
        return CodeNoise(generators)

    def sample(self, chunk: Sampling) -> Tensor:
        """Codes [B, 1, 1, h, w], int64; −1 where none could be drawn because the model's output is not finite."""
        if not chunk.host.codes:
            raise LongtakeError(f"{chunk.host.name} draws no codes: a masked sampler is for Lumos-1 models")
        height, width = chunk.geometry.latent_size
        cells = height * width
        codes = torch.full((chunk.batch, cells), MASKED, device=chunk.host.device)
        shaped = lambda x: x.view(chunk.batch, 1, 1, height, width)
        most = cells  # codes still masked, at most; known without asking the device
        for step in range(self.steps):
            t = chunk.schedule.timesteps[step]
            hidden = _hidden(chunk, shaped(codes), step)
            unknown = codes < 0
            rows = unknown.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # [B, m]: all that is masked
            drawn, logp = self._draw(chunk, step, hidden, rows)
            missing = unknown.gather(1, rows)
            drawn = torch.where(missing, drawn, codes.gather(1, rows))
            finished = codes.scatter(1, rows, drawn)
            again = torch.zeros_like(rows, dtype=torch.bool)
            if step + 1 < self.steps:
                stay = still_masked(cells, step, self.steps)
                noise = chunk.noise.gumbel(chunk.chunk, step, rows)
                confidence = logp + self.ranking_temperature(chunk.chunk, step) * noise.to(logp)
                again = self._least(confidence.masked_fill(~missing, torch.inf), stay, missing.sum(1, keepdim=True))
                most = max(1, min(stay, most - 1))
            codes = codes.scatter(1, rows, torch.where(again, MASKED, drawn))
            shown = shaped(finished)
            seen = chunk.predicted(shown, t, step)
            if seen is not shown:  # other codes were given: they replace those that stay
                codes = torch.where(codes < 0, codes, seen.flatten(1))
        return shaped(codes)

    def log_likelihood(self, chunk: Sampling, truth: Tensor) -> Tensor:
        """How likely the codes `truth` [B, 1, 1, h, w] are held before any of them is known: fp32 [B, 1, 1, h, w], from
        one forward."""
        hidden, codes = _hidden(chunk, torch.full_like(truth, MASKED), 0), truth.flatten(1)
        rows = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
        known = [
            self._log_probabilities(chunk, hidden, part).gather(-1, codes.gather(1, part)[..., None])[..., 0]
            for part in rows.split(_block(chunk), 1)
        ]
        return torch.cat(known, 1).view(truth.shape)

    def ranking_temperature(self, chunk: int, step: int) -> float:
        """T of the ranking noise; `chunk` counts generated frames."""
        if self.compat == "fixed":
            return self.temperature * (1 - (step + 1) / self.steps)
        if chunk:
            return 0.0  # the last step of the first frame multiplied by 0
        return self.temperature * math.prod(1 - (s + 1) / self.steps for s in range(step + 1))

    def commit_input(self, x0: Tensor, geometry: Geometry, stream: str, given: bool = False) -> tuple[Tensor, float]:
        content = _content(x0, geometry)
        if given and self.compat == "upstream":
            return content, 0.0
        if stream == "uncond" and not given and self._uncond_history == "masked":
            return content.masked_fill(content != FIXED, MASKED), 0.0
        pattern = history_pattern(math.prod(geometry.grid), self.history_mask).to(content.device)
        content.flatten(1)[:, pattern] = MASKED  # newlines are content: they can be masked too
        return content, 0.0

    def sound(self, x0: Tensor) -> Tensor:
        return (x0 >= 0).all()

    @property
    def _uncond_history(self) -> str:
        return self.uncond_history or ("masked" if self.compat == "fixed" else "same")

    def _draw(self, chunk: Sampling, step: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A code for each of `rows` [B, m] and its log-probability. Logits exist for a block of rows at a time, and for
        no other rows."""
        drawn, logps = [], []
        for part in rows.split(_block(chunk), 1):
            logp = self._log_probabilities(chunk, hidden, part)
            codes = chunk.noise.codes(chunk.chunk, step, part, logp)
            chosen = logp.gather(-1, codes[..., None])[..., 0]
            drawn.append(torch.where(chosen.isfinite(), codes, MASKED))
            logps.append(chosen)
        return torch.cat(drawn, 1), torch.cat(logps, 1)

    def _log_probabilities(self, chunk: Sampling, hidden: Tensor, rows: Tensor) -> Tensor:
        """Of every code at each of `rows` [B, r]: [B, r, codes]."""
        picked = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
        return F.log_softmax(chunk.host.logits(picked).float(), -1)

    def _least(self, confidence: Tensor, stay: int, missing: Tensor) -> Tensor:
        """Which of the rows [B, m] are masked again: the `stay` least confident, at least 1, never all `missing`."""
        count = torch.minimum(torch.full_like(missing, stay), missing - 1).clamp(min=1)  # [B, 1]
        if self.compat == "fixed":  # exactly so many, ties to the earlier cell
            return confidence.argsort(dim=1, stable=True).argsort(1) < count
        ranked = F.pad(confidence.sort(1).values, (0, 1), value=torch.inf)
        return confidence < ranked.gather(1, count)  # strictly: ties stay


class CodeNoise(NoiseSource):
    """Seeded randomness of a take: one uniform number for each code drawn, and one for each rank.

    Drawn on the CPU, so seeds mean the same on every device.
    """

    def codes(self, chunk: int, step: int, rows: Tensor, logp: Tensor) -> Tensor:
        """One code for each of `rows` [B, r], from log-probabilities [B, r, codes]: the inverse of their sum."""
        total = logp.double().exp().cumsum(-1)
        at = self._uniform(rows)[..., None] * total[..., -1:]
        return torch.searchsorted(total, at, right=True)[..., 0].clamp(max=logp.shape[-1] - 1)

    def gumbel(self, chunk: int, step: int, rows: Tensor) -> Tensor:
        """Standard Gumbel noise [B, m]."""
        tiny = torch.finfo(torch.float64).tiny
        return -(-self._uniform(rows).clamp(min=tiny).log()).clamp(min=tiny).log()

    def _uniform(self, rows: Tensor) -> Tensor:
        each = [torch.rand(rows.shape[1], generator=g, device=g.device, dtype=torch.float64) for g in self.generators]
        return torch.stack([x.to(rows.device) for x in each])


def history_pattern(content: int, part: float) -> Tensor:
    """Content positions that are masked in a committed frame: evenly spread, the same in every frame."""
    n = max(1, round(part * content)) if part else 0
    return torch.tensor([round(j * content / n) for j in range(n)], dtype=torch.int64)


def still_masked(cells: int, step: int, steps: int) -> int:
    """Codes the cosine schedule leaves masked after `step` (0-based)."""
    # fp32 on purpose: 96·cos(π/3) floors to 47 here and to 48 in fp64, and then other ids come out.
    return int(torch.floor(cells * torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5)))


def _hidden(chunk: Sampling, codes: Tensor, step: int) -> Tensor:
    """What a step's forward makes of every code's cell: [B, v, C]."""
    content = _content(codes, chunk.geometry)
    hidden = chunk.forward(content, chunk.schedule.timesteps[step], step)  # [B, rows · columns, C]
    return hidden.unflatten(1, chunk.geometry.grid)[:, :, : codes.shape[-1]].flatten(1, 2)


def _block(chunk: Sampling) -> int:
    """Cells whose logits are held at once."""
    return max(1, BLOCK_ELEMENTS // (chunk.batch * chunk.host.codes))


def _content(codes: Tensor, geometry: Geometry) -> Tensor:
    """Codes [B, 1, 1, h, w] → the content grid [B, 1, 1, rows, columns]: behind them, what is not drawn."""
    rows, columns = geometry.grid
    return F.pad(codes, (0, columns - codes.shape[-1], 0, rows - codes.shape[-2]), value=FIXED)
