"""The suite: which benchmarks there are, what each measures, how long it takes, and how its reports are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LongtakeError

if TYPE_CHECKING:
    from .bench_report import Report

MARKS = re.compile(r"<!-- bench:(?P<name>[\w.-]+) -->\n(?P<table>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """A benchmark: `reader` is where its report's class is, module:class; `minutes` at its default shape on two idle
    cores."""

    name: str
    measures: str
    minutes: float
    shapes: tuple[str, ...]
    reader: str

    def read(self, path: Path) -> Report:
        module, _, name = self.reader.partition(":")
        return getattr(import_module(f".{module}", __package__), name).read(path)


SUITE = {
    entry.name: entry
    for entry in (
        Entry(
            "roofline", "this machine's ceilings: matrix products in TFLOP/s, copies in GB/s", 1,
            ("default", "micro"), "bench_roofline:RooflineReport",
        ),
        Entry(
            "take", "does a long take stay flat, and what does everything beside the forwards cost", 9,
            ("cpu-small", "gpu-wan-1.3b", "cpu-micro"), "take_report:TakeReport",
        ),
        Entry(
            "endless", "what becomes of thousands of latent frames of a trained model: memory, time, light, motion", 14,
            ("long", "micro"), "endless_report:EndlessReport",
        ),
        Entry(
            "packcache", "a packed history on Lumos-1 against two ways of keeping all of it", 23,
            ("lumos-cpu", "lumos-1-1b", "lumos-1-3b", "lumos-micro"), "packcache_report:PackReport",
        ),
        Entry(
            "packforcing", "a compressed, chosen middle: shares of a chunk, against full history and window", 4,
            ("cpu-small", "gpu-wan-1.3b", "cpu-micro"), "packforcing_report:PackForcingReport",
        ),
        Entry(
            "flowcache", "reuse and a compressed past on diffusion forcing: seconds, and what changes", 90,
            ("cpu-sky", "gpu-skyreels-1.3b", "cpu-micro"), "flowcache_report:FlowCacheReport",
        ),
        Entry(
            "flowcache-kv", "compressing one full-size layer: FlowCacheKV's score against whole matrices", 6,
            ("magi-4.5b", "micro"), "bench_flowcache_kv:CompressionReport",
        ),
        Entry(
            "gpu", "the forwards, chunks, kernels and graphs of four published models, on a GPU", 10,
            ("published", "micro"), "gpu.report:GpuReport",
        ),
        Entry(
            "peers", "ours beside other people's caches, in turn, at equal bytes or tokens", 10,
            ("cpu-small", "gpu-wan-1.3b", "cpu-micro"), "peers_report:PeersReport",
        ),
    )
}  # fmt: skip


def read(path: Path) -> Report:
    """The report in a file, whichever benchmark wrote it. Raises LongtakeError for a file that none did."""
    from .provenance import read_json

    data = read_json(path)
    kind = data.get("benchmark") if isinstance(data, dict) else None
    if kind not in SUITE:
        raise LongtakeError(f"{path}: benchmark {kind!r} is not one of {', '.join(SUITE)}")
    return SUITE[kind].read(path)


def report_file(name: str, folder: Path) -> Path:
    """The file a block `<!-- bench:NAME -->` is filled from: NAME.json, else NAME-cpu.json. Raises LongtakeError."""
    for candidate in (folder / f"{name}.json", folder / f"{name}-cpu.json"):
        if candidate.is_file():
            return candidate
    there = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "no report"
    raise LongtakeError(
        f"no {name}.json or {name}-cpu.json in {folder}, which has {there}: measure it, or drop the block"
    )


def fill(document: str, folder: Path, given: Mapping[str, Report] | None = None) -> str:
    """The document with the table of every block `<!-- bench:NAME --> … <!-- /bench:NAME -->` made anew from the
    reports in `folder`, or from those `given` by name, and that of every block `<!-- compare:NAME --> …` from the
    summaries in `folder`/compare. Raises LongtakeError without blocks, or without a report."""
    from .compare.markdown import fill as fill_comparisons

    given = given or {}

    def made(block: re.Match[str]) -> str:
        name = block["name"]
        report = given[name] if name in given else read(report_file(name, folder))
        return f"<!-- bench:{name} -->\n{report.markdown()}\n<!-- /bench:{name} -->"

    filled, blocks = MARKS.subn(made, document)
    filled, compared = fill_comparisons(filled, folder / "compare")
    if not blocks and not compared:
        raise LongtakeError(
            "the document has no <!-- bench:NAME --> … <!-- /bench:NAME -->: put the two lines where a table belongs"
        )
    return filled


def listing() -> str:
    """The suite for people."""
    lines = ["longtake bench NAME: measures, writes benchmarks/NAME-DEVICE.json and prints what it found", ""]
    for e in SUITE.values():
        took = f"{e.minutes:g} min"
        lines += [f"  {e.name:13} {took:>7}  {e.measures}", f"  {'':22}--shape {', '.join(e.shapes)}"]
    lines += [
        "", "Minutes are of the first shape on two idle cores; a shape for a GPU runs where there is one.",
        "longtake bench table --into README.md fills a document's tables from the reports.",
    ]  # fmt: skip
    return "\n".join(lines)
