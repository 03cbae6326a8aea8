"""diffusers' own autoregressive pipelines, run as they are on random weights, to be measured against.

AnyFlow-FAR keeps K/V of the past, the older part at a quarter of the tokens, and writes them anew from the latents of
the whole past after every chunk; its attention goes through `flex_attention`, which without compilation makes all
logits at once, so it is measured through SDPA, too. Asynchronous SkyReels-V2 keeps no K/V: every forward is of all
blocks in flight or finished, under a mask.

Raises LongtakeError, naming the class, where the installed diffusers lacks one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import LongtakeError
from ..hosts.base import HostConfig
from ..hosts.skyreels import SkyReels
from .bench_shapes import Shape
from .machine import Clock
from .random_weights import drawn

PATCH = 2  # both networks' patches, rows and columns
COMPRESSED_PATCH = 4  # AnyFlow-FAR's of the older past


@dataclass
class Account:
    """What a pipeline did, by chunk or as a whole: seconds, most keys seen by a denoising forward, FLOPs."""

    seconds: list[float]
    attended: list[int]
    flops: list[int]


def available(name: str) -> Any:
    """A class of diffusers. Raises LongtakeError if this version has none of that name."""
    import diffusers

    if not hasattr(diffusers, name):
        raise LongtakeError(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


# --- AnyFlow-FAR ------------------------------------------------------------------------------------------------------


class AnyFlow:
    """`AnyFlowFARPipeline` at a shape's sizes: `take()` is one whole video of `chunks` chunks, timed chunk by chunk."""

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int, chunks: int, sdpa: bool = False
    ) -> None:
        transformer, pipeline = available("AnyFlowFARTransformer3DModel"), available("AnyFlowFARPipeline")
        scheduler = available("FlowMapEulerDiscreteScheduler")
        self.shape, self.chunks, self.seed, self.clock = shape, chunks, seed, Clock(device)
        self.device, self.dtype = device, dtype
        make = lambda: transformer(
            num_attention_heads=shape.heads, attention_head_dim=shape.head_dim, in_channels=shape.channels,
            out_channels=shape.channels, text_dim=shape.text_dim, freq_dim=shape.freq_dim, ffn_dim=shape.ffn_dim,
            num_layers=shape.layers, chunk_partition=(shape.chunk_frames,) * chunks,
        )  # fmt: skip
        self.model = drawn(make, device, dtype, seed)
        if sdpa:
            _through_sdpa(self.model)
        self.full_chunks: int = self.model.config.full_chunk_limit
        finished: list[float] = []
        self.finished, clock = finished, self.clock

        class Timed(pipeline):  # type: ignore[misc, valid-type]
            """The pipeline, noting when each chunk is finished: its K/V are written."""

            def encode_kv_cache(self, *args: Any, **options: Any) -> Any:
                written = super().encode_kv_cache(*args, **options)
                finished.append(clock.now())
                return written

        self.pipe = Timed(None, None, self.model, None, scheduler())
        self.pipe.set_progress_bar_config(disable=True)

    def video(self) -> Tensor:
        """Latents [1, C, f, h, w] of a whole video."""
        generator = torch.Generator().manual_seed(self.seed)
        embeds = torch.randn(1, self.shape.text_tokens, self.shape.text_dim, generator=generator).to(self.device)
        return self.pipe(
            prompt_embeds=embeds.to(self.dtype), height=self.shape.height, width=self.shape.width,
            num_frames=4 * (self.chunks * self.shape.chunk_frames - 1) + 1, guidance_scale=1.0,
            num_inference_steps=len(self.shape.timesteps), generator=generator, output_type="latent",
        ).frames  # fmt: skip

    def take(self) -> Account:
        """A video, timed. The last chunk, which nothing looks back at, is left out: its K/V are not written."""
        self.finished.clear()
        marks = [self.clock.now()]
        self.video()
        marks += self.finished
        seconds = [b - a for a, b in pairwise(marks)]
        flops, attended = zip(*(self.cost(i) for i in range(len(seconds))), strict=True)
        return Account(seconds, list(attended), list(flops))

    def cost(self, index: int) -> tuple[int, int]:
        """FLOPs of chunk `index` (from 0), and keys its denoising forwards see."""
        own = self.shape.chunk_tokens
        coarse = own * PATCH**2 // COMPRESSED_PATCH**2
        cost, text = self.shape.flops, self.shape.text_tokens
        past = lambda whole: min(index, whole) * own + max(0, index - whole) * coarse
        keys = past(self.full_chunks - 1) + own
        step = cost.forward(own, keys, text) + cost.text(text)
        whole = self.full_chunks - 1  # the pass that writes: all chunks so far, the newest among them
        tokens = min(index + 1, whole) * own + max(0, index + 1 - whole) * coarse
        write = cost.forward(tokens, tokens, text) + cost.text(text)
        return (step * len(self.shape.timesteps) + write).total, keys

    @property
    def nbytes(self) -> int:
        """Of K/V, as the pipeline allocates them at its beginning."""
        own, coarse = self.shape.chunk_tokens, self.shape.chunk_tokens * PATCH**2 // COMPRESSED_PATCH**2
        tokens = self.full_chunks * own + max(0, self.chunks - self.full_chunks + 1) * coarse
        itemsize = torch.empty((), dtype=self.dtype).itemsize
        return 2 * self.shape.layers * self.shape.heads * self.shape.head_dim * itemsize * tokens


