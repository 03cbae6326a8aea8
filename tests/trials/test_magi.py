"""FlowCache on MAGI-1 reproduces the authors' loop: decisions exactly, latents to 1e-4, KV compression included.

The order of events is written at `flowcache_loop`; what a memory must offer, at `Memory`; when the survivors' order
matters, at `ReferenceMemory.compress`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.trials.magi import (
    Layer,
    MagiConfig,
    RotaryTable,
    Weights,
    attention,
    chunk_positions,
    forward_chunk,
    patch_tokens,
    rotary_table,
    rotate,
    schedule,
)

GOLDEN = Path(__file__).parents[1] / "goldens" / "magi_tiny_flowcache_loop.safetensors"
INACTIVE, COMPUTED, REUSED = 0, 1, 2

Select = Callable[[Tensor, Tensor], Tensor]
"""(rotated queries [n, Hq, D], rotated keys [Hk, L, D]) -> kept token indices [Hk, kept], best first."""


class Memory(Protocol):
    """What the loop asks of the past."""

    layers: Sequence[Layer]

    def begin(self, chunk: int, positions: Tensor) -> None:
        """The next forward is this chunk's, with its tokens at positions [N, 3].

        It sees everything held of earlier chunks, then itself, and its own K/V replaces what was held of it.
        """

    def tokens(self) -> int:
        """Tokens held, per layer and KV head."""

    def compress(self, clean: list[int], select: Select) -> None:
        """Replace all that is held of the chunks in clean by the tokens that select keeps, per layer and KV head."""


# --- the slow, obvious memory ---------------------------------------------------------------------


@dataclass
class ReferenceLayer:
    """Rotated K/V of one layer by chunk id, each [1, n, Hk, D], plus the queries of the last forward."""

    table: RotaryTable
    held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    chunk: int | None = None
    positions: Tensor | None = None
    last_queries: Tensor | None = None  # [N, Hq, D]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, self.positions, self.table), rotate(k, self.positions, self.table)
        self.last_queries = q[0]
        self.held[self.chunk] = k, v
        return attention(q, *self.rows([chunk for chunk in sorted(self.held) if chunk <= self.chunk]))

    def rows(self, chunks: list[int]) -> tuple[Tensor, Tensor]:
        """K and V of these chunks, one after the other: [1, n, Hk, D] each."""
        return tuple(torch.cat([self.held[chunk][i] for chunk in chunks], dim=1) for i in (0, 1))


class ReferenceMemory:
    """One `ReferenceLayer` per layer.

    sort_survivors: keep the survivors of a compression in their old order instead of best first.
    """

    def __init__(self, layers: int, table: RotaryTable, sort_survivors: bool = False) -> None:
        self.layers = [ReferenceLayer(table) for _ in range(layers)]
        self.sort_survivors = sort_survivors

    def begin(self, chunk: int, positions: Tensor) -> None:
        for layer in self.layers:
            layer.chunk, layer.positions = chunk, positions

    def tokens(self) -> int:
        return sum(k.shape[1] for k, _ in self.layers[0].held.values())

    def compress(self, clean: list[int], select: Select) -> None:
        """Survivors are stored under the newest clean chunk, ahead of all active ones, best score first in each head.

        Attention does not see that order, the next compression does: its max-pool runs over the stored order, so
        "neighbours" of a survivor are the tokens of next higher and lower score, not those beside it in the picture.
        """
        clean = [chunk for chunk in clean if chunk in self.layers[0].held]
        for layer in self.layers:
            keys, values = (x[0].transpose(0, 1) for x in layer.rows(clean))  # [Hk, L, D]
            keep = select(layer.last_queries, keys)
            if self.sort_survivors:
                keep = keep.sort(dim=-1).values
            index = keep[..., None].expand(-1, -1, keys.shape[-1])
            kept = tuple(x.gather(1, index).transpose(0, 1)[None] for x in (keys, values))
            for chunk in clean:
                del layer.held[chunk]
            layer.held[clean[-1]] = kept


@dataclass
class AloneLayer:
    """A pass in which the chunk sees itself only and leaves nothing behind."""

    table: RotaryTable
    positions: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(rotate(q, self.positions, self.table), rotate(k, self.positions, self.table), v)


# --- the method -----------------------------------------------------------------------------------


def token_scores(queries: Tensor, keys: Tensor, mix: float, pool: int = 7) -> Tensor:
    """FlowCache's score λ·importance - (1 - λ)·redundancy over the clean tokens, in their stored order: [Hk, L].

    queries [n, Hq, D], keys [Hk, L, D], both rotated. Grouped query heads: the maximum of their logits, before the
    softmax.
    """
    heads, count, dim = keys.shape
    grouped = queries.unflatten(1, (heads, -1))  # [n, Hk, G, D]
    logits = torch.einsum("nhgd,hld->hgnl", grouped, keys).amax(dim=1) / dim**0.5
    importance = logits.softmax(dim=-1).mean(dim=1)  # [Hk, L]
    importance = torch.max_pool1d(importance, pool, stride=1, padding=pool // 2)  # pads with -inf
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = (unit * unit.sum(dim=1, keepdim=True)).sum(dim=-1)
    redundancy = ((cosine - 1) / count).softmax(dim=-1)
    return mix * importance - (1 - mix) * redundancy


@dataclass(frozen=True)
class Run:
    """One run of the golden: its settings under the golden's own names, and the tiny model's sizes in tokens."""

    chunks: int
    num_steps: int
    window: int
    threshold: float
    warmup: int
    compress: bool
    B_total: int | None
    strategy: str | None
    query_granularity: str | None
    mix_lambda: float | None
    discard_nearly_clean: bool
    chunk_frames: int
    frame_tokens: int

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_frames * self.frame_tokens

    def select(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Evict one chunk's worth of tokens: keep the best tokens, or the frames with the best mean score."""
        asking = {"chunk": self.chunk_tokens, "frame": self.frame_tokens}[self.query_granularity]
        scores = token_scores(queries[-asking:], keys, self.mix_lambda)
        keep = keys.shape[1] - self.chunk_tokens
        group = {"token": 1, "frame": self.frame_tokens}[self.strategy]
        best = scores.unflatten(1, (-1, group)).mean(dim=-1).topk(keep // group, dim=-1).indices
        return (best[..., None] * group + torch.arange(group)).flatten(1)


@dataclass
class Chunk:
    """What the loop remembers of one chunk beside its latents: FlowCache's reuse state."""

    done: int = 0  # denoising steps behind it, computed or reused
    accumulated: float = 0.0  # relative change of the feature since the last computed step
    feature: Tensor | None = None  # of the previous step, computed or reused
    update: Tensor | None = None  # Δx of the last step

    def reuses(self, feature: Tensor, run: Run, forced: bool) -> bool:
        """Decide this step from the feature [1, N, E]; whatever the answer, it is the next step's reference."""
        before, self.feature = self.feature, feature
        if forced or before is None or self.done < run.warmup:
            self.accumulated = 0.0
            return False
        change = (feature - before).abs().mean() / (before.abs().mean() + 1e-8)
        path = self.accumulated + change.item()
        self.accumulated = path if path < run.threshold else 0.0
        return path < run.threshold


@dataclass
class Trace:
    """decision, accumulator [step, chunk]; latents [step, C, F, H, W] of the whole video after each global step.

    compressions: {"step", "tokens_before", "tokens_after"} of each; the step after which it happened.
    """

    decision: Tensor
    accumulator: Tensor
    latents: Tensor
    compressions: list[dict[str, int]]


def flowcache_loop(
    weights: Weights, cfg: MagiConfig, run: Run, noise: Tensor, text: Tensor, mask: Tensor, memory: Memory
) -> Trace:
    """Denoise a whole video, chunks staggered; noise [1, C, F, H, W], text [chunks, S, E], mask [chunks, S].

    p = num_steps / window steps make a stage; the video takes chunks + window - 1 stages. In stage s the active
    chunks are those of s - window + 1 .. s that exist; one enters at the start of each of the first `chunks` stages.
    Each global step, in this order:

    1. Decide. For every active chunk, ascending, from the latents as the previous step left them: feature = patch
       embedding of the chunk. Computed when it is the first or the last global step, the chunk's first step, or one
       of its first `warmup` steps; otherwise by the accumulated relative change. All decisions are made before the
       first forward.
    2. Forward. Every chunk to be computed, alone, ascending: at time t[done], seeing all that is held of earlier
       chunks (of those computed in this step already the new K/V, of reused ones the K/V of their last computed step,
       of finished ones what their last computed, still noisy, step left: there is no clean pass) and itself. Its K/V
       replaces what was held of it, layer by layer, in the forward. A chunk begins to be held with its first forward.
    3. Integrate. All active chunks: computed x += (t[done + 1] - t[done])·velocity, and this update is remembered;
       reused x += the remembered update, unchanged, though the time step has grown. Then done += 1.
    4. Compress, if B_total chunks' worth of tokens are held, another chunk is still to enter, and the newest chunk
       has just done p steps (so: at the end of a stage, the last moment before the store would overflow). The clean
       tokens are all that is left of the chunks with done == num_steps, the one finished by this very step included:
       window - 1 chunks are unfinished then, so B_total > window means at least two chunks' worth. One chunk's worth
       is evicted from their union, in each layer and KV head by itself. The queries are those of the last forward
       that ran, of whatever chunk and step; keys and queries are rotated at their absolute positions, which the
       survivors keep. Survivors stand before all unfinished chunks.

    With the nearly clean pass, step 2 forwards the first active chunk once more if its t > 0.3, seeing itself only
    and storing nothing; its velocity is 0.7·(with history) + 0.3·(alone). Skipped when that chunk is reused. The 0.3
    of the schedule is a float32 just above 0.3 and counts.
    """
    times = schedule(run.num_steps)
    stage_steps = run.num_steps // run.window
    total = stage_steps * (run.chunks + run.window - 1)
    table = rotary_table(weights)
    grid = [size // cfg.patch for size in noise.shape[-2:]]
    x = list(noise.split(run.chunk_frames, dim=2))
    state = [Chunk() for _ in x]
    decisions = torch.zeros(total, run.chunks, dtype=torch.uint8)
    accumulators = torch.zeros(total, run.chunks, dtype=torch.float64)
    latents, compressions = [], []

    for step in range(total):
        stage = step // stage_steps
        active = range(max(0, stage - run.window + 1), min(run.chunks, stage + 1))

        forced = step in (0, total - 1)
        for c in active:
            reused = state[c].reuses(patch_tokens(weights, x[c]), run, forced)
            decisions[step, c] = REUSED if reused else COMPUTED
            accumulators[step, c] = state[c].accumulated

        velocity = {}
        for c in active:
            if decisions[step, c] == REUSED:
                continue
            t = times[state[c].done]
            positions = chunk_positions(c * run.chunk_frames, run.chunk_frames, *grid)
            memory.begin(c, positions)
            velocity[c] = forward_chunk(weights, cfg, x[c], t, text[c], mask[c], memory.layers)
            if not run.discard_nearly_clean and c == active[0] and t.item() > 0.3:
                alone = [AloneLayer(table, positions)] * len(memory.layers)
                velocity[c] = 0.7 * velocity[c] + 0.3 * forward_chunk(weights, cfg, x[c], t, text[c], mask[c], alone)

        for c in active:
            if c in velocity:
                state[c].update = (times[state[c].done + 1] - times[state[c].done]) * velocity[c]
            x[c] = x[c] + state[c].update
            state[c].done += 1

        before = memory.tokens()
        if (
            run.compress
            and before >= run.B_total * run.chunk_tokens
            and active[-1] + 1 < run.chunks
            and state[active[-1]].done == stage_steps
        ):
            memory.compress([c for c in range(run.chunks) if state[c].done == run.num_steps], run.select)
            compressions.append({"step": step, "tokens_before": before, "tokens_after": memory.tokens()})

        latents.append(torch.cat(x, dim=2)[0])
    return Trace(decisions, accumulators, torch.stack(latents), compressions)


# --- the claims -----------------------------------------------------------------------------------


@dataclass
class Golden:
    tensors: dict[str, Tensor]
    config: dict
    runs: dict[str, dict]

    def run(self, key: str) -> Run:
        names = Run.__dataclass_fields__
        frames = self.config["cw"]
        sizes = {"chunk_frames": frames, "frame_tokens": self.config["tokens_per_chunk"] // frames}
        return Run(**{name: value for name, value in self.runs[key].items() if name in names}, **sizes)

    def model(self, num_steps: int) -> tuple[Weights, MagiConfig]:
        sizes = self.config["model"]
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_query_groups"]
        weights = {name.removeprefix("weights/"): x for name, x in self.tensors.items() if name.startswith("weights/")}
        return weights, MagiConfig(heads, kv_heads, self.config["patch_size"], step_size=2 * num_steps / 4)

    def replay(self, key: str, sort_survivors: bool = False) -> tuple[Trace, ReferenceMemory]:
        run, inputs = self.run(key), self.runs[key]["inputs"]
        noise, text, mask = (self.tensors[f"{inputs}/{name}"] for name in ("noise", "y", "text_mask"))
        weights, cfg = self.model(run.num_steps)
        memory = ReferenceMemory(self.config["model"]["num_layers"], rotary_table(weights), sort_survivors)
        with torch.no_grad():
            return flowcache_loop(weights, cfg, run, noise, text[0], mask[0], memory), memory


@pytest.fixture(scope="module")
def golden() -> Golden:
    with safe_open(GOLDEN, "pt") as file:
        meta = file.metadata()
    return Golden(load_file(GOLDEN), json.loads(meta["config"]), {run["key"]: run for run in json.loads(meta["runs"])})


RUNS = ["off", "on", "on_low", "off_keep_nearly_clean"]
COMPRESSED = ["compress_B5_token_chunk", "compress_B5_on", "compress_B6_frame_frame_on"]


@pytest.mark.parametrize("key", RUNS + COMPRESSED)
def test_the_loop_reproduces_the_authors_run(golden: Golden, key: str) -> None:
    trace, _ = golden.replay(key)
    want = {name: golden.tensors[f"{key}/{name}"] for name in ("decision", "accumulator", "latents_after_step")}
    assert torch.equal(trace.decision, want["decision"])
    assert trace.compressions == golden.runs[key]["compressions"]
    torch.testing.assert_close(trace.accumulator, want["accumulator"], rtol=0, atol=1e-6)
    torch.testing.assert_close(trace.latents, want["latents_after_step"], rtol=0, atol=1e-4)
    torch.testing.assert_close(trace.latents[-1:], golden.tensors[f"{key}/final_latents"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", COMPRESSED)
def test_the_store_ends_with_the_authors_rows_in_their_order(golden: Golden, key: str) -> None:
    _, memory = golden.replay(key)
    layer = memory.layers[0]
    rows = torch.cat(layer.rows(sorted(layer.held)), dim=-1)[0]  # [tokens, Hk, K | V]
    torch.testing.assert_close(rows, golden.tensors[f"{key}/kv_cache_layer0"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", COMPRESSED)
def test_the_order_of_survivors_matters_from_the_second_compression_on(golden: Golden, key: str) -> None:
    trace, _ = golden.replay(key, sort_survivors=True)
    error = (trace.latents - golden.tensors[f"{key}/latents_after_step"]).abs().amax(dim=(1, 2, 3, 4))
    second = golden.runs[key]["compressions"][1]["step"]
    assert error[: second + 1].max() < 1e-4
    assert error[-1] > 5e-2
