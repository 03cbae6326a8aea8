// What is shown of a take beside its picture: figures, timeline, and what each chunk saw of the past.
// Every text goes into the page as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const POINTS = 60; // of a curve
const ROWS = 24, COLUMNS = 96, OLDEST = 8; // of the strip; of more columns the oldest few and the newest are drawn

export function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

export function bytes(count) {
  for (const unit of ["B", "kB", "MB"]) {
    if (count < 1000) return `${Number(count.toPrecision(3))} ${unit}`;
    count /= 1000;
  }
  return `${Number(count.toPrecision(3))} GB`;
}

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds)), pad = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${pad(minutes)}:${pad(whole % 60)}` : `${minutes}:${pad(whole % 60)}`;
}

const FIGURES = [
  ["speed", "Chunks per second", (s) => s.chunks_per_second, (v) => v.toFixed(2), () => "while it computes"],
  ["realtime", "Realtime factor", (s) => s.realtime_factor, (v) => `${v.toFixed(2)}×`, () => "seconds of video per second"],
  ["held", "Bytes held", (s) => s.held_bytes, bytes, (t) => `${bytes(t.reserved_bytes)} reserved`],
  ["tokens", "Attended tokens", (s) => s.attended_tokens, (v) => v.toLocaleString("en"), () => "history and the chunk itself"],
];

export class Meters {
  constructor(list) {
    this.shown = FIGURES.map(([name, title, value, words, note]) => {
      const curve = document.createElementNS(SVG, "polyline"), picture = document.createElementNS(SVG, "svg");
      picture.setAttribute("viewBox", "0 0 100 28");
      picture.setAttribute("preserveAspectRatio", "none");
      picture.setAttribute("aria-hidden", "true");
      picture.append(curve);
      const figure = element("dd");
      figure.id = `meter-${name}`;
      list.append(element("div", "", element("dt", title), figure, picture));
      return { title, value, words, note, figure, curve, past: [] };
    });
    this.clear();
  }

  clear() {
    for (const one of this.shown) {
      one.past = [];
      one.figure.replaceChildren("–");
      one.curve.setAttribute("points", "");
    }
  }

  add(stats, take) {
    for (const one of this.shown) {
      const value = one.value(stats);
      if (typeof value !== "number" || !Number.isFinite(value)) continue;
      one.past = [...one.past, value].slice(-POINTS);
      one.figure.replaceChildren(one.words(value), element("span", one.note(take)));
      const top = Math.max(...one.past) || 1, step = 100 / (POINTS - 1);
      one.curve.setAttribute("points", one.past.map((v, i) => `${i * step},${27 - (26 * v) / top}`).join(" "));
    }
  }

  words() {
    return this.shown.map((one) => `${one.title}: ${one.figure.firstChild?.textContent ?? "unknown"}`).join(". ");
  }
}

export class Timeline {
  constructor(track, list) {
    Object.assign(this, { track, list, fps: 1 });
    this.clear();
  }

  clear() {
    this.moments = [];
    this.end = 0;
    this.saved = [];
    this.drawList();
    this.drawTrack(0);
  }

  // A prompt and a policy, in force from a frame of the stream on.
  add({ frame, prompt, policy }) {
    const last = this.moments.at(-1);
    if (last && (frame < last.frame || (last.prompt === prompt && last.policy === policy))) return;
    if (last && frame === last.frame) this.moments.pop();
    this.moments.push({ frame, prompt, policy });
    this.drawList();
  }

  // What the server remembers, in place of what was seen here.
  set(moments) {
    this.moments = [...moments];
    this.drawList();
  }

  drawList() {
    this.list.replaceChildren(...this.moments.map((moment, i) => {
      const before = this.moments[i - 1], time = element("time", clock(moment.frame / this.fps));
      const back = moment.what === "seek" && `back to chunk ${moment.chunk}`;
      const how = [back, moment.mode, moment.policy !== before?.policy && moment.policy].filter(Boolean).join(", ");
      const item = element("li", "", time, moment.prompt, how ? element("span", ` (${how})`) : "");
      item.className = `k${i % 6}`;
      return item;
    }));
  }

  drawTrack(now) {
    const total = Math.max(this.end, 1), at = (frame) => `${(100 * frame) / total}%`;
    const part = (kind, frame, text, width) => {
      const made = element("div", text);
      made.className = kind;
      made.style.left = at(frame);
      if (width !== undefined) made.style.width = at(width);
      return made;
    };
    const spans = this.moments.map((moment, i) => {
      const next = this.moments[i + 1]?.frame ?? total;
      return part(`k${i % 6}`, moment.frame, moment.prompt, Math.max(0, next - moment.frame));
    });
    const marks = this.saved.map((frame) => part("mark", frame));
    this.track.replaceChildren(...spans, ...marks, part("head", Math.min(now * this.fps, total)));
  }
}

export class Strip {
  constructor(canvas, text, rows) {
    Object.assign(this, { canvas, text, rows });
    this.clear();
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  clear() {
    this.chunks = [];
    this.text.textContent = "No chunk yet.";
    this.rows.replaceChildren();
    this.draw();
  }

  add(index, blocks) {
    this.chunks = [...this.chunks, { index, blocks: blocks.map(named) }].slice(-ROWS);
    this.draw();
    this.tell();
  }

  tell() {
    const { index, blocks } = this.chunks.at(-1), own = blocks.at(-1), past = blocks.slice(0, -1);
    const seen = past.filter((b) => b.seenFull || b.seenCompressed);
    const compressed = seen.filter((b) => !b.seenFull).length;
    const held = past.reduce((sum, b) => sum + b.span, 0);
    const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
    this.text.textContent = `Chunk ${index} saw ${seen.length} of ${plural(past.length, "block")} held` +
      (compressed ? `, ${compressed} of them compressed` : "") +
      `. Of ${plural(own?.frame ?? 0, "past latent frame")}, ${held} ${held === 1 ? "is" : "are"} held.`;
    this.canvas.setAttribute("aria-label", `Blocks seen by the last ${plural(this.chunks.length, "chunk")}`);
    this.rows.replaceChildren(...blocks.slice(-200).map((b) => {
      const head = element("th", b.span ? `${b.frame}–${b.frame + b.span - 1}` : "text");
      head.scope = "row";
      return element("tr", "", head, ...[b.full, b.seenFull, b.compressed, b.seenCompressed].map((n) => element("td", String(n))));
    }));
  }

  draw() {
    const { canvas } = this, pen = canvas.getContext("2d"), scale = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    if (!width || !this.chunks.length) return;
    pen.scale(scale, scale);
    const style = getComputedStyle(canvas), colour = (name) => style.getPropertyValue(`--${name}`).trim();
    let frames = [...new Set(this.chunks.flatMap((c) => c.blocks.map((b) => b.frame)))].sort((a, b) => a - b);
    if (frames.length > COLUMNS) frames = [...frames.slice(0, OLDEST), ...frames.slice(OLDEST - COLUMNS)];
    const column = new Map(frames.map((frame, i) => [frame, i]));
    const w = Math.min(24, (width - 8) / Math.max(frames.length, 12)), h = (height - 8) / ROWS;
    const hatch = hatched(pen, colour("compressed"));
    this.chunks.forEach((chunk, row) => {
      const y = 4 + (ROWS - this.chunks.length + row) * h;
      chunk.blocks.forEach((block, i) => {
        if (!column.has(block.frame)) return;
        const x = 4 + column.get(block.frame) * w, wide = Math.max(1, w - 1.5), high = Math.max(1, h - 1.5);
        if (i === chunk.blocks.length - 1) {
          pen.fillStyle = colour("own");
          pen.beginPath();
          pen.arc(x + wide / 2, y + high / 2, Math.min(wide, high) / 2, 0, 2 * Math.PI);
          pen.fill();
          return;
        }
        pen.strokeStyle = block.seenFull ? colour("full") : block.seenCompressed ? colour("compressed") : colour("edge");
        pen.strokeRect(x + 0.5, y + 0.5, wide - 1, high - 1);
        const share = block.seenFull ? Math.max(0.15, block.seenFull / Math.max(block.tokens, block.seenFull)) : 0;
        if (block.seenCompressed) {
          pen.fillStyle = hatch;
          pen.fillRect(x, y, wide, high);
        }
        pen.fillStyle = colour("full");
        pen.fillRect(x, y + high * (1 - share), wide, high * share);
      });
    });
  }
}

const named = ([frame, span, tokens, full, compressed, seenFull, seenCompressed]) =>
  ({ frame, span, tokens, full, compressed, seenFull, seenCompressed });

function hatched(pen, colour) {
  const tile = new OffscreenCanvas(4, 4), lines = tile.getContext("2d");
  lines.strokeStyle = colour;
  lines.lineWidth = 1.4;
  lines.beginPath();
  for (const shift of [-4, 0, 4]) {
    lines.moveTo(shift, 4);
    lines.lineTo(shift + 4, 0);
  }
  lines.stroke();
  return pen.createPattern(tile, "repeat");
}
