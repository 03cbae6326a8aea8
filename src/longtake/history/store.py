"""The rows of one stream: preallocated K/V of every token the history holds, in all layers.

A row is one token. Keys lie un-rotated, as they were computed or quantised, with the position they were written at, so
that any later position costs one rotation and one rounding (re-rotating bf16 keys in place reaches 3 % error after a
hundred shifts).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import PlanError
from .memory import Memory
from .quantised import Quantised


@dataclass
class Rows:
    """Where one form of one block lies in the store, and which of its tokens are still there."""

    rows: Tensor  # [n] int64 on the CPU, parallel to `tokens`
    tokens: Tensor  # [n] int64 on the CPU, original numbering, ascending
    head_base: Tensor | None = None  # fused: positions per layer and head [L, B, n, H, axes], fp32
    head_step: Tensor | None = None  # fused: the same for the step of a shift
    key_sum: Tensor | None = None  # [L, B, H, D] fp32, of keys rotated in place, if a policy asked for it


class Sums:
    """Key sums of blocks [L, B, H, D] fp32: `size` allocated at once and handed out; more only if that was too few."""

    def __init__(self, size: int, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.free = list(torch.zeros((size, *shape), device=device).unbind(0))
        self.nbytes = sum(t.nbytes for t in self.free)

    def take(self) -> Tensor:
        if self.free:
            return self.free.pop()
        new = torch.zeros(self.shape, device=self.device)
        self.nbytes += new.nbytes
        return new

    def give(self, total: Tensor) -> None:
        self.free.append(total)


class Store(Memory):
    """K/V rows of one stream, and per row `base`, `step` [R, axes] in fp64.

    `position = base + shift · step`; both are the host's.
    """

    def __init__(
        self, layers: int, batch: int, rows: int, kv_heads: int, head_dim: int, axes: int,
        dtype: torch.dtype, device: torch.device, pinned: bool = False,
        sums: Sums | None = None, form: Quantised | None = None, kernels: bool = False,
    ) -> None:  # fmt: skip
        size = (layers, batch, rows, kv_heads, head_dim)
        super().__init__(size, dtype, device, pinned=pinned, form=form, kernels=kernels)
        self.base = torch.zeros(rows, axes, dtype=torch.float64, device=device)
        self.step = torch.zeros(rows, axes, dtype=torch.float64, device=device)
        self.used = torch.zeros(rows, dtype=torch.bool)
        self.held: dict[tuple[int, str], Rows] = {}
        self.sums = sums or Sums(0, (layers, batch, kv_heads, head_dim), device)

    @property
    def size(self) -> int:
        return self.used.shape[0]

    @property
    def nbytes(self) -> int:
        """Of the rows; key sums, which may be shared with another store, are counted apart."""
        tensors = [*self.kept, self.base, self.step]
        for rows in self.held.values():
            tensors += [t for t in (rows.head_base, rows.head_step) if t is not None]
        return sum(t.nbytes for t in tensors)

    def take(self, key: tuple[int, str], base: Tensor, step: Tensor) -> Rows:
        """Rows for a new form of a block whose tokens stand at `base`, `step` [n, axes]; the lowest free ones."""
        free = (~self.used).nonzero()[: len(base), 0].clone()  # a slice would keep the numbers of all free rows alive
        if len(free) < len(base):
            raise PlanError(
                f"{len(base)} tokens enter, {len(free)} of {self.size} rows are free: drop more in plan(), or let "
                "capacity() count all that is held, the chunk in flight included"
            )
        self.used[free] = True
        at = span(free)
        self.base[at] = base.to(self.base)
        self.step[at] = step.to(self.step)
        self.held[key] = Rows(free, torch.arange(len(free)))
        return self.held[key]

    def find(self, key: tuple[int, str]) -> Rows:
        """The rows of a form that a plan names. Raises PlanError if it is not held."""
        if key not in self.held:
            listed = ", ".join(f"{block} ({form})" for block, form in self.held) or "nothing"
            raise PlanError(f"the plan names block {key[0]} ({key[1]}), the history holds {listed}")
        return self.held[key]

    def send(self, key: tuple[int, str], other: Store) -> None:
        """Move a form of a block to another store, bit by bit; its rows here are free afterwards."""
        held = self.find(key)
        here = held.rows.to(self.base.device)
        there = other.take(key, self.base[here], self.step[here])
        there.tokens, there.key_sum, held.key_sum = held.tokens, held.key_sum, None
        to, at = span(there.rows), span(held.rows)
        for own, its in zip(self.kept, other.kept, strict=True):
            for layer in range(own.shape[0]):
                its[layer][:, to] = own[layer][:, at].to(its.device)
        self.drop(key)

    def drop(self, key: tuple[int, str], tokens: Tensor | None = None) -> None:
        """Give back the rows of a form, or those of some of its tokens."""
        rows = self.find(key)
        gone = torch.ones(len(rows.rows), dtype=torch.bool) if tokens is None else torch.isin(rows.tokens, tokens)
        self.used[rows.rows[gone]] = False
        if bool(gone.all()):
            if rows.key_sum is not None:
                self.sums.give(rows.key_sum)
            del self.held[key]
            return
        stay = ~gone
        rows.rows, rows.tokens = rows.rows[stay], rows.tokens[stay]
        for name in ("head_base", "head_step"):
            if (kept := getattr(rows, name)) is not None:
                setattr(rows, name, kept[:, :, stay.to(kept.device)].clone())

    def grow(self, rows: int) -> None:
        """Make room for `rows` rows in all (full history only: everything else is fixed before the first chunk)."""
        more = rows - self.size
        for name in self.names:
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], rows, *old.shape[3:])
            new[:, :, : self.size] = old
            setattr(self, name, new)
        for name in ("base", "step"):
            old = getattr(self, name)
            setattr(self, name, torch.cat((old, old.new_zeros(more, old.shape[1]))))
        self.used = torch.cat((self.used, self.used.new_zeros(more)))


def span(rows: Tensor) -> slice | Tensor:
    """A slice if the rows are consecutive (no gather needed), else the rows themselves."""
    if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((rows.diff() == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def stretches(rows: Tensor, at_least: int = 1) -> list[tuple[int, slice]]:
    """Consecutive stretches of `rows` as (offset in `rows`, slice of the store), the longest split until there are
    `at_least` of them."""
    if not len(rows):
        return []
    cuts = [0, *((rows.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(rows)]
    while len(cuts) <= min(at_least, len(rows)):
        longest = max(range(len(cuts) - 1), key=lambda i: cuts[i + 1] - cuts[i])
        cuts.insert(longest + 1, (cuts[longest] + cuts[longest + 1]) // 2)
    return [(a, slice(int(rows[a]), int(rows[a]) + b - a)) for a, b in pairwise(cuts)]
