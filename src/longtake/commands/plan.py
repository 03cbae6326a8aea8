"""`longtake plan`: what a take will cost, by arithmetic, for models that are not here; and what a card can run."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from . import shell
from .options import DTYPES, HISTORY_DTYPES

if TYPE_CHECKING:
    from ..planner import ModelShape, PlanRequest, Room
    from ..planner.speed import Card

OF_BYTES = ("vram", "host_ram", "activation_peaks")  # whose numbers are bytes
LEAST_CARD = 10**8  # bytes: what is less was meant otherwise
BYTES = ("memory", "reserve", "needs", "history")
MODELS_HELP = "A named shape (a wrong one lists those known), an embedded model, or a model folder."


def plan(
    model: Annotated[str | None, Option("--model", "-m", help=MODELS_HELP)] = None,
    size: Annotated[str | None, Option(metavar="WxH", help="Pixels.", show_default="the model's")] = None,
    frames: Annotated[int | None, Option(help="Length in pixel frames.")] = None,
    seconds: Annotated[float | None, Option(help="Length in seconds.")] = None,
    chunks: Annotated[int | None, Option(help="Length in chunks.")] = None,
    policy: Annotated[
        str | None, Option("--policy", "-p", help="KV policy, NAME[:key=value,…] (see `longtake policies`).")
    ] = None,
    chunk: Annotated[int | None, Option(help="Latent frames generated together.", show_default="the model's")] = None,
    steps: Annotated[int | None, Option(help="Denoising steps per chunk.", show_default="the model's")] = None,
    residency: Annotated[str, Option(help="Where the view lives: resident, or rebuilt in every forward: scratch.")] = (
        "resident"
    ),
    dtype: Annotated[str, Option(help="Of weights, activations and what is in view.")] = "bfloat16",
    history_dtype: Annotated[
        str | None, Option(help="Keep the past quantised: int8 or fp8.", show_default="as computed")
    ] = None,
    decode: Annotated[bool, Option("--decode/--no-decode", help="Whether pixels are wanted, or latents only.")] = True,
    gpu: Annotated[
        str | None,
        Option(
            metavar="CARD|BYTES", help="A card's name or its memory, e.g. 24GB: what fits; without a length, what runs."
        ),
    ] = None,
    reserve: Annotated[
        str, Option(metavar="BYTES", help="Of the card, for the CUDA context and what the allocator rounds up.")
    ] = "1GB",
    roofline: Annotated[
        Path | None, Option(help="Measured ceilings for seconds: the JSON of `longtake bench roofline`.")
    ] = None,
    tflops: Annotated[float | None, Option(help="Ceiling of matrix products, TFLOP/s.")] = None,
    bandwidth: Annotated[float | None, Option(help="Ceiling of copies, GB/s read and written.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count tokens, bytes, FLOPs and seconds of a take before running it; no weights are needed."""
    height, width = shell.parse_size(size)
    shell.check_choice(dtype, "--dtype", DTYPES)
    shell.check_choice(history_dtype, "--history-dtype", HISTORY_DTYPES)

    from ..errors import LongtakeError
    from ..planner import PlanRequest, answer, ceilings
    from ..policies import parse

    card, room = _room(gpu, reserve)
    if model is None and room is None:
        raise LongtakeError("nothing to plan: name a --model and a length, or a --gpu to see what it runs")
    itemsize = 4 if dtype == "float32" else 2
    known = ceilings(card, roofline, tflops, bandwidth, itemsize)
    shape = None if model is None else _shape(model, itemsize)
    lengths = (frames, seconds, chunks)
    request = PlanRequest(
        model=model or "", size=None if width is None or height is None else (width, height), frames=frames,
        seconds=seconds, chunks=1 if room is not None and lengths == (None, None, None) else chunks,
        policy=None if policy is None else parse(policy), chunk=chunk, steps=steps, residency=residency, decode=decode,
        shape=shape,
    )  # fmt: skip
    if room is not None and (model is None or lengths == (None, None, None)):
        _runnable(room, request, history_dtype, itemsize, as_json)
        return
    if shape is not None:
        request = replace(request, head_bytes=_head_bytes(history_dtype, shape))
    result = answer(request, room, known)
    shell.answer(result, "\n".join(_lines(result)), as_json)


def _room(gpu: str | None, reserve: str) -> tuple[Card | None, Room | None]:
    """The card that is meant, if it has a name, and its memory. Raises LongtakeError for a card that is not known."""
    from ..errors import LongtakeError
    from ..planner import CARDS, Room

    if gpu is None:
        return None, None
    kept = shell.parse_bytes(reserve)
    if card := CARDS.get(gpu.strip().lower().replace(" ", "-")):
        return card, Room(card.about, card.memory, kept)
    try:
        memory = shell.parse_bytes(gpu)
    except LongtakeError:
        raise LongtakeError(f"no card {gpu!r}: give its memory, e.g. 24GB, or one of {', '.join(CARDS)}") from None
    if memory < LEAST_CARD:
        raise LongtakeError(f"--gpu {gpu}: that is {shell.bytes_text(memory)}; give a card's memory, e.g. 24GB")
    return None, Room(gpu, memory, kept)


