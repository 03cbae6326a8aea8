"""Lumos-1 as a host: prompts become the first block of the history, frames are one pass over their ids each.

No pass needs a mask. The prompt is causal and comes first; a frame sees everything held and all of itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...attention import attend
from ...errors import LongtakeError
from ...geometry import Geometry
from ...history import LayerView
from ...history.view import Positions
from ...rope import RotaryTable, mm_rope_table
from ..base import Decoder, Host, HostConfig, TextState
from . import sequence
from .model import LumosForVideoGeneration
from .sequence import LumosGeometry, Vocabulary
from .tokenizer import VideoTokenizer

TEXT_TOKENIZER = ("Alpha-VLLM/Lumina-mGPT-7B-768", "9624463a82ea5ce814af9b561dcd08a31082c3af")  # Hub id, revision


class PromptLayer:
    """One layer while a prompt's K/V are computed: nothing before it, keys kept as they were before rotation."""

    def __init__(self, rotary: RotaryTable, phases: Tensor) -> None:
        self.rotary, self.phases = rotary, phases
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        self.k, self.v = k, v
        q, rotated = self.rotary.rotate(q, self.phases), self.rotary.rotate(k, self.phases)
        return attend(q, rotated, v, causal=causal)


class Lumos(Host):
    """A Lumos-1 transformer with its text tokenizer and its video tokenizer.

    `tokenizer` (text) may be None when prompts are given as ids; `codec` when neither frames nor a first image are
    wanted. Raises LongtakeError for a head size that MM-RoPE does not divide, and for a vocabulary without codes.
    """

    def __init__(
        self, model: LumosForVideoGeneration, config: HostConfig, *, tokenizer: Any = None,
        codec: VideoTokenizer | None = None, name: str = "lumos",
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = model.config
        self.name, self.config, self.model = name, config, model
        self.tokenizer, self.codec = tokenizer, codec
        self.words = Vocabulary.of(sizes.vocabulary)
        self.layers, self.kv_heads = sizes.num_hidden_layers, sizes.num_key_value_heads
        self.head_dim = sizes.head_dim
        self.rotary = mm_rope_table(sizes.head_dim, sizes.rope_theta)
        self.dtype, self.device = model.lm_head.weight.dtype, model.lm_head.weight.device
        self.codes = sizes.vocab_size - self.words.visual
        if self.codes < 1:
            raise LongtakeError(
                f"{name}: a vocabulary of {sizes.vocab_size} ids has no visual codes from {self.words.visual} on"
            )
        if codec is not None and codec.codes != self.codes:
            raise LongtakeError(f"{name} was trained on {self.codes} codes, the video tokenizer has {codec.codes}")

    def geometry(self, height: int | None = None, width: int | None = None) -> LumosGeometry:
        height = self.config.height if height is None else height
        width = self.config.width if width is None else width
        most = sequence.SIZE_UNIT * self.words.largest
        if max(height, width) > most:
            raise LongtakeError(f"size {width}x{height}: {self.name} has words for sides of up to {most} pixels")
        return LumosGeometry(height, width, 1, self.config.chunk_frames, self.config.fps, patch=(1, 1, 1))

    # --- the prompt -------------------------------------------------------------------------------------------------

    def encode_prompt(
        self, prompts: Sequence[str], geometry: Geometry | None = None, frames: int | None = None
    ) -> Tensor:
        """Ids [B, T] of prompts, for a take of `frames` latent frames (None: as long as a training clip); an empty
        prompt is the header alone. Raises LongtakeError for prompts of unequal length: positions count tokens."""
        geometry = geometry or self.geometry()
        seconds, fps = sequence.length(geometry, frames or self.config.training_frames, self.words)
        end = sequence.header(seconds, fps, self.words)
        rows = [[*self._text(prompt, geometry, seconds, fps), *end] if prompt else end for prompt in prompts]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise LongtakeError(
                f"prompts of {lengths[0]} and {lengths[-1]} tokens cannot run in lockstep: {self.name} counts "
                "positions from the prompt; give one prompt repeatedly, or run them one after another"
            )
        return torch.tensor(rows)

    def encode_for(self, prompts: Sequence[str], geometry: Geometry, frames: int | None) -> Tensor:
        return self.encode_prompt(prompts, geometry, frames)

    def unconditional(self, embeds: Tensor) -> Tensor:
        """The header [1, 3] that ends these ids: what is left of a prompt without its text."""
        return embeds[:1, embeds.shape[1] - sequence.HEADER :]

    def check_embeds(self, embeds: Any, name: str) -> None:
        given = f"{tuple(embeds.shape)} of {embeds.dtype}" if isinstance(embeds, Tensor) else type(embeds).__name__
        if not isinstance(embeds, Tensor) or embeds.dim() != 2 or embeds.is_floating_point() or 0 in embeds.shape:
            raise LongtakeError(f"{name}_embeds {given}: {self.name} takes whole-number ids [B, tokens]")
        at = embeds.shape[1] - sequence.HEADER
        if at < 0 or (embeds[:, at] != self.words.video_begin).any():
            raise LongtakeError(
                f"{name}_embeds do not end in a video header ({self.words.video_begin}, seconds, fps): make them with "
                "encode_prompt"
            )

    @torch.no_grad()
    def text_state(self, embeds: Tensor) -> TextState:
        """Ids [B, T] and, per layer, their K/V before rotation; [1, T, H, D] where all rows are alike."""
        ids = embeds.to(self.device)
        if bool((ids == ids[:1]).all()):
            ids = ids[:1]
        phases = self.rotary.phases(sequence.text_positions(ids.shape[1])[0].to(self.device))
        layers = [PromptLayer(self.rotary, phases) for _ in range(self.layers)]
        self.model(ids, layers, causal=True)
        return TextState(embeds, [x.k for x in layers if x.k is not None], [x.v for x in layers if x.v is not None])

    def prefix(self, text: TextState) -> Positions:
        base, step = sequence.text_positions(text.embeds.shape[1])
        return base + text.start, step

    # --- frames -----------------------------------------------------------------------------------------------------

    def positions(self, geometry: Geometry, frame: int, span: int) -> Positions:
        """Of a take whose prompt is empty; see `stream_positions`."""
        return self._positions(geometry, sequence.HEADER, frame)

    def stream_positions(
        self, geometry: Geometry, frame: int, span: int, texts: Mapping[str, TextState]
    ) -> dict[str, Positions]:
        ends = {name: text.start + text.embeds.shape[1] for name, text in texts.items()}
        return {name: self._positions(geometry, end, frame) for name, end in ends.items()}

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView]) -> Tensor:
        """Content grids [B, 1, 1, rows, columns] → hidden states [B, rows · columns, C] of their tokens."""
        (rows, columns), (_, height, width) = latents.shape[3:], LumosGeometry.stride
        geometry = self.geometry(rows * height, (columns - 1) * width)
        ids = sequence.frame_ids(latents.to(self.device), geometry, self.words)
        return self.model(ids, layers)[:, sequence.OPENING : -1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., C] → scores [..., codes] of the visual codes alone."""
        return self.model.logits(hidden.to(self.dtype), slice(self.words.visual, None))

    # --- pixels -----------------------------------------------------------------------------------------------------

    def decoder(self) -> Decoder:
        return self._codec().decoder()

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        if not video.is_floating_point() or not video.isfinite().all():  # codes would hide both
            found = "NaN or infinity" if video.is_floating_point() else str(video.dtype)
            raise LongtakeError(f"frames {tuple(video.shape)} of {found}: give finite floats in [-1, 1]")
        return self._codec().encode(video).to(self.device)

    @property
    def network(self) -> Any:
        return self.model

    def memory(self) -> dict[str, int]:
        parts = {"transformer": sum(p.nbytes for p in self.model.parameters())}
        return parts if self.codec is None else {**parts, "tokenizer": self.codec.memory()}

    # --- within -----------------------------------------------------------------------------------------------------

    def _positions(self, geometry: Geometry, prefix: int, frame: int) -> Positions:
        assert isinstance(geometry, LumosGeometry)
        return sequence.frame_positions(geometry, prefix, frame)

    def _codec(self) -> VideoTokenizer:
        if self.codec is None:
            raise LongtakeError(
                f"{self.name} was loaded without a video tokenizer: give the folder of Cosmos-Tokenizer-DV4x8x8 as "
                "tokenizer= (--tokenizer), or ask for codes only (decode=False)"
            )
        return self.codec

    def _text(self, prompt: str, geometry: Geometry, seconds: int, fps: int) -> list[int]:
        """Ids of BOS, the template around a caption, and the separator."""
        if self.tokenizer is None:
            raise LongtakeError(
                f"{self.name} has no text tokenizer: put {TEXT_TOKENIZER[0]}'s tokenizer.json into the model folder, "
                "or pass ids as prompt_embeds"
            )
        whole = self.model.config.prompt_template.format(
            width=geometry.width, height=geometry.height, frames=seconds * fps, fps=fps, prompt=prompt
        )
        ids = self.tokenizer(whole, add_special_tokens=False).input_ids[: self.config.text_tokens]
        if strange := [i for i in ids if i >= self.words.visual or i in self.words]:
            raise LongtakeError(f"the prompt contains a special token (id {strange[0]}): leave it out")
        return [self.words.bos, *ids, self.words.separator]
