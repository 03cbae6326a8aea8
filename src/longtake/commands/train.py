"""`longtake train`: the embedded model again, from nothing; and compressors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import typer

from ..errors import LongtakeError
from . import options, shell
from .usage import Commands

LEAST_MINUTES = 0.25  # a stage writes its numbers every ten seconds
SEEDS = 1 << 40  # those from here on are for judging

train = typer.Typer(cls=Commands, help="Train a model of the zoo.")


@train.callback()
def zoo() -> None:
    """Train a model of the zoo."""


@train.command("tiny-wan")
@shell.guarded
def tiny_wan(
    out: options.TrainFolder,
    variant: options.Variant = "short",
    vae_minutes: options.VaeMinutes = 13.0,
    decoder_minutes: options.DecoderMinutes = 5.0,
    many_minutes: options.ManyMinutes = 36.0,
    few_minutes: options.FewMinutes = 100.0,
    begin: options.Begin = None,
    batch: options.Batch = 2,
    seed: options.TrainSeed = 0,
    device: options.TrainDevice = "cpu",
    threads: options.TrainThreads = None,
    as_json: options.AsJson = False,
) -> None:
    """Train an embedded model from nothing on its procedural world, and write it as a folder that --model takes.

    The same command goes on where it was stopped: checkpoints and numbers are kept in DIR/work.
    """
    minutes = {"vae": vae_minutes, "decoder": decoder_minutes, "many": many_minutes, "few": few_minutes}
    shell.check_choice(variant, "--variant", ("short", "long"))
    _check(minutes, batch, seed, threads, device)
    _make_folder(out)

    from ..evaluate.machine import cpu_threads

    shell.hush()
    with cpu_threads(threads), _resumable(out) as stop:
        # Late, because its classes are diffusers' and transformers' own.
        from ..zoo.train_tiny_wan import train as run

        _say_planned(minutes if begin is None else {"few": minutes["few"]}, out)
        facts = run(out, variant, minutes, begin, device, seed, batch, lambda: stop.asked)
    text = f"{out}: autoencoder {facts['vae_psnr_fresh_seeds']} dB on fresh seeds; longtake generate … --model {out}"
    shell.answer({"out": str(out), **facts}, text, as_json)


@train.command("tiny-lumos")
@shell.guarded
def tiny_lumos(
    out: options.TrainFolder,
    tokenizer_minutes: options.TokenizerMinutes = 25.0,
    transformer_minutes: options.TransformerMinutes = 90.0,
    begin: options.BeginLumos = None,
    batch: options.LumosBatch = 1,
    seed: options.TrainSeed = 0,
    device: options.TrainDevice = "cpu",
    threads: options.TrainThreads = None,
    as_json: options.AsJson = False,
) -> None:
    """Train an embedded Lumos-1 from nothing on its procedural world, and write it as a folder that --model takes.

    On a CPU, minutes are those the training had a core for: a busy machine makes it last longer. The same command goes
    on where it was stopped: checkpoints and numbers are kept in DIR/work.
    """
    minutes = {"tokenizer": tokenizer_minutes, "transformer": transformer_minutes}
    _check(minutes, batch, seed, threads, device)
    _make_folder(out)

    from ..evaluate.machine import cpu_threads

    shell.hush()
    with cpu_threads(threads), _resumable(out) as stop:
        from ..zoo.train_tiny_lumos import train as run

        _say_planned(minutes if begin is None else {"transformer": minutes["transformer"]}, out)
        facts = run(out, minutes, begin, device, seed, batch, lambda: stop.asked)
    score = facts["tokenizer_psnr_fresh_seeds"]
    text = f"{out}: tokenizer {score} dB on fresh seeds; longtake generate … --model {out}"
    shell.answer({"out": str(out), **facts}, text, as_json)


@train.command("tiny-skyreels")
@shell.guarded
def tiny_skyreels(
    begin: options.BeginMany,
    out: options.TrainFolder,
    minutes: options.TrainMinutes = 40.0,
    batch: options.Batch = 2,
    seed: options.TrainSeed = 0,
    device: options.TrainDevice = "cpu",
    threads: options.TrainThreads = None,
    as_json: options.AsJson = False,
) -> None:
    """Train SkyReels-V2's diffusion forcing in small, from the many-step stage of a training of tiny-wan on.

    On a CPU, minutes are those the training had a core for: a busy machine makes it last longer. The same command goes
    on where it was stopped: checkpoints and numbers are kept in DIR/work.
    """
    _check({"": minutes}, batch, seed, threads, device)
    shell.check_folder(out)

    from ..evaluate.machine import cpu_threads

    shell.hush()
    with cpu_threads(threads), _resumable(out) as stop:
        from ..zoo.train_tiny_skyreels import train as run

        shell.say(f"training for {minutes:g} minutes, less what is done; numbers in {out / 'work' / 'metrics.jsonl'}")
        facts = run(out, minutes, begin, device, seed, batch, stop=lambda: stop.asked)
    shell.answer({"out": str(out), **facts}, f"{out}: longtake generate … --model {out}", as_json)


@train.command("compressor")
@shell.guarded
def compressor(
    out: options.CompressorFolder,
    model: options.Model = None,
    minutes: options.TrainMinutes = 20.0,
    chunks: options.RolloutChunks = 7,
    batch: options.TrainTakes = 2,
    policy: options.TrainPolicy = "packforcing",
    prompts: options.PromptFile = None,
    real_score: options.RealScore = None,
    fake_score: options.FakeScore = None,
    lora_rank: options.LoraRank = 0,
    rate: options.Rate = None,
    carry: options.Carry = "blocks",
    positions: options.CompressedPositions = "midpoint",
    low: options.LowBranch = "pixels",
    past: options.RolloutPast = "own",
    seed: options.TrainSeed = 0,
    device: options.TrainDevice = "cpu",
    threads: options.TrainThreads = None,
    as_json: options.AsJson = False,
) -> None:
    """Train what PackForcing compresses its middle with, through rollouts of a causal Wan model.

    Without --real-score the loss is self-distillation: under its compressed past the model is to predict what it
    predicts under its whole past. With it, it is distribution matching, the published recipe. The same command goes on
    where it was stopped. A model folder that holds the result as compressor/ uses it from then on.
    """
    _check({"": minutes}, batch, seed, threads, device)
    for name, value, least in (("chunks", chunks, 2), ("lora-rank", lora_rank, 0)):
        if value < least:
            raise LongtakeError(f"--{name} {value}: give at least {least}")
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise LongtakeError(f"--rate {rate:g}: give a number above 0")
    if fake_score is not None and real_score is None:
        raise LongtakeError("--fake-score alone trains nothing: give --real-score too")
    told = _lines(prompts) if prompts is not None else []
    shell.check_folder(out)

    from ..compressors.base import CARRIES, POSITIONS
    from ..compressors.dual_branch import LOWS
    from ..evaluate.machine import cpu_threads
    from ..zoo.train_compressor import PASTS, Recipe
    from ..zoo.train_compressor import train as run

    for option, choice, known in (
        ("carry", carry, CARRIES), ("positions", positions, POSITIONS), ("low", low, LOWS), ("past", past, PASTS),
    ):  # fmt: skip
        shell.check_choice(choice, f"--{option}", known)
    recipe = Recipe(
        chunks=chunks, batch=batch, policy=policy, real=real_score, fake=fake_score, lora=lora_rank, rate=rate,
        carry=carry, where=positions, low=low, past=past,
    )  # fmt: skip
    numbers = out / "work" / "metrics.jsonl"
    begun = f"training for {minutes:g} minutes, less what is done; numbers in {numbers}"
    shell.hush()
    with cpu_threads(threads), _resumable(out) as stop:
        facts = run(
            model or options.DEFAULT_MODEL, out, minutes, recipe=recipe, prompts=told, device=device, seed=seed,
            stop=lambda: stop.asked, ready=lambda: shell.say(begun),
        )  # fmt: skip
    held = facts["held_out_distillation"]
    text = (
        f"{out / 'compressor'}: {facts['steps']} steps; on fresh takes {held['trained']:.4g} away from seeing the "
        f"whole past, {held['low_resolution_alone']:.4g} without training"
    )
    shell.answer({"out": str(out), **facts}, text, as_json)


@contextlib.contextmanager
def _resumable(out: Path) -> Iterator[shell.StopAsked]:
    """Within `with`, the first Ctrl-C or SIGTERM is for the training to see, which then saves what it has; whatever
    ends it, the user is told what is kept."""
    from ..zoo.stages import Stopped

    with shell.StopAsked("step") as stop:
        try:
            yield stop
        except Stopped as kept:
            shell.say(str(kept))
            raise typer.Exit(stop.exit_code) from None
        except KeyboardInterrupt:
            kept_there = ", ".join(str(path) for path in sorted((out / "work").glob("*.pt")))
            shell.say(
                f"stopped at once; kept as of the last checkpoint, at most 90 seconds old: {kept_there}; the same "
                "command goes on from there"
                if kept_there
                else "stopped at once, before the first checkpoint: nothing is kept"
            )
            raise typer.Exit(shell.INTERRUPTED) from None


def _check(minutes: dict[str, float], batch: int, seed: int, threads: int | None, device: str) -> None:
    for name, value in minutes.items():
        if not (value >= LEAST_MINUTES and math.isfinite(value)):
            option = f"--{name}-minutes" if name else "--minutes"
            raise LongtakeError(f"{option} {value:g}: give each stage at least {LEAST_MINUTES:g}")
    if batch < 1:
        raise LongtakeError(f"--batch {batch}: give at least 1")
    if not 0 <= seed < SEEDS:
        raise LongtakeError(f"--seed {seed}: give a number from 0 to {SEEDS - 1}")
    shell.check_threads(threads)
    shell.check_device(device)


def _say_planned(minutes: dict[str, float], out: Path) -> None:
    planned = sum(minutes.values())
    shell.say(
        f"training for {planned:g} minutes in all, less what is done; numbers in {out / 'work' / 'metrics.jsonl'}"
    )


def _lines(path: Path) -> list[str]:
    try:
        told = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LongtakeError(f"--prompts {path} cannot be read: {error}") from error
    if not told:
        raise LongtakeError(f"--prompts {path} is empty: give a text file with one prompt a line")
    return told


def _make_folder(out: Path) -> None:
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtakeError(f"cannot make folder {out / 'work'}: {error.strerror}; give another --out") from error
