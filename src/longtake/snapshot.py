"""Snapshots: a session at a chunk boundary as one safetensors file, and back, bit-exactly."""

from __future__ import annotations

import json
import os
import platform
import secrets
import stat
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import policies
from . import reuse as reuse_policies
from .compressors import Compressor
from .errors import LongtakeError
from .history import History
from .history.store import Rows, Store
from .history.view import Live
from .hosts.base import Host
from .hosts.loading import load
from .plan import Block, Form
from .policies import KVPolicy
from .reuse import ReusePolicy
from .samplers.chunked import NoiseSource
from .samplers.masked import MaskedSampler
from .samplers.stagger import Stagger

if TYPE_CHECKING:
    from .session import Session

FORMAT = 3


def environment() -> dict[str, str]:
    """What a bit-exact continuation depends on beside the model."""
    import diffusers

    return {
        "torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def save(session: Session, path: Any) -> None:
    """Write to a temporary name beside `path`, then rename. Raises LongtakeError if it cannot be written."""
    path = Path(path)
    if not isinstance(session.noise, NoiseSource):
        raise LongtakeError("a session with noise= of its own cannot be snapshotted: its state is not the session's")
    tensors, meta = _history_state(session.history)
    for i, state in enumerate(session.noise.state()):
        tensors[f"rng/{i}"] = state
    for name, text in session.texts.items():
        tensors[f"text/{name}"] = text.embeds
    if session._pending is not None:
        tensors["text/pending"] = session._pending.embeds
    if session._first_frames is not None:
        tensors["first_frames"] = session._first_frames
    if session._ahead is not None:
        tensors["ahead/latents"], tensors["ahead/frames"] = session._ahead
    decoder_meta = None
    if session.decoder is not None:
        decoder, decoder_meta = session.decoder.state_dict()
        tensors.update({f"decoder/{k}": v for k, v in decoder.items()})
    made, rollout = session.rollout.state_dict()
    carried, reused = session._reuse.state_dict()
    tensors |= {f"rollout/{k}": v for k, v in made.items()} | {f"reuse/{k}": v for k, v in carried.items()}
    sampler = session.sampler
    description = {
        "format": FORMAT, "environment": environment(), "host": session.host.name, "device": session.host.device.type,
        "dtype": str(session.host.dtype), "weights": session.host.weights_digest(),
        "policy": policies.describe(session.policy), "reuse": reuse_policies.describe(session.reuse),
        "prompt": session._prompt, "negative": session._negative, "lockstep": session.lockstep,
        "guidance_scale": session.guidance_scale, "num_inference_steps": session.num_inference_steps,
        "height": session.geometry.height, "width": session.geometry.width, "chunks": session.chunks,
        "frames": session._frames, "starts": {name: text.start for name, text in session.texts.items()},
        "masked": asdict(sampler) if isinstance(sampler, MaskedSampler) else None,
        "stagger": asdict(sampler) if isinstance(sampler, Stagger) else None,
        "prompt_switch": [session.prompt_switch, session._pending_mode],
        "frame": session.frame, "index": session.index, "residency": session.history.residency,
        "history_dtype": session.history_dtype,
        "keep_latents": session.rollout.kept is not None, "decode": session.decode,
        "compressor": session.compressor and session.compressor.describe(),
        "decoder": decoder_meta, "history": meta, "rollout": rollout, "reused": reused,
        "generators": [g.device.type for g in session.noise.generators],
    }  # fmt: skip
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)  # by the umask; safetensors' own is for the owner alone
        save_file(_apart(tensors), temporary, {"longtake": json.dumps(description)})
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise LongtakeError(f"the snapshot cannot be written to {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def describe(path: Any) -> dict[str, Any]:
    """What a snapshot says of itself. Raises LongtakeError if it is none, or of another format."""
    if Path(path).is_dir():
        raise LongtakeError(f"{path} is a folder, no snapshot: give the file that `longtake generate --snapshot` wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise LongtakeError(f"{path} is not a readable snapshot: {error}") from error
    try:
        description = dict(json.loads(metadata["longtake"]))
    except (KeyError, TypeError, ValueError):
        raise LongtakeError(
            f"{path} is not a longtake snapshot, only a safetensors file: give one that `longtake generate --snapshot` "
            "or Session.snapshot wrote"
        ) from None
    if description.get("format") != FORMAT:
        raise LongtakeError(f"{path} has snapshot format {description.get('format')}; this version reads {FORMAT}")
    return description


def restore(
    cls: type[Session], path: Any, model: Host | Any, policy: KVPolicy | None, reuse: ReusePolicy | None,
    compressor: Compressor | None = None,
) -> Session:  # fmt: skip
    """See `Session.restore`."""
    description = describe(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise LongtakeError(f"{path} is not a readable snapshot: {error}") from error
    host = model if isinstance(model, Host) else load(model)
    if str(host.dtype) != description["dtype"]:
        raise LongtakeError(
            f"{path} was made with {description['dtype']} weights, the model has {host.dtype}: load it with that dtype"
        )
    if host.weights_digest() != description["weights"]:
        raise LongtakeError(
            f"{path} was made with the weights of {description['host']}, and {host.name} has others: load that model"
        )
    name, options = description["reuse"]
    if reuse is None and name not in reuse_policies.available():
        raise LongtakeError(f"the snapshot was made with reuse policy {name} {options}: pass it as reuse=")
    reuse = reuse or reuse_policies.build(name, options)
    made_with, fields_of = description["policy"]
    if policy is None and made_with not in policies.available():
        raise LongtakeError(
            f"the snapshot was made with policy {made_with or 'of a file'} {fields_of}, which no name is known for: "
            "pass it (policy=…, or --policy my_file.py:MyPolicy)"
        )
    policy = policy or policies.build(made_with, fields_of)
    masked, stagger = description["masked"], description["stagger"]
    sampler: Any = Stagger(**stagger) if stagger else masked and MaskedSampler(**masked)
    session = cls(
        host, policy, reuse=reuse,
        prompt_embeds=tensors["text/cond"], negative_prompt_embeds=tensors.get("text/uncond"),
        height=description["height"], width=description["width"],
        generator=[torch.Generator(device) for device in description["generators"]],
        num_inference_steps=description["num_inference_steps"], guidance_scale=description["guidance_scale"],
        chunks=description["chunks"], residency=description["residency"], decode=description["decode"],
        history_dtype=description.get("history_dtype"), keep_latents=description["keep_latents"], compressor=compressor,
        prompt_switch=description["prompt_switch"][0],
        sampler=sampler,
    )  # fmt: skip
    made_by, ours = description["compressor"], session.compressor and session.compressor.describe()
    if made_by != ours:
        raise LongtakeError(
            f"{path} was made with compressor {made_by}, this session has {ours}: pass that one as compressor="
        )
    if "ahead/latents" in tensors:
        session._ahead = tensors["ahead/latents"].to(host.device), tensors["ahead/frames"]
    for stream, text in session.texts.items():
        session.texts[stream] = text = replace(text, start=description["starts"][stream])
        if host.prefix(text) is not None and description["history"]["blocks"]:
            session.texts[stream] = replace(text, k=[], v=[])  # the history has them
    session._prompt, session._negative = description["prompt"], description["negative"]
    session.lockstep = description["lockstep"]
    session.frame, session.index = description["frame"], description["index"]
    session._first_frames = tensors.get("first_frames")
    session._frames = description["frames"]
    _, session._pending_mode = description["prompt_switch"]
    if "text/pending" in tensors:
        session._pending = host.text_state(tensors["text/pending"])
    session.noise.restore([tensors[f"rng/{i}"] for i in range(session.batch)])
    part = lambda start: {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    if session.decoder is not None:
        session.decoder.load_state_dict(part("decoder/"), description["decoder"])
    _check_fits(session.history, tensors, path)
    _restore_history(session.history, tensors, description["history"])
    session.rollout.load_state_dict(part("rollout/"), description["rollout"])
    session._reuse.load_state_dict({k: v.to(host.device) for k, v in part("reuse/").items()}, description["reused"])
    now = {**environment(), "device": host.device.type}
    then = {**description["environment"], "device": description["device"]}
    if changed := {k: (v, now.get(k)) for k, v in then.items() if now.get(k) != v}:
        listed = ", ".join(f"{k} {a} → {b}" for k, (a, b) in changed.items())
        warnings.warn(
            f"the snapshot was made in another environment ({listed}): the continuation may differ in rounding",
            stacklevel=3,
        )
    return session


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own: safetensors refuses shared ones (one embedding given twice)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        at = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if at in seen else tensor
        seen.add(at)
    return result


def _check_fits(history: History, tensors: dict[str, Tensor], path: Any) -> None:
    for stream, store in history.stores.items():
        k = tensors[f"history/{stream}/k"]
        ours, theirs = ((*t.shape[:2], *t.shape[3:]) for t in (store.k, k))
        if ours != theirs:
            raise LongtakeError(
                f"{path} is another model's: its keys are {theirs} (layers, takes, heads, channels), this one's {ours}"
            )


def _history_state(history: History) -> tuple[dict[str, Tensor], dict[str, Any]]:
    history.table()  # what has been fused by now becomes a block
    if history.fusing or any(live.reopened for live in history._live.values()):
        raise LongtakeError("a snapshot is taken between two chunks")
    tensors: dict[str, Tensor] = {}
    held: dict[str, list[Any]] = {}
    for stream, store in _stores(history).items():
        used = store.used.nonzero()[:, 0]
        at = used.to(store.k.device)
        tensors[f"history/{stream}/used"] = used
        for name in store.names:
            tensors[f"history/{stream}/{name}"] = getattr(store, name).index_select(2, at)
        for name in ("base", "step"):
            tensors[f"history/{stream}/{name}"] = getattr(store, name).index_select(0, at)
        held[stream] = []
        for i, ((block, form), rows) in enumerate(store.held.items()):
            present = [f.name for f in fields(Rows) if getattr(rows, f.name) is not None]
            tensors.update({f"history/{stream}/held/{i}/{name}": getattr(rows, name) for name in present})
            held[stream].append([block, form, present])
    scores = {stream: sorted(view.scores) for stream, view in history.views.items()}
    for stream, layers in scores.items():
        tensors.update({f"history/scores/{stream}/{layer}": history.views[stream].scores[layer] for layer in layers})
    queries = {stream: sorted(view.queries) for stream, view in history.views.items()}
    for stream, layers in queries.items():
        tensors.update({f"history/queries/{stream}/{layer}": history.views[stream].queries[layer] for layer in layers})
    blocks = []
    for i, b in enumerate(history.blocks):
        forms = {
            name: [form.tokens, _token_set(tensors, f"history/blocks/{i}/{name}", form.kept)]
            for name, form in b.forms.items()
        }
        blocks.append({
            "id": b.id, "role": b.role, "frame": b.frame, "span": b.span, "grid": b.grid, "forms": forms,
            "packable": _token_set(tensors, f"history/blocks/{i}.packable", b.packable),
            "structural": _token_set(tensors, f"history/blocks/{i}.structural", b.structural),
        })  # fmt: skip
    live = []  # chunks in flight: of a staggered take
    for block, flying in history._live.items():
        for i, position in enumerate(flying.positions.values()):
            tensors[f"history/live/{block}/{i}/base"], tensors[f"history/live/{block}/{i}/step"] = position
        live.append([block, [list(key) for key in flying.positions], sorted(list(key) for key in flying.written)])
    sizes = {stream: store.size for stream, store in _stores(history).items()}
    return tensors, {
        "held": held, "blocks": blocks, "frames_seen": history.frames_seen, "next_id": history._next_id,
        "rows": sizes, "scores": scores, "queries": queries, "live": live,
    }  # fmt: skip


def _stores(history: History) -> dict[str, Store]:
    """Every store of a history, those in host memory included, by stream."""
    return history.stores | {f"{stream}.away": archive for stream, archive in history.archives.items()}


def _restore_history(history: History, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    stores = _stores(history)
    if lacking := [stream for stream, held in meta["held"].items() if held and stream not in stores]:
        raise LongtakeError(
            f"the snapshot holds {', '.join(lacking)}, for which this policy has no place: pass the same"
        )
    for stream, store in stores.items():
        if stream not in meta["rows"]:
            continue
        if store.size < meta["rows"][stream]:
            store.grow(meta["rows"][stream])
            history.buffers.rows = max(history.buffers.rows, store.size)
        used = tensors[f"history/{stream}/used"]
        at = used.to(store.k.device)
        store.used[used] = True
        for name in store.names:
            getattr(store, name).index_copy_(2, at, tensors[f"history/{stream}/{name}"].to(store.k.device))
        for name in ("base", "step"):
            getattr(store, name).index_copy_(0, at, tensors[f"history/{stream}/{name}"].to(store.k.device))
        for i, (block, form, present) in enumerate(meta["held"][stream]):
            values = {name: tensors[f"history/{stream}/held/{i}/{name}"] for name in present}
            for name in set(present) - {"rows", "tokens"}:
                values[name] = values[name].to(history.device)
            if "key_sum" in values:
                values["key_sum"] = store.sums.take().copy_(values["key_sum"])
            store.held[(block, form)] = Rows(**values)
    for stream, layers in meta["scores"].items():
        stored = {layer: tensors[f"history/scores/{stream}/{layer}"].to(history.device) for layer in layers}
        history.views[stream].scores = stored
    for stream, layers in meta.get("queries", {}).items():
        stored = {layer: tensors[f"history/queries/{stream}/{layer}"].to(history.device) for layer in layers}
        history.views[stream].queries = stored
    for i, b in enumerate(meta["blocks"]):
        held = {
            name: Form(tokens, _as_token_set(tensors, f"history/blocks/{i}/{name}", kept))
            for name, (tokens, kept) in b["forms"].items()
        }
        history.blocks.append(Block(
            b["id"], b["role"], b["frame"], b["span"], held, tuple(b["grid"]),
            _as_token_set(tensors, f"history/blocks/{i}.packable", b["packable"]),
            _as_token_set(tensors, f"history/blocks/{i}.structural", b["structural"]),
        ))  # fmt: skip
    for block, keys, written in meta.get("live", ()):
        name = f"history/live/{block}"
        positions = {
            (stream, form): (tensors[f"{name}/{i}/base"], tensors[f"{name}/{i}/step"])
            for i, (stream, form) in enumerate(keys)
        }
        queries = {stream: dict(view.queries) for stream, view in history.views.items()}
        done = {(stream, form) for stream, form in written}
        history._live[block] = Live(positions, written=done, scores=history._scored(), queries=queries)
    history.frames_seen, history._next_id = meta["frames_seen"], meta["next_id"]


def _token_set(tensors: dict[str, Tensor], key: str, tokens: Any) -> Any:
    """A token set as JSON: null, [start, stop, step], or "tensor" with the numbers stored under `key`."""
    if tokens is None:
        return None
    if isinstance(tokens, range):
        return [tokens.start, tokens.stop, tokens.step]
    tensors[key] = tokens
    return "tensor"


def _as_token_set(tensors: dict[str, Tensor], key: str, stored: Any) -> Any:
    if stored is None:
        return None
    return tensors[key] if stored == "tensor" else range(*stored)
