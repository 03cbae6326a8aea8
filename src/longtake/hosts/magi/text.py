"""What a MAGI-1 chunk reads: the prompt behind its special tokens, or the learned null caption.

The special tokens are learned embeddings in a file of their own (`special_tokens.npz`): one says "high quality", eight
say how many chunks are still to come (none … seven or more), so the text differs from chunk to chunk. Every text
token's keys and values depend on it alone, so a prompt's are computed once and the special ones put before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import LongtakeError
from ..base import TextState
from .model import MagiTransformer3DModel

FILE = "special_tokens.npz"
ROWS = {"hq": 1, "static": 2, "dynamic": 3, "borderness": 4, "3d": 15, "anime": 16}  # in `other_tokens`
DURATION = 7  # first of the rows that say how many chunks follow
LONGEST = 7  # "seven or more"

KV = list[tuple[Tensor, Tensor]]  # per layer, K and V [1, T, Hk, D]


@dataclass
class MagiText(TextState):
    """A prompt's embeddings and cross-attention K/V [B, T, Hk, D] per layer, of which take i has `lengths[i]` tokens
    (rows of zeros at the end are padding, and not attended to)."""

    lengths: tuple[int, ...] = ()


class SpecialTokens:
    """The learned special tokens [n, channels], and which of them stand before a chunk's text."""

    def __init__(self, tokens: Tensor, names: Sequence[str]) -> None:
        unknown = [name for name in names if name != "duration" and name not in ROWS]
        if unknown:
            raise LongtakeError(f"special token {unknown[0]!r}: use duration, {', '.join(ROWS)}")
        if len(tokens) <= max(DURATION + LONGEST, *ROWS.values()):
            raise LongtakeError(f"{FILE} has {len(tokens)} tokens, MAGI-1 has 100: take the file of its repository")
        self.tokens, self.names = tokens, tuple(names)

    @classmethod
    def read(cls, path: Path, names: Sequence[str]) -> SpecialTokens:
        """Raises LongtakeError for a file that is missing or is not MAGI-1's."""
        try:
            with np.load(path) as stored:
                rows = stored["other_tokens"].astype(np.float16)  # half precision is what the model was trained with
        except (OSError, KeyError, ValueError) as error:
            raise LongtakeError(
                f"{path} cannot be read ({error}): take {FILE} from example/assets of the MAGI-1 repository, or put "
                '"special_tokens": [] into "magi" of longtake.json to go without'
            ) from error
        return cls(torch.from_numpy(rows).float(), names)

    def rows(self, remaining: int | None) -> list[int]:
        """Numbers of the tokens before the text of a chunk after which `remaining` chunks follow (None: no end known).
        Each name's token is put before those of the names before it."""
        last = LONGEST if remaining is None else min(remaining, LONGEST)
        return [DURATION + last if name == "duration" else ROWS[name] for name in reversed(self.names)]


class Texts:
    """Cross-attention K/V of every text a model reads.

    special: None where a model is run without special tokens. null_tokens: how much of the null caption is read.
    """

    def __init__(self, model: MagiTransformer3DModel, special: SpecialTokens | None, null_tokens: int) -> None:
        self.model, self.special, self.null_tokens = model, special, null_tokens
        self.limit = model.config.caption_max_length
        self._special: KV | None = None
        self._null: KV | None = None

    @torch.no_grad()
    def prompt(self, embeds: Tensor) -> MagiText:
        """Embeddings [B, T, channels], zero-padded, to what a session keeps of a prompt."""
        embeds = embeds[:, : self.limit].to(self.model.y_embedder.null_caption_embedding, copy=True).contiguous()
        kv = self.model.text_kv(embeds)
        return MagiText(embeds, [k for k, _ in kv], [v for _, v in kv], lengths=lengths_of(embeds))

    def of_chunk(self, text: MagiText, remaining: int | None) -> list[list[tuple[Tensor, Tensor]]]:
        """Per layer, K and V of every take: the special tokens of a chunk with `remaining` chunks to follow, then the
        prompt, cut at the model's longest text."""
        before = None if self.special is None else self._special_kv(self.special.rows(remaining))
        per_layer = []
        for layer, (k, v) in enumerate(zip(text.k, text.v, strict=True)):
            takes = []
            for take, length in enumerate(text.lengths):
                own_k, own_v = (t[take : take + 1, :length] for t in (k, v))
                if before is not None:
                    own_k, own_v = (
                        torch.cat(pair, 1)[:, : self.limit] for pair in zip(before[layer], (own_k, own_v), strict=True)
                    )
                takes.append((own_k, own_v))
            per_layer.append(takes)
        return per_layer

    def null(self) -> list[list[tuple[Tensor, Tensor]]]:
        """The null caption's, shared by all takes."""
        if self._null is None:
            with torch.no_grad():
                self._null = self.model.text_kv(self.model.y_embedder.null_caption_embedding[None, : self.null_tokens])
        return [[pair] for pair in self._null]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for kv in (self._special or [], self._null or []) for pair in kv for t in pair)

    def _special_kv(self, rows: list[int]) -> KV:
        assert self.special is not None
        if self._special is None:
            with torch.no_grad():
                self._special = self.model.text_kv(self.special.tokens.to(self.model.rope.bands.device)[None])
        return [(k[:, rows], v[:, rows]) for k, v in self._special]


def lengths_of(embeds: Tensor) -> tuple[int, ...]:
    """Text tokens of every take: up to the last row of `embeds` [B, T, d] that is not all zero."""
    real = embeds.ne(0).any(-1)
    last = real.flip(1).int().argmax(1)  # zero rows at the end
    return tuple((real.shape[1] - last).where(real.any(1), 0).tolist())
