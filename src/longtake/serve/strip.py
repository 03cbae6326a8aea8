"""What a chunk was shown of the past, block by block and form by form: a row of the page's eviction strip."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ..history.sight import BlockSight
from ..history.sight import Sight as _Sight
from ..plan import COMPRESSED, FULL

if TYPE_CHECKING:
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
    """Notes what a session's history shows each chunk."""

    def __init__(self, session: Session) -> None:
        self._history = session.history
        self._sight = _Sight(session.history)

    def row(self) -> list[StripBlock]:
        """What is held after the last chunk, and what of it the chunk saw; itself included, as seen by itself."""
        blocks = [block for block in self._history.table().blocks if block.forms]
        if len(blocks) > _MOST:
            blocks = blocks[:_OLDEST] + blocks[_OLDEST - _MOST :]
        past = {sight.block.id: sight for sight in self._sight.past()}
        return [self._told(block, past.get(block.id, BlockSight(block))) for block in blocks]

    def _told(self, block: Block, sight: BlockSight) -> StripBlock:
        held = {form: block.forms[form].count if form in block.forms else 0 for form in (FULL, COMPRESSED)}
        tokens = max((form.tokens for name, form in block.forms.items() if name == FULL), default=0)
        seen = {form: math.ceil(round(sight.tokens(form), 6)) for form in held}
        if block.id == self._sight.own or (block.role == "fused" and not any(seen.values())):
            seen[FULL] = held[FULL]  # the chunk sees itself; and what it has just fused
        return StripBlock(block.frame, block.span, tokens, held[FULL], held[COMPRESSED], seen[FULL], seen[COMPRESSED])
