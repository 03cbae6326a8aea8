// Quality over a price: points with intervals, and the Pareto front of the means.
const WIN = { higher: (a, b) => a >= b, lower: (a, b) => a <= b, "near 0": (a, b) => Math.abs(a) <= Math.abs(b) };

const WISH = { higher: "higher is better", lower: "lower is better", "near 0": "best near 0" };

// Those that nobody beats: no other is at least as good in both and better in one.
function front(points, cost, quality) {
  const asGood = (a, b) => WIN[cost](a.x, b.x) && WIN[quality](a.y, b.y);
  return points.filter((one) => !points.some((other) => other !== one && asGood(other, one) && !asGood(one, other)));
}

function spot(value, axis) {
  const found = typeof value === "number" ? { mean: value, n: 1 } : value;
  if (!found || found.mean == null || !found.n) return null;
  const ends = found.n > 1 && found.ci95?.every((end) => end != null) ? found.ci95.map((end) => end * axis.scale) : null;
  return { at: found.mean * axis.scale, ends };
}

async function tradeoff(root, table) {
  const kinds = { speed: ["chunk_seconds", "realtime"], space: ["device_bytes", "total_bytes", "attended_tokens"] };
  const costs = table.costs.filter((axis) => kinds[root.dataset.kind]?.includes(axis.key) ?? true);
  const has = (axis) => table.rows.some((row) => spot(row.values[axis.key], axis));
  const qualities = table.qualities.filter(has);
  if (!qualities.length) { root.append(h("p", {}, "No measure of quality is at hand for these arms.")); return; }
  const text = h("p", { class: "small", role: "status" });
  let draw = () => {};
  const first = qualities.find((axis) => axis.better && table.rows.filter((row) => spot(row.values[axis.key], axis)).length === table.rows.length);
  const across = choice(root.dataset.kind === "speed" ? "Speed" : root.dataset.kind === "space" ? "Memory" : "Price", costs.map((axis) => [axis.key, axis.title]), () => draw());
  const up = choice("Quality", qualities.map((axis) => [axis.key, axis.title]), () => draw());
  up.select.value = (first ?? qualities[0]).key;
  root.append(h("div", { class: "bar" }, across.field, up.field));
  draw = figure(root, (width) => clamp(width * 0.6, 290, 400), () => {
    const cost = costs.find((axis) => axis.key === across.select.value), quality = qualities.find((axis) => axis.key === up.select.value);
    const points = [], absent = [];
    for (const row of table.rows) {
      const x = spot(row.values[cost.key], cost), y = spot(row.values[quality.key], quality);
      if (x && y && (x.at || cost.key !== "attended_tokens")) points.push({ row, x: x.at, y: y.at, ex: x.ends, ey: y.ends });
      else absent.push(row.arm);
    }
    const racing = points.filter((point) => !point.row.control);
    const best = quality.better ? front(racing, cost.better, quality.better) : [];
    best.sort((a, b) => a.x - b.x);
    text.textContent = (quality.better
      ? `On the front: ${best.map((p) => p.row.arm).join("; ") || "nobody"}.`
      : `${quality.title} is neither good nor bad by itself, so there is no front.`)
      + (absent.length ? ` Not drawn, for want of a number: ${absent.join("; ")}.` : "");
    const rule = table.chance[quality.key];
    const [left, right] = range(points.flatMap((p) => [p.x, ...(p.ex ?? [])]), false, 0.1);
    const [low, high] = range([...points.flatMap((p) => [p.y, ...(p.ey ?? [])]), rule, quality.better === "near 0" ? 0 : null], false, 0.1);
    return {
      label: `${quality.title} over ${cost.title}`, x: { low: left, high: right, title: `${cost.title} (${WISH[cost.better]})` },
      y: { low, high, title: `${quality.title}${quality.better ? ` (${WISH[quality.better]})` : ""}` },
      marks: (plot) => [
        rule != null && s("path", { d: `M${plot.inside.left} ${plot.py(rule)}H${plot.inside.right}`, class: "chance" }),
        rule != null && s("text", { x: plot.inside.right, y: plot.py(rule) - 4, "text-anchor": "end" }, "chance"),
        quality.better === "near 0" && s("path", { d: `M${plot.inside.left} ${plot.py(0)}H${plot.inside.right}`, class: "chance" }),
        best.length > 1 && s("path", { class: "front", d: best.map((p, i) => `${i ? "L" : "M"}${plot.px(p.x)} ${plot.py(p.y)}`).join("") }),
        table.connect && [...new Set(racing.map((p) => p.row.name))].map((name) => {
          const own = racing.filter((p) => p.row.name === name).sort((a, b) => a.x - b.x);
          return own.length > 1 && s("path", { class: `line thin ${own[0].row.colour}`, d: path(own.map((p) => [p.x, p.y]), plot) });
        }),
        points.map((p) => s("path", { class: `whisker ${p.row.colour}`, d: (p.ey ? `M${plot.px(p.x)} ${plot.py(p.ey[0])}V${plot.py(p.ey[1])}` : "") + (p.ex ? `M${plot.px(p.ex[0])} ${plot.py(p.y)}H${plot.px(p.ex[1])}` : "") })),
        points.map((p, i) => dot(p, i, best.includes(p), plot, cost, quality)),
        labels(points, best, plot),
      ],
    };
  });
  root.append(text);
}

