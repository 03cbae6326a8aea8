"""A session: one take (or several in lockstep), its prompts, its decoder and its end. How chunks come about is the
rollout's (samplers/): chunk after chunk, or several in flight."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .chunk import Chunk, ChunkStats, Clock, SessionStats
from .compressors import Compressor
from .errors import LongtakeError
from .geometry import Geometry
from .history import History, storage_form
from .hosts.base import Decoder, Host, TextState
from .hosts.loading import load
from .plan import HistoryShape
from .policies import FullHistory, KVPolicy, KVRange, SlidingWindow
from .replay import CudaGraphs, Replay, check_graphs
from .reuse import Decision, NoReuse, ReusePolicy, ReuseRun
from .samplers import Sampler, default_sampler, runner_of
from .samplers.chunked import Schedule
from .samplers.one_by_one import OneByOne
from .samplers.stagger import Stagger
from .samplers.staggered import Staggered
from .switching import CUT_FRAMES, check_switch


class Session:
    """An endless iterator of chunks.

    Args:
        model: a host (`longtake.load`), anything `longtake.load` takes, or a diffusers pipeline object.
        policy: KV policy; default: the window the model was made for.
        reuse: reuse policy; default: every forward is computed.
        prompt: a string, or a list of strings for takes in lockstep.
        prompt_embeds / negative_prompt_embeds: [B, T, d] instead of prompts (ids [B, T] for Lumos-1), or a `TextState`
            that several takes of one prompt share.
        negative_prompt: for guidance; default empty.
        compressor: what makes the compressed form of chunks, for policies that ask for it; default the model's own.
        image: first frame, float [3, H, W] or [B, 3, H, W] in [−1, 1]; it becomes latent frame 0.
        seed: one number (takes in lockstep get seed, seed + 1, …) or one per take; or `generator`, as in diffusers.
        height, width: pixels; default the model's.
        num_inference_steps: default the model's own list of timesteps.
        sampler: e.g. `MaskedSampler(compat="upstream")` or `Stagger(steps=50, lag=5)`; default the model's own.
        guidance_scale: 1 is no guidance and one stream.
        chunks: an upper limit if it is known; the take then ends by itself, and full history is allocated at once.
        num_frames: the same in pixel frames, a given image included; a staggered take may end in a shorter chunk.
        residency: where the view lives: "resident", "scratch" or "alias" (see `History`).
        history_dtype: "int8" or "fp8" keeps the past quantised, each token of each head under a scale of its own; what
            is in view is of the model's dtype. None keeps it as it was computed.
        kernels: "triton" builds the view with Triton kernels, and with a quantised past and a "scratch" view lets
            attention read the codes; None is PyTorch alone.
        cuda_graphs: record the forwards of a chunk's steps once the window is full, and replay them: for causal Wan
            models on CUDA.
        memory_limit: bytes for history and view; "resident" falls back to "scratch" above it.
        keep_latents: keep the latents of every chunk the history holds, so that `rebuild` can rewrite its K/V.
        prompt_switch: what a new prompt does to the past, "keep", "recache", "flush" or "cut" (see `switching`);
            default the policy's own way, for most of them "keep". "recache" keeps latents.
        decode: False yields latents only.
        callback_on_step_end(session, step, timestep, {"latents": x0}) → dict or None; x0 [B, C, f, h, w] is the step's
            prediction of the finished chunk, and {"latents": …} replaces it.
        callback_on_chunk_end(session, index, {"frames", "latents", "stats"}) → dict or None; may replace the frames.
        noise: anything with `draw(channels, frames, height, width) → [B, C, f, h, w]`, instead of seeded noise.

    Raises LongtakeError for inputs that cannot work, NonFiniteError when a chunk comes out with NaN or infinity (the
    chunk is not committed: the session stands where it stood before).
    """

    def __init__(
        self, model: Host | Any, policy: KVPolicy | None = None, *, reuse: ReusePolicy | None = None,
        compressor: Compressor | None = None,
        prompt: str | Sequence[str] | None = None, prompt_embeds: Tensor | TextState | None = None,
        negative_prompt: str | Sequence[str] | None = None, negative_prompt_embeds: Tensor | TextState | None = None,
        image: Tensor | None = None, seed: int | Sequence[int] = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        height: int | None = None, width: int | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, sampler: Sampler | None = None,
        chunks: int | None = None, num_frames: int | None = None, residency: str = "resident",
        history_dtype: str | None = None, kernels: str | None = None, cuda_graphs: bool = False,
        memory_limit: int | None = None, decode: bool = True, keep_latents: bool = False,
        prompt_switch: str | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_chunk_end: Callable[..., dict[str, Any] | None] | None = None, noise: Any = None,
    ) -> None:  # fmt: skip
        self.host: Host = model if isinstance(model, Host) else load(model)
        config = self.host.config
        if not isinstance(policy, KVPolicy | None) or not isinstance(reuse, ReusePolicy | None):
            raise LongtakeError(
                f"policy={policy!r}, reuse={reuse!r}: give policy objects, e.g. SlidingWindow(21, sink=3), or None"
            )
        if chunks is not None and chunks < 1:
            raise LongtakeError(f"{chunks} chunks: ask for at least 1, or None for an endless take")
        self.policy = policy or default_policy(self.host)
        self.reuse = (reuse or NoReuse()).for_model(self.host.reuse_preset)
        if not isinstance(compressor, Compressor | None):
            raise LongtakeError(
                f"compressor={compressor!r}: give a compressor, e.g. longtake.load_compressor(FOLDER) or "
                "longtake.MeanPool(), or None"
            )
        wanted = "compressed" in self.policy.requires
        self.compressor = (compressor or self.host.compressor) if wanted else None
        if compressor is not None and self.compressor is not None:
            self.compressor.check(self.host)
        if isinstance(self.compressor, torch.nn.Module):
            self.compressor.to(self.host.device)
        self.geometry: Geometry = self.host.geometry(height, width)
        self.chunks = chunks
        self.guidance_scale = config.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(self.guidance_scale):
            raise LongtakeError(f"guidance_scale {self.guidance_scale}: give a finite number; 1 is no guidance")
        self.num_inference_steps = num_inference_steps
        self.sampler = sampler or default_sampler(config, num_inference_steps)
        self.schedule: Schedule = self.sampler.schedule
        self.callback_on_step_end, self.callback_on_chunk_end = callback_on_step_end, callback_on_chunk_end

        given_frames = 0 if image is None else 1
        self._frames = None if chunks is None else chunks * self.geometry.chunk_frames + given_frames
        if num_frames is not None:
            self._frames = self._length(num_frames, chunks, given_frames)
            self.chunks = -(-(self._frames - given_frames) // self.geometry.chunk_frames)
        self._prompt, text = self._encode(prompt, prompt_embeds, "prompt")
        self.batch = len(text.embeds)
        self.lockstep = self.batch > 1 or not (prompt is None or isinstance(prompt, str))
        self.texts: dict[str, TextState] = {"cond": text}  # by guidance branch
        self._negative: str | list[str] = ""
        if "uncond" in self.host.streams(self.guidance_scale):
            if negative_prompt is None and negative_prompt_embeds is None:
                negative_prompt_embeds = self.host.unconditional(text.embeds)
            self._negative, negative = self._encode(
                negative_prompt, negative_prompt_embeds, "negative_prompt", expand=self.batch
            )
            if len(negative.embeds) != self.batch:
                raise LongtakeError(
                    f"{len(negative.embeds)} negative prompts for {self.batch} takes: give one, or one each"
                )
            self.texts["uncond"] = negative
        self.host.prompts_encoded()
        own_way = "keep" if isinstance(self.sampler, Stagger) else self.policy.prompt_switch
        self.prompt_switch = check_switch(prompt_switch or own_way)
        self._pending: TextState | None = None
        self._pending_mode = "keep"
        renoised = not isinstance(self.sampler, Stagger) or self.host.solver == "renoise"
        self._reuse = ReuseRun(self.reuse, self.host.feature, renoised=renoised)
        if self._reuse.active and not self.sampler.reuses:
            raise LongtakeError(f"reuse={self.reuse.name}: {self.host.name} draws codes, not velocities; leave it out")

        self.history_dtype, self.kernels = history_dtype, kernels
        self.history = self._make_history(residency, memory_limit, given_frames)
        self.decode = decode
        seen = self.compressor is not None and self.compressor.wants_pixels
        self.decoder: Decoder | None = self.host.decoder() if decode or seen else None
        self._ahead: tuple[Tensor, Tensor] | None = None  # latents and frames of a chunk decoded but not committed
        noise = noise or self.sampler.noise(_generators(seed, generator, self.batch))
        self.rollout = self._make_rollout(noise, keep_latents or self.prompt_switch == "recache", cuda_graphs)
        self.frame = 0  # next latent frame to hand out
        self.index = 0  # next chunk to hand out
        self.stats = SessionStats()
        self._first_frames: Tensor | None = None
        if image is not None:
            self._begin_with(image)

    # --- the rollout ----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        return self

    @torch.no_grad()
    def __next__(self) -> Chunk:
        if self.chunks is not None and self.index >= self.chunks:
            raise StopIteration
        started = time.perf_counter()
        self._obey()
        clock = Clock()
        finished = self.rollout.next(clock, last=self.index + 1 == self.chunks)
        frames, decode_seconds, compress_seconds = self._settle(finished.latents)
        frames = self._show(frames)
        stats = ChunkStats(
            self.index, finished.frame, finished.latents.shape[2], 0 if frames is None else frames.shape[1],
            time.perf_counter() - started, clock.seconds, decode_seconds, finished.attended, self.history.held_bytes,
            clock.forwards, clock.reused, compress_seconds, decisions=finished.decisions, flops=clock.flops,
            skipped_flops=clock.skipped,
        )  # fmt: skip
        return self._hand_out(frames, finished.latents, stats)

    def _settle(self, latents: Tensor) -> tuple[Tensor | None, float, float]:
        """Decode what the rollout has made or was given, and let it become the past: its own frames, and the seconds
        that decoding and compressing took."""
        try:
            started = time.perf_counter()
            frames = self._decode(latents)
            decoded = time.perf_counter()
            self.rollout.compress(frames)
            compressed = time.perf_counter()
        except BaseException:
            self.rollout.abandon()
            raise
        self.rollout.pop()
        self._ahead = None
        return frames, decoded - started, compressed - decoded

    def _hand_out(self, frames: Tensor | None, latents: Tensor, stats: ChunkStats) -> Chunk:
        self.frame = stats.frame + stats.latent_frames
        self.index += 1
        self.stats.add(stats)
        chunk = Chunk(stats.index, _one(frames, self.lockstep), _one(latents, self.lockstep), stats)
        if self.callback_on_chunk_end is not None:
            given = {"frames": chunk.frames, "latents": chunk.latents, "stats": stats}
            changed = self.callback_on_chunk_end(self, chunk.index, given) or {}
            chunk.frames = changed.get("frames", chunk.frames)
        return chunk

    @torch.no_grad()
    def extend(self, latents: Tensor) -> None:
        """Commit given clean latents [B, C, f, h, w] as the next chunks, as if the take had made them: a video to be
        continued. f is a whole number of chunks; the frames they decode to are not given again. A staggered take begins
        with them, and f is any number. Raises LongtakeError for another shape, NonFiniteError for NaN or infinity."""
        pieces = self.rollout.pieces(latents)
        if isinstance(self.rollout, Staggered) and (self.frame or self.index):
            raise LongtakeError("a staggered take has begun: latents are given before its first chunk")
        for piece in pieces:
            if self.chunks is not None and self.index >= self.chunks:
                raise LongtakeError(f"the take has {self.chunks} chunks and all of them are there: nothing can follow")
            self._give(piece)

    def _give(self, latents: Tensor, image: bool = False) -> Tensor | None:
        """Let given latents [B, C, f, h, w] be the next of the take; the frames they decode to."""
        self._obey()
        chunks = self.rollout.give(latents, image)
        frames, *_ = self._settle(latents)
        self.frame += latents.shape[2]
        self.index += chunks
        return frames

    @property
    def prompt(self) -> str | list[str]:
        """The prompt in force from the next chunk on. Setting it treats the past as `prompt_switch` says."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str | Sequence[str]) -> None:
        self.switch(prompt)

    def switch(self, prompt: str | Sequence[str], mode: str | None = None) -> None:
        """A new prompt from the next chunk on; `mode` says what it does to the past (default: `prompt_switch`)."""
        mode = self.switch_mode(mode)
        given, text = self._encode(prompt, None, "prompt")
        if len(text.embeds) != self.batch:
            raise LongtakeError(f"{len(text.embeds)} prompts for {self.batch} takes: give one for each")
        self._prompt, self._pending, self._pending_mode = given, text, mode
        self.host.prompts_encoded()

    def set_prompt_embeds(self, embeds: Tensor, mode: str | None = None) -> None:
        """Embeddings [B, T, d] instead of a prompt, in force from the next chunk on; `mode` as for `switch`."""
        mode = self.switch_mode(mode)
        _, text = self._encode(None, embeds, "prompt")
        if len(text.embeds) != self.batch:
            raise LongtakeError(f"{len(text.embeds)} prompt embeddings for {self.batch} takes: give one for each")
        self._prompt, self._pending, self._pending_mode = "", text, mode

    def switch_mode(self, mode: str | None = None) -> str:
        """What a new prompt would do to the past, asked for as `mode`. Raises LongtakeError if this take cannot."""
        mode = check_switch(mode or self.prompt_switch)
        if mode in ("flush", "cut") and not self.rollout.forgets:
            raise LongtakeError(
                f"prompt switch {mode!r}: chunks in flight see the past, so here a new prompt can only 'keep' it or "
                "'recache' what has finished"
            )
        if mode == "recache" and self.rollout.kept is None:
            raise LongtakeError(
                "prompt switch 'recache' needs the latents of the past: make the session with prompt_switch='recache' "
                "or keep_latents=True"
            )
        return mode

    @torch.no_grad()
    def rebuild(self) -> int:
        """Rewrite the K/V of every held chunk from its latents under the prompt in force, oldest first, each seeing
        what the policy shows it of those before (prompt recache, chunk by chunk). Chunks that have lost tokens stay as
        they are. Returns the number of chunks rewritten. Needs `keep_latents=True`."""
        if self.rollout.kept is None:
            raise LongtakeError("rebuild needs the latents of the past: make the session with keep_latents=True")
        self._obey()
        return self.rollout.rebuild()

    @property
    def noise(self) -> Any:
        """The take's source of randomness."""
        return self.rollout.noise

    @noise.setter
    def noise(self, noise: Any) -> None:
        self.rollout.noise = noise

    # --- what it holds ----------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes held between two chunks, by part; `total` is their sum. Weights are the model's, not the session's."""
        parts = self.history.memory()
        texts = [*self.texts.values(), *([self._pending] if self._pending else [])]
        parts["text"] = sum(text.nbytes for text in texts)
        parts["decoder"] = self.decoder.nbytes if self.decoder is not None else 0
        parts["decoder"] += self._first_frames.nbytes if self._first_frames is not None else 0
        parts |= {**self.rollout.memory(), "reuse": self._reuse.nbytes}
        return {**parts, "total": sum(parts.values())}

    def reuse_schedule(self) -> list[Decision] | None:
        """What the reuse policy will decide for each step of a chunk, where that is known before the take, with a
        metric that holds nothing of the video, and the same for every chunk. None where it is not."""
        alone = isinstance(self.rollout, OneByOne)
        return self._reuse.schedule(self.rollout.turns(), self.rollout.rows(self.chunks), alone=alone)

    def snapshot(self, path: Any) -> None:
        """Write all that the continuation depends on to one safetensors file; `Session.restore` goes on bit-exactly."""
        from .snapshot import save

        save(self, path)

    @classmethod
    def restore(
        cls, path: Any, model: Host | Any, policy: KVPolicy | None = None, reuse: ReusePolicy | None = None,
        compressor: Compressor | None = None,
    ) -> Session:  # fmt: skip
        """A session as it was at `snapshot`. `policy` and `reuse` are needed only if no name is registered for them,
        `compressor` if it was not the model's own."""
        from .snapshot import restore

        return restore(cls, path, model, policy, reuse, compressor)

    # --- within -----------------------------------------------------------------------------------------------------

    def _make_history(self, residency: str, memory_limit: int | None, given_frames: int) -> History:
        # one frame more than the chunks, for a first image
        frames = None if self.chunks is None else self.chunks * self.geometry.chunk_frames + 1
        prefixes = {name: self.host.prefix(text) for name, text in self.texts.items()}
        anchors = max(0 if at is None else len(at[0]) for at in prefixes.values())
        if anchors:  # the prompt is in the sequence, and with it a given image
            anchors += given_frames * self.geometry.tokens_per_frame
        shape = replace(
            history_shape(self.host, self.geometry, self.batch, len(self.texts), self.compressor, self.history_dtype),
            frames=frames,
            anchor_tokens=anchors,
        )
        if isinstance(self.sampler, Stagger):
            steps = len(self.host.timetable(self.sampler.steps)[0])
            _, live, frames = self.sampler.layout(self.geometry, steps, self._frames)
            live += self.host.lingering if self.sampler.commit == "clean" else 0
            shape = replace(shape, frames=frames, live_chunks=live)
        self.policy = self.policy.settle(shape)
        self.policy.check(shape)
        capacity, visible = self.policy.capacity(shape), self.policy.visible(shape)
        if memory_limit is not None:
            if capacity is None or visible is None:
                raise LongtakeError(
                    f"memory_limit={memory_limit} cannot be kept, {self.policy.name} grows with the take: "
                    "say how long it is (chunks=), or use a bounded policy"
                )
            view = visible * shape.view_token_bytes
            views = {"resident": view, "scratch": view // (shape.layers * shape.streams), "alias": 0}
            if residency == "resident" and capacity * shape.token_bytes + view > memory_limit:
                residency = "scratch"
            need = capacity * shape.token_bytes + views.get(residency, 0)
            if need > memory_limit:
                raise LongtakeError(
                    f"{self.policy.name} needs {need} bytes of history and view, memory_limit is {memory_limit}: "
                    "shrink the policy (policy.fit(bytes, shape)) or raise the limit"
                )
        scores = type(self.policy).score is not KVPolicy.score
        return History(
            shape, self.host.rotary, streams=tuple(self.texts), capacity=capacity, visible=visible,
            residency=residency, score=self.policy.score if scores else None,
            key_sums="key_sums" in self.policy.requires, query_sums="query_sums" in self.policy.requires,
            offloaded=self.policy.offloaded(shape), summed=self.policy.summed(shape),
            dtype=self.host.dtype, device=self.host.device, history_dtype=self.history_dtype,
            kernels=self.kernels,
        )  # fmt: skip

    def _make_rollout(self, noise: Any, keep: bool, graphs: bool) -> OneByOne | Staggered:
        """What makes this take: one chunk after another, or several at a time."""
        replay = None
        if graphs:
            check_graphs(self.host, self.host.config.sampler, self.history.residency)
            replay = Replay(self.host, CudaGraphs(self.host.device))
        if not isinstance(self.sampler, Stagger):
            return OneByOne(
                self.host, self.geometry, self.history, self.policy, self._reuse, self.sampler, noise=noise,
                texts=self.texts, guidance=self.guidance_scale, on_step=self._predicted,
                compressor=self.compressor, keep=keep, replay=replay,
            )  # fmt: skip
        if self.compressor is not None:
            raise LongtakeError(f"{self.policy.name} keeps compressed chunks, which a staggered take cannot make yet")
        if self.sampler.window is None:
            steps = len(self.host.timetable(self.sampler.steps)[0])
            self.sampler.check(self.geometry, self.host.config.training_frames, steps)
        return runner_of(self.host)(
            self.host, self.geometry, self.history, self.policy, self._reuse, self.sampler,
            noise=noise, texts=self.texts, guidance=self.guidance_scale, ends_at=self._frames,
            on_step=self._predicted if self.callback_on_step_end is not None else None, keep=keep,
        )  # fmt: skip

    def _length(self, num_frames: int, chunks: int | None, given: int) -> int:
        """Latent frames of a take of `num_frames` pixel frames."""
        frames, whole = self.geometry.latent_frames(num_frames), self.geometry.chunk_frames
        if chunks is not None:
            raise LongtakeError("say how long: chunks= or num_frames=, one of them")
        if frames <= given:
            raise LongtakeError(f"{num_frames} frames: ask for more than the {self.geometry.pixel_frames(given)} given")
        if isinstance(self.sampler, Stagger) or (frames - given) % whole == 0:
            return frames
        near = [self.geometry.pixel_frames(given + whole * ((frames - given) // whole + k)) for k in (0, 1)]
        raise LongtakeError(
            f"{num_frames} frames are no whole number of chunks: use {' or '.join(str(n) for n in near if n > 0)}"
        )

    def _predicted(self, x0: Tensor, t: float, step: int) -> Tensor:
        """A step's prediction of the finished chunk, or what the callback makes of it."""
        if self.callback_on_step_end is None:
            return x0
        given = (self.callback_on_step_end(self, step, t, {"latents": x0}) or {}).get("latents", x0)
        if given.shape != x0.shape:
            raise LongtakeError(
                f"callback_on_step_end gave latents of shape {tuple(given.shape)}, the chunk has {tuple(x0.shape)}"
            )
        return given.to(x0)

    def _decode(self, latents: Tensor) -> Tensor | None:
        """The chunk's own frames. They are kept until it is committed: a decoder cannot go back."""
        if self.decoder is None:
            return None
        if self._ahead is None:
            with self.host.lock:
                self._ahead = latents, self.decoder.push(latents).cpu()
        elif not torch.equal(self._ahead[0], latents):
            raise LongtakeError(
                "the last chunk was interrupted after it had been decoded, and now another would take its place: "
                "go back with Session.restore(snapshot)"
            )
        return self._ahead[1]

    def _show(self, frames: Tensor | None) -> Tensor | None:
        """A chunk's frames as they are handed out: behind those of a first image, and only if they are wanted."""
        if frames is None or not self.decode:
            return None
        if self._first_frames is not None:
            frames = torch.cat((self._first_frames, frames), 1)
            self._first_frames = None
        return frames

    @torch.no_grad()
    def _begin_with(self, image: Tensor) -> None:
        """Commit a given first image as latent frame 0; its pixel frame comes out with the first chunk."""
        size = (3, self.geometry.height, self.geometry.width)
        given = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        if given != size and given not in ((1, *size), (self.batch, *size)):
            raise LongtakeError(f"image {given}: give a float tensor {list(size)} in [-1, 1], or one such per take")
        image = image.reshape(-1, *size)
        latents = self.host.encode_image(image)
        latents = (latents.float() if latents.is_floating_point() else latents).expand(self.batch, -1, -1, -1, -1)
        frames = self._give(latents, image=True)
        self._first_frames = frames if self.decode else None

    def _obey(self) -> None:
        """A prompt that was set since the last chunk comes into force."""
        if self._pending is not None:
            # where a prompt is part of the sequence, it ends where the one before it did: frames stay where they are
            old, new = self.texts["cond"], self._pending
            start = old.start + old.embeds.shape[1] - new.embeds.shape[1]
            self.texts["cond"] = replace(new, start=start)
            if self._pending_mode in ("flush", "cut"):
                self.rollout.flush(CUT_FRAMES if self._pending_mode == "cut" else 0)
            elif self._pending_mode == "recache":
                self.rollout.rebuild()
            self._pending = None  # last: whatever interrupts this is made good before the next chunk

    def _encode(
        self, prompt: str | Sequence[str] | None, embeds: Tensor | TextState | None, name: str, expand: int = 1
    ) -> tuple[str | list[str], TextState]:
        """What was given, and what becomes of it; one text stands for `expand` takes."""
        if isinstance(embeds, TextState):
            return "", embeds
        if embeds is not None:
            if prompt:
                raise LongtakeError(f"give {name} or {name}_embeds, not both")
            self.host.check_embeds(embeds, name)
            prompts: str | list[str] = ""
        else:
            if prompt is None:
                raise LongtakeError(f"a session needs {name}= or {name}_embeds=")
            if not isinstance(prompt, str) and not (
                isinstance(prompt, Sequence) and all(isinstance(text, str) for text in prompt)
            ):
                raise LongtakeError(f"{name}={prompt!r}: give a string, or a list of strings for takes in lockstep")
            prompts = prompt if isinstance(prompt, str) else list(prompt)
            if not prompts and not isinstance(prompts, str):
                raise LongtakeError(f"an empty list of prompts: give at least one {name}")
            listed = [prompts] if isinstance(prompts, str) else prompts
            embeds = self.host.encode_for(listed, self.geometry, self._frames)
        if len(embeds) == 1:
            embeds = embeds.expand(expand, *embeds.shape[1:])
        return prompts, self.host.text_state(embeds)


def default_policy(host: Host) -> KVPolicy:
    """The window a model was made for: its own setting, else its training length with one chunk as sink."""
    config = host.config
    if config.sampler == "staggered" and config.overlap is not None:
        return FullHistory()  # of a window, which is as long as the clips it was trained on
    if config.kv_ranges:
        return KVRange(config.kv_ranges)
    frames = config.window or config.training_frames
    sink = config.chunk_frames if config.sink is None else config.sink
    return SlidingWindow(frames, min(sink, frames - config.chunk_frames))


def history_shape(
    host: Host, geometry: Geometry, batch: int = 1, streams: int = 1, compressor: Compressor | None = None,
    history_dtype: str | None = None,
) -> HistoryShape:  # fmt: skip
    """The sizes a policy needs, of a take of `host` at `geometry`; without a compressor, the model's own counts. Codes
    have no compressed form: nothing is between two of them."""
    form = storage_form(history_dtype)
    itemsize = torch.empty((), dtype=host.dtype).element_size()
    return HistoryShape(
        host.layers, host.kv_heads, host.head_dim, itemsize, geometry.tokens_per_frame, geometry.chunk_frames,
        batch, streams, compressed_tokens=0 if host.codes else (compressor or host.compressor).tokens(geometry),
        decay=host.config.decay, training_frames=host.config.training_frames,
        structural_tokens=len(geometry.structural) // geometry.chunk_frames,
        head_bytes=None if form is None else form.head_bytes(host.head_dim),
    )  # fmt: skip


def generate(model: Host | Any, *, seconds: float | None = None, chunks: int | None = None, **options: Any) -> Session:
    """A session that ends by itself after `seconds` of video, or after `chunks`; options as for `Session`."""
    if [seconds, chunks, options.get("num_frames")].count(None) != 2:
        raise LongtakeError("say how long: seconds=, chunks= or num_frames=, one of them")
    host = model if isinstance(model, Host) else load(model)
    if options.get("num_frames") is not None:
        return Session(host, **options)
    if seconds is not None:
        geometry = host.geometry(options.get("height"), options.get("width"))
        chunks = geometry.chunks(seconds, given=0 if options.get("image") is None else 1)
    if chunks is None or chunks < 1 or not math.isfinite(chunks):
        raise LongtakeError(f"{chunks} chunks: ask for at least 1")
    return Session(host, chunks=chunks, **options)


def _generators(
    seed: int | Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[torch.Generator]:
    if generator is not None:
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != batch:
            raise LongtakeError(f"{len(generators)} generators for {batch} takes: give one for each")
        return generators
    seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise LongtakeError(f"{len(seeds)} seeds for {batch} takes: give one for each, or a single number")
    return [torch.Generator().manual_seed(s) for s in seeds]


def _one(x: Any, lockstep: bool) -> Any:
    return x if lockstep or x is None else x[0]
