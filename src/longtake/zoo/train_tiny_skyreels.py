"""Train the embedded model `tiny-skyreels`, as `longtake train tiny-skyreels` does.

It goes on from the many-step stage of a training of `tiny-wan`: autoencoder and tokenizer are that training's, its text
encoder is trained on with the transformer (SkyReels-V2's has Wan's weights by the same names), so the finished model
has one of its own. What it learns is diffusion forcing: every chunk
of a window has a noise level of its own, and sees those before it with the noise they have. Checkpoints are kept in
DIR/work, so the same command goes on where it was stopped; numbers go to DIR/work/metrics.jsonl; DIR itself is the
finished pipeline folder.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from longtake.errors import LongtakeError
from longtake.hosts.base import CONFIG_NAME, HostConfig
from longtake.hosts.skyreels import FIRST_LEVEL, shifted
from longtake.zoo import forcing, lanes, tiny_text, tiny_transformer, tiny_vae
from longtake.zoo.clips import CHUNK, Batch, Library
from longtake.zoo.stages import Stage, Stop, as_the_folder, begun_with, circumstances, go_on
from longtake.zoo.train_tiny_wan import PROMPTS

STEPS = 50
LAG = 10  # steps; five chunks are in flight
WINDOW = 7 * CHUNK  # latent frames
OVERLAP = CHUNK
SHIFT = tiny_transformer.SHIFT
CONDITION_NOISE = 20.0  # thousandths of noise in given frames
RATE = 1.5e-3
FILMS = 1500  # a shelf this large is not outlived
ABOUT = (
    "SkyReels-V2's diffusion forcing in small: chunks at staggered noise levels, actors who hide and come back (128 x"
    " 128, 16 frames a second), trained on from tiny-wan's many-step stage by `longtake train tiny-skyreels`; for"
    " measuring what reuse and compression change, not for beauty."
)


def levels(steps: int = STEPS) -> tuple[float, ...]:
    """The noise levels that a chunk passes through, one more than it takes steps, as the host has them."""
    return (*shifted(np.linspace(FIRST_LEVEL, 0, steps + 1)[:-1], SHIFT), 0.0)


def build(wan: WanTransformer3DModel) -> SkyReelsV2Transformer3DModel:
    """SkyReels-V2's transformer with the weights of a Wan one: the same modules by the same names."""
    c = wan.config
    model = SkyReelsV2Transformer3DModel(
        patch_size=tuple(c.patch_size), num_attention_heads=c.num_attention_heads,
        attention_head_dim=c.attention_head_dim, in_channels=c.in_channels, out_channels=c.out_channels,
        text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.num_layers,
        cross_attn_norm=c.cross_attn_norm, qk_norm=c.qk_norm, rope_max_seq_len=c.rope_max_seq_len,
    )  # fmt: skip
    model.load_state_dict(wan.state_dict())
    return model


def train(
    out: Path,
    minutes: float,
    begin: Path,
    device: str = "cpu",
    seed: int = 0,
    batch: int = 2,
    films: int = tiny_transformer.FIRST_FILMS,
    stop: Stop = go_on,
) -> dict[str, object]:
    """Run or resume the training and write the pipeline folder `out`; returns what `training.json` says.

    `minutes` are CPU time (see `Stage`). `begin` is the folder of a training of tiny-wan: its vae/ and its
    work/…-many.pt are taken. `films` are encoded before the first step. Raises LongtakeError if they are not there.
    """
    begun, work = time.monotonic(), out / "work"
    vae, transformer, encoder, tokens, start = _begun(begin, device)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    modules: dict[str, torch.nn.Module] = {"transformer": transformer, "encoder": encoder}
    recipe = {"seed": seed, "batch": batch, "begin": begun_with(start)}
    stage = Stage("forcing", work, modules, minutes, RATE, recipe=recipe, stop=stop)
    if stage.used < stage.minutes * 60:
        library = Library(vae, "short", seed + stage.steps)
        library.grow(films)
        for _ in stage:
            rng = np.random.default_rng([seed, 2, stage.steps])
            library.grow(int(library.films < FILMS and rng.random() < 0.3))
            window = library.draw(rng, batch)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                text = tiny_text.embed(tokens, encoder, window.captions)
                loss, actor = _loss(transformer, window, text, rng)
            stage.step(loss, actor=actor, films=library.films)
    stage.finish()
    forcing.release(transformer)
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    facts: dict[str, object] = {
        **circumstances(device),
        "seed": seed,
        "minutes": minutes,
        "steps": stage.steps,
        "last_call_minutes": round((time.monotonic() - begun) / 60, 1),
        "final": rows[-1],
    }
    export(out, vae, transformer, encoder, tokens, facts)
    return facts


