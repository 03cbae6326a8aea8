"""`longtake generate`: one take into an MP4, frames written as they are made."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import LongtakeError
from ..named import spec
from ..switching import SWITCHES
from . import options, shell
from .take import report_text, roll, say_prompt

if TYPE_CHECKING:
    from ..compressors import Compressor
    from ..geometry import Geometry
    from ..hosts.base import Host
    from ..policies import KVPolicy
    from ..samplers.masked import MaskedSampler
    from ..session import Session

LONG_TEXT = 0.1  # part of a packed history's budget


def generate(
    output: options.Output,
    prompt: options.Prompt = None,
    model: options.Model = None,
    policy: options.Policy = None,
    compressor: options.CompressorSpec = None,
    reuse: options.Reuse = "none",
    reuse_log: options.ReuseLog = None,
    size: options.Size = None,
    seconds: options.Seconds = None,
    chunks: options.Chunks = None,
    seed: options.Seed = None,
    image: options.Picture = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: options.Negative = None,
    prompt_switch: options.PromptSwitch = None,
    switch_mode: options.SwitchMode = None,
    memory: options.Memory = None,
    residency: options.Residency = None,
    history_dtype: options.HistoryDtype = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    text_encoder: options.TextEncoder = "offload",
    tokenizer: options.VideoTokenizer = None,
    allow_torchscript: options.AllowTorchscript = False,
    compat: options.Compat = None,
    threads: options.Threads = None,
    causal: options.Causal = False,
    family: options.CausalFamily = None,
    latents: options.Latents = None,
    snapshot: options.Snapshot = None,
    resume: options.Resume = None,
    as_json: options.AsJson = False,
) -> None:
    """Generate one take and write it to an MP4 file.

    Ctrl-C, SIGTERM and SIGHUP end the take after the chunk in flight, a second Ctrl-C at once; either way the file
    holds what was made and plays. SIGKILL cannot be handled: it leaves a hidden .longtake-….part that does not play.
    """
    if output.suffix.lower() != ".mp4":
        raise LongtakeError(f"output {output}: an MP4 is written, so let the name end in .mp4")
    for path, what in ((output, "output"), (latents, "latents"), (snapshot, "snapshot"), (reuse_log, "reuse log")):
        if path is not None:
            shell.check_file(path, what)
    # a snapshot may take the place of the one gone on from: it is written beside it, and has read all of it before
    shell.check_distinct(
        {"-o": output, "--latents": latents, "--snapshot": snapshot, "--reuse-log": reuse_log}, {"--image": image}
    )
    shell.check_distinct({"-o": output, "--latents": latents, "--reuse-log": reuse_log}, {"--resume": resume})
    fixed = {
        "reuse": reuse if reuse != "none" else None, "size": size, "seed": seed, "image": image, "steps": steps,
        "guidance": guidance, "negative": negative, "memory": memory, "residency": residency,
        "history-dtype": history_dtype, "compat": compat,
    }  # fmt: skip
    if resume is not None and (given := [f"--{name}" for name, value in fixed.items() if value is not None]):
        raise LongtakeError(f"{', '.join(given)}: the snapshot of --resume settles that; leave it out")
    if prompt is None and resume is None:
        raise LongtakeError('a take needs a prompt: longtake generate "a red ball bouncing" -o take.mp4')
    if steps is not None and steps < 1:
        raise LongtakeError(f"{steps} steps: a chunk needs at least 1")
    if seconds is not None and chunks is not None:
        raise LongtakeError("--seconds and --chunks: give one of them")
    if chunks is not None and chunks < 1:
        raise LongtakeError(f"{chunks} chunks: ask for at least 1")
    seconds = options.DEFAULT_SECONDS if seconds is None else seconds
    shell.check_seconds(seconds)
    if guidance is not None and not math.isfinite(guidance):
        raise LongtakeError(f"--guidance {guidance}: give a finite number; 1 is no guidance")
    shell.check_choice(dtype, "--dtype", options.DTYPES)
    shell.check_choice(history_dtype, "--history-dtype", options.HISTORY_DTYPES)
    shell.check_choice(switch_mode, "--switch-mode", SWITCHES)
    height, width = shell.parse_size(size)
    switches = [parse_switch(text) for text in prompt_switch or ()]
    if switch_mode is not None and not switches and (resume is None or prompt is None):
        raise LongtakeError(f"--switch-mode {switch_mode} has nothing to do: give --prompt-switch SECONDS:PROMPT too")
    budget = None if memory is None else shell.parse_bytes(memory)
    shell.check_threads(threads)

    from ..compressors import parse as parse_compressor
    from ..hosts.convert import FAMILIES
    from ..hosts.prompts import TEXT_ENCODER_FATES
    from ..policies import parse
    from ..reuse import parse as parse_reuse
    from ..reuse import write_log
    from ..session import Session, default_policy
    from ..snapshot import describe

    shell.check_choice(family, "--family", FAMILIES)
    shell.check_choice(text_encoder, "--text-encoder", TEXT_ENCODER_FATES)
    kv_policy = None if policy is None else parse(policy)
    made_by = None if compressor is None else parse_compressor(compressor)
    if kv_policy is not None:
        check_compressor(made_by, kv_policy)  # before the model is loaded
    reuse_policy = parse_reuse(reuse)
    shell.check_device(device)
    if image is not None:
        from ..video import read_image

        read_image(image)  # before the model is loaded, which may take minutes
    told = {} if resume is None else describe(resume)
    started = time.perf_counter()
    shell.hush()
    source = model or told.get("host") or options.DEFAULT_MODEL
    shell.say(f"loading {source}")
    host = load_host(
        source, device, dtype, family or causal or None, text_encoder, tokenizer=tokenizer,
        allow_torchscript=allow_torchscript,
    )  # fmt: skip
    prompts = [text for text in (prompt, negative, *(text for _, text in switches)) if text is not None]
    check_host(host, bool(prompts), negative, guidance)
    say_cut(host, prompts)
    load_seconds = time.perf_counter() - started
    with shell.cpu_threads(threads, host) as used:
        later = [text for _, text in switches] + ([prompt] if prompt is not None and resume is not None else [])
        # once the session stands there is no text encoder any more
        embeds = {text: host.encode_prompt([text]) for text in later} if text_encoder == "free" else {}
        if resume is not None:
            take = restored(resume, host, kv_policy, made_by)
            check_compressor(made_by, take.policy)
            if switch_mode is not None:
                take.prompt_switch = take.switch_mode(switch_mode)
            if prompt is not None:
                say_prompt(take, prompt, embeds)
        else:
            asked = kv_policy
            kv_policy = kv_policy or default_policy(host)
            check_compressor(made_by, kv_policy)
            if budget is not None:
                kv_policy = fitted(kv_policy, budget, host, height, width, guidance, history_dtype)
                if asked is not None and kv_policy != asked:
                    shell.say(f"note: --memory {memory} turns --policy {spec(asked)} into {spec(kv_policy)}")
            geometry = host.geometry(height, width)
            if chunks is None:
                chunks = geometry.chunks(seconds, given=0 if image is None else 1)
            say_plan(chunks, geometry, kv_policy)  # before the session, which takes its memory at once
            take = Session(
                host, kv_policy, reuse=reuse_policy, compressor=made_by,
                prompt=prompt, negative_prompt=negative, seed=seed or 0,
                image=None if image is None else first_frame(image, geometry.height, geometry.width),
                height=height, width=width, num_inference_steps=steps, guidance_scale=guidance,
                sampler=compatible(host, compat, steps), residency=residency or "resident",
                history_dtype=history_dtype, prompt_switch=switch_mode,
                chunks=None if snapshot else chunks,  # a snapshot's take may go on
            )  # fmt: skip
        say_reuse(take)
        say_long_text(take, 0 if image is None else 1)
        before = take.geometry.pixel_frames(take.frame) if resume is not None else 0
        if chunks is None:  # the length of the continuation
            chunks = take.geometry.chunks(seconds + before / take.geometry.fps, given=take.frame)
        if take.chunks is not None and take.index + chunks > take.chunks:
            raise LongtakeError(
                f"{chunks} chunks more: this snapshot's take was begun with {take.chunks} in all and ends in "
                f"{take.chunks - take.index}; ask for that many, or begin it without chunks="
            )
        if resume is not None:
            say_plan(chunks, take.geometry, take.policy)
        total = take.geometry.pixel_frames(take.frame + chunks * take.geometry.chunk_frames) - before
        check_switches(switches, total - take.geometry.chunk_frames * take.geometry.stride[0], take.geometry.fps)

        with shell.StopAsked() as stop:  # around the snapshot too: it belongs to the end that was asked for
            made = roll(take, chunks, switches, embeds, output, latents, stop)
            if snapshot is not None and made.whole:
                take.snapshot(snapshot)
        if reuse_log is not None:
            write_log(reuse_log, made.decisions, {"model": host.name, "reuse": spec(take.reuse)})
    report = {
        "output": str(output) if made.frames else None, "status": made.status, "model": host.name,
        "policy": spec(take.policy), "fitted_to_bytes": budget, "reuse": spec(take.reuse),
        "prompt": made.prompt or take.prompt or prompt, "seed": None if resume else seed or 0,
        "width": take.geometry.width, "height": take.geometry.height, "fps": take.geometry.fps,
        "device": str(host.device), "threads": used, "dtype": str(host.dtype).removeprefix("torch."),
        "load_seconds": load_seconds, **made.figures(take),
        "latents": str(latents) if latents and made.frames else None,
        "snapshot": str(snapshot) if snapshot and made.whole else None,
    }  # fmt: skip
    shell.answer(report, report_text(report), as_json)
    if made.status == "interrupted":
        if snapshot is not None and not made.whole:
            shell.say("no snapshot was written: the second Ctrl-C cut into a chunk")
        raise typer.Exit(stop.exit_code)
    if made.error is not None:
        shell.fail(str(made.error), shell.FAILED)


def load_host(
    model: str, device: str | None, dtype: str | None, causal: bool | str | None, text_encoder: str, **parts: Any
) -> Host:
    """`longtake.load`, which files of code were run being said."""
    from ..hosts.loading import load

    host = load(model, device=device, dtype=dtype, causal=causal, text_encoder=text_encoder, **parts)
    for name, digest in getattr(getattr(host, "codec", None), "sha256", {}).items():
        shell.say(f"{name} sha256 {digest}")
    return host


def compatible(host: Host, compat: str | None, steps: int | None) -> MaskedSampler | None:
    """The model's sampler, in the variant that is asked for; None: as it is."""
    from ..samplers import default_sampler
    from ..samplers.masked import MaskedSampler

    if compat is None:
        return None
    sampler = default_sampler(host.config, steps)
    if not isinstance(sampler, MaskedSampler):
        raise LongtakeError(f"--compat {compat}: it is for Lumos-1 models, {host.name} is none; leave it out")
    return replace(sampler, compat=compat)


