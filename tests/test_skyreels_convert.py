"""Upstream SkyReels-V2 checkpoints become folders that longtake and diffusers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from longtake import LongtakeError, Session, load
from longtake.hosts.convert import convert, diffusers_name

from .skyreels import skyreels_golden, tiny_skyreels, tiny_transformer
from .tiny_checkpoints import upstream_name, write_base


def upstream(model: Any) -> dict[str, Tensor]:
    """The weights under SkyReels-V2's own names: Wan's, and three for the frame rate."""
    own = {"fps_projection.net.0.proj": "fps_projection.0", "fps_projection.net.2": "fps_projection.2"}
    named = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        named[f"{own[module]}.{leaf}" if module in own else upstream_name(name)] = tensor.clone()
    return named


def test_every_published_name_is_known() -> None:
    _, meta = skyreels_golden()
    assert {theirs: diffusers_name(theirs) for theirs in meta["diffusers_key_map"]} == meta["diffusers_key_map"]


@pytest.mark.parametrize(("folder", "fps"), [("SkyReels-V2-DF-1.3B-540P", True), ("SkyReels-V2-DF-14B-720P", False)])
def test_a_published_folder_over_a_wan_base_makes_the_same_video(folder: str, fps: bool, tmp_path: Path) -> None:
    model = tiny_transformer(fps=fps, text_dim=16)
    source = tmp_path / folder
    source.mkdir()
    save_file(upstream(model), source / "model.safetensors")
    base = write_base(tmp_path / "wan", num_layers=2, attention_head_dim=12, freq_dim=16, ffn_dim=32)
    done = convert(source, tmp_path / "out", base, dtype="float32")
    assert done["host"] == "skyreels"
    host = load(tmp_path / "out")
    assert host.config.training_frames == (31 if "720P" in folder else 25)
    words = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(1))
    options = {
        "prompt_embeds": words[0], "negative_prompt_embeds": words[1], "num_frames": 9, "num_inference_steps": 3,
        "height": 32, "width": 32, "decode": False,
    }  # fmt: skip
    reference = tiny_skyreels(fps=fps)
    reference = type(host)(model, host.config, name="reference")
    videos = [torch.cat([chunk.latents for chunk in Session(h, **options)], 1) for h in (host, reference)]
    assert torch.allclose(*videos, atol=1e-4)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe).__name__ == "SkyReelsV2DiffusionForcingPipeline"


def test_a_wan_checkpoint_over_a_skyreels_base_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "sky")
    tiny_transformer(text_dim=16).save_pretrained(base / "transformer")
    save_file(upstream(tiny_transformer(text_dim=16)), tmp_path / "self_forcing.safetensors")
    with pytest.raises(LongtakeError, match="give a Wan model"):
        convert(tmp_path / "self_forcing.safetensors", tmp_path / "out", base)
