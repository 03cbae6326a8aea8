"""Train the embedded models `tiny-wan-short` and `tiny-wan-long` from nothing, as `longtake train tiny-wan` does.

Stages: the video autoencoder, its decoder alone, then text encoder and transformer together: for every noise level
("many"), then for the four of the sampler ("few"). Each keeps a checkpoint in DIR/work, so the same command goes on
where it was stopped; numbers go to DIR/work/metrics.jsonl; DIR itself is the finished pipeline folder, DIR/many-steps
the transformer before its last stage. The second variant begins with the autoencoder and "many" of the first.
"""

import json
import time
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from longtake.errors import LongtakeError
from longtake.zoo import lanes, tiny_text, tiny_transformer, tiny_vae
from longtake.zoo.clips import CHUNK
from longtake.zoo.stages import Stop, as_the_folder, circumstances, go_on

VARIANTS = ("short", "long")
PROMPTS = (
    "a ball, a square and a triangle",
    "a diamond, a ball, a square and a ball",
    "a triangle, a triangle and a ball",
)
ABOUT = (
    "A four-step causal text-to-video model of actors who hide and come back (128 x 128, 16 frames a second), variant"
    " {variant}, trained from nothing on a procedural world by `longtake train tiny-wan`; for measuring what a policy"
    " remembers, not for beauty."
)


def train(
    out: Path,
    variant: str,
    minutes: dict[str, float],
    begin: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    batch: int = 2,
    stop: Stop = go_on,
) -> dict[str, object]:
    """Run or resume every stage and write the pipeline folder `out`; returns what `training.json` says.

    `minutes` are the budgets of "vae", "decoder", "many" and "few". With `begin`, the folder of a finished training,
    its autoencoder and its stage "many" are taken, and only "few" is trained.
    """
    work, begun = out / "work", time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    common = device, seed, batch
    if begin is None:
        vae = tiny_vae.train(work, minutes["vae"], device, seed, stop)
        tiny_vae.refine(work, vae, minutes["decoder"], device, seed, stop)
        many, *_ = tiny_transformer.train(work, vae, variant, "many", minutes["many"], *common, stop=stop)
        many.half().save_pretrained(out / "many-steps", safe_serialization=True)
        start = work / f"{variant}-many.pt"
    else:
        try:
            vae = tiny_vae.load(begin / "vae")
            start = next(iter((begin / "work").glob("*-many.pt")))
        except (OSError, ValueError, StopIteration) as error:
            raise LongtakeError(f"{begin} is no finished training: give an --out of `longtake train`") from error
        vae.to(device).requires_grad_(False)
    transformer, encoder, tokens = tiny_transformer.train(
        work, vae, variant, "few", minutes["few"], *common, start=start, stop=stop
    )
    facts: dict[str, object] = {
        **circumstances(device),
        "variant": variant,
        "seed": seed,
        "minutes": minutes,
        "last_call_minutes": round((time.monotonic() - begun) / 60, 1),
        "final": {row["stage"]: row for row in map(json.loads, (work / "metrics.jsonl").read_text().splitlines())},
        "vae_psnr_fresh_seeds": round(_vae_psnr(vae), 2),
    }
    export(out, variant, vae, transformer, encoder, tokens, facts)
    return facts


def export(
    out: Path,
    variant: str,
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
        "fps": lanes.FPS,
        "height": lanes.SIZE,
        "width": lanes.SIZE,
        "text_tokens": tiny_text.TEXT_TOKENS,
        "training_frames": 7 * CHUNK,
        "prompts": list(PROMPTS),
        "about": ABOUT.format(variant=variant),
        "world": lanes.WORLD,
    }
    as_the_folder(out.glob("*/*.safetensors"), out / "model_index.json")
    for name, content in (("longtake.json", description), ("training.json", facts)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def _vae_psnr(vae: AutoencoderKLWan) -> float:
    scores = []
    for seed in range(8):
        video, _ = lanes.sample((1 << 41) + seed, 33)
        scores.append(tiny_vae.psnr(tiny_vae.decode(vae, tiny_vae.encode(vae, video[None]))[0], video))
    return float(np.mean(scores))
