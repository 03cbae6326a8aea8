"""Video tokenizers: pixels to codes and back, 4 × 8 × 8 pixels a code, the first frame by itself.

Lumos-1 was trained on the codes of Cosmos-0.1-Tokenizer-DV4x8x8, which is published as TorchScript. A TorchScript file
is a program: loading it runs what its author wrote. So it is loaded only if the user says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...digest import file_sha256
from ...errors import LongtakeError, first_line
from ..base import Decoder
from .fsq import FSQ

COSMOS_LEVELS = (8, 8, 8, 5, 5, 5)  # 64,000 codes
COSMOS_STRIDE = (4, 8, 8)
FILES = ("encoder.jit", "decoder.jit")
CONTEXT = 12  # latent frames decoded again before the new one, so that it sees its past
PROBE = (5, 64, 96)  # frames, height, width of the clip a tokenizer is checked with


class VideoTokenizer(Protocol):
    """Pixels ↔ codes, causal in time: a frame's codes depend on no later frame, and its pixels on no later codes."""

    codes: int  # how many there are
    stride: tuple[int, int, int]  # pixels per code: time, height, width

    def encode(self, video: Tensor) -> Tensor:
        """Float [B, 3, 1 + 4k, H, W] in [−1, 1] → int64 codes [B, 1, 1 + k, h, w]."""

    def decoder(self) -> Decoder:
        """A new streaming decoder: codes [B, 1, f, h, w] → uint8 frames [B, T, H, W, 3]."""

    def memory(self) -> int:
        """Bytes of weights."""


class CosmosTokenizer:
    """The TorchScript pair encoder.jit, decoder.jit in a folder.

    `allow` says that the user trusts the files; `sha256` holds their digests. Raises LongtakeError without that trust,
    for missing or unreadable files, and for any tokenizer but DV4x8x8.
    """

    codes = math.prod(COSMOS_LEVELS)
    stride = COSMOS_STRIDE

    def __init__(
        self, folder: Path | str, *, allow: bool = False, device: torch.device | str = "cpu", context: int = CONTEXT
    ) -> None:
        self.folder, self.device, self.context = Path(folder), torch.device(device), context
        if context < 1:
            raise LongtakeError(f"context of {context} latent frames: a frame is decoded after at least 1")
        paths = [self.folder / name for name in FILES]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise LongtakeError(
                f"{self.folder} has no {' and no '.join(missing)}: give the folder of Cosmos-Tokenizer-DV4x8x8"
            )
        self.sha256 = {path.name: file_sha256(path) for path in paths}
        if not allow:
            listed = ", ".join(f"{name} sha256 {digest}" for name, digest in self.sha256.items())
            raise LongtakeError(
                f"{self.folder} holds TorchScript, which runs code when it is loaded ({listed}): if you trust these "
                "files, say allow_torchscript=True (--allow-torchscript)"
            )
        try:
            self._encoder, self._decoder = (
                torch.jit.load(str(path), map_location=self.device).eval() for path in paths
            )
        except (RuntimeError, ValueError, OSError) as error:
            line = first_line(error)
            raise LongtakeError(f"{self.folder}: not loadable as TorchScript ({line})") from error
        # what the weights are: the published pair computes in bfloat16
        self.dtype = next((p.dtype for p in self._encoder.parameters()), torch.float32)
        self._check()

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        return self._encode(video)[0].long().unsqueeze(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """All at once: codes [B, 1, f, h, w] → float frames [B, 3, 1 + 4(f − 1), H, W]."""
        return self._decoder(codes[:, 0].to(self.device, torch.int32)).float().clamp(-1, 1)

    def decoder(self) -> WindowedDecoder:
        return WindowedDecoder(self)

    def memory(self) -> int:
        return sum(p.nbytes for part in (self._encoder, self._decoder) for p in part.parameters())

    def _encode(self, video: Tensor) -> tuple[Tensor, ...]:
        out = self._encoder(video.to(self.device, self.dtype))
        return tuple(out) if isinstance(out, tuple | list) else (out,)

    @torch.no_grad()
    def _check(self) -> None:
        """Whether a clip becomes codes as DV4x8x8 makes them, and a clip again."""
        frames, height, width = PROBE
        clip = torch.linspace(-1, 1, 3 * math.prod(PROBE)).view(1, 3, *PROBE)
        expected = (1, 1 + (frames - 1) // 4, height // 8, width // 8)
        try:
            indices, *rest = self._encode(clip)
            found = f"codes {tuple(indices.shape)} of {indices.dtype}"
            whole = not indices.is_floating_point() and tuple(indices.shape) == expected
            if whole:
                found = f"codes {int(indices.min())} to {int(indices.max())}"
                whole = int(indices.min()) >= 0 and int(indices.max()) < self.codes
            quantised = next((x for x in rest if x.dim() == 5 and x.shape[1] == len(COSMOS_LEVELS)), None)
            if whole and quantised is not None:
                found = "codes that are not the FSQ numbers of its own output"
                whole = torch.equal(FSQ(COSMOS_LEVELS).nearest(quantised.movedim(1, -1)), indices.long())
            if whole:
                pixels = self.decode(indices.long().unsqueeze(1))
                found, whole = f"frames {tuple(pixels.shape)}", tuple(pixels.shape) == (1, 3, *PROBE)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            found, whole = f"an error ({line})", False
        if not whole:
            raise LongtakeError(
                f"{self.folder} is not Cosmos-Tokenizer-DV4x8x8: a clip {tuple(clip.shape)} gives {found}; give the "
                "folder of nvidia/Cosmos-Tokenizer-DV4x8x8 (not DV8x8x8)"
            )


class WindowedDecoder:
    """Decodes one take piece by piece with a tokenizer that has no state to carry over: the last `context` latent
    frames are decoded again before each new one, and only the new frames are handed out.

    Equal to decoding all at once as long as the take has no more than `context` + 1 latent frames; beyond that the
    frames before the window are forgotten.
    """

    def __init__(self, tokenizer: CosmosTokenizer) -> None:
        self.tokenizer = tokenizer
        self.past: Tensor | None = None  # codes [B, 1, ≤ context, h, w]

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Codes [B, 1, f, h, w] → uint8 frames [B, T, H, W, 3]; the first latent frame gives 1, each later one 4."""
        frames = []
        for codes in latents.to(self.tokenizer.device).split(1, 2):
            window = codes if self.past is None else torch.cat((self.past, codes), 2)
            new = 1 if self.past is None else self.tokenizer.stride[0]
            each = [self.tokenizer.decode(take)[:, :, -new:] for take in window.split(1)]  # the pair takes one clip
            frames.append(to_uint8(torch.cat(each)))
            self.past = window[:, :, -self.tokenizer.context :].clone()
        return torch.cat(frames, 1)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return ({} if self.past is None else {"past": self.past}), {"version": 1}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if meta.get("version") != 1:
            raise LongtakeError(f"decoder snapshot has version {meta.get('version')!r}; this one continues 1 only")
        past = tensors.get("past")
        self.past = None if past is None else past.to(self.tokenizer.device)

    @property
    def nbytes(self) -> int:
        return 0 if self.past is None else self.past.nbytes


def to_uint8(pixels: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [−1, 1] → uint8 [B, T, H, W, 3], rounded to nearest."""
    pixels = pixels.permute(0, 2, 3, 4, 1).float().clamp(-1, 1)
    return pixels.mul(0.5).add(0.5).mul(255.0).round().to(torch.uint8).contiguous()
