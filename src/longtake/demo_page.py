"""The demo's page: what demo.json holds, as one HTML file beside its videos. No network, no library."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 380, 230  # of a chart, in SVG units: about its pixels, so that its text is as large as it says
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 18, 12, 30  # its margins


def page(result: dict[str, Any]) -> str:
    """The HTML text for a result of `make_demo`. Every text in it is escaped: prompts are a user's own."""
    model = result["model"]
    ms = lambda seconds: f"{1000 * seconds:.0f} ms"
    charts = [
        ("Time per chunk", "everything from request to frames", "seconds", ms),
        ("The model's forwards of it", "what the policy has a say in", "forward_seconds", ms),
        ("History held", "K/V rows in use", "history_bytes", bytes_text),
    ]
    body = f"""
<header>
<h1>One shot, {len(result["policies"])} memories</h1>
<p>{len(_prompts(result))} prompts, each as one continuous take of {result["seconds"]:.1f} s under
{len(result["policies"])} KV policies: what of the past the model may keep and see. Same seed
({result["seed"]}), same noise; only the memory differs.</p>
</header>
{_note(result)}
<section>
<div class="bar"><h2>The takes</h2><button id="play" type="button">Pause</button>
<button id="again" type="button">From the start</button></div>
{"".join(_prompt_row(result, prompt) for prompt in _prompts(result))}
</section>
<section><h2>Speed and bytes</h2>{_table(result)}
<p class="small">Chunks/s and realtime: generation with decoding, without MP4 encoding, over all takes of a policy.
Realtime is seconds of video per second of work. Early and late: median time per chunk in the first and the last third.
Held: everything that stays between two chunks (K/V, view, decoder, text), without the weights.</p>
</section>
<section><h2>Along the take</h2>{_legend(result)}
<div class="charts">{"".join(_chart(result, *chart) for chart in charts)}</div>
<p class="small">Medians over the prompts, by the second of video at which the chunk ends. The dashed line marks the
length that the model was trained on ({model["training_seconds"]:.1f} s).</p>
</section>
<section><h2>Contact sheet</h2>
<a href="contact_sheet.png"><img class="sheet" src="contact_sheet.png"
alt="Rows: prompt and policy. Columns: time."></a>
</section>
{_footer(result)}"""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>longtake demo: {escape(model['name'])}</title><style>{_CSS}</style></head>"
        f"<body><main>{body}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def bytes_text(count: float) -> str:
    """Bytes in decimal units, for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _prompts(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(take["prompt"] for take in result["takes"]))


def _note(result: dict[str, Any]) -> str:
    """What the pictures are and what they are not."""
    model = result["model"]
    times = result["seconds"] / model["training_seconds"]
    lines = [
        f"<b>What this shows.</b> {escape(model['name'])}, {model['width']}×{model['height']} at {model['fps']:g} "
        f"fps. {_prose(model['about'])}",
        f"Its training clips last {model['training_seconds']:.1f} s; these takes are {times:.1f} times as long, and "
        "what comes after is extrapolation. A small model shows how policies differ in time, bytes and drift; how good "
        "a large one looks under them it does not show.",
    ]
    if result["shortened_from"]:
        lines.append(
            f"The takes have {result['chunks']} chunks instead of {result['shortened_from']}, so that the demo ends in "
            "time on this machine; <code>--seconds</code> sets their length."
        )
    if result["others_busy"] is not None and result["others_busy"] > 0.15:
        lines.append(
            f"Other processes used {result['others_busy']:.0%} of this machine meanwhile: the times are too long, and "
            "differences between policies partly chance."
        )
    for row in result["left_out"]:
        lines.append(f"Not here: {escape(row['policy'])} ({escape(row['why'])}).")
    return '<div class="note">' + "".join(f"<p>{line}</p>" for line in lines) + "</div>"


def _prose(text: str) -> str:
    """Text with its `code` set as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _prompt_row(result: dict[str, Any], prompt: str) -> str:
    size = f'width="{result["model"]["width"]}" height="{result["model"]["height"]}"'  # the place it will take
    cards = "".join(
        f'<figure><video src="{escape(t["video"])}" poster="{escape(t["poster"])}" {size} muted loop playsinline '
        f'controls preload="auto" aria-label="{escape(prompt)}, {escape(t["policy"])}"></video>'
        f"<figcaption>{escape(t['policy'])}<span>{t['realtime_factor']:.2f}× realtime</span></figcaption></figure>"
        for t in result["takes"]
        if t["prompt"] == prompt
    )
    return f'<h3>{escape(prompt)}</h3><div class="cards" style="--n:{len(result["policies"])}">{cards}</div>'


