"""What is compared: every policy that has a name, at several budgets, and the controls that keep the figures honest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ...compressors import Compressor
from ...compressors import parse as parse_compressor
from ...errors import LongtakeError
from ...named import spec as described
from ...plan import HistoryShape
from ...policies import FullHistory, KVPolicy, PackCache, SlidingWindow, registry
from ...reuse import NoReuse, ReusePolicy
from ...reuse import registry as reuses

TRUTH, FROZEN, LOOP, NO_HISTORY, SHUFFLED = "truth", "frozen", "loop", "no history", "shuffled"
CONTROLS = (TRUTH, FROZEN, LOOP, NO_HISTORY, SHUFFLED)
OWN = "own"  # compressor
MODEL_FREE = (TRUTH, FROZEN, LOOP)  # pictures made of the given frames, without a model


@dataclass(frozen=True)
class Arm:
    """One row of a comparison. `budget` is in bytes of history and None where nothing was fitted; `reuse` is None where
    every forward is computed; `compressor` names one other than the model's own."""

    name: str
    policy: KVPolicy | None = None
    control: str = ""
    budget: int | None = None
    reuse: ReusePolicy | None = None
    reuse_name: str = ""
    compressor: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What identifies the arm: name, the policy's own name and options, budget; and the same of reuse, if any."""
        policy = registry.describe(self.policy) if self.policy is not None else None
        told: dict[str, Any] = {"name": self.name, "control": self.control, "policy": policy, "budget": self.budget}
        if self.reuse is not None:
            told |= {"reuse": reuses.describe(self.reuse), "reuse_name": self.reuse_name}
        if self.compressor:
            told["compressor"] = _compressor(self.compressor).describe()
        return told

    @property
    def compresses(self) -> bool:
        """Whether a compressor has a part in what comes out."""
        return self.policy is not None and "compressed" in self.policy.requires

    def made_by(self) -> Compressor | None:
        """The compressor of a take, None for the model's own."""
        return _compressor(self.compressor) if self.compressor else None

    @property
    def reference(self) -> Arm | None:
        """The arm that this one should equal but for what it saves: the same policy with every forward computed."""
        return None if self.reuse is None else replace(self, reuse=None, reuse_name="")


def controls(shape: HistoryShape, clip: int) -> list[Arm]:
    """The five rows that every table has; `clip` is the length of a training clip in latent frames, and what the
    shuffled history's model sees: a model shown more than it was trained on may look away from anything."""
    seen = max(clip, 2 * shape.chunk_frames)
    policies: dict[str, KVPolicy] = {
        NO_HISTORY: SlidingWindow(shape.chunk_frames, sink=0), SHUFFLED: SlidingWindow(seen, sink=0),
    }  # fmt: skip
    return [Arm(name, policies.get(name), name) for name in CONTROLS]


def arms(specs: Sequence[str], frames: Sequence[int], shape: HistoryShape, notes: list[str]) -> list[Arm]:
    """Policies of `specs` ("window:sink=0", "packcache", …; empty: all that have a name, the window also without a
    sink), each fitted to the bytes of so many latent frames of K/V; without `frames`, as they are.

    A policy that cannot be fitted stands once, as it is, if it works for such a take; why a row is missing, and which
    options fitting has changed, goes into `notes`. Raises LongtakeError for an unknown policy.
    """
    found: list[Arm] = []
    for spec in dict.fromkeys(specs or every()):
        policy = registry.parse(spec)
        if isinstance(policy, FullHistory) or not frames:
            candidates: list[tuple[int | None, KVPolicy]] = [(None, policy)]
        else:
            candidates = _fitted(spec, policy, [n * shape.frame_bytes for n in dict.fromkeys(frames)], shape, notes)
        for budget, chosen in candidates:
            whole = budget is not None or not frames or isinstance(policy, FullHistory)
            name = spec if whole else f"{spec} (not fitted)"
            try:
                chosen = _measured(chosen, shape)
                chosen.settle(shape).check(shape)
            except LongtakeError as error:
                notes.append(f"{_at(spec, budget)}: {error}")
                continue
            if same := next((arm for arm in found if arm.policy == chosen), None):
                notes.append(f"{_at(spec, budget)} is the same policy as {_at(same.name, same.budget)}")
                continue
            found.append(Arm(name, chosen, budget=budget))
    return found


