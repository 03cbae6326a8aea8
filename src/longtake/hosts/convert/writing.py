"""What is written: the transformer's shards, one in memory at a time, and the base's other files, linked or copied."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...errors import LongtakeError
from .reading import Weight

_SHARD_BYTES = 2 * 10**9
_LINK_BYTES = 1 << 20  # smaller files are copied: people edit JSON in place, and a hard link would edit the base too


def check_space(out: Path, layout: Mapping[str, torch.Tensor], components: list[tuple[Path, Path]]) -> None:
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


def write_transformer(
    folder: Path, model: Any, layout: Mapping[str, torch.Tensor], tensors: Mapping[str, Weight]
) -> int:
    """config.json, the shards (one in memory at a time) and their index; returns the number of shards."""
    from huggingface_hub import split_torch_state_dict_into_shards

    model.save_config(folder)
    split = split_torch_state_dict_into_shards(
        dict(layout), filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=_SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        shard = {n: _read(n, tensors[n], layout[n].dtype) for n in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        # safetensors makes it readable by its owner only
        (folder / file).chmod((folder / "config.json").stat().st_mode)
        del shard  # before the next one is built, or two would be in memory
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)
    return len(split.filename_to_tensors)


def _read(name: str, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """One weight, in memory of its own: tensors of a .pt may share theirs, which safetensors refuses."""
    tensor = weight.read().to(dtype, copy=True).contiguous()
    if not torch.isfinite(tensor).all():
        raise LongtakeError(f"{name} is not finite in {dtype}; the file is damaged, or pass dtype='float32'")
    return tensor


def copy_components(folder: Path, components: list[tuple[Path, Path]]) -> None:
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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
