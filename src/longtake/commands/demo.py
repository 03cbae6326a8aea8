"""`longtake demo`: see and measure the policies side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options, shell
from .progress import DemoProgress

if TYPE_CHECKING:
    from ..policies import KVPolicy


def demo(
    out: options.DemoFolder = Path("longtake-demo"),
    model: options.Model = None,
    prompt: options.Prompts = None,
    policy: options.Policies = None,
    seconds: options.DemoSeconds = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Make takes of three prompts under several policies, and a page that compares them. Needs no arguments.

    OUT_DIR gets index.html, an MP4 for each take, contact_sheet.png and demo.json, in about a minute on two cores, two
    at most.
    """
    if seconds is not None:
        shell.check_seconds(seconds)
    shell.check_choice(dtype, "--dtype", options.DTYPES)

    from ..demo import check_out, make_demo
    from ..hosts.loading import load
    from ..policies import parse

    check_out(out)
    shell.check_threads(threads)
    policies: list[KVPolicy] = []
    for spec in policy or ():
        if (parsed := parse(spec)) in policies:
            shell.say(f"note: --policy {spec} is given twice, and compared once")
        else:
            policies.append(parsed)
    shell.check_device(device)
    shell.hush()
    host = load(model or options.DEFAULT_MODEL, device=device, dtype=dtype)
    with shell.cpu_threads(threads, host), DemoProgress() as progress:
        result = make_demo(
            out, host, prompts=prompt or (), policies=policies, seconds=seconds, seed=seed or 0, tick=progress.tick
        )
    page = (out / "index.html").absolute()
    shell.answer({"out": str(out), "page": str(page), **result}, _text(result, page), as_json)


def _text(result: dict[str, Any], page: Path) -> str:
    """The table of the page, for the terminal."""
    lines = [
        f"{len(result['takes'])} takes of {result['seconds']:.1f} s in {result['wall_seconds']:.0f} s, "
        f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    ]
    width = max(len(p["label"]) for p in result["policies"])
    lines.append(f"{'policy':{width}}  chunks/s  realtime  attended  history")
    for p in result["policies"]:
        lines.append(
            f"{p['label']:{width}}  {p['chunks_per_second']:8.2f}  {p['realtime_factor']:7.2f}x  "
            f"{p['attended_tokens']:8}  {shell.bytes_text(p['history_bytes'])}"
        )
    lines += [f"left out: {row['policy']} ({row['why']})" for row in result["left_out"]]
    return "\n".join([*lines, f"contact sheet {page.parent / 'contact_sheet.png'}", f"open {page}"])
