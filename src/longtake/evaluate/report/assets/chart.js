// Axes and lines, drawn anew for every width so that text keeps its size on a phone.
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((each) => each * power >= rough * 0.999) * power, found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log2(low)); power <= Math.log2(high) + 1e-9; power++) found.push(2 ** power);
  return found.filter((value) => value >= low * 0.999);
}

// The range of some numbers, with room around it; `zero`: from 0 on.
function range(values, zero = false, room = 0.06) {
  const found = values.filter((value) => value != null && Number.isFinite(value));
  if (!found.length) return [0, 1];
  let low = Math.min(...found), high = Math.max(...found);
  if (zero) { low = Math.min(0, low); high = Math.max(0, high); }
  const extra = (high - low || Math.abs(high) || 1) * room;
  return [zero && low === 0 ? 0 : low - extra, zero && high === 0 ? 0 : high + extra];
}

// A figure that draws itself again when its width changes. `paint(width)` gives {x, y, label, marks(plot)}, or {label, bare, marks()} for one
// without axes; an axis is {low, high, title, log?, format?}.
function figure(holder, height, paint) {
  const box = h("div", { class: "plot" });
  holder.append(box);
  let width = 0;
  const draw = () => {
    const at = box.contains(document.activeElement) && document.activeElement.dataset.mark;
    if (width > 0) box.replaceChildren(canvas(width, typeof height === "function" ? height(width) : height, paint(width)));
    if (at) box.querySelector(`[data-mark="${at}"]`)?.focus();
  };
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now && now !== width) { width = now; draw(); }
  }).observe(box);
  return draw;
}