def _through_sdpa(model: Any) -> None:
    """The same attention through torch's SDPA: its masks made dense, once for all layers of a pass."""
    from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalAttnProcessor
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    held: list[tuple[BlockMask, Tensor]] = []

    class ThroughSDPA(AnyFlowCausalAttnProcessor):
        _attention_backend = "native"
        _SUPPORTED_BACKENDS = ("native",)

        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            mask = options.get("attention_mask")
            if isinstance(mask, BlockMask):
                if not held or held[0][0] is not mask:
                    size = mask.seq_lengths
                    held[:] = [(mask, create_mask(mask.mask_mod, None, None, *size, device=hidden_states.device))]
                options["attention_mask"] = held[0][1]
            return super().__call__(attn, hidden_states, *args, **options)

    for block in model.blocks:
        block.attn1.set_processor(ThroughSDPA())


# --- asynchronous SkyReels-V2 -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Staggering:
    """How both sides run: chunks of a video, steps of each, and by how many a chunk is behind the one before it."""

    chunks: int
    chunk_frames: int
    steps: int
    lag: int


class AsyncSkyReels:
    """`SkyReelsV2DiffusionForcingPipeline` with `ar_step`, and a host on the same weights for our side."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int, how: Staggering) -> None:
        transformer = available("SkyReelsV2Transformer3DModel")
        pipeline = available("SkyReelsV2DiffusionForcingPipeline")
        scheduler = available("UniPCMultistepScheduler")
        self.shape, self.how, self.clock, self.seed = shape, how, Clock(device), seed
        make = lambda: transformer(
            num_attention_heads=shape.heads, attention_head_dim=shape.head_dim, in_channels=shape.channels,
            out_channels=shape.channels, text_dim=shape.text_dim, freq_dim=shape.freq_dim, ffn_dim=shape.ffn_dim,
            num_layers=shape.layers,
        )  # fmt: skip
        model = drawn(make, device, dtype, seed)
        flow = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
        self.pipe = pipeline(None, None, model, None, flow)
        self.pipe.set_progress_bar_config(disable=True)
        config = HostConfig(
            host="skyreels", causal=True, chunk_frames=how.chunk_frames, shift=8.0, guidance_scale=1.0, fps=24,
            sampler="staggered", steps=how.steps, lag=how.lag, training_frames=how.chunks * how.chunk_frames,
            text_tokens=shape.text_tokens, height=shape.height, width=shape.width, commit="adopt",
        )  # fmt: skip
        self.host = SkyReels(drawn(make, device, dtype, seed), config, name=shape.name)  # weights of its own, the same
        self.embeds = torch.randn(
            1, shape.text_tokens, shape.text_dim, generator=torch.Generator().manual_seed(seed)
        ).to(device, dtype)

    def take(self) -> Account:
        """The whole video, timed as one."""
        cost, text = self.shape.flops, self.shape.text_tokens
        forwards: list[int] = []  # tokens of each

        def look(module: Any, args: Any, options: Any) -> None:
            _, _, frames, height, width = options["hidden_states"].shape
            forwards.append(frames * (height // PATCH) * (width // PATCH))

        frames = 4 * (self.how.chunks * self.how.chunk_frames - 1) + 1
        hook = self.pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
        try:
            seconds = self.clock.seconds(lambda: self.pipe(
                prompt=None, prompt_embeds=self.embeds, height=self.shape.height, width=self.shape.width,
                num_frames=frames, base_num_frames=frames, num_inference_steps=self.how.steps, guidance_scale=1.0,
                ar_step=self.how.lag, causal_block_size=self.how.chunk_frames, output_type="latent",
                generator=torch.Generator().manual_seed(self.seed),
            ))  # fmt: skip
        finally:
            hook.remove()
        flops = sum((cost.forward(n, n, text) + cost.text(text)).total for n in forwards)
        return Account([seconds], [max(forwards)], [flops])