def export(
    out: Path,
    vae: AutoencoderKLWan,
    transformer: SkyReelsV2Transformer3DModel,
    encoder: UMT5EncoderModel,
    tokens: PreTrainedTokenizerFast,
    facts: dict[str, object],
) -> None:
    """Write the folder in the layout of a diffusers pipeline, halves, with `longtake.json` and `training.json`."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    pipe = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=tokens, text_encoder=encoder.half(), vae=vae.half(), transformer=transformer.half(),
        scheduler=scheduler,
    )  # fmt: skip
    pipe.save_pretrained(out, safe_serialization=True)
    settings = HostConfig(
        host="skyreels", causal=True, chunk_frames=CHUNK, timesteps=(), shift=SHIFT, guidance_scale=1.0, fps=lanes.FPS,
        height=lanes.SIZE, width=lanes.SIZE, text_tokens=tiny_text.TEXT_TOKENS, training_frames=WINDOW,
        sampler="staggered", steps=STEPS, lag=LAG, overlap=OVERLAP, condition_noise=CONDITION_NOISE,
        reuse="tiny-skyreels", prompts=PROMPTS, about=ABOUT, world=lanes.WORLD,
    )  # fmt: skip
    as_the_folder(out.glob("*/*.safetensors"), out / "model_index.json")
    for name, content in ((CONFIG_NAME, settings.as_dict()), ("training.json", facts)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def _begun(
    begin: Path, device: str
) -> tuple[AutoencoderKLWan, SkyReelsV2Transformer3DModel, UMT5EncoderModel, PreTrainedTokenizerFast, Path]:
    tokens = tiny_text.tokenizer()
    encoder = tiny_text.build(len(tokens)).to(device)
    try:
        vae: Any = tiny_vae.load(begin / "vae")
        start = next(iter((begin / "work").glob("*-many.pt")))
    except (OSError, ValueError, StopIteration) as error:
        raise LongtakeError(
            f"{begin} has no vae/ and work/…-many.pt: give an --out of `longtake train tiny-wan`"
        ) from error
    wan = tiny_transformer.build(vae.config.z_dim).to(device)
    try:
        tiny_transformer.load(start, {"transformer": wan, "encoder": encoder}, device)
    except (OSError, RuntimeError, KeyError) as error:
        raise LongtakeError(f"{start} is no checkpoint of this version's tiny-wan: train it anew") from error
    return vae.to(device).requires_grad_(False), build(wan).to(device), encoder, tokens, start


def _loss(
    transformer: SkyReelsV2Transformer3DModel, window: Batch, text: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    x, (batch, n) = window.latents, window.learn.shape
    given = window.learn == 0  # the first chunk of a window from the middle of a take: it stands there, nearly clean
    sigmas = torch.from_numpy(forcing.draw_sigmas(rng, (batch, n), levels(), SHIFT)).to(x)
    sigmas = torch.where(given, CONDITION_NOISE / 1000, sigmas)
    # Finished chunks are a sampler's, not the world's: as teacher forcing dirties its history, so are they.
    dirt = torch.from_numpy(
        rng.uniform(0, tiny_transformer.HISTORY_NOISE, (batch, n)) * (rng.random((batch, 1)) < 0.5)
    ).to(x)
    spread = lambda per_chunk: per_chunk.repeat_interleave(CHUNK, 1)[:, None, :, None, None]  # [B, n] → [B, 1, F, 1, 1]
    noise = torch.randn_like(x)
    mixed = spread(torch.where(sigmas == 0, dirt, sigmas))
    noisy = (1 - mixed) * x + mixed * noise
    # Where a window begins in the middle of a take it may count from its own beginning, as a sampler's windows do.
    own = torch.arange(n * CHUNK, device=x.device).expand(batch, -1)
    restart = given.any(1) & torch.from_numpy(rng.random(batch) < 0.5).to(x.device)
    frames = torch.where(restart[:, None], own, window.frames)
    predicted = forcing.velocity(transformer, noisy, sigmas, text, frames)
    error = (predicted.float() - (noise - x)).square().mean(1)  # [B, F, h, w]
    learn = torch.where((sigmas > 0) & ~given, 1.0, 0.0)
    learn[:, 0] *= tiny_transformer.FIRST_CHUNK
    learn = learn.repeat_interleave(CHUNK, 1)[:, :, None, None]
    marks = torch.tensor([1.0, tiny_transformer.ACTOR, tiny_transformer.RETURNED], device=x.device)
    weight = learn * marks[window.actors.long()]
    seen = learn * (window.actors > 0)
    loss = (error * weight).sum() / weight.sum().clamp_min(1e-6)
    return loss, float((error.detach() * seen).sum() / seen.sum().clamp_min(1))
