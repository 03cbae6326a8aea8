"""How attention to the past decays with distance: m_d = C·ρ^d, fitted to measured masses (PackCache §3.2).

Masses are averaged over queries, heads, layers, steps and chunks before the logarithm is taken, so that rare layers
that never look back do not rule the fit; the fit of every layer stands beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LongtakeError
from ..hosts.base import Host
from ..policies import FullHistory, KVPolicy, PackCache
from ..policies.allocation import decay_weights
from ..session import Session
from ..zoo import lanes
from .attention_mass import ChunkMass, HeatMap, MassProbe
from .compare.footage import Footage
from .compare.protocols import fork
from .provenance import provenance, write_report

LEAST_MASS = 1e-6  # below it a frame says more about rounding than about decay
SCHEMA = 1
SCENES = 4  # of a world, if nobody says how many


@dataclass(frozen=True)
class Decay:
    """log m_d = log C − α·d. `r2` is that of the weighted fit of the logarithms."""

    rho: float  # e^−α: what is left after one more latent frame
    c: float
    half_life: float  # latent frames, ln 2 / α; infinite where attention does not fall
    r2: float
    ages: int  # points fitted

    def mass(self, age: float) -> float:
        return self.c * self.rho**age


def fit(ages: Sequence[float], masses: Sequence[float], weights: Sequence[float] | None = None) -> Decay | None:
    """Weighted least squares over the logarithms; weights: how often each age was seen. None with fewer than two ages
    of any mass."""
    x, y = np.asarray(ages, float), np.asarray(masses, float)
    w = np.ones_like(x) if weights is None else np.asarray(weights, float)
    usable = (y >= LEAST_MASS) & (w > 0)
    if usable.sum() < 2:
        return None
    x, y, w = x[usable], np.log(y[usable]), w[usable] / w[usable].sum()
    mx, my = (w * x).sum(), (w * y).sum()
    spread = (w * (x - mx) ** 2).sum()
    slope = (w * (x - mx) * (y - my)).sum() / spread
    left = (w * (y - my - slope * (x - mx)) ** 2).sum()
    total = (w * (y - my) ** 2).sum()
    rho = math.exp(slope)
    half = math.log(2) / -slope if slope < 0 else math.inf
    r2 = 1.0 - left / total if total > 0 else 1.0
    return Decay(rho, math.exp(my - slope * mx), half, r2, int(usable.sum()))


@dataclass
class DecayReport:
    """Measured masses of takes, and what they say."""

    model: str
    policy: str
    stream: str
    takes: list[dict[str, Any]]  # prompt and seed
    chunks: list[ChunkMass]
    provenance: dict[str, Any]
    heat: list[HeatMap] = field(default_factory=list)

    def by_age(self, per_token: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ages [D], mass [layers, steps, D] of the history frame of that age, and chunks that had one [D]."""
        most = max((s.age for c in self.chunks for s in c.segments if s.kind == "history"), default=0)
        if not most:
            raise LongtakeError("no chunk had any history: make the take longer (--chunks 3 or more)")
        steps, layers = self.chunks[0].array().shape[:2]
        total, count = np.zeros((layers, steps, most)), np.zeros(most)
        for chunk in self.chunks:
            mass = chunk.array()
            for i, segment in enumerate(chunk.segments):
                if segment.kind == "history":
                    total[:, :, segment.age - 1] += mass[:, :, i].T / (segment.tokens if per_token else 1)
                    count[segment.age - 1] += 1
        seen = count > 0
        return np.arange(1, most + 1)[seen], (total / np.maximum(count, 1))[:, :, seen], count[seen]

    def by_step(self) -> dict[str, np.ndarray]:
        """Mass [steps] of text, anchors, history and the current chunk, mean over layers and chunks with a history."""
        past = [c for c in self.chunks if any(s.kind == "history" for s in c.segments)]
        sums: dict[str, np.ndarray] = {}
        for kind in ("text", "anchor", "history", "current"):
            rows = [c.array()[:, :, [s.kind == kind for s in c.segments]].sum(-1).mean(1) for c in past]
            if any(s.kind == kind for c in past for s in c.segments):
                sums[kind] = np.mean(rows, 0)
        return sums

    def decay(self, layer: int | None = None) -> Decay | None:
        """The fit of one layer, or of the mean over all."""
        ages, mass, count = self.by_age()
        return fit(ages.tolist(), (mass.mean(0) if layer is None else mass[layer]).mean(0).tolist(), count.tolist())

    def budget(self) -> dict[str, list[float]]:
        """Shares PackCache gives to the ages, newest first: as the paper has them, and for the fitted ρ."""
        default = PackCache()
        shares = {"rho 0.5": [float(b) for b in decay_weights(default.max_frames, 0.5)]}
        found = self.decay()
        if found is not None and 0 < found.rho < 1:
            ages = len(self.by_age()[0])
            shares[f"rho {found.rho:.3g}"] = [float(b) for b in decay_weights(ages, round(found.rho, 3))]
        return shares

    def as_dict(self) -> dict[str, Any]:
        ages, mass, count = self.by_age()
        _, per_token, _ = self.by_age(per_token=True)
        overall = self.decay()
        layers = [self.decay(layer) for layer in range(mass.shape[0])]
        digits = lambda x: np.round(x, 8).tolist()
        return {
            "schema": SCHEMA, "analysis": "decay", "model": self.model, "policy": self.policy, "stream": self.stream,
            "takes": self.takes, "rho": overall and overall.rho, "fit": overall and _json(overall),
            "fit_per_layer": [d and _json(d) for d in layers],
            "ages": ages.tolist(), "chunks_per_age": count.tolist(), "mass": digits(mass.mean((0, 1))),
            "mass_per_token": digits(per_token.mean((0, 1))), "mass_layer_step_age": digits(mass),
            "by_step": {kind: digits(values) for kind, values in self.by_step().items()}, "budget": self.budget(),
            "chunks": [c.as_dict() for c in self.chunks], "provenance": self.provenance,
        }  # fmt: skip

    def text(self) -> str:
        """For people."""
        found = self.decay()
        ages, mass, _ = self.by_age()
        past = "over true frames" if any(take.get("past") == "true" for take in self.takes) else "over its own past"
        takes = f"{len(self.chunks)} chunks of {len(self.takes)} takes"
        lines = [f"{self.model} under {self.policy}, {past}: {takes}"]
        for kind, values in self.by_step().items():
            lines.append(
                f"  {kind:8} {values.mean():.1%} of attention, {values[0]:.1%} → {values[-1]:.1%} over the steps"
            )
        for age, share in list(zip(ages, mass.mean((0, 1)), strict=True))[:6]:
            lines.append(f"  age {age:<4} {share:.3%}")
        if found is None:
            return "\n".join([*lines, "too few ages for a fit: make the take longer (--chunks)"])
        life = "never halves" if math.isinf(found.half_life) else f"halves every {found.half_life:.2f} latent frames"
        return "\n".join([*lines, f"rho {found.rho:.3f} per latent frame: attention {life} (R² {found.r2:.3f})"])

    def write(self, folder: Path, stem: str = "decay") -> list[Path]:
        """`stem`.json and the figures in `folder`. Raises LongtakeError if they cannot be written."""
        from .decay_figures import figures

        return write_report(folder, stem, json.dumps(self.as_dict()), figures(self))


