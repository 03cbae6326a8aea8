"""A session: one rollout (or several in lockstep) and all its state. The only place where model, policy, sampler and
history meet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .chunk import Chunk, ChunkStats, Clock, SessionStats
from .compressors import Compressor, TakeState
from .errors import LongtakeError, NonFiniteError, PlanError
from .geometry import Geometry
from .history import History, storage_form
from .hosts.base import Decoder, Host, TextState
from .hosts.loading import load
from .plan import COMPRESSED, FULL, Drop, HistoryShape, Plan
from .policies import FullHistory, KVPolicy, KVRange, SlidingWindow
from .replay import CudaGraphs, Replay, check_graphs
from .reuse import Decision, NoReuse, ReusePolicy, ReuseRun, Turn
from .samplers import Sampler, Sampling, default_sampler, runner_of
from .samplers.chunked import CLEAN_TIMESTEP, NoiseSource, Schedule
from .samplers.stagger import Stagger
from .samplers.staggered import Staggered
from .switching import CUT_FRAMES, check_switch


@dataclass
class _Stream:
    """One guidance branch: its text."""

    text: TextState


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
            raise LongtakeError(f"compressor={compressor!r}: give a compressor, e.g. MeanPool(), or None")
        wanted = "compressed" in self.policy.requires
        self.compressor = (compressor or self.host.compressor) if wanted else None
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
        self._streams: dict[str, _Stream] = {"cond": _Stream(text)}
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
            self._streams["uncond"] = _Stream(negative)
        self.host.prompts_encoded()
        own_way = "keep" if isinstance(self.sampler, Stagger) else self.policy.prompt_switch
        self.prompt_switch = check_switch(prompt_switch or own_way)
        self._pending: TextState | None = None
        self._pending_mode = "keep"
        self._cut = 0  # frames by which the next chunk stands further off in time
        renoised = not isinstance(self.sampler, Stagger) or self.host.solver == "renoise"
        self._reuse = ReuseRun(self.reuse, self.host.feature, renoised=renoised)
        if self._reuse.active and not self.sampler.reuses:
            raise LongtakeError(f"reuse={self.reuse.name}: {self.host.name} draws codes, not velocities; leave it out")
        self._unobserved = False  # the last step of the chunk in flight was reused

        self.noise = noise or self.sampler.noise(_generators(seed, generator, self.batch))
        self.history_dtype, self.kernels = history_dtype, kernels
        self.history = self._make_history(residency, memory_limit, given_frames)
        self._replay = self._recording() if cuda_graphs else None
        self.decode = decode
        seen = self.compressor is not None and self.compressor.wants_pixels
        self.decoder: Decoder | None = self.host.decoder() if decode or seen else None
        self._ahead: tuple[Tensor, Tensor] | None = None  # latents and frames of a chunk decoded but not committed
        self._compressing = TakeState()
        self._tokens: dict[int, Tensor] = {}  # block → compressed tokens [B, n, d], where latents are kept
        keep_latents = keep_latents or self.prompt_switch == "recache"
        self._latents: dict[int, Tensor] | None = {} if keep_latents else None  # block → latents [B, C, f, h, w]
        self.frame = 0  # next latent frame
        self.index = 0  # next chunk
        self.stats = SessionStats()
        self._first_frames: Tensor | None = None
        self._staggered = self._stagger(self.sampler) if isinstance(self.sampler, Stagger) else None
        if image is not None:
            self._begin_with(image)

    # --- the rollout ----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        return self

    @torch.no_grad()
    def __next__(self) -> Chunk:
        if self._staggered is None and self.chunks is not None and self.index >= self.chunks:
            raise StopIteration
        started = time.perf_counter()
        self._obey()
        self._begin()
        clock = Clock()
        if self._staggered is not None:
            return self._next_staggered(self._staggered, clock, started)
        rng = self._noise_state()
        block = self._admit(self.geometry.chunk_frames)
        kept = self.sampler.commits_last or self.index + 1 != self.chunks
        try:
            x0 = self._denoise(block, clock)
            sound = self.sampler.sound(x0)
            if kept:
                sound = sound & torch.isfinite(self._write(x0, block, clock)).all()
            # read only after the commit pass is on its way: no stall on a GPU; its output shows a bad key or value
            if not sound.item():
                raise NonFiniteError(
                    f"chunk {self.index} has NaN or infinite values and was not committed; "
                    "go back with Session.restore(snapshot), or try another seed or dtype"
                )
            attended = self.history.attended() + self.geometry.tokens_per_frame * self.geometry.chunk_frames
            decode_started = time.perf_counter()
            frames = self._decode(x0)
            decode_seconds = time.perf_counter() - decode_started
            compressed = self._compress(x0, frames, block)
            compress_seconds = time.perf_counter() - decode_started - decode_seconds
        except BaseException:
            self.history.abandon(block)
            self._restore_noise(rng)
            self._reuse.finish(self.index)
            raise
        if kept:
            self._commit(block, x0, compressed)
        else:  # nothing comes after it that would look at it
            self.history.abandon(block)
            self._ahead = None
        frames = self._show(frames)
        stats = ChunkStats(
            self.index, self.frame, self.geometry.chunk_frames, 0 if frames is None else frames.shape[1],
            time.perf_counter() - started, clock.seconds, decode_seconds, attended, self.history.held_bytes,
            clock.forwards, clock.reused, compress_seconds,
            decisions=self._reuse.finish(self.index), flops=clock.flops, skipped_flops=clock.skipped,
        )  # fmt: skip
        return self._hand_out(frames, x0, stats)

    def _next_staggered(self, take: Staggered, clock: Clock, started: float) -> Chunk:
        """The chunk that finishes next; others stay in flight."""
        finished = take.next(clock)
        decode_started = time.perf_counter()
        frames = self._decode(finished.latents)
        decode_seconds = time.perf_counter() - decode_started
        take.pop()
        self._ahead = None
        frames = self._show(frames)
        stats = ChunkStats(
            self.index, finished.frame, finished.latents.shape[2], 0 if frames is None else frames.shape[1],
            time.perf_counter() - started, clock.seconds, decode_seconds, finished.attended, self.history.held_bytes,
            clock.forwards, clock.reused, decisions=finished.decisions, flops=clock.flops,
            skipped_flops=clock.skipped,
        )  # fmt: skip
        return self._hand_out(frames, finished.latents, stats)

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
        if self._staggered is not None:
            self._begin_staggered(self._staggered, latents)
            return
        span, size = self.geometry.chunk_frames, (self.geometry.channels, *self.geometry.latent_size)
        given = tuple(latents.shape)
        if len(given) != 5 or (given[1], *given[3:]) != size or given[0] not in (1, self.batch) or given[2] % span:
            raise LongtakeError(
                f"latents {list(given)}: give [{self.batch}, {size[0]}, {span} n, {size[1]}, {size[2]}], whole chunks"
            )
        for part in latents.to(self.host.device).expand(self.batch, -1, -1, -1, -1).split(span, 2):
            if self.chunks is not None and self.index >= self.chunks:
                raise LongtakeError(f"the take has {self.chunks} chunks and all of them are there: nothing can follow")
            self._obey()
            self._begin()
            block = self._admit(span)
            self._unobserved = True  # no step comes before the commit pass, which is looked at in its place
            try:
                written = self._write(part, block, Clock(), given=True)
                if not (self.sampler.sound(part) & torch.isfinite(written).all()).item():
                    raise NonFiniteError(f"the given chunk {self.index} has or leads to NaN or infinite values")
                frames = self._decode(part)
                compressed = self._compress(part, frames, block)
            except BaseException:
                self.history.abandon(block)
                raise
            self._commit(block, part, compressed)
            self.frame += span
            self.index += 1

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
        if mode in ("flush", "cut") and self._staggered is not None:
            raise LongtakeError(
                f"prompt switch {mode!r}: chunks in flight see the past, so here a new prompt can only 'keep' it or "
                "'recache' what has finished"
            )
        if mode == "recache" and self._latents is None:
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
        if self._latents is None:
            raise LongtakeError("rebuild needs the latents of the past: make the session with keep_latents=True")
        self._obey()
        if self._staggered is not None:
            return self._staggered.rebuild()
        self._begin()
        return self._recache(self._latents)

    def _recache(self, latents: Mapping[int, Tensor]) -> int:
        blocks = self.history.table().blocks
        whole = [block.id for block in blocks if self.history.rewritable(block) and block.id in latents]
        for block in whole:
            table = self.history.reopen(block)
            try:
                plan = self.policy.plan(table, self.history.signals(self.index))
                self.history.apply(replace(plan, drops=()))
                self._write(latents[block], block, Clock(), given=table.live[0].role == "anchor")
                if COMPRESSED in table.live[0].forms:
                    self._carry(self._tokens[block], block)
                self.history.commit(block)
            except BaseException:
                self.history.abandon(block)
                raise
        return len(whole)

    # --- what it holds ----------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes held between two chunks, by part; `total` is their sum. Weights are the model's, not the session's."""
        parts = self.history.memory()
        texts = [stream.text for stream in self._streams.values()] + ([self._pending] if self._pending else [])
        parts["text"] = sum(text.nbytes for text in texts)
        parts["decoder"] = self.decoder.nbytes if self.decoder is not None else 0
        parts["decoder"] += self._first_frames.nbytes if self._first_frames is not None else 0
        parts["latents"] = sum(latents.nbytes for latents in (self._latents or {}).values())
        parts["latents"] += self._staggered.nbytes if self._staggered is not None else 0
        parts["compressor"] = self._compressing.nbytes + sum(tokens.nbytes for tokens in self._tokens.values())
        parts["reuse"] = self._reuse.nbytes
        if self._replay is not None:
            parts["graphs"] = self._replay.nbytes
        return {**parts, "total": sum(parts.values())}

    def reuse_schedule(self) -> list[Decision] | None:
        """What the reuse policy will decide for each step of a chunk, where that is known before the take: with a
        metric that holds nothing of the video. None where it is not."""
        return self._reuse.schedule(self._turns(0) if self._staggered is None else self._staggered.turns())

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
        prefixes = {name: self.host.prefix(stream.text) for name, stream in self._streams.items()}
        anchors = max(0 if at is None else len(at[0]) for at in prefixes.values())
        if anchors:  # the prompt is in the sequence, and with it a given image
            anchors += given_frames * self.geometry.tokens_per_frame
        shape = replace(
            history_shape(
                self.host, self.geometry, self.batch, len(self._streams), self.compressor, self.history_dtype
            ),
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
            shape, self.host.rotary, streams=tuple(self._streams), capacity=capacity, visible=visible,
            residency=residency, score=self.policy.score if scores else None,
            key_sums="key_sums" in self.policy.requires, query_sums="query_sums" in self.policy.requires,
            offloaded=self.policy.offloaded(shape), summed=self.policy.summed(shape),
            dtype=self.host.dtype, device=self.host.device, history_dtype=self.history_dtype,
            kernels=self.kernels,
        )  # fmt: skip

    def _recording(self) -> Replay:
        check_graphs(self.host, self.host.config.sampler, self.history.residency)
        return Replay(self.host, CudaGraphs(self.host.device))

    def _stagger(self, sampler: Stagger) -> Staggered:
        """What runs this take, several chunks at a time."""
        height, width = self.geometry.latent_size
        if self.compressor is not None:
            raise LongtakeError(f"{self.policy.name} keeps compressed chunks, which a staggered take cannot make yet")
        if sampler.window is None:
            sampler.check(self.geometry, self.host.config.training_frames, len(self.host.timetable(sampler.steps)[0]))
        return runner_of(self.host)(
            self.host, self.geometry, self.history, self.policy, self._reuse, sampler,
            draw=lambda n: self.noise.draw(self.geometry.channels, n, height, width).to(self.host.device),
            texts={name: stream.text for name, stream in self._streams.items()}, guidance=self.guidance_scale,
            ends_at=self._frames, on_step=self._predicted if self.callback_on_step_end is not None else None,
            keep=self._latents is not None,
        )  # fmt: skip

    @torch.no_grad()
    def _begin_staggered(self, take: Staggered, latents: Tensor) -> Tensor | None:
        """Start a staggered take from given latents; the frames they decode to."""
        size, given = (self.geometry.channels, *self.geometry.latent_size), tuple(latents.shape)
        if len(given) != 5 or (given[1], *given[3:]) != size or given[0] not in (1, self.batch):
            raise LongtakeError(f"latents {list(given)}: give [{self.batch}, {size[0]}, f, {size[1]}, {size[2]}]")
        if self.frame or self.index:
            raise LongtakeError("a staggered take has begun: latents are given before its first chunk")
        self._obey()
        latents = latents.to(self.host.device).expand(self.batch, -1, -1, -1, -1)
        take.begin(latents)
        frames = self._decode(latents)
        self._ahead, self.frame = None, latents.shape[2]
        return frames

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

    def _begin(self) -> None:
        """Where prompts are part of the sequence, their K/V are a block of the history, never dropped: its first, made
        anew when another prompt comes into force."""
        prefixes = {name: self.host.prefix(stream.text) for name, stream in self._streams.items()}
        positions = {name: at for name, at in prefixes.items() if at is not None}
        if not positions or not any(stream.text.k for stream in self._streams.values()):
            return
        for stream in self._streams.values():
            if not stream.text.k:  # the block is one for all streams
                stream.text = replace(self.host.text_state(stream.text.embeds), start=stream.text.start)
        if old := next((b for b in self.history.blocks if b.role == "anchor" and not b.span), None):
            self.history.reserve(max(0, len(positions["cond"][0]) - old.forms[FULL].tokens))
            self.history.apply(Plan(drops=(Drop(old.id),)))
        block = self.history.admit(0, 0, positions, role="anchor")
        self.history.blocks.insert(0, self.history.blocks.pop())  # time order
        self.history.apply(Plan())
        for name, stream in self._streams.items():
            for view, k, v in zip(
                self.history.layers(name, block, write=True), stream.text.k, stream.text.v, strict=True
            ):
                view.put(k.expand(self.batch, -1, -1, -1), v.expand(self.batch, -1, -1, -1))
            stream.text = replace(stream.text, k=[], v=[])  # the history holds them now
        self.history.commit(block)

    def _admit(self, span: int, role: str = "live") -> int:
        texts = {name: stream.text for name, stream in self._streams.items()}
        block = self.history.admit(
            self.frame,
            span,
            self.host.stream_positions(self.geometry, self.frame, span, texts),
            role=role,
            grid=self.geometry.grid,
            packable=self.geometry.packable,
            structural=self.geometry.structural,
        )
        try:
            plan = self.policy.plan(self.history.table(), self.history.signals(self.index))
            if self._cut:
                plan = replace(plan, live_shift=plan.live_shift + self._cut)
            if COMPRESSED in plan.forms:
                if self.compressor is None:
                    raise PlanError('it asks for compressed forms: let its `requires` name "compressed"')
                base, step = self.host.positions(self.geometry, self.frame, span)
                small = self.compressor.positions(base, step, self.geometry, span)
                self.history.add_form(block, COMPRESSED, small)
            self.history.apply(plan)
        except BaseException as error:
            self.history.abandon(block)
            if isinstance(error, PlanError):
                raise PlanError(f"policy {self.policy.name or type(self.policy).__name__}: {error}") from error
            raise
        return block

    def _commit(self, block: int, latents: Tensor, compressed: tuple[Tensor | None, TakeState]) -> None:
        self.history.commit(block)
        self._ahead, self._cut = None, 0
        tokens, self._compressing = compressed
        if self._latents is not None:
            self._latents[block] = latents
            if tokens is not None:
                self._tokens[block] = tokens
            self._forget_latents()

    def _forget_latents(self) -> None:
        """Of chunks that the history holds nothing of any more."""
        if self._latents is not None:
            held = {b.id for b in self.history.table().blocks}
            self._latents = {b: kept for b, kept in self._latents.items() if b in held}
            self._tokens = {b: kept for b, kept in self._tokens.items() if b in held}

    def _compress(self, latents: Tensor, frames: Tensor | None, block: int) -> tuple[Tensor | None, TakeState]:
        """The compressed tokens of a chunk, their K/V written if its plan asked for that form, and what the compressor
        remembers of the take after it."""
        if self.compressor is None:
            return None, self._compressing
        pixels = frames if self.compressor.wants_pixels else None
        with self.host.lock, torch.no_grad():
            tokens, state = self.compressor.compress(latents, pixels, self._compressing, self.host, self.geometry)
        if COMPRESSED not in self.history.table().live[-1].forms:
            return None, state
        self._carry(tokens, block)
        return tokens, state

    def _carry(self, tokens: Tensor, block: int) -> None:
        """Give compressed tokens their K/V in every layer and stream: part of the commit pass, before the table
        changes."""
        assert self.compressor is not None
        for name, stream in self._streams.items():
            layers = self.history.layers(name, block, form=COMPRESSED, write=True)
            if self.compressor.carry == "projection":
                written = self.host.project(tokens, layers)
            else:
                written = self.host.carry(tokens, CLEAN_TIMESTEP, stream.text, layers)
            if not (torch.isfinite(tokens).all() & torch.isfinite(written).all()).item():
                raise NonFiniteError(
                    f"the compressed form of chunk {self.index} has NaN or infinite values and was not committed: "
                    "try another dtype or compressor"
                )

    def _denoise(self, block: int, clock: Clock) -> Tensor:
        turns = self._turns(self.index)

        def velocity(x: Tensor, t: float, step: int) -> Tensor:
            computed = self._reuse.decide([turns[step]], [x])[0]
            self._unobserved = not computed
            if not computed:
                clock.reused += len(self._streams)
                clock.skipped += self._reuse.state(self.index).cost
                if not self._reuse.carries_residual:
                    return self._reuse.carried(turns[step], x)
            before = clock.flops
            out = self._forward_all(x, t, block, clock, step=step, computed=computed)
            if computed:
                self._reuse.state(self.index).cost = clock.flops - before
                self._reuse.keep(turns[step], x, out)
            return out

        self._unobserved = False

        return self.sampler.sample(Sampling(
            self.host, self.geometry, self.batch, self.schedule, self.index, self.noise, velocity, self._predicted
        ))  # fmt: skip

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

    def _write(self, x0: Tensor, block: int, clock: Clock, given: bool = False) -> Tensor:
        """The commit pass of every stream: the K/V that later chunks will see of this one."""
        fed = {name: self.sampler.commit_input(x0, self.geometry, name, given) for name in self._streams}
        t = next(iter(fed.values()))[1]
        return self._forward_all({name: x for name, (x, _) in fed.items()}, t, block, clock, write=True)

    def _forward_all(
        self, x: Tensor | Mapping[str, Tensor], t: float, block: int, clock: Clock, *, step: int | None = None,
        write: bool = False, computed: bool = True,
    ) -> Tensor:  # fmt: skip
        """The velocity of one step, guidance included; or, with `write`, the commit pass of every stream. A step that
        is not `computed` puts the residuals of an earlier one between embedding and head."""
        steps = len(self.schedule.timesteps)
        last = step == steps - 1 or (write and self._unobserved)  # the commit pass stands in for a reused last step
        moments = {"commit": write, "first_step": step == 0, "last_forward": last}
        observe = moments.get(self.policy.moment or "", False)
        velocities: dict[str, Tensor] = {}
        each = x if isinstance(x, Mapping) else dict.fromkeys(self._streams, x)
        for name, stream in self._streams.items():
            x = each[name]
            residuals = self._reuse.state(self.index).residuals if step is not None else {}
            if not computed:
                velocities[name], _ = self.host.forward_residual(x, t, stream.text, [], residuals[name])
                continue
            layers = self.history.layers(name, block, write=write, observe=observe)
            with clock.of(self.host.flops(x, stream.text, layers)):
                if step is not None and self._reuse.carries_residual:
                    velocities[name], residuals[name] = self.host.forward_residual(x, t, stream.text, layers)
                elif self._replay is not None and step is not None:
                    velocities[name] = self._replay.forward(name, x, t, stream.text, layers)
                else:
                    velocities[name] = self.host.forward(x, t, stream.text, layers)
        cond = velocities["cond"]
        if "uncond" not in velocities:
            return cond
        uncond = velocities["uncond"].float()
        return uncond + self.guidance_scale * (cond.float() - uncond)

    def _turns(self, chunk: int) -> list[Turn]:
        """The steps of a chunk, as reuse policies see them."""
        times, sigmas = self.schedule.timesteps, (*self.schedule.sigmas, 0.0)
        final = self.chunks is not None and chunk == self.chunks - 1
        return [
            Turn(chunk, k, len(times), t, sigmas[k], sigmas[k + 1], last=final and k == len(times) - 1)
            for k, t in enumerate(times)
        ]

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
        if self._staggered is not None:
            frames = self._begin_staggered(self._staggered, latents)
            self._first_frames = frames if self.decode else None
            return
        self._begin()
        block = self._admit(1, role="anchor" if self.history.blocks else "live")  # as the prompt is, so is its image
        written = self._write(latents, block, Clock(), given=True)
        if not (self.sampler.sound(latents) & torch.isfinite(written).all()).item():
            raise NonFiniteError("the first image leads to NaN or infinite values: is it finite, and in [-1, 1]?")
        frames = self._decode(latents)
        self._commit(block, latents, self._compress(latents, frames, block))
        self._first_frames = frames if self.decode else None
        self.frame = 1

    def _obey(self) -> None:
        """A prompt that was set since the last chunk comes into force."""
        if self._pending is not None:
            # where a prompt is part of the sequence, it ends where the one before it did: frames stay where they are
            old, new = self._streams["cond"].text, self._pending
            start = old.start + old.embeds.shape[1] - new.embeds.shape[1]
            self._streams["cond"].text = replace(new, start=start)
            if self._staggered is not None:
                self._staggered.texts = {name: stream.text for name, stream in self._streams.items()}
            if self._pending_mode in ("flush", "cut"):
                self.history.forget(self.policy.flush(self.history.table()))
                self._forget_latents()
                self._cut = CUT_FRAMES if self._pending_mode == "cut" else 0
            elif self._pending_mode == "recache" and self._staggered is not None:
                self._staggered.rebuild()
            elif self._pending_mode == "recache" and self._latents is not None:
                self._begin()
                self._recache(self._latents)
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

    def _noise_state(self) -> list[Tensor]:
        return self.noise.state() if isinstance(self.noise, NoiseSource) else []

    def _restore_noise(self, state: list[Tensor]) -> None:
        if isinstance(self.noise, NoiseSource):
            self.noise.restore(state)


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
    """The sizes a policy needs, of a take of `host` at `geometry`; without a compressor, the model's own counts."""
    form = storage_form(history_dtype)
    itemsize = torch.empty((), dtype=host.dtype).element_size()
    return HistoryShape(
        host.layers, host.kv_heads, host.head_dim, itemsize, geometry.tokens_per_frame, geometry.chunk_frames,
        batch, streams, compressed_tokens=(compressor or host.compressor).tokens(geometry),
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
