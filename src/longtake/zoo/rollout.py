"""A rollout that gradients pass through: the plans of a KV policy carried out with plain concatenation.

What a take does in preallocated buffers, this does in new tensors, so that a loss on a later chunk reaches the
compressor that made the tokens an earlier one is remembered by. A full-resolution past is detached, as is the past that
compressed tokens see on their way through the model: a compressor learns from what its own tokens do, chunk by chunk.

Letters: B takes, L layers, N tokens, H heads, D head dim.
"""

from __future__ import annotations

import contextlib
from dataclasses import MISSING, dataclass, fields, replace

import torch
from torch import Tensor

from ..attention import attend
from ..compressors import Compressor, TakeState
from ..decoding import half_on_cpu
from ..errors import LongtakeError
from ..geometry import Geometry
from ..hosts.base import TextState
from ..hosts.wan import CausalWan
from ..plan import COMPRESSED, FULL, Block, BlockTable, Choose, Entry, Form, HistoryShape, Plan, Signals, as_tensor
from ..policies import KVPolicy
from ..rope import RotaryTable
from ..samplers.chunked import CLEAN_TIMESTEP


@dataclass
class _Held:
    """One form of one block: keys before rotation and values, per layer [B, N, H, D], and where its tokens stand."""

    k: list[Tensor]
    v: list[Tensor]
    base: Tensor
    step: Tensor