function canvas(width, height, { x, y, label, marks, bare }) {
  const name = unique("figure"), svg = { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-labelledby": name };
  if (bare) return s("svg", svg, s("title", { id: name }, label), marks());
  const format = (axis) => axis.format ?? number;
  const rows = ticks(y.low, y.high, height / 55);
  const left = 14 + 6.6 * Math.max(2, ...rows.map((value) => format(y)(value).length)), right = 12, top = 24, bottom = 40;
  const inside = { left, right: width - right, top, bottom: height - bottom };
  const unit = x.log ? (v) => Math.log(v / x.low) / Math.log(x.high / x.low) : (v) => (v - x.low) / (x.high - x.low || 1);
  const px = (v) => left + unit(v) * (width - right - left);
  const py = (v) => inside.bottom - ((v - y.low) / (y.high - y.low || 1)) * (inside.bottom - top);
  const back = (at) => {
    const share = (at - left) / (width - right - left);
    return x.log ? x.low * (x.high / x.low) ** share : x.low + share * (x.high - x.low);
  };
  const columns = x.log ? logTicks(x.low, x.high) : ticks(x.low, x.high, (width - left) / 85);
  return s("svg", svg,
    s("title", { id: name }, label),
    s("g", { class: "axes", "aria-hidden": true },
      rows.map((v) => [s("path", { d: `M${left} ${py(v)}H${width - right}`, class: "rule" }),
        s("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, format(y)(v))]),
      columns.map((v) => [s("path", { d: `M${px(v)} ${inside.bottom}v4`, class: "tick" }),
        s("text", { x: px(v), y: inside.bottom + 17, "text-anchor": "middle" }, format(x)(v))]),
      s("path", { d: `M${left} ${inside.bottom}H${width - right}`, class: "tick" }),
      s("text", { x: width - right, y: height - 5, "text-anchor": "end", class: "name" }, x.title),
      s("text", { x: 2, y: 12, class: "name" }, y.title)),
    marks({ px, py, inside, width, height, x, y, back }));
}

function path(points, plot) {
  let d = "", pen = "M";
  for (const [x, y] of points) {
    if (y == null) { pen = "M"; continue; }
    d += `${pen}${plot.px(x).toFixed(1)} ${plot.py(y).toFixed(1)}`;
    pen = "L";
  }
  return d;
}

// Lines over a common x, with a crosshair for pointer and arrow keys. `series`: {row, points: [[x, y, low?, high?]]}.
function lines(holder, height, describe) {
  let at = null, head = null, told = null, plot = null, shown = null;
  const status = h("p", { class: "readout", role: "status" });
  const cross = s("path", { class: "cross" }), now = s("path", { class: "now" });
  const dots = s("g", { "aria-hidden": true });
  const place = (mark, value) => {
    const inside = value != null && plot && value >= plot.x.low && value <= plot.x.high;
    mark.setAttribute("d", inside ? `M${plot.px(value)} ${plot.inside.top}V${plot.inside.bottom}` : "");
  };
  const nearest = (points, x) => points.reduce((best, point) => (point[1] != null && (!best || Math.abs(point[0] - x) < Math.abs(best[0] - x)) ? point : best), null);
  function read(x) {
    at = x;
    place(cross, x);
    const found = shown.series.map((each) => [each, nearest(each.points, x)]).filter(([, point]) => point);
    dots.replaceChildren(...found.map(([each, [a, b]]) => s("circle", { cx: plot.px(a), cy: plot.py(b), r: 3.5, class: each.row.colour })));
    const written = found.map(([each, point]) => `${each.row.arm}: ${(shown.y.format ?? number)(point[1])}`);
    told = [shown.at(found[0]?.[1][0] ?? x), ...written];
    return told;
  }
  const draw = figure(holder, height, (width) => {
    shown = describe(width);
    status.textContent = "";
    return { ...shown, marks: (given) => {
      plot = given;
      const area = s("rect", { x: plot.inside.left, y: plot.inside.top, width: Math.max(1, plot.inside.right - plot.inside.left),
        height: plot.inside.bottom - plot.inside.top, class: "area", tabindex: 0, "data-mark": "area", role: "slider",
        "aria-label": `${shown.label}. Arrow keys read the values`, "aria-valuemin": number(plot.x.low),
        "aria-valuemax": number(plot.x.high), "aria-valuenow": number(plot.x.low) });
      area.addEventListener("pointermove", (event) => {
        const x = clamp(plot.back(event.clientX - area.ownerSVGElement.getBoundingClientRect().left), plot.x.low, plot.x.high);
        hint(event, read(x));
      });
      area.addEventListener("pointerleave", () => { unhint(); place(cross, null); dots.replaceChildren(); });
      area.addEventListener("click", () => { if (at != null) shown.pick?.(at); });
      area.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
        if (event.key === "Enter" && at != null) shown.pick?.(at);
        if (step === undefined) return;
        event.preventDefault();
        const x = clamp((at ?? plot.x.low) + step * shown.step, plot.x.low, plot.x.high);
        status.textContent = read(x).join(" · ");
        area.setAttribute("aria-valuenow", number(x));
        area.setAttribute("aria-valuetext", status.textContent);
      });
      place(now, head);
      return [
        shown.rules?.map(([y, text]) => [s("path", { d: `M${plot.inside.left} ${plot.py(y)}H${plot.inside.right}`, class: "chance" }),
          s("text", { x: plot.inside.right, y: plot.py(y) - 4, "text-anchor": "end" }, text)]),
        shown.series.map(({ points, row }) => {
          const spread = points.filter((p) => p[2] != null);
          const edge = spread.length > 1 && `${path(spread.map((p) => [p[0], p[3]]), plot)}${path(spread.map((p) => [p[0], p[2]]).reverse(), plot).replace("M", "L")}Z`;
          return edge && s("path", { d: edge, class: `band ${row.colour}` });
        }),
        shown.series.map(({ points, row }) => s("path", { d: path(points, plot), class: `line ${row.colour}`, "stroke-dasharray": row.dash })),
        shown.series.filter(({ points }) => points.length < 2).map(({ points, row }) => points.map(([x, y]) => s("circle", { cx: plot.px(x), cy: plot.py(y), r: 3, class: row.colour }))),
        now, cross, dots, area,
      ];
    } };
  });
  holder.append(status);
  return { draw, head: (x) => { head = x; place(now, x); } };
}
