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
            "steps": len(config.timesteps), "training_frames": config.training_frames, "about": config.about,
            "path": str(folder),
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
    """List the KV policies with their options, as `--policy NAME:key=value,…` takes them."""
    from .. import policies as package

    known: dict[str, dict[str, Any]] = {}
    for name, cls in sorted(package.available().items()):
        types = get_type_hints(cls)
        options = {
            f.name: {"type": getattr(types[f.name], "__name__", str(types[f.name])), "default": f.default}
            for f in fields(cls)
            if f.init
        }
        about = (cls.__doc__ or "").strip().partition("\n")[0]
        known[name] = {"class": cls.__name__, "options": options, "about": about}
    lines = []
    for name, policy in known.items():
        lines.append(f"{name}  ({policy['class']}) {policy['about']}")
        lines += [f"    {key}: {option['type']} = {option['default']}" for key, option in policy["options"].items()]
    lines += ["", "A policy of your own: --policy my_file.py:MyPolicy[:key=value,…]"]
    answer({"policies": known}, "\n".join(lines), as_json)
