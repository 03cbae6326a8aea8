"""`longtake plan`: what a take will cost, by arithmetic, for models that are not here."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from . import shell


def plan(
    model: Annotated[str, Option("--model", "-m", help="A named shape; a wrong one lists those known.")],
    size: Annotated[str | None, Option(metavar="WxH", help="Pixels.", show_default="the model's")] = None,
    frames: Annotated[int | None, Option(help="Length in pixel frames.")] = None,
    seconds: Annotated[float | None, Option(help="Length in seconds.")] = None,
    chunks: Annotated[int | None, Option(help="Length in chunks.")] = None,
    policy: Annotated[
        str | None, Option("--policy", "-p", help="KV policy, NAME[:key=value,…] (see `longtake policies`).")
    ] = None,
    chunk: Annotated[int | None, Option(help="Latent frames generated together.", show_default="the model's")] = None,
    steps: Annotated[int | None, Option(help="Denoising steps per chunk.", show_default="the model's")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count tokens, bytes and FLOPs of a take before running it; no weights are needed."""
    height, width = shell.parse_size(size)

    from ..planner import PlanRequest
    from ..planner import plan as count
    from ..policies import parse

    request = PlanRequest(
        model=model, size=None if width is None or height is None else (width, height), frames=frames, seconds=seconds,
        chunks=chunks, policy=None if policy is None else parse(policy), chunk=chunk, steps=steps,
    )  # fmt: skip
    result = count(request)
    shell.answer(result, "\n".join(_lines(result)), as_json)


def _lines(result: dict[str, Any], indent: str = "") -> list[str]:
    """One line per number, bytes and large counts also in words; lists of rows are left to --json."""
    lines = []
    for key, value in result.items():
        name = f"{indent}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += [f"{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and len(value) <= 4 and all(isinstance(x, int | float) for x in value):
            lines.append(f"{name}: {' / '.join(f'{x:g}' for x in value)}")
        elif isinstance(value, list):
            lines.append(f"{name}: {len(value)} values, see --json")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            words = f"  ({shell.bytes_text(value)})" if key.endswith("bytes") else ""
            lines.append(f"{name}: {value:,}{words}" if isinstance(value, int) else f"{name}: {value:.6g}")
        else:
            lines.append(f"{name}: {value}")
    return lines