class _Layer:
    """A `LayerView` without buffers: what one layer's attention sees, and what it was given."""

    def __init__(self, rotary: RotaryTable, phases: Tensor, k: Tensor | None, v: Tensor | None) -> None:
        self.rotary, self.phases, self.past = rotary, phases, (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None, **_: object) -> Tensor:
        self.put(k, v)
        keys, values = [self.rotary.rotate(k, self.phases)], [v]
        past_k, past_v = self.past
        if past_k is not None and past_v is not None:
            keys, values = [past_k, *keys], [past_v, *values]
        return attend(self.rotary.rotate(q, self.phases), torch.cat(keys, 1), torch.cat(values, 1), backend=backend)

    def put(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v


class Rollout:
    """Takes in lockstep under `policy`. For every chunk: `begin`, any number of `velocity`, `commit`.

    fast: decode what the compressor sees in half precision where a CPU has it; most of the time goes there.

    `compressor` is needed by policies that ask for compressed forms; gradients reach its weights, and the host's own
    where they ask for any (LoRA). Raises LongtakeError for a policy that drops or fuses single tokens.
    """

    def __init__(
        self, host: CausalWan, policy: KVPolicy, geometry: Geometry, text: TextState,
        compressor: Compressor | None = None, fast: bool = False,
    ) -> None:  # fmt: skip
        self.host, self.policy, self.geometry, self.text, self.compressor = host, policy, geometry, text, compressor
        self.decoder = host.decoder() if compressor is not None and compressor.wants_pixels else None
        self.hurry = half_on_cpu if fast else lambda device: contextlib.nullcontext()
        self.state = TakeState()
        self.blocks: list[Block] = []
        self.held: dict[tuple[int, str], _Held] = {}
        self.frame = 0
        self.begun = 0

    def begin(self) -> None:
        """Plan the next chunk."""
        span = self.geometry.chunk_frames
        base, step = self.host.positions(self.geometry, self.frame, span)
        self.live = Block(self.begun, "live", self.frame, span, {FULL: Form(len(base))}, self.geometry.grid)
        self.begun += 1
        table = BlockTable(tuple(self.blocks), (self.live,), self.frame)
        self.plan = self.policy.plan(table, Signals(self.live.id))
        for drop in self.plan.drops:
            if drop.tokens is not None:
                raise self._unfit("drops single tokens")
            self._drop(drop.block, drop.form)
        self.phases = self._phases(base, step, self.plan.live_shift)
        self.here = base, step
        self.keys, self.values = self._past(self.plan)

    def velocity(self, x: Tensor, timestep: float) -> Tensor:
        """Velocity [B, C, f, h, w] of the chunk begun, in fp32."""
        return self._forward(x, timestep, self._layers(self.phases, self.keys, self.values))

    def commit(self, x0: Tensor) -> None:
        """The chunk begun becomes part of the past as x0 [B, C, f, h, w], in the forms its plan asked for."""
        x0 = x0.detach()
        keys, values = ([t.detach() for t in part] for part in (self.keys, self.values))
        with torch.no_grad():
            layers = self._layers(self.phases, keys, values)
            self._forward(x0, CLEAN_TIMESTEP, layers)
        self._hold(FULL, layers, *self.here)
        if self.compressor is not None:
            tokens = self._compress(x0)
            if COMPRESSED in self.plan.forms:
                base, step = self.compressor.positions(*self.here, self.geometry, self.live.span)
                layers = self._layers(self._phases(base, step, self.plan.live_shift), keys, values)
                if self.compressor.carry == "projection":
                    self.host.project(tokens, layers)
                else:
                    with self.host.bound(self.text, layers):
                        self.host.through(tokens, CLEAN_TIMESTEP)
                self._hold(COMPRESSED, layers, base, step)
        self.blocks.append(replace(self.live, role="committed"))
        self.frame += self.live.span

    # --- within -----------------------------------------------------------------------------------------------------

    def _compress(self, x0: Tensor) -> Tensor:
        assert self.compressor is not None
        with self.hurry(self.host.device):
            pixels = None if self.decoder is None else self.decoder.push(x0)
        tokens, self.state = self.compressor.compress(x0, pixels, self.state, self.host, self.geometry)
        return tokens

    def _hold(self, form: str, layers: list[_Layer], base: Tensor, step: Tensor) -> None:
        self.held[(self.live.id, form)] = _Held([v.k for v in layers], [v.v for v in layers], base, step)
        self.live = replace(self.live, forms={**self.live.forms, form: Form(len(base))})

    def _forward(self, x: Tensor, timestep: float, layers: list[_Layer]) -> Tensor:
        with self.host.bound(self.text, layers):
            return self.host.velocity(x, timestep).float()

    def _layers(self, phases: Tensor, keys: list[Tensor], values: list[Tensor]) -> list[_Layer]:
        past = zip(keys, values, strict=True) if keys else [(None, None)] * self.host.layers
        return [_Layer(self.host.rotary, phases, k, v) for k, v in past]

    def _phases(self, base: Tensor, step: Tensor, shift: float) -> Tensor:
        return self.host.rotary.phases((base + shift * step).to(self.host.device))

    def _past(self, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
        """Keys, rotated to where the plan puts them, and values of what it shows, per layer; empty for nothing."""
        seen: list[tuple[_Held, Tensor | None, float]] = []
        for entry in plan.entries:
            if isinstance(entry, Entry) and not entry.log_weight:
                tokens = None if entry.tokens is None else as_tensor(entry.tokens)
                seen.append((self.held[(entry.block, entry.form)], tokens, entry.shift))
            elif isinstance(entry, Choose):  # training has no queries to score with yet: the most recent stand in
                frames = {b.id: b.frame for b in self.blocks}
                picked = entry.candidates[-entry.k :]
                starts = entry.starts or [frames[b] for b in picked]
                seen += [
                    (self.held[(b, entry.form)], None, at - frames[b]) for b, at in zip(picked, starts, strict=True)
                ]
            else:
                raise self._unfit("fuses or weights tokens")
        if not seen:
            return [], []
        keys, values = [], []
        for layer in range(self.host.layers):
            k, v = [], []
            for held, tokens, shift in seen:
                place = slice(None) if tokens is None else tokens
                phases = self._phases(held.base[place], held.step[place], shift)
                k.append(self.host.rotary.rotate(held.k[layer][:, place], phases))
                v.append(held.v[layer][:, place])
            keys.append(torch.cat(k, 1))
            values.append(torch.cat(v, 1))
        return keys, values

    def _drop(self, block: int, form: str) -> None:
        del self.held[(block, form)]
        at = next(i for i, b in enumerate(self.blocks) if b.id == block)
        forms = {name: kept for name, kept in self.blocks[at].forms.items() if name != form}
        if forms:
            self.blocks[at] = replace(self.blocks[at], forms=forms)
        else:
            del self.blocks[at]

    def _unfit(self, what: str) -> LongtakeError:
        return LongtakeError(
            f"policy {self.policy.name or type(self.policy).__name__} {what}: a compressor is trained with policies "
            "that keep whole chunks, such as packforcing"
        )


def check_policy(policy: KVPolicy, shape: HistoryShape) -> None:
    """Raise LongtakeError if no compressor can be trained with this policy."""
    if "compressed" not in policy.requires:
        raise LongtakeError(
            f"policy {policy.name or type(policy).__name__} has no use for a compressor{_because(policy)}"
        )
    policy.check(shape)


def _because(policy: KVPolicy) -> str:
    """What to do, with the option that keeps a policy from compressing if it is one."""
    for field in fields(policy):
        usual = field.default
        if usual is MISSING or getattr(policy, field.name) == usual:
            continue
        try:
            if "compressed" in replace(policy, **{field.name: usual}).requires:
                given = f"{field.name}={getattr(policy, field.name)}"
                return f" with {given}: leave that away, or give {field.name}={usual}"
        except LongtakeError:  # it goes with another option only
            continue
    return ": give one that has, such as packforcing"
