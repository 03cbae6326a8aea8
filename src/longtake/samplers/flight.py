"""Chunks in flight, and a staggered take written down: where it stands, its chunks with their solvers and prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..hosts.base import TextState
from ..reuse import Decision
from .rollout import Finished
from .solvers import Solver

if TYPE_CHECKING:
    from .staggered import Staggered

_PLACE = ("origin", "until", "ends_at", "frame", "chunk", "row", "entered")  # where a take stands
_NUMBERS = ("chunk", "block", "frame", "span", "start", "chunks", "step")  # of a chunk in flight


@dataclass
class InFlight:
    """A chunk that is being denoised."""

    chunk: int  # number in the take
    block: int  # its id in the history
    frame: int  # first latent frame, in the take
    span: int
    start: int  # row of its first step
    x: Tensor  # fp32 [B, C, f, h, w]
    solver: Solver
    texts: dict[str, TextState]  # as the passes name them
    said: dict[str, TextState]  # the take's prompts when it entered …
    chunks: int | None  # … and its chunks, if they were known
    given: Tensor | None = None  # latents [B, C, g, h, w] that its first frames have at every step
    step: int = 0  # steps taken


def written(take: Staggered) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """See `Staggered.state_dict`."""
    tensors: dict[str, Tensor] = {}
    if take.tail is not None:
        tensors["tail"] = take.tail
    if take.begun_with is not None:
        tensors["given"] = take.begun_with
    texts: list[TextState] = []
    live = []
    for i, chunk in enumerate(take.live):
        solver, told = chunk.solver.state_dict()
        tensors[f"live/{i}/x"] = chunk.x
        if chunk.given is not None:
            tensors[f"live/{i}/given"] = chunk.given
        tensors |= {f"live/{i}/solver/{name}": x for name, x in solver.items()}
        for text in chunk.said.values():
            if not any(text is known for known in texts):
                texts.append(text)
        said = {name: next(k for k, known in enumerate(texts) if known is text) for name, text in chunk.said.items()}
        live.append({name: getattr(chunk, name) for name in _NUMBERS} | {"solver": told, "said": said})
    tensors |= {f"texts/{k}": text.embeds for k, text in enumerate(texts)}
    tensors |= {f"done/{i}": finished.latents for i, finished in enumerate(take.done)}
    tensors |= {f"kept/{block}": x for block, (x, _) in (take.kept or {}).items()}
    done = [
        {"chunk": f.chunk, "frame": f.frame, "attended": f.attended, "decisions": [asdict(d) for d in f.decisions]}
        for f in take.done
    ]
    kept = {str(block): timestep for block, (_, timestep) in (take.kept or {}).items()}
    return tensors, {name: getattr(take, name) for name in _PLACE} | {"live": live, "done": done, "kept": kept}


def read(take: Staggered, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """See `Staggered.load_state_dict`."""
    device = take.host.device
    at = lambda name: tensors[name].to(device) if name in tensors else None
    for name in _PLACE:
        setattr(take, name, meta[name])
    take.tail, take.begun_with = at("tail"), at("given")
    take.forget_plan()
    numbers = sorted({int(name.removeprefix("texts/")) for name in tensors if name.startswith("texts/")})
    texts = [take.host.text_state(tensors[f"texts/{k}"]) for k in numbers]
    take.live = []
    for i, told in enumerate(meta["live"]):
        said = {name: texts[k] for name, k in told["said"].items()}
        solver, start = take.solver(), f"live/{i}/solver/"
        held = {k.removeprefix(start): v.to(device) for k, v in tensors.items() if k.startswith(start)}
        solver.load_state_dict(held, told["solver"])
        x = at(f"live/{i}/x")
        assert x is not None
        take.live.append(InFlight(
            **{name: told[name] for name in _NUMBERS}, x=x, solver=solver, said=said,
            texts=take.host.chunk_texts(said, told["chunk"], told["chunks"]), given=at(f"live/{i}/given"),
        ))  # fmt: skip
    take.done = []
    for i, told in enumerate(meta["done"]):
        decisions = tuple(Decision(**decision) for decision in told["decisions"])
        latents = tensors[f"done/{i}"].to(device)
        take.done.append(Finished(told["chunk"], told["frame"], latents, told["attended"], decisions))
    if take.kept is not None:
        kept = meta.get("kept", {})
        take.kept = {int(block): (tensors[f"kept/{block}"].to(device), t) for block, t in kept.items()}
