"""What a chunk was shown of the past, block by block and form by form: a row of the page's eviction strip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..plan import COMPRESSED, FULL, Choose, Entry

if TYPE_CHECKING:
    from ..history import History
    from ..plan import Block
    from ..session import Session

_MOST = 512  # blocks of a row; of more, the oldest few and the newest are told
_OLDEST = 16


class StripBlock(NamedTuple):
    """A block that the history holds. Tokens of a block that the chunk saw in some layers only are averaged over them,
    rounded up."""

    frame: int  # first latent frame
    span: int  # latent frames; 0: text
    tokens: int  # when written, in full
    full: int  # held now, as they were written
    compressed: int  # held now, of the compressed form
    seen_full: int  # shown to the chunk
    seen_compressed: int


class Sight:
    """Notes what a session's history shows each chunk, as its K/V are written: by then open choices are made."""

    def __init__(self, session: Session) -> None:
        self._history: History = session.history
        self._seen: dict[tuple[int, str], int] = {}
        self._writing = -1  # the block that is being written: the chunk itself
        session.history.probe = self._note

    def row(self) -> list[StripBlock]:
        """What is held after the last chunk, and what of it the chunk saw; itself included, as seen by itself."""
        blocks = [block for block in self._history.table().blocks if block.forms]
        if len(blocks) > _MOST:
            blocks = blocks[:_OLDEST] + blocks[_OLDEST - _MOST :]
        return [self._told(block) for block in blocks]

    def _told(self, block: Block) -> StripBlock:
        held = {form: block.forms[form].count if form in block.forms else 0 for form in (FULL, COMPRESSED)}
        tokens = max((form.tokens for name, form in block.forms.items() if name == FULL), default=0)
        seen = {form: self._seen.get((block.id, form), 0) for form in held}
        if block.id == self._writing or (block.role == "fused" and not any(seen.values())):
            seen[FULL] = held[FULL]  # the chunk sees itself; and what it has just fused
        return StripBlock(block.frame, block.span, tokens, held[FULL], held[COMPRESSED], seen[FULL], seen[COMPRESSED])

    def _note(self, stream: str, block: int, write: bool, layers: Any) -> None:
        if not write or stream != self._history.streams[0]:
            return
        view, counts = self._history.views[stream], {b.id: b for b in self._history.blocks}
        seen: dict[tuple[int, str], float] = {}
        choices = iter(view.choices)
        for entry in view.plan.entries if view.plan is not None else ():
            if isinstance(entry, Entry):
                owned = counts[entry.block].forms[entry.form].count
                seen[(entry.block, entry.form)] = owned if entry.tokens is None else len(entry.tokens)
            elif isinstance(entry, Choose):
                picked = [set(places.flatten().tolist()) for places, *_ in next(choices).picked.values()]
                for place, candidate in enumerate(entry.candidates):
                    if layers_seeing := sum(place in chosen for chosen in picked):
                        owned = counts[candidate].forms[entry.form].count
                        seen[(candidate, entry.form)] = owned * layers_seeing / len(picked)
            else:
                seen |= {(b, FULL): counts[b].forms[FULL].count for b in entry.blocks if b in counts}
        self._seen, self._writing = {key: -int(-count // 1) for key, count in seen.items()}, block
