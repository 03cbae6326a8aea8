"""Which tokens of a frame go first: orders whose every beginning is a good sample of the frame.

Keeping the first n of one fixed order makes the kept sets nested as n falls, whatever the counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = ("bayer", "ardf", "stride", "random")


def ranks(order: str, tokens: int, grid: tuple[int, int], *, seed: int = 0, mask_ratio: float = 0.7) -> Tensor:
    """Rank [tokens] int64 of every content token of a frame, 0 is kept longest. `grid`: rows and columns of the tokens;
    a frame that is no such grid counts as one row."""
    if order == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(tokens, generator=generator)
    if order == "stride":
        return _places(_bits_reversed(tokens))
    key = bayer(*(grid if grid[0] * grid[1] == tokens else (1, tokens)))
    if order == "ardf":  # what the write pass of masked decoding leaves visible, then what it masks
        masked = torch.zeros(tokens, dtype=torch.int64)
        n = max(1, round(mask_ratio * tokens))
        masked[[round(j * tokens / n) for j in range(n)]] = 1
        key = key + 64 * masked
    return _places(key)


def bayer(rows: int, columns: int) -> Tensor:
    """Threshold [rows · columns] of every cell in the 8×8 dither matrix, 0 … 63: the lowest half of them is a
    checkerboard, the lowest quarter every other row and column."""
    m = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(3):
        m = torch.cat((torch.cat((4 * m, 4 * m + 2), 1), torch.cat((4 * m + 3, 4 * m + 1), 1)))
    return m[torch.arange(rows)[:, None] % 8, torch.arange(columns) % 8].flatten()


def _bits_reversed(tokens: int) -> Tensor:
    """Token numbers with their bits in reverse: a stride halved again and again, for counts that do not divide."""
    index, key = torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64)
    for _ in range(max(1, (tokens - 1).bit_length())):
        key, index = 2 * key + index % 2, index // 2
    return key


def _places(key: Tensor) -> Tensor:
    """Ranks of keys, equal ones in order of their number."""
    ranks = torch.empty_like(key)
    ranks[key.argsort(stable=True)] = torch.arange(len(key))
    return ranks
