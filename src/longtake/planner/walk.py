"""A policy's take without a model: the table of blocks from chunk to chunk, and the tokens it shows and holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import LongtakeError
from ..plan import COMPRESSED, FULL, Block, BlockTable, Choose, Drop, Entry, Form, Signals, TokenSet, difference
from ..policies import FullHistory, KVPolicy


@dataclass(frozen=True)
class Layout:
    """What a host says of the tokens of its frames. `text` tokens stand before the first one."""

    tokens_per_frame: int
    grid: tuple[int, int]
    structural: Sequence[int] = ()  # of one frame
    text: int = 0
    compressed: int = 0  # tokens of a chunk's compressed form


@dataclass(frozen=True)
class Step:
    """One chunk: tokens of history in its view, and tokens held while it is made, its own apart."""

    frame: int
    span: int
    seen: int
    held: int


def walk(policy: KVPolicy, layout: Layout, spans: Sequence[int], given: int = 0) -> Iterator[Step]:
    """The chunks of `spans` latent frames under `policy`, after `given` conditioning frames that are anchors.

    Raises LongtakeError for a policy whose plans depend on more than block metadata.
    """
    if type(policy) is FullHistory:  # the same in closed form: tables of a long take grow with its square
        frames = given
        for span in spans:
            past = layout.text + frames * layout.tokens_per_frame
            yield Step(frames, span, past, past)
            frames += span
        return
    blocks: list[Block] = []
    if layout.text:
        blocks.append(Block(0, "anchor", 0, 0, {FULL: Form(layout.text)}))
    frame = 0
    for number, span in enumerate([*([given] if given else []), *spans], start=1):
        live = _block(layout, number, frame, span, "anchor" if given and number == 1 else "committed")
        plan = policy.plan(BlockTable(tuple(blocks), (live,), frame), Signals(chunk=number - 1))
        if plan.score is not None:
            raise _open(policy)
        for drop in plan.drops:
            drop_tokens(blocks, drop)
        if COMPRESSED in plan.forms:
            live = replace(live, forms={**live.forms, COMPRESSED: Form(layout.compressed)})
        if not (given and number == 1):
            held = sum(form.count for b in blocks for form in b.forms.values())
            yield Step(frame, span, seen_tokens(policy, plan.entries, blocks), held)
        blocks.append(live)
        frame += span


def _block(layout: Layout, number: int, frame: int, span: int, role: str) -> Block:
    n = layout.tokens_per_frame
    structural: TokenSet = range(0)
    if len(layout.structural):
        first = torch.as_tensor(list(layout.structural))
        structural = torch.cat([first + n * i for i in range(span)])
    return Block(number, role, frame, span, {FULL: Form(n * span)}, layout.grid, structural=structural)


def drop_tokens(blocks: list[Block], drop: Drop) -> None:
    """Take what a plan drops out of a list of blocks."""
    at = next(i for i, b in enumerate(blocks) if b.id == drop.block)
    forms = dict(blocks[at].forms)
    form = forms.pop(drop.form)
    if drop.tokens is not None and len(kept := difference(form.owned, drop.tokens)):
        forms[drop.form] = replace(form, kept=kept)
    if forms:
        blocks[at] = replace(blocks[at], forms=forms)
    else:
        del blocks[at]


def seen_tokens(policy: KVPolicy, entries: Iterable[object], blocks: list[Block]) -> int:
    """Tokens that the entries of a plan show. Raises LongtakeError for one that only a model can resolve."""
    forms = {b.id: b.forms for b in blocks}
    seen = 0
    for entry in entries:
        if isinstance(entry, Entry):
            seen += forms[entry.block][entry.form].count if entry.tokens is None else len(entry.tokens)
        elif isinstance(entry, Choose):
            seen += entry.k * forms[entry.candidates[0]][entry.form].count
        else:
            raise _open(policy)
    return seen


def _open(policy: KVPolicy) -> LongtakeError:
    return LongtakeError(
        f"policy {policy.name}: its plans depend on a model's own queries, which arithmetic cannot tell"
    )
