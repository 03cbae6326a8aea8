"""PSNR and SSIM of a take against its reference: the same model, policy, prompt, seed and noise without reuse.

Free takes under different policies are different videos, of which no measure of likeness says which is better; so there
is none across policies.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...hosts.base import Host
from ..metrics.likeness import psnr_frames, ssim_frames
from ..provenance import read_json, write_atomically
from .cells import Cell, Store
from .takes import replayed
from .writing import writing


def reference_of(cell: Cell) -> Cell | None:
    """The cell that this one is measured against; None where it is its own measure, or has none."""
    arm = cell.arm.reference
    return None if arm is None else replace(cell, arm=arm)


def against_path(store: Store, cell: Cell, reference: Cell) -> Path:
    """Where the likeness of a cell to its reference is kept."""
    return store.files(cell) / f"against-{reference.key}.json"


def compare_takes(host: Host, store: Store, cell: Cell, reference: Cell) -> None:
    """Measure a cell against its reference, both decoded anew from their latents, and keep what comes out."""
    psnr, ssim = [], []
    for ours, theirs in zip(
        replayed(host, store.files(cell)), replayed(host, store.files(reference)), strict=True
    ):  # fmt: skip
        psnr.append(psnr_frames(ours, theirs))
        ssim.append(ssim_frames(ours, theirs))
    listed = {name: np.concatenate(values) for name, values in (("psnr", psnr), ("ssim", ssim))}
    content: dict[str, Any] = {"reference": reference.key}
    for name, values in listed.items():
        content[name] = round(float(values.mean()), 5)
        content[f"{name}_per_frame"] = [round(float(value), 5) for value in values]
    with writing():
        write_atomically(against_path(store, cell, reference), json.dumps(content, separators=(",", ":")).encode())


def likeness(store: Store, cell: Cell) -> dict[str, Any] | None:
    """What is known of a cell against its reference; None if there is nothing, or the file is damaged."""
    reference = reference_of(cell)
    if reference is None:
        return None
    path = against_path(store, cell, reference)
    try:
        found = read_json(path)
        return found if found["reference"] == reference.key and "psnr" in found and "ssim" in found else None
    except (ValueError, KeyError, TypeError):
        return None