def measure(
    host: Host, prompts: Sequence[str | None], *, seeds: Sequence[int] = (0,), chunks: int | None = None,
    policy: KVPolicy | None = None, stream: str = "cond", queries: int = 256, anchors: int = 0,
    heat_layers: Sequence[int] | None = None, progress: Any = None, **options: Any,
) -> DecayReport:  # fmt: skip
    """Run one take per prompt and seed and measure its attention.

    `chunks`: default as long as a training clip, beyond which a model is measured out of its depth. `anchors`: first
    latent frames that are no history. `heat_layers`: default the first, the middle and the last. Further options go to
    the session. Raises LongtakeError for policies whose view differs from head to head.
    """
    policy = policy or FullHistory()
    chunks = chunks or _clip(host)
    report = DecayReport(host.name, policy.name, stream, [], [], provenance(host.device))
    for number, (prompt, seed) in enumerate((p, s) for p in prompts for s in seeds):
        given = options if prompt is None else {**options, "prompt": prompt}
        take = Session(host, policy, seed=seed, chunks=chunks, decode=False, **given)
        with _watched(report, take, queries, anchors, heat_layers):
            for done, _ in enumerate(take, start=1):
                if progress is not None:
                    progress("takes", number * chunks + done, len(prompts) * len(seeds) * chunks)
        report.takes.append({"prompt": prompt, "seed": seed, "chunks": chunks, "past": "own"})
    return report


def measure_truth(
    host: Host, *, seeds: Sequence[int] = range(SCENES), chunks: int | None = None, policy: KVPolicy | None = None,
    stream: str = "cond", queries: int = 256, anchors: int = 0, heat_layers: Sequence[int] | None = None,
) -> DecayReport:  # fmt: skip
    """As `measure`, over a true past: in scenes of the world of lanes, which models of that world cannot begin by
    themselves, true chunks are committed one by one, and the chunk after each is generated and watched.

    Raises LongtakeError for a model of no world.
    """
    if host.config.world != lanes.WORLD:
        raise LongtakeError(f"{host.name} is of no world whose truth is known: measure over its own past (--past own)")
    policy = policy or FullHistory()
    chunks, span = chunks or _clip(host), host.config.chunk_frames
    report = DecayReport(host.name, policy.name, stream, [], [], provenance(host.device))
    for seed in seeds:
        footage = Footage(host, seed, chunks * span, lanes.GAPS)
        truth = footage.latents(chunks * span)
        take = Session(
            host, policy, prompt=footage.scene.caption, seed=seed, height=lanes.SIZE, width=lanes.SIZE, decode=False,
            chunks=chunks,
        )  # fmt: skip
        for number in range(1, chunks):
            take.extend(truth[:, :, (number - 1) * span : number * span])
            ahead = fork(take, seed, 1)
            with _watched(report, ahead, queries, anchors, heat_layers):
                next(ahead)
        report.takes.append({"prompt": footage.scene.caption, "seed": seed, "chunks": chunks, "past": "true"})
    return report


@contextmanager
def _watched(
    report: DecayReport, take: Session, queries: int, anchors: int, heat_layers: Sequence[int] | None
) -> Iterator[None]:
    """What the take's chunks look at within `with` is added to the report; the last heat maps stay."""
    if report.stream not in take.history.streams:
        raise LongtakeError(f"no stream {report.stream!r} here: this take has {', '.join(take.history.streams)}")
    layers = take.host.layers
    heat = tuple(sorted({0, layers // 2, layers - 1})) if heat_layers is None else tuple(heat_layers)
    probe = MassProbe(take.history, queries=queries, anchors=anchors, heat_layers=heat)
    with probe.watching():
        yield
    report.chunks += [c for c in probe.chunks if c.stream == report.stream]
    report.heat = [m for (stream, _), m in probe.heat.items() if stream == report.stream]


def _clip(host: Host) -> int:
    """Chunks of a training clip."""
    return max(2, host.config.training_frames // host.config.chunk_frames)


def _json(found: Decay) -> dict[str, Any]:
    """A fit as JSON values; a half-life without end is null."""
    return {k: v if math.isfinite(v) else None for k, v in asdict(found).items()}
