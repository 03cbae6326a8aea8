"""Two caches as other people's code has them, on our own host, to be measured against: same weights, sampler, noise and
attention call, so that what differs is the cache.

    growing     rotated keys; every forward joins past and chunk with `torch.cat`, the commit pass keeps what was joined
    shifted     rotated keys in a buffer of the window's size, sink first; once it is full, every chunk moves what stays
                to the left (the copy that Self-Forcing's own code makes), then each forward writes the chunk behind it

Neither makes another copy: past keys are never rotated again, and attention reads the buffer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..attention import attend
from ..hosts.wan import CausalWan
from ..rope import RotaryTable
from ..samplers import Sampling, default_sampler


class Cache(Protocol):
    """One layer's cache; what `LayerView` is to a session."""

    @property
    def nbytes(self) -> int: ...

    @property
    def attended(self) -> int:
        """Keys of the last forward."""

    def begin(self, phases: Tensor) -> None:
        """A new chunk, whose tokens stand at `phases`."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, backend: str | None = None,
        parallel_config: object = None,
    ) -> Tensor: ...  # fmt: skip

    def keep(self) -> None:
        """The chunk stays as the last forward left it."""


class Growing:
    """A cache that grows by concatenation: k, v [B, T, H, D]."""

    def __init__(self, rotary: RotaryTable) -> None:
        self.rotary = rotary
        self.past: tuple[Tensor, Tensor] | None = None
        self.joined: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.past is None else sum(t.nbytes for t in self.past)

    @property
    def attended(self) -> int:
        return 0 if self.joined is None else self.joined[0].shape[1]

    def begin(self, phases: Tensor) -> None:
        self.phases = phases

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, backend: str | None = None,
        parallel_config: object = None,
    ) -> Tensor:  # fmt: skip
        q, k = self.rotary.rotate(q, self.phases), self.rotary.rotate(k, self.phases)
        self.joined = None  # of the step before: two of them need not be alive at once
        if self.past is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(self.past, (k, v), strict=True))
        self.joined = k, v
        return attend(q, k, v, backend=backend, parallel_config=parallel_config)

    def keep(self) -> None:
        self.past = self.joined


class Shifted:
    """A window in a buffer [B, window, H, D] whose first `sink` tokens stay and whose others move to the left."""

    def __init__(self, rotary: RotaryTable, size: tuple[int, int, int, int], sink: int, like: Tensor) -> None:
        self.rotary, self.sink, self.window = rotary, sink, size[1]
        self.k, self.v = like.new_zeros(size), like.new_zeros(size)
        self.filled = self.seen = 0

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    @property
    def attended(self) -> int:
        return self.seen

    def begin(self, phases: Tensor) -> None:
        self.phases, tokens = phases, phases.shape[-3]
        if (evicted := self.filled + tokens - self.window) > 0:
            for x in (self.k, self.v):
                stays = x[:, self.sink + evicted : self.filled].clone()  # the two overlap
                x[:, self.sink : self.filled - evicted] = stays
            self.filled -= evicted

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, backend: str | None = None,
        parallel_config: object = None,
    ) -> Tensor:  # fmt: skip
        self.seen = self.filled + k.shape[1]
        live = slice(self.filled, self.seen)
        self.rotary.rotate(k, self.phases, out=self.k[:, live])
        self.v[:, live] = v
        q = self.rotary.rotate(q, self.phases)
        past = self.k[:, : self.seen], self.v[:, : self.seen]
        return attend(q, *past, backend=backend, parallel_config=parallel_config)

    def keep(self) -> None:
        self.filled = self.seen


class CachedTake:
    """A take on `host` whose layers keep their past in `cache()`s; an iterator of chunks [C, f, h, w], like a session
    with `seed` and `embeds`."""

    def __init__(self, host: CausalWan, embeds: Tensor, seed: int, cache: Callable[[], Cache]) -> None:
        self.host, self.geometry = host, host.geometry()
        self.text = host.text_state(embeds)
        self.sampler = default_sampler(host.config, None)
        self.noise = self.sampler.noise([torch.Generator().manual_seed(seed)])
        self.layers: list[Cache] = [cache() for _ in range(host.layers)]
        self.index = 0

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def attended(self) -> int:
        return self.layers[0].attended

    def __iter__(self) -> Iterator[Tensor]:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        span = self.geometry.chunk_frames
        base, _ = self.host.positions(self.geometry, self.index * span, span)
        phases = self.host.rotary.phases(base.to(self.host.device))
        for layer in self.layers:
            layer.begin(phases)
        x0 = self.sampler.sample(
            Sampling(self.host, self.geometry, 1, self.sampler.schedule, self.index, self.noise, self._forward)
        )
        self._forward(*self.sampler.commit_input(x0, self.geometry, "cond"), 0)
        for layer in self.layers:
            layer.keep()
        self.index += 1
        return x0[0]

    def _forward(self, x: Tensor, t: float, step: int) -> Tensor:
        return self.host.forward(x, t, self.text, self.layers)  # type: ignore[arg-type]  # they attend, too