def with_compressors(rows: Sequence[Arm], specs: Sequence[str]) -> list[Arm]:
    """The rows, those that compress once under each compressor of `specs` ("own" is the model's); without specs as they
    are. Raises LongtakeError for a compressor that there is none of, and if no row compresses."""
    if not specs:
        return list(rows)
    for spec in specs:
        if spec != OWN:
            _compressor(spec)
    if not any(row.compresses for row in rows):
        raise LongtakeError("--compressor: no policy here compresses; add one that does, such as packforcing")
    found: list[Arm] = []
    for row in rows:
        others = [replace(row, name=f"{row.name} ({spec})", compressor=spec) for spec in specs if spec != OWN]
        found += [*([row] if OWN in specs else []), *others] if row.compresses else [row]
    return found


def take_arms(
    specs: Sequence[str], frames: Sequence[int], reuse: Sequence[str], shape: HistoryShape, own: KVPolicy,
    notes: list[str],
) -> list[Arm]:  # fmt: skip
    """Policies of free takes, as their specs have them, or fitted to the bytes of so many latent frames where `frames`
    are given; each of them with each kind of reuse. Without specs it is the model's `own` policy.

    Raises LongtakeError for an unknown policy or reuse policy.
    """
    rows: list[Arm] = []
    if frames:
        rows = arms(specs or [described(own)], frames, shape, notes)
    for spec in () if frames else dict.fromkeys(specs or [described(own)]):
        policy = registry.parse(spec) if specs else own
        try:
            policy = _measured(policy, shape)
            policy.settle(shape).check(shape)
        except LongtakeError as error:
            notes.append(f"{spec}: {error}")
            continue
        rows.append(Arm(spec, policy))
    found: list[Arm] = []
    for row in rows:
        for name in dict.fromkeys(reuse):
            parsed = reuses.parse(name)
            arm = row if isinstance(parsed, NoReuse) else replace(row, reuse=parsed, reuse_name=name)
            if arm not in found:
                found.append(arm)
    return found


def every() -> list[str]:
    """Specs of all policies that have a name and work without options; the window also without a sink, and with its
    frames moved to where training had them."""
    names = []
    for name in sorted(registry.available()):
        try:
            registry.parse(name)
        except LongtakeError:  # it has to be told something
            continue
        names += ["window:sink=0", "window", "window:positions=slots"] if name == "window" else [name]
    return names


def _fitted(
    spec: str, policy: KVPolicy, budgets: Sequence[int], shape: HistoryShape, notes: list[str]
) -> list[tuple[int | None, KVPolicy]]:
    found: list[tuple[int | None, KVPolicy]] = []
    for budget in sorted(budgets):
        try:
            fitted = policy.fit(budget, shape)
        except LongtakeError as error:
            notes.append(f"{_at(spec, budget)}: {error}")
            continue
        found.append((budget, fitted))
        if other := _overruled(spec, policy, fitted):
            notes.append(f"{_at(spec, budget)} is fitted with {other}")
    return found or [(None, policy)]


def _measured(policy: KVPolicy, shape: HistoryShape) -> KVPolicy:
    """The policy with the model's measured decay where it goes by it: that is a note beside the model, and the hash of
    the model's files does not hold it. Raises LongtakeError if there is no such note."""
    return policy.settle(shape) if isinstance(policy, PackCache) else policy


def _overruled(spec: str, given: KVPolicy, fitted: KVPolicy) -> str:
    """Options that a spec names and fitting has changed, as they are now."""
    (_, before), (_, after) = registry.describe(given), registry.describe(fitted)
    named = {option.partition("=")[0].strip() for option in spec.partition(":")[2].split(",")}
    return ", ".join(f"{key}={after[key]}" for key in after if key in named and after[key] != before.get(key))


@lru_cache(maxsize=8)
def _compressor(spec: str) -> Compressor:
    return parse_compressor(spec)


def _at(spec: str, budget: int | None) -> str:
    return spec if budget is None else f"{spec} at {budget // 1024} KiB"
