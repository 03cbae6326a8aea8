"""One self-contained HTML file of a comparison. It asks nothing of the network, and says so to the browser."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from ..compare.markdown import commit_of
from . import takes, world
from .table import wish
from .text import escape
from .videos import CAP, Videos

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = (
    "dom.js", "chart.js", "tradeoff.js", "curves.js", "player.js", "board.js", "sight.js", "decisions.js", "main.js",
)  # fmt: skip


def page(summary: dict[str, Any], store_folder: Path | None = None, video_bytes: int = CAP) -> str:
    """The report as HTML.

    summary: what `longtake compare` prints with --json. store_folder: the folder that holds `cells` with their files;
    without it the page has tables and trade-offs only, and says so. video_bytes: so much MP4 goes into the page at
    most; what is beyond is linked. Missing and damaged files are named on the page, never an error.
    """
    videos = Videos(video_bytes)
    sections, data, names = [], [], []
    definitions = summary.get("definitions") or {}
    for number, table in enumerate(summary.get("takes") or ()):
        markup, parts = takes.section(number, table, definitions, store_folder, videos)
        sections.append(markup)
        data += parts
        names.append((f"takes-{number}", takes.title(table)))
    for number, table in enumerate(summary.get("tables") or ()):
        markup, parts = world.section(number, table, store_folder, videos)
        sections.append(markup)
        data += parts
        names.append((f"world-{number}", f"{table['model']}, protocol {table['protocol']}"))
    script = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{script}\n}})();\n'
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    notes = _notes(summary)
    if not sections:
        sections = ["<p class=warn>No cell is finished: there is nothing to show yet.</p>"]
    tail = [("definitions", "How it is measured")] if definitions else []
    tail += [("notes", "Not in the tables")] if notes else []
    return "\n".join([
        "<!doctype html>", "<html lang=en>", "<meta charset=utf-8>",
        f"<meta http-equiv=Content-Security-Policy content=\"{_policy(script, style)}\">",
        "<meta name=viewport content='width=device-width,initial-scale=1'>", "<title>longtake compare</title>",
        f"<style>{style}</style>", "<svg id=ink hidden aria-hidden=true></svg>",
        _header(summary, videos, [*names, *tail]),
        "<noscript><p class=warn>Charts, videos and maps need JavaScript; the tables do not.</p></noscript>",
        "<main>", *sections, _definitions(definitions), notes, _provenance(summary), "</main>",
        "<div id=tip role=tooltip hidden></div>", *data, *videos.parts, f"<script>{script}</script>", "</html>", "",
    ])  # fmt: skip


def _policy(script: str, style: str) -> str:
    """Only this script and this style run; nothing is fetched but videos that lie beside the file."""
    of = lambda text: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
    return (
        f"default-src 'none'; script-src {of(script)}; style-src {of(style)}; media-src blob: 'self' file:; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _header(summary: dict[str, Any], videos: Videos, names: list[tuple[str, str]]) -> str:
    cells, finished = summary.get("cells"), summary.get("finished")
    state = ""
    if cells is not None:
        whole = cells == finished
        text = f"All {cells} cells are finished." if whole else (
            f"{finished} of {cells} cells are finished. Run the command again to make the rest; why some are missing "
            "stands at the end."
        )  # fmt: skip
        state = f"<p class={'good' if whole else 'warn'} role=status>{text}</p>"
    contents = "".join(f"<li><a href='#{anchor}'>{escape(text)}</a></li>" for anchor, text in names)
    clips = f"<p class=small>{videos.sentence()}</p>" if summary.get("takes") or videos.embedded + videos.linked else ""
    return (
        f"<header><h1>longtake compare</h1><p class=small>{escape(_origin(summary))}</p>"
        f"<pre tabindex=0 aria-label='The command'><code>{escape(summary.get('command', ''))}</code></pre>"
        f"{state}{clips}<nav aria-label=Contents><ul>{contents}</ul></nav></header>"
    )


def _origin(summary: dict[str, Any]) -> str:
    origin = summary.get("origin") or {}
    git = origin.get("git") or {}
    commit = (git.get("commit") or "unknown commit")[:12] + (" with changes" if git.get("dirty") else "")
    machine = origin.get("machine") or {}
    date = str(origin.get("date") or "")[:16].replace("T", " ")
    return " · ".join(filter(None, (date, machine.get("gpu") or machine.get("cpu"), commit)))


def _definitions(definitions: dict[str, Any]) -> str:
    if not definitions:
        return ""
    rows = "".join(
        f"<dt>{escape(told['title'])} <small>{escape(', '.join(filter(None, (told['unit'], wish(told['better'])))))}"
        f"</small></dt><dd>{escape(told['text'])}</dd>"
        for told in definitions.values()
    )
    return (
        "<section aria-labelledby=definitions><h2 id=definitions>How it is measured</h2>"
        f"<dl class=terms>{rows}</dl></section>"
    )


def _notes(summary: dict[str, Any]) -> str:
    if not summary.get("notes"):
        return ""
    listed = "".join(f"<li>{escape(note)}</li>" for note in summary["notes"])
    return f"<section aria-labelledby=notes><h2 id=notes>Not in the tables</h2><ul>{listed}</ul></section>"


def _provenance(summary: dict[str, Any]) -> str:
    origin = summary.get("origin") or {}
    rows = []
    for group in ("machine", "versions", "git"):
        for key, value in (origin.get(group) or {}).items():
            if value is not None:
                rows.append(f"<tr><th scope=row>{escape(group)}: {escape(key)}</th><td>{escape(value)}</td></tr>")
    if not rows:
        return ""
    made = "".join(
        f"<li>{one['cells']} cells at {escape(commit_of(one, 12))}, {escape(one['gpu'] or one['cpu'] or '')}, "
        f"{escape(one['from'][:10])}</li>"
        for one in summary.get("made_by") or ()
    )
    return (
        f"<section aria-labelledby=origin><h2 id=origin>Where it was made</h2><ul>{made}</ul><p>Below, the last run; "
        "every file in cells/ has the origin of its own cell.</p><details><summary>Machine and versions</summary>"
        f"<div class=wide><table class=facts><tbody>{''.join(rows)}</tbody></table></div></details></section>"
    )
