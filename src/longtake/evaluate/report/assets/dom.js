// Elements, numbers, data: what everything else is made of. Text only ever becomes text nodes.
const SVG = document.getElementById("ink").namespaceURI;
const h = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
const s = (name, attributes, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

function number(value, digits = 3) {
  if (value == null || !Number.isFinite(value)) return "—";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en").replaceAll(",", "\u2009").replace("-", "−");
  if (size && size < 1e-3) return value.toExponential(digits - 1).replaceAll("-", "−");
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

function amount(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = bytes > 0 ? Math.min(4, Math.floor(Math.log2(bytes) / 10)) : 0;
  return `${number(bytes / 2 ** (10 * step))} ${units[step]}`;
}

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

function bytesOf(id) {
  const text = atob(document.getElementById(id).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const opened = new Map();
// JSON that lies in the page in gzip; the same promise for everybody who asks.
function data(id) {
  if (!opened.has(id)) {
    const stream = () => new Blob([bytesOf(id)]).stream().pipeThrough(new DecompressionStream("gzip"));
    opened.set(id, Promise.resolve().then(() => new Response(stream()).json()));
  }
  return opened.get(id);
}

let names = 0;
const unique = (what) => `${what}-${++names}`;

// A select with its label; `options` are [value, text].
function choice(label, options, change) {
  const id = unique("choice");
  const select = h("select", { id, onchange: () => change(select.value) },
    options.map(([value, text]) => h("option", { value }, text)));
  return { select, field: h("div", { class: "field" }, h("label", { for: id }, label), select) };
}

// Buttons that stay pressed, one for each arm: which of them are shown.
function chips(label, rows, chosen, change) {
  const set = new Set(chosen);
  const buttons = rows.map((row) => {
    const button = h("button", { type: "button", class: "chip", "aria-pressed": set.has(row.arm) }, swatch(row), row.arm);
    button.addEventListener("click", () => {
      if (!set.delete(row.arm)) set.add(row.arm);
      button.setAttribute("aria-pressed", set.has(row.arm));
      change(set);
    });
    return button;
  });
  return { set, field: h("div", { class: "chips", role: "group", "aria-label": label }, buttons) };
}

const SHAPES = [
  (r) => `M${-r} 0A${r} ${r} 0 1 0 ${r} 0A${r} ${r} 0 1 0 ${-r} 0Z`, (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
  (r) => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`, (r) => `M0 ${-1.2 * r}L${1.2 * r} ${r}H${-1.2 * r}Z`,
  (r) => `M0 ${1.2 * r}L${1.2 * r} ${-r}H${-1.2 * r}Z`,
];
const DASHES = [null, "6 3", "2 3", "9 3 2 3", "1 4"];

// Every arm's looks: a colour for its policy, a shape and a dash for its kind of reuse.
function dress(rows) {
  const colours = [...new Set(rows.map((row) => row.name))], shapes = ["", ...new Set(rows.map((row) => row.variant).filter(Boolean))];
  for (const row of rows) {
    row.colour = `c${colours.indexOf(row.name) % 10}`;
    const variant = shapes.indexOf(row.variant) + Math.floor(colours.indexOf(row.name) / 10);
    row.shape = SHAPES[variant % SHAPES.length];
    row.dash = row.control ? "2 3" : DASHES[variant % DASHES.length];
  }
}

const swatch = (row) => s("svg", { class: `swatch ${row.colour}`, viewBox: "-12 -6 24 12", "aria-hidden": true },
  s("path", { d: "M-12 0H12", "stroke-dasharray": row.dash }), s("path", { d: row.shape(4), class: "dot" }));

// The note beside the pointer.
const tip = document.getElementById("tip");
function hint(event, lines) {
  tip.replaceChildren(...lines.filter(Boolean).map((line, i) => h(i ? "div" : "b", {}, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const wide = document.documentElement.clientWidth, high = document.documentElement.clientHeight;
  const left = event.clientX + 14 + box.width > wide ? event.clientX - box.width - 14 : event.clientX + 14;
  tip.style.left = `${clamp(left, 4, Math.max(4, wide - box.width - 4))}px`;
  tip.style.top = `${clamp(event.clientY + 16, 4, Math.max(4, high - box.height - 4))}px`;
}
const unhint = () => { tip.hidden = true; };
for (const moved of ["wheel", "touchmove"]) addEventListener(moved, unhint, { passive: true }); // not "scroll": focus scrolls too
addEventListener("keydown", (event) => { if (event.key === "Escape") unhint(); });
