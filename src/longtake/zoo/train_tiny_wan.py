"""Train the embedded model `tiny-wan` from nothing: `python -m longtake.zoo.train_tiny_wan --out DIR`.

Three stages: the video autoencoder, its decoder alone, then text encoder and transformer together. Each keeps a
checkpoint in DIR/work, so the same command goes on where it was stopped; numbers go to DIR/work/metrics.jsonl; DIR
itself is the finished pipeline folder.
"""

import argparse
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from longtake.zoo import tiny_text, tiny_transformer, tiny_vae, world
from longtake.zoo.clips import CHUNK

PROMPTS = (
    "a red ball bouncing on a dark background",
    "a green square moving on a light background",
    "a white ring moving at night",
)
ABOUT = (
    "A four-step causal text-to-video model of coloured shapes (64 x 64, 16 frames a second), trained from nothing on a"
    " procedural world by `python -m longtake.zoo.train_tiny_wan`; for trying, testing and measuring, not for beauty."
)


def train(
    out: Path,
    vae_minutes: float,
    decoder_minutes: float,
    transformer_minutes: float,
    device: str = "cpu",
    seed: int = 0,
    batch: int = 6,
) -> dict[str, object]:
    """Run or resume every stage and write the pipeline folder `out`; returns what `training.json` says."""
    work, begun = out / "work", time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    vae = tiny_vae.train(work, vae_minutes, device, seed)
    tiny_vae.refine(work, vae, decoder_minutes, device, seed)
    transformer, encoder, tokens = tiny_transformer.train(work, vae, transformer_minutes, device, seed, batch)
    facts: dict[str, object] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "versions": {lib.__name__: lib.__version__ for lib in (torch, diffusers, transformers)},
        "seed": seed,
        "minutes": {"vae": vae_minutes, "decoder": decoder_minutes, "transformer": transformer_minutes},
        "last_call_minutes": round((time.monotonic() - begun) / 60, 1),
        "final": {row["stage"]: row for row in map(json.loads, (work / "metrics.jsonl").read_text().splitlines())},
        "vae_psnr_fresh_seeds": round(_vae_psnr(vae), 2),
    }
    export(out, vae, transformer, encoder, tokens, facts)
    return facts


def export(
    out: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
    tokens: PreTrainedTokenizerFast,
    facts: dict[str, object],
) -> None:
    """Write the folder in the layout of a diffusers pipeline, halves, with `longtake.json` and `training.json`."""
    pipe = WanPipeline(
        tokenizer=tokens,
        text_encoder=encoder.half(),
        vae=vae.half(),
        transformer=transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=tiny_transformer.SHIFT),
    )
    pipe.save_pretrained(out, safe_serialization=True)
    description = {
        "format": 1,
        "host": "wan",
        "causal": True,
        "chunk_frames": CHUNK,
        "timesteps": list(tiny_transformer.TIMESTEPS),
        "shift": tiny_transformer.SHIFT,
        "guidance_scale": 1.0,
        "fps": world.FPS,
        "height": world.SIZE,
        "width": world.SIZE,
        "text_tokens": tiny_text.TEXT_TOKENS,
        "training_frames": 7 * CHUNK,
        "prompts": list(PROMPTS),
        "about": ABOUT,
    }
    for path in out.glob("*/*.safetensors"):
        path.chmod(0o644)
    for name, content in (("longtake.json", description), ("training.json", facts)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def _vae_psnr(vae: AutoencoderKLWan) -> float:
    scores = []
    for seed in range(16):
        video, _ = world.sample((1 << 40) + seed, 33)
        scores.append(tiny_vae.psnr(tiny_vae.decode(vae, tiny_vae.encode(vae, video[None]))[0], video))
    return float(np.mean(scores))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m longtake.zoo.train_tiny_wan", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; also holds the checkpoints")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=6, help="windows of four chunks a step")
    parser.add_argument("--vae-minutes", type=float, default=12.0)
    parser.add_argument("--decoder-minutes", type=float, default=6.0)
    parser.add_argument("--transformer-minutes", type=float, default=40.0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    minutes = given.vae_minutes, given.decoder_minutes, given.transformer_minutes
    train(given.out, *minutes, given.device, given.seed, given.batch)


if __name__ == "__main__":
    main()
