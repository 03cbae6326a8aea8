"""Chunks of several sessions in one go: wherever they ask the model for the same step, it is asked once for all.

What is joined is the model's own work (projections, feed-forward layers, the text); attention stays with each session's
view, so policies, histories and chunk numbers may differ. Batched arithmetic rounds differently: latents agree with
those of a session by itself to about 1e-5, and a session that was joined once is not made again bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..history import LayerView
from ..hosts.base import Host, TextState

T = TypeVar("T")


@dataclass
class _Call:
    """A forward that a session waits for. `x` is latents or tokens [B, …]."""

    kind: str  # "forward" or "carry"
    x: Tensor
    timestep: float
    text: TextState
    layers: list[Any]  # views
    result: Tensor | None = None
    error: BaseException | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Calls of one key can be one."""
        return self.kind, self.x.shape[1:], self.x.dtype, self.timestep, self.text.embeds.shape[1:]

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None


class JoinedView:
    """The layer views of several sessions as one: each sees its own rows of the batch."""

    def __init__(self, views: Sequence[LayerView], sizes: list[int]) -> None:
        self.views, self.sizes = views, sizes

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """As `LayerView.attend`, [B, N, H, D]."""
        rows = zip(self.views, *(x.split(self.sizes) for x in (q, k, v)), strict=True)
        return torch.cat([view.attend(*own, **options) for view, *own in rows])


class Together:
    """A round: one chunk of each of several sessions of one host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._waiting: list[_Call] = []
        self._making = 0  # sessions that will ask again or end
        self._turn = threading.Condition()
        self._texts: dict[tuple[int, ...], tuple[list[TextState], TextState]] = {}
        self.forwards = 0  # of the model, each for one session or more

    def run(self, jobs: Sequence[Callable[[Seat], T]], threads: int | None = None) -> list[T | BaseException]:
        """Do every job in a thread of its own, with a seat in place of the host: what they return, or raise."""
        results: list[Any] = [None] * len(jobs)
        self._making = len(jobs)

        def make(i: int, job: Callable[[Seat], T]) -> None:
            if threads is not None:
                torch.set_num_threads(threads)  # a setting of each thread
            try:
                results[i] = job(Seat(self))
            except BaseException as error:
                results[i] = error
            finally:
                with self._turn:
                    self._making -= 1
                    self._go_on()

        workers = [threading.Thread(target=make, args=(i, job), daemon=True) for i, job in enumerate(jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return results

    def ask(self, call: _Call) -> Tensor:
        """The answer to a session's call; waits until every session that is still making its chunk has asked."""
        with self._turn:
            self._waiting.append(call)
            self._making -= 1
            self._go_on()
            self._turn.wait_for(lambda: call.done)
        if call.error is not None:
            raise call.error
        assert call.result is not None
        return call.result

    def _go_on(self) -> None:
        if self._making or not self._waiting:
            return
        # the noisiest step first: who is ahead, with one guidance stream or a step reused, waits for the others there
        first = max(call.timestep for call in self._waiting)
        groups: dict[tuple[Any, ...], list[_Call]] = {}
        for call in self._waiting:
            if call.timestep == first:
                groups.setdefault(call.key, []).append(call)
        self._waiting = [call for call in self._waiting if call.timestep != first]
        for calls in groups.values():
            try:
                self._answer(calls)
            except BaseException as error:
                for call in calls:
                    call.error = error
            self._making += len(calls)
        self._turn.notify_all()

    def _answer(self, calls: list[_Call]) -> None:
        self.forwards += 1
        sizes = [len(call.x) for call in calls]
        x, text, layers = calls[0].x, calls[0].text, calls[0].layers
        if len(calls) > 1:
            x, text = torch.cat([call.x for call in calls]), self._text([call.text for call in calls])
            layers = [JoinedView(views, sizes) for views in zip(*(call.layers for call in calls), strict=True)]
        made = getattr(self.host, calls[0].kind)(x, calls[0].timestep, text, layers)
        for call, own in zip(calls, made.split(sizes), strict=True):
            call.result = own

    def _text(self, texts: list[TextState]) -> TextState:
        """Prompts [B, T, d] one after another; they stay the same all through a chunk."""
        key = tuple(id(text) for text in texts)
        if key not in self._texts:
            join = lambda parts: [torch.cat(same) for same in zip(*parts, strict=True)]
            k, v = join([text.k for text in texts]), join([text.v for text in texts])
            joined = replace(texts[0], embeds=torch.cat([text.embeds for text in texts]), k=k, v=v)
            self._texts[key] = texts, joined  # the parts too: an identity is theirs only while they live
        return self._texts[key][1]


class Seat:
    """A host as one of several sessions sees it: all its own but for the forwards, which are asked for together."""

    def __init__(self, together: Together) -> None:
        self._together = together

    def __getattr__(self, name: str) -> Any:
        return getattr(self._together.host, name)

    def forward(self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView]) -> Tensor:
        return self._together.ask(_Call("forward", latents, timestep, text, layers))

    def carry(self, tokens: Tensor, timestep: float, text: TextState, layers: list[LayerView]) -> Tensor:
        return self._together.ask(_Call("carry", tokens, timestep, text, layers))