def check_host(host: Host, reads: bool, negative: str | None, guidance: float | None) -> None:
    """Raise LongtakeError if the model lacks what the take needs; `reads`: there are prompts."""
    for part, purpose in (("vae", "make frames of latents"), *([("text_encoder", "read a prompt")] if reads else ())):
        if getattr(host, part, host) is None:  # hosts of other kinds have parts of other names
            raise LongtakeError(f"{host.name} has no {part}/ to {purpose}: give --model a complete folder")
    scale = host.config.guidance_scale if guidance is None else guidance
    if negative is not None and scale == 1:
        raise LongtakeError("--negative needs guidance, whose scale is 1 here, which is none: add e.g. --guidance 3")


def check_compressor(compressor: Compressor | None, policy: KVPolicy) -> None:
    """Raise LongtakeError for a compressor that the policy would never ask."""
    if compressor is not None and "compressed" not in policy.requires:
        raise LongtakeError(
            f"--compressor: policy {spec(policy)} does not compress; give one that does, such as --policy packforcing, "
            "or leave the compressor away"
        )


def say_cut(host: Host, prompts: list[str]) -> None:
    """A line for every prompt of which the model sees the beginning only."""
    most = host.config.text_tokens
    tokenizer: Any = getattr(host, "tokenizer", None)
    for text in prompts if tokenizer is not None else ():
        count = len(tokenizer(" ".join(text.split())).input_ids)
        if count > most:
            start = text if len(text) < 40 else f"{text[:37]}..."
            shell.say(f"warning: prompt {start!r} has {count} tokens; {host.name} sees the first {most}")


