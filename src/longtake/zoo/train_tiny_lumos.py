"""Train the embedded model `tiny-lumos` from nothing, as `longtake train tiny-lumos` does.

Stages: the video tokenizer, then the transformer on its codes. Each keeps a checkpoint in DIR/work, so the same command
goes on where it was stopped, and a larger number of minutes continues a finished stage; numbers go to
DIR/work/metrics.jsonl; DIR itself is the finished model folder.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from longtake.errors import LongtakeError
from longtake.hosts.base import CONFIG_NAME, HostConfig
from longtake.hosts.lumos import LumosForVideoGeneration
from longtake.hosts.lumos.fsq_tokenizer import FSQTokenizer
from longtake.hosts.lumos.loading import OWN_TOKENIZER
from longtake.zoo import lanes, tiny_lumos, tiny_lumos_tokenizer, tiny_vae
from longtake.zoo.stages import Stop, as_the_folder, circumstances, go_on
from longtake.zoo.tiny_lumos_clips import WINDOW

STEPS = 16  # of mask decoding, a latent frame
PROMPTS = (
    "a ball, a square and a triangle",
    "a diamond, a ball, a square and a ball",
    "a triangle, a triangle and a ball",
)
ABOUT = (
    "A Lumos-1 in small: text, codes and masks in one sequence, actors who hide and come back (128 x 128, 16 frames a "
    "second), trained from nothing on a procedural world by `longtake train tiny-lumos`; for measuring what a policy "
    "remembers, not for beauty."
)


def train(
    out: Path,
    minutes: dict[str, float],
    begin: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    batch: int = 1,
    stop: Stop = go_on,
) -> dict[str, object]:
    """Run or resume both stages and write the model folder `out`; returns what `training.json` says.

    `minutes` are the budgets of "tokenizer" and "transformer", in CPU time (see `Stage`). With `begin`, the
    folder of another training, its tokenizer is taken as it is, and the transformer begins with its weights.
    """
    work, begun = out / "work", time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    start = None
    if begin is None:
        tokenizer = tiny_lumos_tokenizer.train(work, minutes["tokenizer"], device, seed, stop)
    else:
        start = begin / "work" / "transformer.pt"
        try:
            tokenizer = FSQTokenizer.from_pretrained(begin / OWN_TOKENIZER, local_files_only=True)
        except (OSError, ValueError) as error:
            raise LongtakeError(f"{begin} is no finished training: give an --out of `longtake train`") from error
        if not start.exists():
            raise LongtakeError(f"{begin} has no work/transformer.pt: give an --out of `longtake train tiny-lumos`")
        tokenizer.to(device, torch.float32).eval().requires_grad_(False)
    score = round(tokenizer_psnr(tokenizer), 2)
    save_tokenizer(out, tokenizer)
    model = tiny_lumos.train(work, tokenizer, minutes["transformer"], device, seed, batch, start, stop)
    rows = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
    facts: dict[str, object] = {
        **circumstances(device),
        "seed": seed,
        "minutes": minutes,
        "last_call_minutes": round((time.monotonic() - begun) / 60, 1),
        "final": {row["stage"]: row for row in rows},
        "tokenizer_psnr_fresh_seeds": score,
    }
    export(out, model, tiny_lumos.text_tokenizer(), facts)
    return facts


def save_tokenizer(out: Path, tokenizer: FSQTokenizer) -> None:
    """Write `out`/video_tokenizer, in halves."""
    copy = tiny_lumos_tokenizer.build()
    copy.load_state_dict(tokenizer.state_dict())
    for p in copy.parameters():
        p.data = p.data.half().contiguous()
    copy.save_pretrained(out / OWN_TOKENIZER, safe_serialization=True)


def export(out: Path, model: LumosForVideoGeneration, words: PreTrainedTokenizerFast, facts: dict[str, object]) -> None:
    """Write a folder as Lumos-1 is published, halves, with `longtake.json` and `training.json`; `save_tokenizer` wrote
    the rest."""
    model.half().save_pretrained(out)
    words.save_pretrained(out)
    settings = HostConfig(
        host="lumos", causal=True, sampler="masked", chunk_frames=1, steps=STEPS, guidance_scale=1.0, fps=lanes.FPS,
        height=lanes.SIZE, width=lanes.SIZE, text_tokens=tiny_lumos.TEXT_TOKENS, training_frames=WINDOW,
        history_mask=tiny_lumos.FLOOR, prompts=PROMPTS, about=ABOUT, world=lanes.WORLD,
    )  # fmt: skip
    as_the_folder(out.rglob("*.safetensors"), out / "config.json")
    for name, content in ((CONFIG_NAME, settings.as_dict()), ("training.json", facts)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def tokenizer_psnr(tokenizer: FSQTokenizer, clips: int = 8) -> float:
    """Decibels, of scenes that no training draws."""
    scores = []
    for seed in range(clips):
        video, _ = lanes.sample((1 << 41) + seed, 33)
        again = tiny_lumos_tokenizer.decode(tokenizer, tiny_lumos_tokenizer.encode(tokenizer, video[None]))[0]
        scores.append(tiny_vae.psnr(again, video))
    return float(np.mean(scores))
