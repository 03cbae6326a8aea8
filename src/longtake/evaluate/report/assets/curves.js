// What a take did over its time: measures of the picture, and the cost of every chunk.
const MEASURES = [
  ["brightness", "brightness, grey levels"], ["contrast", "contrast, grey levels"], ["sharpness", "sharpness, grey levels"],
  ["flicker", "flicker, grey levels"], ["motion", "motion, frame widths per second"], ["clock", "clock lawful"],
  ["psnr", "PSNR to the take without reuse, dB"], ["ssim", "SSIM to the take without reuse"],
  ["lpips", "LPIPS to the take without reuse"], ["similarity", "likeness to itself, by lag"],
];
const EXPENSES = [
  ["chunk_seconds", "seconds a chunk"], ["chunk_forward_seconds", "seconds in forwards"], ["chunk_decode_seconds", "seconds in decoding"],
  ["chunk_overhead_seconds", "seconds of overhead"], ["chunk_attended_tokens", "tokens attended"],
  ["chunk_history_bytes", "K/V in use", amount], ["chunk_memory_total", "memory in all", amount],
  ["chunk_memory_device", "memory on the device", amount], ["chunk_flops", "FLOPs computed"], ["chunk_forwards", "forwards computed"],
  ["chunk_reused", "forwards reused"],
];
const MOST_ARMS = 8; // drawn at first
const MOST_BANDS = 3; // arms whose ranges can be told apart
const DRIFTS = ["brightness", "contrast", "sharpness"];

const groupsOf = (table) => {
  const found = new Map();
  for (const take of Object.values(table.takes)) found.set(`${take.prompt}\n${take.seed}`, take);
  return [...found].map(([id, { prompt, seed }]) => [id, `${prompt || "no prompt"} · seed ${seed}`]);
};
const takeOf = (table, row, group) => row.takes.map((key) => [key, table.takes[key]]).find(([, take]) => take && `${take.prompt}\n${take.seed}` === group) ?? null;

// Points of a curve: x in seconds of video, in chunks, or lags in seconds; smoothed over `over` values.
function pointsOf(curve, unit, over = 1, from = 0) {
  const { values, every = 1, lags } = curve, half = Math.floor(over / every / 2);
  return values.map((value, i) => {
    const near = half > 0 ? values.slice(Math.max(0, i - half), i + half + 1).filter((v) => v != null) : [value];
    const x = lags ? lags[i] : from + i * every + (every - 1) / 2;
    return [x * unit, value == null || !near.length ? null : mean(near)];
  });
}

// The same points, as the change since the first second (`start` in values of x).
function changes(points, start) {
  const first = points.filter(([x, y]) => x <= start && y != null).map(([, y]) => y);
  const from = first.length ? mean(first) : points.find(([, y]) => y != null)?.[1] ?? 0;
  return points.map(([x, y]) => [x, y == null ? null : y - from]);
}

// Mean over takes with the band from least to most.
function merged(curves) {
  const longest = curves.reduce((a, b) => (b.length > a.length ? b : a), []);
  return longest.map(([x], i) => {
    const values = curves.map((curve) => curve[i]?.[1]).filter((v) => v != null);
    return values.length ? [x, mean(values), ...(curves.length > 1 ? [Math.min(...values), Math.max(...values)] : [])] : [x, null];
  });
}