def say_long_text(take: Session, given_frames: int) -> None:
    """A line where a prompt that lies in the history is long beside a packed budget: it is kept whole, whatever that
    costs."""
    from ..policies import PackCache

    if not isinstance(take.policy, PackCache):
        return
    geometry = take.geometry
    text = take.history.shape.anchor_tokens - given_frames * geometry.tokens_per_frame
    budget = take.policy.budget(geometry.tokens_per_frame - len(geometry.structural))
    if text > LONG_TEXT * budget:
        shell.say(
            f"warning: the prompt's {text} tokens stay whole beside a history of {budget}: more than a tenth of it; "
            "shorten the prompt or give more history_frames"
        )


def say_plan(chunks: int, geometry: Geometry, policy: KVPolicy) -> None:
    """What is about to be made: the first chunk may take long."""
    tokens = geometry.chunk_frames * geometry.tokens_per_frame
    shell.say(
        f"making {chunks} chunk{'s' if chunks > 1 else ''} of {tokens} tokens, {geometry.width}x{geometry.height} "
        f"pixels, under {spec(policy)}"
    )


def fitted(
    policy: KVPolicy, budget: int, host: Host, height: int | None, width: int | None, guidance: float | None,
    history_dtype: str | None = None,
) -> KVPolicy:  # fmt: skip
    """The policy with its own parameters chosen for `budget` bytes of history."""
    from ..session import history_shape

    scale = host.config.guidance_scale if guidance is None else guidance
    streams = 1 if scale == 1 else 2
    shape = history_shape(host, host.geometry(height, width), streams=streams, history_dtype=history_dtype)
    return policy.fit(budget, shape)


