"""The contract of what runs a take: one chunk after another, or several in flight. The session gives it texts and hears
of finished chunks; in between model, policy, reuse and history meet here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..chunk import Clock
from ..errors import LongtakeError
from ..geometry import Geometry
from ..history import History
from ..hosts.base import TextState
from ..plan import BlockTable
from ..policies import KVPolicy
from ..reuse import Decision, ReuseRun, Turn


@dataclass(frozen=True)
class Finished:
    """A chunk that took its last step, and what its last forward attended to."""

    chunk: int
    frame: int
    latents: Tensor  # fp32 [B, C, f, h, w]
    attended: int
    decisions: tuple[Decision, ...] = ()  # of its steps, by the reuse policy


class Rollout(ABC):
    """A take (or several in lockstep) in the making: `next`, then `compress` and `pop`, chunk after chunk; or `give` in
    place of `next`, for latents that are not generated. A chunk that is not popped has not happened: `abandon` it.

    `texts` are the prompts by guidance branch, shared with the session, which replaces them between chunks. `noise` is
    what `Sampler.noise` made, or the user's. `kept` is None unless latents of what the history holds are kept, for
    `rebuild`.
    """

    host: Any  # who makes the forwards: for a round of several sessions, what stands for it
    geometry: Geometry
    history: History
    noise: Any
    texts: dict[str, TextState]
    frame: int  # next latent frame
    kept: dict[int, Any] | None
    forgets: ClassVar[bool]  # whether `flush` can be: nothing in flight sees the past

    @abstractmethod
    def next(self, clock: Clock, last: bool = False) -> Finished:
        """The next finished chunk; nothing will follow the `last`. Raises NonFiniteError for NaN or infinity, and
        StopIteration where it knows by itself that the take is at its end."""

    @abstractmethod
    def pieces(self, latents: Tensor) -> list[Tensor]:
        """Given latents [1 or B, C, f, h, w] as `give` takes them. Raises LongtakeError for another shape."""

    def _fitting(self, latents: Tensor, multiple: int = 1) -> Tensor:
        """The same for every take and on the host's device, if it is of this geometry and so many frames, or a multiple
        of them."""
        batch, size = self.history.shape.batch, (self.geometry.channels, *self.geometry.latent_size)
        given = tuple(latents.shape)
        if (
            len(given) != 5 or (given[1], *given[3:]) != size or given[0] not in (1, batch)
            or not given[2] or given[2] % multiple
        ):  # fmt: skip
            frames, whole = ("f", "") if multiple == 1 else (f"{multiple} n", ", whole chunks")
            raise LongtakeError(
                f"latents {list(given)}: give [{batch}, {size[0]}, {frames}, {size[1]}, {size[2]}]{whole}"
            )
        return latents.to(self.host.device).expand(batch, -1, -1, -1, -1)

    @abstractmethod
    def give(self, latents: Tensor, image: bool = False) -> int:
        """Take latents [B, C, f, h, w] as if they had been made here (`image`: the take's first frame); the number of
        chunks that they are."""

    def compress(self, frames: Tensor | None) -> None:  # noqa: B027 (nothing to do where no form is compressed)
        """The compressed form of what `next` or `give` made, whose decoded frames are [B, T, H, W, 3]."""

    @abstractmethod
    def pop(self) -> None:
        """What `next` or `give` made is handed out: it becomes the past."""

    @abstractmethod
    def abandon(self) -> None:
        """What `next` or `give` made, and was not popped, goes; `next` begins where it did before."""

    @abstractmethod
    def rebuild(self) -> int:
        """Rewrite the K/V of what the history holds from its latents under the prompts in force, oldest first, each
        seeing what the policy shows it of those before. What has lost tokens stays as it is. Returns the number of
        blocks rewritten. Needs `kept`."""

    @abstractmethod
    def flush(self, cut: int) -> None:
        """Forget what the policy gives up for a new prompt; the next chunk stands `cut` latent frames further off."""

    @abstractmethod
    def turns(self) -> list[Turn]:
        """The steps of a chunk, as reuse policies see them."""

    @abstractmethod
    def rows(self, chunks: int | None) -> list[list[Turn]] | None:
        """The turns of what is to come of a take of so many chunks, row by row; None if its length is not known, or
        chunks are in flight."""

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Bytes held beside the history, by part."""

    @abstractmethod
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a continuation depends on but the history, the noise and the reuse: tensors, and what JSON takes."""

    @abstractmethod
    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Go on from `state_dict`, in a history that was restored too."""


def last_forwards(
    reuse: ReuseRun, computed: Sequence[Turn], rows: Sequence[Sequence[Turn]], *, adopts: bool
) -> set[int]:
    """Of the chunks in flight that are `computed` in a row, those whose scores can be the last ones before the table
    changes, which it does after the `rows` that follow. A later forward's take their place, so of a row the last
    chunk's count (and a chunk's that it `adopts` as it ends), and of several rows the last one's in which any is
    computed. Which that is, is known beforehand without reuse, and where decisions hold nothing of the video; with the
    "latent" metric every row may be, and is scored: one forward in it, at the cost of one more product of queries and
    past keys, in fp32."""
    later = reuse.ahead(rows)
    if later is not None and any(not decision.reused for row in later for decision in row):
        return set()
    adopted = [turn for turn in computed if adopts and turn.index == turn.steps - 1]
    return {turn.chunk for turn in (*adopted, *computed[-1:])}


def rewrite(
    history: History, policy: KVPolicy, kept: Collection[int], chunk: int, write: Callable[[int, BlockTable], None]
) -> int:
    """Reopen every block of the history that is whole and in `kept`, oldest first, let `write` make its K/V anew where
    the policy shows it those before, and commit it again. Returns how many there were."""
    whole = [block.id for block in history.table().blocks if history.rewritable(block) and block.id in kept]
    for block in whole:
        table = history.reopen(block)
        try:
            plan = policy.plan(table, history.signals(chunk))
            history.apply(replace(plan, drops=()))
            write(block, table)
            history.commit(block)
        except BaseException:
            history.abandon(block)
            raise
    return len(whole)
