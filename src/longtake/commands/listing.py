"""`longtake models` and `longtake policies`: what there is to choose from."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, get_type_hints

from .options import AsJson
from .shell import answer, bytes_text


def models(as_json: AsJson = False) -> None:
    """List the models inside the package, causal models known on the Hub, and the families `convert` knows."""
    from ..hosts.base import HostConfig
    from ..hosts.convert import FAMILIES
    from ..hosts.loading import KNOWN_CAUSAL, embedded

    own: dict[str, dict[str, Any]] = {}
    for name, folder in embedded().items():
        config = HostConfig.read(folder)
        own[name] = {
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "width": config.width, "height": config.height, "fps": config.fps, "chunk_frames": config.chunk_frames,
            "steps": config.steps or len(config.timesteps), "training_frames": config.training_frames,
            "about": config.about, "path": str(folder),
        }  # fmt: skip
    families = {name: asdict(family) for name, family in FAMILIES.items()}
    lines = ["Embedded (--model NAME)"]
    for name, m in own.items():
        lines.append(
            f"  {name}  {bytes_text(m['bytes'])}, {m['width']}x{m['height']} at {m['fps']:g} fps, chunks of "
            f"{m['chunk_frames']} latent frames, {m['steps']} steps"
        )
        lines += [f"    {m['about']}"] if m["about"] else []
    lines += ["", "Known causal models on the Hub (--model ID)"]
    lines += [f"  {name}  {family}" for name, family in KNOWN_CAUSAL.items()]
    lines += ["", "Families of checkpoints (longtake convert --family NAME)"]
    for name, family in FAMILIES.items():
        window = f"window {family.window}, sink {family.sink}" if family.window else "no window of its own"
        lines.append(
            f"  {name}  chunks of {family.chunk_frames}, {len(family.timesteps)} steps, trained on "
            f"{family.training_frames} latent frames, {window}"
        )
    answer({"embedded": own, "hub": KNOWN_CAUSAL, "families": families}, "\n".join(lines), as_json)


def policies(as_json: AsJson = False) -> None:
    """List KV policies and reuse policies with their options, as --policy and --reuse NAME:key=value take them."""
    from .. import policies as kv
    from .. import reuse

    known, reusing = _described(kv.available()), _described(reuse.available())
    lines = ["What of the past is kept and seen (--policy)", *_lines(known), ""]
    lines += ["A policy of your own: --policy my_file.py:MyPolicy[:key=value,…]", ""]
    lines += ["Which steps reuse an earlier result (--reuse)", *_lines(reusing), "", "Their slow / fast, by model"]
    lines += [
        f"    {name}: {p.slow:g} / {p.fast:g} (teacache {p.tea_slow:g} / {p.tea_fast:g}), metric {p.metric}, warm-up "
        f"{p.warmup}, last {p.last}, rescale {p.rescale}"
        for name, p in reuse.PRESETS.items()
    ]
    presets = {name: asdict(preset) for name, preset in reuse.PRESETS.items()}
    answer({"policies": known, "reuse": reusing, "reuse_presets": presets}, "\n".join(lines), as_json)


def _described(classes: dict[str, type[Any]]) -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    for name, cls in sorted(classes.items()):
        types = get_type_hints(cls)
        options = {
            f.name: {"type": getattr(types[f.name], "__name__", str(types[f.name])), "default": f.default}
            for f in fields(cls)
            if f.init and f.repr
        }
        about = (cls.__doc__ or "").strip().partition("\n")[0]
        known[name] = {"class": cls.__name__, "options": options, "about": about}
    return known


def _lines(known: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, policy in known.items():
        lines.append(f"{name}  ({policy['class']}) {policy['about']}")
        lines += [f"    {key}: {option['type']} = {option['default']}" for key, option in policy["options"].items()]
    return lines