def first_frame(path: Path, height: int, width: int) -> Any:
    """A picture as the first frame of a take: float [3, H, W] in [-1, 1]."""
    import torch

    from ..video import read_image

    return torch.from_numpy(read_image(path, (height, width))).permute(2, 0, 1).float() / 127.5 - 1


def restored(path: Path, host: Host, policy: KVPolicy | None, compressor: Compressor | None = None) -> Session:
    """The snapshot's session, provided that it fits the model and the policy."""
    from ..session import Session

    try:
        return Session.restore(path, host, policy, compressor=compressor)
    except (LongtakeError, RuntimeError, KeyError, IndexError) as error:
        if str(path) in str(error):
            raise
        raise LongtakeError(f"snapshot {path} does not fit model {host.name} and this policy: {error}") from error


def parse_switch(text: str) -> tuple[float, str]:
    """`SECONDS:PROMPT` to its two parts."""
    at, colon, prompt = text.partition(":")
    try:
        seconds = float(at)
    except ValueError:
        seconds = math.nan
    if not colon or not prompt.strip() or not (seconds >= 0 and math.isfinite(seconds)):
        raise LongtakeError(f'prompt switch {text!r}: write SECONDS:PROMPT, e.g. "2.5:a red ball at night"')
    return seconds, prompt.strip()


def check_switches(switches: list[tuple[float, str]], last_start: int, fps: float) -> None:
    """Put the switches in order; raise LongtakeError for one that no chunk would obey any more."""
    switches.sort(key=lambda switch: switch[0])
    if switches and switches[-1][0] > last_start / fps:
        raise LongtakeError(
            f"prompt switch at {switches[-1][0]:g} s comes too late: the last chunk starts at "
            f"{last_start / fps:.2f} s; set it earlier or make the take longer"
        )


def say_reuse(take: Session) -> None:
    """What a reuse policy will do, where that is known before the take."""
    if (decisions := take.reuse_schedule()) is None or take.reuse.name == "none":
        return
    reused = [str(d.index) for d in decisions if d.reused]
    steps = f"steps {', '.join(reused)}" if reused else "none"
    shell.say(f"{spec(take.reuse)} reuses {len(reused)} of {len(decisions)} steps of a chunk: {steps}")
