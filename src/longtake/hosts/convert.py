"""Published few-step causal Wan checkpoints (`.pt`, `.safetensors`) into a diffusers-format folder that longtake loads.

Self-Forcing and its descendants publish one network: the Wan2.1 transformer under the original repository's names. Its
text encoder, VAE and sizes are Wan's own, so a conversion is: pick the right weights in the file, rename them, merge a
LoRA if there is one, check every name and shape against the base model's config, and write

    out/  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  model_index.json  longtake.json

`longtake.json` holds what no weight file says: chunk length, timesteps, shift, window. It is built next to `out` and
renamed at the end, so `out` is either complete or absent.
"""

import hashlib
import json
import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longtake.errors import LongtakeError


@dataclass(frozen=True)
class Family:
    """How one published family of checkpoints is run. Frames are latent; timesteps are nominal, before `shift`."""

    ema: bool
    """Which of the file's two sets its authors sample from: `generator_ema` or `generator`."""
    chunk_frames: int = 3
    timesteps: tuple[int, ...] = (1000, 750, 500, 250)
    training_frames: int = 21
    window: int | None = None
    """Frames attended, sink and current chunk included; None: all that were generated."""
    sink: int = 0
    note: str | None = None


FAMILIES: dict[str, Family] = {
    "self-forcing": Family(ema=True),
    "causal-forcing": Family(ema=False),
    "causal-forcing-framewise": Family(
        ema=True,
        chunk_frames=1,
        note="the 1- and 2-step files use timesteps [1000] and [1000, 500] after a first chunk of 4 steps; "
        "longtake.json says 4 steps for every chunk",
    ),
    "longlive": Family(
        ema=False,
        training_frames=240,
        window=12,
        sink=3,
        note="longlive_base.pt alone was trained on 21 frames; the published model is base + lora.pt",
    ),
    "rolling-forcing": Family(
        ema=True,
        timesteps=(1000, 800, 600, 400, 200),
        training_frames=27,
        window=21,
        sink=3,
        note="trained to denoise five chunks at staggered noise levels; longtake.json runs one chunk at a time",
    ),
}

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_COMPONENTS = ("vae", "text_encoder", "tokenizer", "scheduler")
_TRANSFORMER_CLASSES = ("WanTransformer3DModel", "CausalWanTransformer3DModel")
_SHARD_BYTES = 2 * 10**9
_LINK_BYTES = 1 << 20  # smaller files are copied: people edit JSON in place, and a hard link would edit the base too
_WRAPPERS = {"model", "module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
_LORA_NAME = re.compile(r"(?:base_model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

# Module names, original Wan → diffusers. The affine norm is `norm3` there and `norm2` here.
_GLOBAL_MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK_MODULES = {
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in (_ATTENTION | _IMAGE_ATTENTION).items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def convert(
    source: str | Path,
    out: str | Path,
    base: str | Path,
    *,
    family: str | None = None,
    ema: bool | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    dtype: str | torch.dtype = "bfloat16",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `out`, a diffusers-format model folder, from the published checkpoint `source`.

    Peak memory is one output shard (at most 2 GB) plus a few weights in fp32; 2.4 GB measured for 1.3B. `source` is
    memory-mapped, read one tensor at a time and never unpickled beyond tensors. `out` takes the transformer at `dtype`
    (1.3B in bf16: 2.8 GB); the base's large files are hard-linked where the file system allows it, else copied.

    Args:
        source: `.pt`/`.pth`, `.safetensors`, or a folder of sharded `.safetensors`; original Wan or diffusers names.
        out: folder to create.
        base: the Wan model it was distilled into, in diffusers format: a folder, or a Hub id to download (all but its
            transformer weights).
        family: one of `FAMILIES`; by default read from the file's name, when that names exactly one.
        ema: take `generator_ema` (True) or `generator` (False); by default what the family's authors sample from.
            A file with a single set of weights has no such choice.
        lora: adapter to merge (peft names): `W += lora_scale · B @ A`, in fp32.
        lora_scale: alpha / rank of that adapter; 1 for LongLive.
        dtype: `bfloat16`, `float16` or `float32`. Weights that diffusers keeps in fp32 are written in fp32.
        overwrite: replace `out` if an earlier conversion wrote it.

    Returns:
        What was done, ready for JSON: tensors, parameters, bytes, shards, family, ema (None: the file had one set of
        weights), merged LoRA layers, a note on the family.

    Raises:
        LongtakeError: an input is missing, unreadable or does not fit the base; `out` is in the way; the disk is full.
            `out` is then as it was before.
    """
    source, out = Path(source), Path(out)
    lora = None if lora is None else Path(lora)
    dtype = _dtype(dtype)
    _check_out(out, overwrite, inputs=[source, Path(base), *([lora] if lora else [])])
    name, preset = _family(source, family)
    with ExitStack() as files:
        weights, ema_used = _choose(_flatten(_open(source, files)), source, preset.ema if ema is None else ema, ema)
        adapter = _unwrap(_open(lora, files), ("generator_lora", "state_dict", "model")) if lora else {}
        base_folder = _base_folder(base)
        model, shapes = _skeleton(base_folder)
        tensors = _match(weights, shapes, source)
        merges = _match_lora(adapter, shapes, lora) if lora else {}
        layout = _layout(model, dtype)
        components, index = _component_files(base_folder), _pipeline_index(base_folder)
        _check_space(out, layout, components)
        origin: dict[str, Any] = {"file": source.name, "sha256": _sha256(source), "family": name, "ema": ema_used}
        if lora:
            origin["lora"] = {"file": lora.name, "sha256": _sha256(lora), "scale": lora_scale}
        with _Staging(out) as folder:
            shards = _write_transformer(folder / "transformer", model, layout, tensors, merges, lora_scale)
            _copy_components(folder, components)
            _write_json(folder / "model_index.json", index)
            _write_json(folder / "longtake.json", _description(preset, origin))
    return {
        "out": str(out),
        "base": str(base),
        "host": "wan",
        "family": name,
        "ema": ema_used,
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(layout),
        "parameters": sum(t.numel() for t in layout.values()),
        "bytes": sum(t.nbytes for t in layout.values()),
        "shards": shards,
        "lora_layers": len(merges),
        "note": preset.note,
    }


def diffusers_name(name: str) -> str | None:
    """The `WanTransformer3DModel` name of an original Wan weight (wrapper prefixes stripped); None if it has none."""
    if name == "head.modulation":
        return "scale_shift_table"
    prefix, modules, rest = "", _GLOBAL_MODULES, name
    if block := re.fullmatch(r"(blocks\.\d+\.)(.+)", name):
        prefix, modules, rest = block[1], _BLOCK_MODULES, block[2]
        if rest == "modulation":
            return prefix + "scale_shift_table"
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{modules[module]}.{leaf}" if module in modules and leaf in ("weight", "bias") else None


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A tensor of a file that is not read yet."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def _open(path: Path, files: ExitStack) -> dict[str, Any]:
    """The file's (possibly nested) dict with `_Weight` leaves; whatever is no tensor is kept as it is."""
    if path.is_dir():
        shards = _shards(path)
        return {name: weight for shard in shards for name, weight in _open_safetensors(shard, files).items()}
    if not path.is_file():
        raise LongtakeError(f"{path} does not exist; give a .pt, .pth or .safetensors file, or a folder of shards")
    if path.suffix == ".safetensors":
        return _open_safetensors(path, files)
    if path.suffix in (".pt", ".pth"):
        return _open_torch(path)
    raise LongtakeError(f"{path.name} is not a checkpoint longtake reads; give a .pt, .pth or .safetensors file")


def _open_safetensors(path: Path, files: ExitStack) -> dict[str, Any]:
    try:
        handle = files.enter_context(safe_open(path, framework="pt"))
        names = list(handle.keys())
        return {n: _Weight(tuple(handle.get_slice(n).get_shape()), partial(handle.get_tensor, n)) for n in names}
    except (SafetensorError, OSError) as error:
        raise LongtakeError(
            f"{path.name} is no complete .safetensors file ({_line(error)}); download it again"
        ) from None


def _open_torch(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):  # the directory of a zip stands at its end: a cut file has none
        raise LongtakeError(
            f"{path.name} is not a complete torch.save file (cut download, Git LFS pointer, or torch older than 1.6); "
            "download it again, or re-save it with a current torch"
        )
    try:
        tree = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise LongtakeError(
            f"{path.name} holds pickled Python objects besides tensors, which could run code, and was not loaded; "
            "if you trust its author, re-save only its state dict with torch.save or as .safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise LongtakeError(f"{path.name} cannot be read ({_line(error)}); download it again") from None
    if not isinstance(tree, Mapping):
        raise LongtakeError(f"{path.name} holds a {type(tree).__name__}, not a dict of weights; give a state dict")
    return _lazy(tree)


def _lazy(tree: Mapping) -> dict[str, Any]:
    """The same dict with mapped tensors as `_Weight`."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _lazy(value)
        return _Weight(tuple(value.shape), lambda: value) if isinstance(value, torch.Tensor) else value

    return {str(name): leaf(value) for name, value in tree.items()}


def _shards(folder: Path) -> list[Path]:
    """The weight files of a sharded folder, those its index names if it has one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise LongtakeError(f"{folder} holds {len(indices)} weight indices; give the folder of one model")
    if not indices:
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise LongtakeError(f"{folder} holds no .safetensors file; give a checkpoint file or a folder of shards")
        return found
    weight_map = _read_json(indices[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LongtakeError(f"{indices[0]} has no weight_map; download the folder again")
    named = sorted({folder / file for file in weight_map.values()})
    if missing := [path.name for path in named if not path.is_file()]:
        raise LongtakeError(f"{folder} lacks {_some(missing)} named in its index; download the missing shards")
    return named


# --- choosing and naming -------------------------------------------------------------------------------------------


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested sets of a flat file (`generator.blocks…`), as safetensors must spell them, made dicts again."""
    nested: dict[str, Any] = {}
    for name, value in tree.items():
        head, dot, rest = name.partition(".")
        if dot and head in ("generator", "generator_ema"):
            nested.setdefault(head, {})[rest] = value
        else:
            nested[name] = value
    return nested


def _unwrap(tree: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Descend through the wrapping dicts called `names` until none is left."""
    names = tuple(names)
    while inner := next((name for name in names if isinstance(tree.get(name), Mapping)), None):
        tree = tree[inner]
    return tree


def _choose(tree: dict, source: Path, want_ema: bool, asked: bool | None) -> tuple[dict[str, Any], bool | None]:
    """The generator's weights, and whether they are the averaged ones (None: the file holds one set only)."""
    outer = _unwrap(tree, ("model", "state_dict"))
    sets = {name: outer[name] for name in ("generator", "generator_ema") if isinstance(outer.get(name), Mapping)}
    if not sets:
        if asked:
            raise LongtakeError(f"{source.name} has no EMA weights: it holds {_some(list(outer))}; leave ema out")
        return outer, None
    wanted = "generator_ema" if want_ema else "generator"
    if wanted not in sets:
        kind, other = ("EMA", "ema=False (--no-ema)") if want_ema else ("non-EMA", "ema=True (--ema)")
        raise LongtakeError(
            f"{source.name} has no {kind} weights ({wanted!r}): it holds {_some(list(outer))}; "
            f"pass {other} to take {next(iter(sets))!r}"
        )
    return _unwrap(sets[wanted], ("model", "state_dict")), want_ema


def _family(source: Path, family: str | None) -> tuple[str, Family]:
    known = ", ".join(FAMILIES)
    if family is not None:
        if family not in FAMILIES:
            raise LongtakeError(f"unknown family {family!r}; pass --family with one of {known}")
        return family, FAMILIES[family]
    resolved = source.absolute()
    for text in (resolved.name, f"{resolved.parent.name} {resolved.name}"):
        if len(found := _named_families(text)) == 1:
            return found[0], FAMILIES[found[0]]
    raise LongtakeError(f"the name {source.name} does not tell the family; pass --family with one of {known}")


def _named_families(text: str) -> list[str]:
    """Families that a file (and folder) name spells out. LongLive 2 is another model and is none of them."""
    text = re.sub(r"[-_. ]", "", text.lower())
    found = [name for name in ("self-forcing", "rolling-forcing") if name.replace("-", "") in text]
    if "longlive" in text and "longlive2" not in text:
        found.append("longlive")
    if "causalforcing" in text:
        kinds = {"chunkwise": "causal-forcing", "framewise": "causal-forcing-framewise"}
        found += [name for kind, name in kinds.items() if kind in text]
    return found


def _bare(name: str) -> str:
    """`name` without the components that FSDP, compile, checkpointing and wrapper classes put anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_table(name: str) -> bool:
    """Precomputed rotary tables: not weights, rebuilt by the model."""
    return any(part == "rope" or part.startswith("freqs") for part in name.split("."))


def _match(weights: dict[str, Any], shapes: dict[str, tuple[int, ...]], source: Path) -> dict[str, _Weight]:
    """Every weight of the base under its diffusers name, or an error that names what does not fit."""
    bare = [(_bare(name), value) for name, value in weights.items()]
    bare = [(name, value) for name, value in bare if not _is_table(name)]
    renamed = any(name.startswith("condition_embedder.") for name, _ in bare)
    tensors: dict[str, _Weight] = {}
    unknown, twice = [], []
    for name, value in bare:
        target = name if renamed else diffusers_name(name)
        if target not in shapes or not isinstance(value, _Weight):
            unknown.append(name)
        elif target in tensors:
            twice.append(name)
        else:
            tensors[target] = value
    missing = [name for name in shapes if name not in tensors]
    problems = [
        f"{len(names)} {what} ({_some(names)})"
        for what, names in (("unknown keys", unknown), ("missing keys", missing), ("repeated keys", twice))
        if names
    ]
    if problems:
        raise LongtakeError(
            f"{source.name} does not fit the base: {', '.join(problems)}; "
            "give a Wan generator checkpoint and the base of the same model"
        )
    wrong = [
        f"{name} is {list(tensor.shape)}, the base says {list(shapes[name])}"
        for name, tensor in tensors.items()
        if tensor.shape != shapes[name]
    ]
    if wrong:
        raise LongtakeError(
            f"{source.name} has {len(wrong)} tensors of another size: {_some(wrong)}; give the base it was trained from"
        )
    return tensors


def _match_lora(
    adapter: dict[str, Any], shapes: dict[str, tuple[int, ...]], lora: Path
) -> dict[str, tuple[_Weight, _Weight]]:
    """Weight name → (A [r, in], B [out, r]) for every key of the adapter; a key that fits nothing is an error."""
    pairs: dict[str, dict[str, _Weight]] = {}
    unmatched = []
    for name, value in adapter.items():
        found = _LORA_NAME.fullmatch(_bare(name))
        layer = f"{found['layer']}.weight" if found else ""
        target = layer if layer in shapes else diffusers_name(layer)
        sides = pairs.setdefault(target, {}) if target in shapes and isinstance(value, _Weight) else None
        if not found or sides is None or found["side"] in sides:
            unmatched.append(name)
        else:
            sides[found["side"]] = value
    unmatched += [f"{name} has only lora_{next(iter(sides))}" for name, sides in pairs.items() if len(sides) == 1]
    if unmatched or not pairs:
        what = f"{len(unmatched)} keys that fit no layer ({_some(unmatched)})" if unmatched else "no LoRA keys"
        raise LongtakeError(f"{lora.name} has {what}; give a peft LoRA (lora_A/lora_B) trained on this model")
    merges = {name: (sides["A"], sides["B"]) for name, sides in pairs.items()}
    for name, (a, b) in merges.items():
        fits = len(a.shape) == len(b.shape) == 2 and b.shape[1] == a.shape[0]
        if not fits or (b.shape[0], a.shape[1]) != shapes[name]:
            raise LongtakeError(
                f"{lora.name} does not fit: B {list(b.shape)} @ A {list(a.shape)} for {name} {list(shapes[name])}; "
                "give the LoRA of this model size"
            )
    return merges


# --- the base ------------------------------------------------------------------------------------------------------


def _base_folder(base: str | Path) -> Path:
    """The base's folder, downloaded if `base` is a Hub id, with every part this needs."""
    folder = Path(base)
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(base)):
        folder = _download(str(base))
    if not folder.is_dir():
        raise LongtakeError(f"base {base} is neither a folder nor a Hub id; give a Wan model in diffusers format")
    parts = ["model_index.json", "transformer/config.json", *_COMPONENTS]
    if missing := [part for part in parts if not (folder / part).exists()]:
        raise LongtakeError(f"base {base} lacks {', '.join(missing)}; give a complete Wan model in diffusers format")
    if (folder / "transformer_2").is_dir():
        raise LongtakeError(f"base {base} has two transformers (Wan2.2 A14B); give the model the checkpoint came from")
    return folder


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "transformer/config.json", *(f"{part}/*" for part in _COMPONENTS)]
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:  # besides its own errors, the Hub client lets those of its HTTP library through
        raise LongtakeError(
            f"base {repo} is no local folder and could not be downloaded ({_line(error)}); "
            "check the name and the connection, or give a folder"
        ) from None


def _skeleton(base: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The base's transformer without memory (meta tensors), and the shape of each of its weights."""
    from diffusers import WanTransformer3DModel

    path = base / "transformer" / "config.json"
    config = _read_json(path)
    if (kind := config.get("_class_name")) not in _TRANSFORMER_CLASSES:
        raise LongtakeError(f"base {base} holds a {kind}; give a Wan model (WanTransformer3DModel)")
    try:
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise LongtakeError(f"{path} describes no Wan transformer ({_line(error)}); restore the base") from None
    return model, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _component_files(base: Path) -> list[tuple[Path, Path]]:
    """(file, path inside the model folder) of everything but the transformer and the pipeline index."""
    return [
        (Path(folder) / name, (Path(folder) / name).relative_to(base))
        for part in _COMPONENTS
        for folder, _, names in os.walk(base / part, followlinks=True)
        for name in sorted(names)
    ]


def _pipeline_index(base: Path) -> dict[str, Any]:
    """The base's model_index.json with the stock class: some publishers name a class that only their code has."""
    return _read_json(base / "model_index.json") | {"transformer": ["diffusers", "WanTransformer3DModel"]}


# --- writing -------------------------------------------------------------------------------------------------------


class _Staging:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""

    def __init__(self, out: Path):
        self.out = out
        token = secrets.token_hex(4)
        self.folder, self.old = (out.with_name(f".{out.name}.{token}.{end}") for end in ("partial", "old"))

    def __enter__(self) -> Path:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
        except OSError as error:
            raise LongtakeError(f"cannot create {self.out} ({_line(error)}); choose another folder") from None
        return self.folder

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as failure:
            error = failure
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise LongtakeError(
                f"writing {self.out} failed ({_line(error)}) and left nothing behind; "
                "free some space or choose another disk"
            ) from None

    def _publish(self) -> None:
        replaced = self.out.exists()
        if replaced:
            self.out.rename(self.old)
        try:
            self.folder.rename(self.out)
        except OSError:
            if replaced:
                self.old.rename(self.out)
            raise
        shutil.rmtree(self.old, ignore_errors=True)


def _check_out(out: Path, overwrite: bool, inputs: list[Path]) -> None:
    """`out` is free, or an earlier conversion that may go and that none of the inputs stands in."""
    if not out.exists():
        return
    if not overwrite:
        raise LongtakeError(f"{out} exists; choose another folder, or pass overwrite=True (--overwrite) to replace it")
    if out.is_symlink() or not (out / "longtake.json").is_file():
        raise LongtakeError(f"{out} was not written by longtake convert and is not replaced; choose another folder")
    for path in inputs:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise LongtakeError(f"{out} holds the input {path} and is not replaced; choose another folder")


def _check_space(out: Path, layout: Mapping[str, torch.Tensor], components: list[tuple[Path, Path]]) -> None:
    """Refuse before the first byte when the disk cannot hold the result; files that can be hard-linked cost nothing."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    stats = [file.stat() for file, _ in components]
    device = place.stat().st_dev
    copied = sum(s.st_size for s in stats if s.st_size < _LINK_BYTES or s.st_dev != device)
    needed, free = copied + sum(t.nbytes for t in layout.values()), shutil.disk_usage(place).free
    if needed > free:
        raise LongtakeError(
            f"{out} needs {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free; "
            "free some space or choose another disk"
        )


def _layout(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Meta tensors with the shape and dtype each weight is written with, in the model's order."""
    exact = set(model._keep_in_fp32_modules or ())
    return {
        name: tensor.to(torch.float32 if exact.intersection(name.split(".")) else dtype)
        for name, tensor in model.state_dict().items()
    }


def _write_transformer(
    folder: Path,
    model: Any,
    layout: Mapping[str, torch.Tensor],
    tensors: Mapping[str, _Weight],
    merges: Mapping[str, tuple[_Weight, _Weight]],
    lora_scale: float,
) -> int:
    """config.json, the shards (one in memory at a time) and their index; returns the number of shards."""
    from huggingface_hub import split_torch_state_dict_into_shards

    model.save_config(folder)
    split = split_torch_state_dict_into_shards(
        dict(layout), filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=_SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        shard = {n: _weight(n, tensors[n], merges.get(n), lora_scale, layout[n].dtype) for n in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(
            (folder / "config.json").stat().st_mode
        )  # safetensors makes it readable by its owner only
        del shard  # before the next one is built, or two would be in memory
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)
    return len(split.filename_to_tensors)


def _weight(
    name: str, stored: _Weight, merge: tuple[_Weight, _Weight] | None, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """One weight, merged, in memory of its own: tensors of a .pt may share theirs, which safetensors refuses."""
    tensor = stored.read()
    if merge:
        a, b = (side.read().float() for side in merge)
        tensor = tensor.float() + scale * (b @ a)
    tensor = tensor.to(dtype, copy=True).contiguous()
    if not torch.isfinite(tensor).all():
        raise LongtakeError(f"{name} is not finite in {dtype}; the file is damaged, or pass dtype='float32'")
    return tensor


def _copy_components(folder: Path, components: list[tuple[Path, Path]]) -> None:
    for file, inside in components:
        target = folder / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        file = file.resolve()  # a Hub cache holds symlinks; the result must outlive the cache
        if file.stat().st_size >= _LINK_BYTES:
            try:
                os.link(file, target)
                continue
            except OSError:
                pass  # another disk, or a file system without hard links
        shutil.copyfile(file, target)


def _description(preset: Family, origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "host": "wan",
        "causal": True,
        "chunk_frames": preset.chunk_frames,
        "timesteps": list(preset.timesteps),
        "shift": 5.0,
        "guidance_scale": 1.0,
        "fps": 16,
        "height": 480,
        "width": 832,
        "text_tokens": 512,
        "training_frames": preset.training_frames,
        "window": preset.window,
        "sink": preset.sink,
        "source": origin,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LongtakeError(f"{path} cannot be read ({_line(error)}); download it again") from None
    if not isinstance(data, dict):
        raise LongtakeError(f"{path} is not a JSON object; download it again")
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _sha256(path: Path) -> str:
    """Of the file; of a sharded folder, of the `sha256sum` listing of its shards."""
    if path.is_dir():
        listing = "".join(f"{_sha256(shard)}  {shard.name}\n" for shard in _shards(path))
        return hashlib.sha256(listing.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise LongtakeError(f"dtype {dtype} is not supported; give one of {', '.join(DTYPES)}")
    return found


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f", … {len(names) - limit} more" if len(names) > limit else "")


def _line(error: BaseException) -> str:
    """The first line of an exception's message, short enough to stand inside a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(" .")