async function curves(root, table, bus) {
  let draws = [];
  const redraw = () => draws.forEach((draw) => draw());
  const all = Object.values(table.takes), several = all.length > 1;
  const which = choice("Takes", [["", several ? `mean of all ${all.length}` : "the only one"], ...(several ? groupsOf(table) : [])], redraw);
  const arms = chips("Arms that are drawn", table.rows, table.rows.slice(0, MOST_ARMS).map((row) => row.arm), redraw);
  const pair = h("div", { class: "pair" }), panels = [h("div"), h("div")];
  pair.append(...panels);
  root.append(h("div", { class: "bar" }, which.field), arms.field, pair);
  draws = [panel(panels[0], MEASURES, false), panel(panels[1], EXPENSES, true)];

  function panel(holder, kinds, byChunk) {
    const have = kinds.filter(([key]) => all.some((take) => take.curves[key]));
    if (!have.length) { holder.append(h("p", {}, `No file with ${byChunk ? "costs" : "measures over time"} could be read.`)); return () => {}; }
    let line = { draw() {} };
    const summary = h("tbody"), note = h("p", { class: "small" }), draw = () => line.draw();
    const measure = choice(byChunk ? "Cost by chunk" : "Picture over time", have.map(([key, title]) => [key, title]), () => { since.field.hidden = !DRIFTS.includes(measure.select.value); draw(); });
    const since = choice("Shown as", [["yes", "change since the first second"], ["", "value"]], draw);
    since.field.hidden = !DRIFTS.includes(measure.select.value);
    holder.append(h("div", { class: "bar" }, measure.field, byChunk ? null : since.field));
    line = lines(holder, (width) => clamp(width * 0.6, 250, 330), () => {
      const key = measure.select.value, [, title, format = number] = kinds.find(([name]) => name === key), lag = key === "similarity";
      const unit = byChunk ? 1 : 1 / table.fps, over = byChunk || lag ? 1 : table.fps, change = !byChunk && !since.field.hidden && since.select.value;
      const series = [], absent = [];
      for (const row of table.rows.filter((each) => arms.set.has(each.arm))) {
        const takes = row.takes.map((name) => table.takes[name]).filter((take) => take?.curves[key] && (!which.select.value || `${take.prompt}\n${take.seed}` === which.select.value));
        const points = takes.map((take) => pointsOf(take.curves[key], unit, over, byChunk ? 1 : 0)).map((each) => (change ? changes(each, 1) : each));
        if (takes.length) series.push({ row, points: merged(points) });
        else absent.push(row.arm);
      }
      if (series.length > MOST_BANDS) for (const each of series) each.points = each.points.map(([x, y]) => [x, y]);
      const xs = series.flatMap(({ points }) => points.map(([x]) => x)), ys = series.flatMap(({ points }) => points.flatMap(([, ...v]) => v));
      const [low, high] = range(ys, byChunk || Boolean(change)), [left, right] = xs.length ? [Math.min(...xs), Math.max(...xs)] : [0, 1];
      summary.replaceChildren(...series.map(({ row, points }) => {
        const found = points.map(([, y]) => y).filter((y) => y != null);
        return h("tr", {}, h("th", { scope: "row" }, row.arm), [found[0], found.at(-1), Math.min(...found), Math.max(...found), mean(found)].map((v) => h("td", {}, format(v))));
      }));
      note.textContent = [over > 1 && "Smoothed over one second.", several && !which.select.value && (series.length > MOST_BANDS ? `With ${MOST_BANDS} arms or fewer, bands show the range of the takes.` : "Bands: the range of the takes."),
        absent.length && `Nothing to draw for ${absent.join("; ")}.`].filter(Boolean).join(" ");
      return {
        label: `${title} over ${byChunk ? "chunks" : lag ? "the lag" : "the time of the video"}`, series,
        x: { low: left, high: right > left ? right : left + 1, title: byChunk ? "chunk" : lag ? "lag, seconds" : "seconds of video" },
        y: { low, high, title: change ? `change of ${title}` : title, format }, step: xs.length > 1 ? Math.max((right - left) / 100, byChunk ? 1 : unit) : 1,
        at: (x) => (byChunk ? `chunk ${number(x)}` : `${lag ? "lag " : ""}${number(x)} s`), rules: change ? [[0, ""]] : null,
        pick: lag ? null : (x) => bus.say("seek", byChunk ? { chunk: Math.round(x) - 1 } : { seconds: x }),
      };
    });
    bus.hear("moment", ({ seconds, chunk }) => line.head(measure.select.value === "similarity" ? null : byChunk ? chunk + 1 : seconds));
    holder.append(note, h("details", {}, h("summary", {}, "The drawn lines as a table"), h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "The drawn lines" }, h("table", {},
      h("thead", {}, h("tr", {}, ["arm", "first", "last", "least", "most", "mean"].map((name) => h("th", { scope: "col" }, name)))), summary))));
    return draw;
  }
}