function dot(p, i, winner, plot, cost, quality) {
  const ends = (e) => (e ? ` (${number(e[0])} to ${number(e[1])})` : "");
  const told = [p.row.arm, `${cost.title}: ${number(p.x)}${ends(p.ex)}`, `${quality.title}: ${number(p.y)}${ends(p.ey)}`, winner ? "on the front" : ""];
  const mark = s("g", { class: `point ${p.row.colour}${winner ? " winner" : ""}`, transform: `translate(${plot.px(p.x)} ${plot.py(p.y)})`,
    tabindex: 0, "data-mark": `p${i}`, role: "img", "aria-label": told.filter(Boolean).join("; ") },
  winner && s("path", { d: SHAPES[0](10), class: "ring" }), s("path", { d: p.row.shape(5.5), class: "dot" }), s("path", { d: SHAPES[0](14), class: "reach" }));
  mark.addEventListener("pointerenter", (event) => hint(event, told));
  mark.addEventListener("pointerleave", unhint);
  mark.addEventListener("focus", () => { const box = mark.getBoundingClientRect(); hint({ clientX: box.right, clientY: box.bottom }, told); });
  mark.addEventListener("blur", unhint);
  return mark;
}

// Names beside the points, the front's first, as long as they do not cover anything.
function labels(points, best, plot) {
  const taken = points.map((p) => ({ l: plot.px(p.x) - 8, r: plot.px(p.x) + 8, t: plot.py(p.y) - 8, b: plot.py(p.y) + 8 })), made = [];
  for (const p of [...best, ...points.filter((each) => !best.includes(each))]) {
    const text = p.row.arm.length > 34 ? `${p.row.arm.slice(0, 33)}…` : p.row.arm, wide = text.length * 6.1 + 4, x = plot.px(p.x), y = plot.py(p.y);
    for (const [l, t, anchor] of [[x + 13, y - 6, "start"], [x - 13 - wide, y - 6, "end"], [x - wide / 2, y - 27, "middle"], [x - wide / 2, y + 13, "middle"]]) {
      const box = { l, r: l + wide, t, b: t + 13 };
      if (box.l < plot.inside.left || box.r > plot.width || box.t < plot.inside.top || box.b > plot.inside.bottom) continue;
      if (taken.some((o) => box.l < o.r && o.l < box.r && box.t < o.b && o.t < box.b)) continue;
      taken.push(box);
      const at = anchor === "start" ? l : anchor === "end" ? l + wide : l + wide / 2;
      made.push(s("text", { x: at, y: t + 10, "text-anchor": anchor, class: "tag" }, text));
      break;
    }
  }
  return s("g", { "aria-hidden": true }, made);
}

function legend(rows, all, ring = true) {
  const seen = new Set(), shown = rows.filter((row) => all || (!seen.has(row.name) && seen.add(row.name)));
  return h("ul", { class: "legend", "aria-label": "Legend" }, shown.map((row) => h("li", {}, swatch(row), all ? row.arm : row.name)),
    ring && h("li", {}, s("svg", { class: "swatch", viewBox: "-12 -6 24 12", "aria-hidden": true }, s("path", { d: "M-12 0H12", class: "front" }), s("path", { d: SHAPES[0](5), class: "ring" })), "Pareto front"));
}

const key = async (root, table) => { root.append(legend(table.rows, !table.connect)); };

// Recall over the gap, each name at its largest budget.
async function gaps(root, table) {
  const last = [...new Map(table.rows.map((row) => [row.name, row])).values()].filter((row) => row.gaps.length);
  if (!last.length) { root.append(h("p", {}, "No gap has enough returns for a point.")); return; }
  const every = last.flatMap((row) => row.gaps.map(([gap]) => gap)), rule = table.chance.recall_colour;
  lines(root, 300, () => ({
    label: "Colour recall over the gap in latent frames", step: 1, at: (x) => `gap ${number(x)}`,
    x: { low: Math.min(...every), high: Math.max(...every, Math.min(...every) + 1), title: "gap in latent frames, at the largest budget", log: true },
    y: { low: 0, high: 1.02, title: "colour recall" }, rules: [[rule, "chance"]],
    series: last.map((row) => ({ row, points: [...row.gaps].sort((a, b) => a[0] - b[0]) })),
  }));
  root.append(legend(last, false, false));
}
