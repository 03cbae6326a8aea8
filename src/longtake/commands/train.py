"""`longtake train`: the embedded model again, from nothing."""

from __future__ import annotations

import math
from pathlib import Path

import typer

from ..errors import LongtakeError
from . import options, shell
from .usage import Commands

LEAST_MINUTES = 0.25  # a stage writes its numbers every ten seconds

train = typer.Typer(cls=Commands, help="Train a model of the zoo.")


@train.callback()
def zoo() -> None:
    """Train a model of the zoo."""


@train.command("tiny-wan")
@shell.guarded
def tiny_wan(
    out: options.TrainFolder,
    vae_minutes: options.VaeMinutes = 8.0,
    decoder_minutes: options.DecoderMinutes = 8.0,
    transformer_minutes: options.TransformerMinutes = 40.0,
    batch: options.Batch = 6,
    seed: options.TrainSeed = 0,
    device: options.TrainDevice = "cpu",
    threads: options.TrainThreads = None,
    as_json: options.AsJson = False,
) -> None:
    """Train the embedded model from nothing on its procedural world, and write it as a folder that --model takes.

    The same command goes on where it was stopped: checkpoints and numbers are kept in DIR/work.
    """
    for name, minutes in (("vae", vae_minutes), ("decoder", decoder_minutes), ("transformer", transformer_minutes)):
        if not (minutes >= LEAST_MINUTES and math.isfinite(minutes)):
            raise LongtakeError(f"--{name}-minutes {minutes:g}: give each stage at least {LEAST_MINUTES:g}")
    if batch < 1:
        raise LongtakeError(f"--batch {batch}: give at least 1")
    shell.check_threads(threads)
    shell.check_device(device)
    _make_folder(out)

    import torch

    shell.hush()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        # Late, because its classes are diffusers' and transformers' own.
        from ..zoo.train_tiny_wan import train as run

        shell.say(
            f"training for {vae_minutes + decoder_minutes + transformer_minutes:g} minutes in all, less what is done; "
            f"numbers in {out / 'work' / 'metrics.jsonl'}"
        )
        facts = run(out, vae_minutes, decoder_minutes, transformer_minutes, device, seed, batch)
    finally:
        torch.set_num_threads(before)
    text = f"{out}: autoencoder {facts['vae_psnr_fresh_seeds']} dB on fresh seeds; longtake generate … --model {out}"
    shell.answer({"out": str(out), **facts}, text, as_json)


def _make_folder(out: Path) -> None:
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtakeError(f"cannot make folder {out / 'work'}: {error.strerror}; give another --out") from error