def _table(result: dict[str, Any]) -> str:
    head = ("policy", "chunks/s", "realtime", "early", "late", "attended tokens", "history", "held in all")
    rows = []
    for p in result["policies"]:
        cells = (
            f"{p['chunks_per_second']:.2f}", f"{p['realtime_factor']:.2f}×", f"{1000 * p['early_seconds']:.0f} ms",
            f"{1000 * p['late_seconds']:.0f} ms", f"{p['attended_tokens']}", bytes_text(p["history_bytes"]),
            bytes_text(p["memory"]["total"]),
        )  # fmt: skip
        rows.append(f"<tr><th scope=row>{escape(p['label'])}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    columns = "".join(f"<th scope=col>{name}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _legend(result: dict[str, Any]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><line class="{_style(i)}" x1="1" x2="25" y1="4" y2="4"/></svg>'
        f"{escape(p['label'])}</li>"
        for i, p in enumerate(result["policies"])
    )
    return f'<ul class="legend">{items}</ul>'


def _chart(result: dict[str, Any], title: str, subtitle: str, key: str, text: Callable[[float], str]) -> str:
    """One line per policy over the take, from zero."""
    curves = [(p["label"], p["curves"]["end"], p["curves"][key]) for p in result["policies"]]
    ticks = nice_ticks(max(max(ys) for _, _, ys in curves))
    times = nice_ticks(max(xs[-1] for _, xs, _ in curves))
    right, top = max(times[-1], curves[0][1][-1]), ticks[-1]
    at = lambda x: _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)
    up = lambda y: _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM)
    parts = []
    for y in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{text(y)}</text>')
    for x in times:
        parts.append(f'<text x="{at(x):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:g} s</text>')
    trained = result["model"]["training_seconds"]
    if trained < right:
        parts.append(
            f'<line class="mark" x1="{at(trained):.1f}" x2="{at(trained):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        )
    for i, (label, xs, ys) in enumerate(curves):
        points = " ".join(f"{at(x):.1f},{up(y):.1f}" for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline class="{_style(i)}" points="{points}"/>')
        parts += [
            f'<circle class="dot {_style(i)}" cx="{at(x):.1f}" cy="{up(y):.1f}" r="6">'
            f"<title>{escape(label)}: {text(y)} at {x:.1f} s</title></circle>"
            for x, y in zip(xs, ys, strict=True)
        ]
    return (
        f"<figure><figcaption><b>{title}</b><span>{subtitle}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title} along the take">{"".join(parts)}</svg>'
        "</figure>"
    )


def nice_ticks(top: float) -> list[float]:
    """Round numbers from 0 to the first at or above `top`, three to six of them."""
    if top <= 0:
        return [0.0, 1.0]
    power = 10.0
    while power > top:
        power /= 10
    while power * 10 <= top:
        power *= 10
    step = next(m * power for m in (0.2, 0.5, 1, 2) if 5 * m * power >= top)
    count = 1
    while count * step < top * (1 - 1e-9):
        count += 1
    return [round(i * step, 12) for i in range(count + 1)]


def _style(i: int) -> str:
    """Colour and dashes of the i-th line. Neighbours differ in both: a line shows through the gaps of one upon it."""
    return f"c{i % 8} d{i % 3}"


def _footer(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    where = machine["gpu"] if result["model"]["device"].startswith("cuda") else machine["cpu"]
    threads = f"{result['threads']} thread{'s' if result['threads'] != 1 else ''}"
    made = [
        str(where or "unknown processor"), f"{machine['usable_cores']} usable cores", threads,
        f"{result['model']['device']}, {result['model']['dtype']}",
        f"weights {bytes_text(sum(result['model']['weight_bytes'].values()))}",
        *(f"{name} {version}" for name, version in versions.items() if version), result["date"],
        f"the whole demo took {result['wall_seconds']:.0f} s",
    ]  # fmt: skip
    return (
        f'<footer><p class="small">Measured in this run: {escape(" · ".join(made))}.</p>'
        '<p class="small">All figures, chunk by chunk: <a href="demo.json">demo.json</a>. '
        "Another model or policy: <code>longtake demo --model … --policy …</code></p></footer>"
    )


def _lines(colours: Sequence[str]) -> str:
    return "".join(f"--k{i}:{colour};" for i, colour in enumerate(colours))


_LIGHT = ("#2a6fd6", "#c2410c", "#0f8a5f", "#9333c8", "#a16207", "#be185d", "#0e7490", "#57534e")
_DARK = ("#6aa9ff", "#ff9a5c", "#4fd1a0", "#c58bff", "#e0b341", "#ff7eb0", "#4cc9e0", "#b8b2ab")

_CSS = (
    ":root{color-scheme:light dark;--bg:#fbfbfa;--ink:#1b1b1a;--soft:#5d5b57;--line:#dddbd6;--card:#fff;"
    + _lines(_LIGHT)
    + "}@media(prefers-color-scheme:dark){:root{"
    "--bg:#161615;--ink:#ececea;--soft:#a5a29c;--line:#383733;--card:#1f1f1d;" + _lines(_DARK) + "}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 8px}h2{font-size:1.2rem;margin:0}h3{font-size:1rem;margin:20px 0 8px}
section{margin-top:36px}header p{max-width:70ch;margin:0}
.note{border-left:3px solid var(--k0);padding:2px 0 2px 14px;margin:20px 0;max-width:75ch}.note p{margin:6px 0}
.small,figcaption span{color:var(--soft);font-size:.85rem}.small{max-width:80ch}
.bar{display:flex;flex-wrap:wrap;gap:10px;align-items:center}
button{font:inherit;font-size:.9rem;padding:6px 14px;border:1px solid var(--line);border-radius:6px;
background:var(--card);color:var(--ink);cursor:pointer}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;max-width:calc(var(--n)*272px)}
figure{margin:0;min-width:0}.cards video{width:100%;height:auto;display:block;border-radius:6px;background:#000;
image-rendering:pixelated}
figcaption{font-size:.9rem;margin-top:4px;overflow-wrap:anywhere}figcaption span{display:block}
.scroll{overflow-x:auto;margin-top:12px}table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left}thead th{color:var(--soft);font-weight:500;font-size:.85rem}tbody th{font-weight:500}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:20px;margin-top:12px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:12px 0 0;font-size:.9rem}
.legend svg{width:26px;height:8px;margin-right:6px}
svg text{fill:var(--soft);font:13px system-ui,sans-serif}.charts svg{width:100%;height:auto;display:block}
.grid{stroke:var(--line)}.mark{stroke:var(--soft);stroke-dasharray:4 4}
polyline,.legend line{fill:none;stroke:var(--k);stroke-width:2.2;stroke-linejoin:round}
.dot{fill:transparent}.dot:hover{fill:var(--k)}
.d1{stroke-dasharray:7 3}.d2{stroke-dasharray:2 3}
.sheet{width:100%;height:auto;margin-top:12px;border:1px solid var(--line);border-radius:6px}
a{color:var(--k0)}code{overflow-wrap:anywhere}footer{margin-top:40px}
""" + "".join(f".c{i}{{--k:var(--k{i})}}" for i in range(8))
)

_SCRIPT = """
const videos=[...document.querySelectorAll("video")],play=document.getElementById("play");
const still=matchMedia("(prefers-reduced-motion: reduce)").matches;
let running=!still;
const show=()=>{play.textContent=running?"Pause":"Play"};
const refused=e=>{if(e.name==="NotAllowedError"){running=false;show()}};
const run=()=>{videos.forEach(v=>running?v.play().catch(refused):v.pause());show()};
const again=()=>{videos.forEach(v=>{v.currentTime=0});run()};
play.onclick=()=>{running=!running;run()};
document.getElementById("again").onclick=()=>{running=true;again()};
videos.forEach(v=>{v.controls=false;v.onpointerenter=v.onpointerleave=e=>{v.controls=e.type==="pointerenter"}});
const ready=v=>v.readyState>3||new Promise(done=>{v.oncanplaythrough=v.onerror=done});
const late=new Promise(done=>{setTimeout(done,3000)});
Promise.race([late,Promise.all(videos.map(ready))]).then(()=>{if(running)again()});
show();
"""
