"""`longtake analyze`: what a model does with its past, measured while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from ..errors import LongtakeError
from . import options, shell
from .usage import Commands

if TYPE_CHECKING:
    from ..hosts.base import Host

analyze = typer.Typer(cls=Commands, help="Measure what a model does with its past.")


@analyze.callback()
def group() -> None:
    """Measure what a model does with its past."""


@analyze.command("decay")
@shell.guarded
def decay(
    model: options.Model = None,
    prompt: Annotated[
        list[str] | None, Option("--prompt", help="Prompt; may be repeated.", show_default="the model's examples")
    ] = None,
    past: Annotated[
        str | None,
        Option(
            metavar="[true|own]",
            help="What chunks look back at: true frames of scenes, which bring their own prompts, or what the take has "
            "made itself.",
            show_default="true for a model of the world of lanes",
        ),
    ] = None,
    seeds: Annotated[
        int | None, Option(help="Takes of each prompt, or scenes.", show_default="1 of each prompt, 4 scenes")
    ] = None,
    chunks: Annotated[
        int | None, Option(help="Length of a take in chunks.", show_default="as long as a training clip")
    ] = None,
    policy: Annotated[str, Option("--policy", "-p", help="What the take sees while it is measured.")] = "full",
    size: options.Size = None,
    anchors: Annotated[int, Option(help="First latent frames that are no history but anchors.")] = 0,
    stream: Annotated[str, Option(help="cond or uncond.")] = "cond",
    out: Annotated[Path, Option(help="Folder for decay.json and the figures.")] = Path("analysis"),
    save: Annotated[
        bool, Option("--save", help="Write rho into the model folder's longtake.json, for policies with rho=auto.")
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how attention to earlier frames falls with their age, and fit PackCache's decay to it."""
    shell.check_choice(dtype, "--dtype", options.DTYPES)
    shell.check_choice(past, "--past", ("true", "own"))
    for name, value in (("--seeds", seeds), ("--chunks", chunks)):
        if value is not None and value < 1:
            raise LongtakeError(f"{name} {value}: give at least 1")
    if anchors < 0:
        raise LongtakeError(f"--anchors {anchors}: give 0 or more")
    shell.check_folder(out)
    height, width = shell.parse_size(size)
    shell.check_device(device)

    from ..evaluate.decay import SCENES, measure, measure_truth
    from ..policies import parse

    home = _settings_file(model or options.DEFAULT_MODEL) if save else None
    seen = parse(policy)
    host, prompts = _host(model, device, dtype, prompt)
    given: dict[str, Any] = {"chunks": chunks, "policy": seen, "stream": stream, "anchors": anchors}
    with shell.cpu_threads(None, host):
        if past == "true" or (past is None and host.config.world and not prompt and not size):
            if prompt or size:
                raise LongtakeError("--past true: its scenes bring prompt and size; leave --prompt and --size out")
            report = measure_truth(host, seeds=range(seeds or SCENES), **given)
        else:
            report = measure(host, prompts, seeds=range(seeds or 1), height=height, width=width, **given)
    written = report.write(out)
    found = report.decay()
    if home is not None:
        if found is None or not 0 < round(found.rho, 4) < 1:
            raise LongtakeError(f"nothing was saved: attention does not decay here (rho {found and found.rho})")
        from ..evaluate.decay_note import with_decay
        from ..evaluate.provenance import write_atomically

        text = with_decay(home.read_text(encoding="utf-8"), round(found.rho, 4))
        write_atomically(home, text.encode())
        written.append(home)
    _finish(report, written, as_json)


@analyze.command("reuse")
@shell.guarded
def reuse(
    model: options.Model = None,
    prompt: options.See = None,
    spec: Annotated[str, Option("--reuse", metavar="SPEC", help="The reuse policy to watch.")] = "flowcache:slow",
    metric: Annotated[
        str | None, Option(help="What is traced: latent or timestep.", show_default="what the policy measures")
    ] = None,
    chunks: Annotated[int, Option(help="Length of the two takes in chunks.")] = 4,
    seed: Annotated[int, Option(help="Start of the random numbers.")] = 0,
    steps: options.Steps = None,
    size: options.Size = None,
    guidance: options.Guidance = None,
    out: Annotated[Path, Option(help="Folder for reuse.json and the figures.")] = Path("analysis"),
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Trace how far chunks move from step to step, what a reuse policy decides by that, and what theory says of it."""
    shell.check_choice(dtype, "--dtype", options.DTYPES)
    shell.check_choice(metric, "--metric", ("latent", "timestep"))
    shell.check_folder(out)
    height, width = shell.parse_size(size)
    shell.check_device(device)

    from ..evaluate.reuse_traces import measure
    from ..reuse import parse

    policy = parse(spec)
    host, prompts = _host(model, device, dtype, [prompt] if prompt else None)
    with shell.cpu_threads(None, host):
        report = measure(
            host, prompts[0], reuse=policy, metric=metric, chunks=chunks, seed=seed, num_inference_steps=steps,
            height=height, width=width, guidance_scale=guidance,
        )  # fmt: skip
    _finish(report, report.write(out), as_json)


@analyze.command("selection")
@shell.guarded
def selection(
    model: options.Model = None,
    prompt: options.See = None,
    policy: Annotated[str, Option("--policy", "-p", help="packforcing, with options.")] = "packforcing",
    chunks: Annotated[int, Option(help="Length of the take in chunks.")] = 100,
    seed: Annotated[int, Option(help="Start of the random numbers.")] = 0,
    size: options.Size = None,
    out: Annotated[Path, Option(help="Folder for selection.json and the figures.")] = Path("analysis"),
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Record which blocks of the middle PackForcing picks, and how demand spreads over the history."""
    shell.check_choice(dtype, "--dtype", options.DTYPES)
    shell.check_folder(out)
    height, width = shell.parse_size(size)
    shell.check_device(device)

    from ..evaluate.selection import measure
    from ..policies import PackForcing, parse

    asked = parse(policy)
    if not isinstance(asked, PackForcing):
        raise LongtakeError(f"--policy {policy}: only packforcing chooses blocks, give packforcing[:key=value,…]")
    host, prompts = _host(model, device, dtype, [prompt] if prompt else None)
    with shell.cpu_threads(None, host):
        report = measure(host, prompts[0], policy=asked, chunks=chunks, seed=seed, height=height, width=width)
    _finish(report, report.write(out), as_json)


def _host(
    model: str | None, device: str | None, dtype: str | None, prompts: list[str] | None
) -> tuple[Host, list[str]]:
    """The model, and the prompts given or its own. Raises LongtakeError if it has none."""
    from .generate import load_host

    shell.hush()
    host = load_host(model or options.DEFAULT_MODEL, device, dtype, None, "offload")
    prompts = prompts or list(host.config.prompts)
    if not prompts:
        raise LongtakeError(f"{host.name} comes without example prompts: give --prompt")
    return host, prompts


def _finish(report: Any, written: list[Path], as_json: bool) -> None:
    shell.answer(report.as_dict(), report.text(), as_json)
    shell.say_written(written)


def _settings_file(model: str) -> Path:
    """The longtake.json of an embedded model or a folder. Raises LongtakeError where there is none."""
    from ..hosts.base import CONFIG_NAME
    from ..hosts.loading import embedded

    home = embedded().get(model, Path(model).expanduser()) / CONFIG_NAME
    if not home.is_file():
        raise LongtakeError(f"--save writes into {CONFIG_NAME} of a model folder, and {home} is not there")
    return home