def _shape(model: str, itemsize: int) -> ModelShape:
    """A named shape, or that of a model that is here, with working numbers of so many bytes."""
    from ..errors import LongtakeError
    from ..planner import models

    named = models()
    if model in named:
        return replace(named[model], itemsize=itemsize)
    from ..hosts.base import CONFIG_NAME, HostConfig
    from ..hosts.loading import embedded
    from ..planner.folders import shape_of

    folder = embedded().get(model) or Path(model).expanduser()
    if not folder.is_dir():
        here = ", ".join(sorted({*named, *embedded()}))
        raise LongtakeError(f"no model {model!r} to plan for; known: {here}; or give a model folder")
    if not (folder / CONFIG_NAME).exists():
        raise LongtakeError(f"{folder} has no {CONFIG_NAME}, which says how it is run: name a known model instead")
    return shape_of(folder, model, asdict(HostConfig.read(folder)), itemsize)


def _head_bytes(history_dtype: str | None, shape: ModelShape) -> int | None:
    """Bytes of one token's K, or V, of one head in a quantised past."""
    from ..history import storage_form

    form = storage_form(history_dtype)
    return None if form is None else form.head_bytes(shape.head_dim)


def _runnable(room: Room, request: PlanRequest, history_dtype: str | None, itemsize: int, as_json: bool) -> None:
    """What the card runs: a row for each model and size."""
    from ..planner import models, runnable

    shapes = [request.shape] if request.shape else [replace(s, itemsize=itemsize) for s in models().values()]
    rows = []
    for shape in shapes:
        rows += runnable(room, replace(request, head_bytes=_head_bytes(history_dtype, shape)), [shape])
    result = {"card": asdict(room), "rows": rows}
    shell.answer(result, "\n".join(_table(room, rows)), as_json)


def _table(room: Room, rows: list[dict[str, Any]]) -> list[str]:
    """The rows in columns, as wide as what stands in them, and what the words mean."""
    head = ("model", "size", "weights", "one take", "runs", "takes", "with", "all kept", "at most")
    cells = [head]
    for row in rows:
        best = row["largest"]
        if row["why"] is not None:
            cells.append((row["model"], f"{row['width']}x{row['height']}", "", "", "no", "—", row["why"], "—", "—"))
            continue
        cells.append((
            row["model"], f"{row['width']}x{row['height']}", shell.bytes_text(row["weights"]),
            shell.bytes_text(row["needs"]), "yes" if row["fits"] else "no", str(row["sessions"] or "—"),
            f"{row['policy']}, {row['residency']}", _length(row["full_history_seconds"]),
            "—" if best is None else best["policy"],
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    title = (
        f"{room.name}: {shell.bytes_text(room.memory)}, {shell.bytes_text(room.reserve)} of it kept free. Arithmetic, "
        "nothing was run."
    )
    return [
        title, "", table[0], "-" * max(map(len, table)), *table[1:], "",
        "one take: bytes on the device of an endless one under the policy and view of `with`; takes: how many at once.",
        "all kept: the longest take with its whole history; at most: the largest history under that policy; both with",
        "a view that is rebuilt in every forward (--residency scratch). The text encoder is in host memory.",
        *(f"Not counted: {what}." for what in sorted({what for row in rows for what in row["uncounted"]})),
    ]  # fmt: skip


def _length(seconds: float | None) -> str:
    return "endless" if seconds is None else "—" if seconds == 0 else f"{seconds:.3g} s"


def _lines(result: dict[str, Any], indent: str = "", sizes: bool = False) -> list[str]:
    """One line per number, bytes and large counts also in words; lists of rows are left to --json."""
    lines = []
    for key, value in result.items():
        name = f"{indent}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += [f"{name}:", *_lines(value, indent + "  ", key in OF_BYTES)]
        elif isinstance(value, list) and len(value) <= 4 and all(isinstance(x, int | float) for x in value):
            lines.append(f"{name}: {' / '.join(f'{x:g}' for x in value)}")
        elif isinstance(value, list):
            lines.append(f"{name}: {len(value)} values, see --json")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            words = f"  ({shell.bytes_text(value)})" if sizes or key.endswith("bytes") or key in BYTES else ""
            lines.append(f"{name}: {value:,}{words}" if isinstance(value, int) else f"{name}: {value:.6g}")
        else:
            lines.append(f"{name}: {'not known' if value is None else value}")
    return lines
