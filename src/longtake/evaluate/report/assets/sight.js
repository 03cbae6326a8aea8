// The eviction viewer: what of the past every chunk was shown, in which form, at which place.
const FORMS = { full: "full", compressed: "compressed" };
const colourOf = (form) => FORMS[form] ?? "other";
const frames = (frame, span) => (span ? (span > 1 ? `frames ${frame} to ${frame + span - 1}` : `frame ${frame}`) : "text");
const places = (seen, span) => `place ${number(seen.at, 6)}${span > 1 ? ` to ${number(seen.at + span - 1, 6)}` : ""}`;

function wayOf(block) {
  if (!block.seen.length) return [`held (${held(block)}), not shown${block.away ? "; in host memory" : ""}`];
  return block.seen.map((seen) => `${seen.form}, ${plural(Math.round(seen.tokens), "token")}${seen.tokens < block.tokens ? ` of ${number(block.tokens)}` : ""}, ${places(seen, block.span)}`
    + (seen.share < 1 ? `, for ${number(100 * seen.share)} % of layers × heads` : "") + (seen.log_weight ? `, log weight ${number(seen.log_weight)}` : "") + (block.away ? "; in host memory" : ""));
}
const held = (block) => Object.entries(block.held).map(([form, tokens]) => `${form}: ${number(tokens)}`).join(", ") || "nothing";

async function sight(root, table, bus) {
  const rows = table.rows.filter((row) => row.takes.some((key) => table.takes[key]?.sight));
  let group = groupsOf(table)[0][0], content = null, map = null, row = Infinity; // the last chunk, which has the most behind it
  const arm = choice("Arm", rows.map((each) => [each.arm, each.arm]), load);
  const which = choice("Prompt and seed", groupsOf(table), (value) => { group = value; load(); });
  arm.select.value = (rows.find((each) => !each.name.startsWith("full")) ?? rows[0]).arm; // which has something to drop
  const key = unique("chunk");
  const slider = h("input", { type: "range", id: key, min: 0, max: 0, value: 0, class: "scrub" });
  const head = h("output", { for: key, class: "time" });
  const status = h("p", { class: "told", role: "status" }), note = h("p", { class: "small" });
  const lanes = h("div"), chart = h("div"), body = h("tbody"), marks = h("ul", { class: "legend", "aria-label": "Legend" });
  const draw = figure(lanes, 190, (width) => strip(content?.chunks[row], width));
  let wait = 0;

  async function load() {
    const mine = ++wait, found = rows.find((each) => each.arm === arm.select.value), take = takeOf(table, found, group);
    const next = take?.[1].sight ? await data(take[1].sight) : null;
    if (mine !== wait) return;
    content = next;
    chart.replaceChildren();
    map = null;
    if (!content) {
      status.textContent = take ? "What this take's chunks saw is not in this file." : "This take is missing.";
      body.replaceChildren();
      draw();
      return;
    }
    note.textContent = content.every > 1 ? `A long take: every ${content.every}th of its ${content.of} chunks is here.` : "";
    const last = Math.max(...content.chunks.map((chunk) => chunk.frame + chunk.span));
    const forms = [...new Set(content.chunks.flatMap((chunk) => chunk.blocks.flatMap((block) => block.seen.map((seen) => seen.form))))];
    const mark = (colour, text, alpha) => h("li", {}, s("svg", { class: "swatch", viewBox: "0 0 24 12", "aria-hidden": true }, s("rect", { width: 24, height: 12, class: `fill ${colour}`, opacity: alpha })), text);
    marks.replaceChildren(...forms.map((form) => mark(colourOf(form), `seen, ${form}`)), mark("held", "held, not shown"), mark("own", "the chunk itself"), mark("gone", "dropped, or not yet made"));
    map = board(chart, {
      columns: last, rows: content.chunks.length, height: clamp(content.chunks.length * 13, 90, 340), label: `Map of what every chunk saw. ${arm.select.value}: a row for each chunk, a column for each latent frame of the past. Arrow keys walk over it.`,
      across: "latent frame →", down: "chunk ↓",
      paint(rect) {
        rect(0, 0, last, content.chunks.length, "gone");
        content.chunks.forEach((chunk, r) => {
          for (const block of chunk.blocks) {
            if (!block.span) continue;
            if (!block.seen.length) rect(block.frame, r, block.span, 1, "held");
            block.seen.forEach((seen, i) => rect(block.frame, r + i / block.seen.length, block.span, 1 / block.seen.length, colourOf(seen.form), 0.35 + 0.65 * seen.share));
          }
          rect(chunk.frame, r, chunk.span, 1, "own");
        });
      },
      tell(c, r) {
        const chunk = content.chunks[r], found = chunk.blocks.filter((each) => each.frame <= c && c < each.frame + each.span);
        const own = c >= chunk.frame && c < chunk.frame + chunk.span;
        return [`chunk ${chunk.index + 1}, frame ${c}`, ...(own ? ["the chunk itself"] : found.length ? found.flatMap((block) => [`block of ${frames(block.frame, block.span)}, ${block.role}`, ...wayOf(block)]) : [c < chunk.frame ? "dropped" : "not yet made"])];
      },
      pick: (c, r) => show(r, true, false),
    });
    slider.max = content.chunks.length - 1;
    show(row, false);
  }
  function show(to, aloud, walk = true) {
    row = clamp(to, 0, content.chunks.length - 1);
    slider.value = row;
    const chunk = content.chunks[row], before = content.chunks[row - 1], now = new Set(chunk.blocks.map((block) => block.id));
    const seen = chunk.blocks.filter((block) => block.seen.length), gone = (before?.blocks ?? []).filter((block) => !now.has(block.id));
    const tokens = {};
    for (const block of seen) for (const each of block.seen) tokens[each.form] = (tokens[each.form] ?? 0) + each.tokens * each.share;
    head.textContent = `chunk ${chunk.index + 1} of ${content.of}`;
    slider.setAttribute("aria-valuetext", head.textContent);
    status.textContent = `Chunk ${chunk.index + 1} makes ${frames(chunk.frame, chunk.span)}${chunk.at !== chunk.frame ? ` at place ${number(chunk.at, 6)}` : ""}. It sees ${seen.length} of ${plural(chunk.blocks.length, "held block")}`
      + (Object.keys(tokens).length ? `: ${Object.entries(tokens).map(([form, n]) => `${number(Math.round(n))} tokens ${form === "full" ? "in full" : form}`).join(", ")}, beside ${number(chunk.tokens)} of its own.` : ".")
      + (gone.length ? ` Dropped since the chunk before: ${gone.map((block) => frames(block.frame, block.span)).join(", ")}.` : "");
    body.replaceChildren(...chunk.blocks.map((block) => h("tr", {}, h("th", { scope: "row" }, frames(block.frame, block.span)), [block.role, held(block) + (block.away ? " (host memory)" : ""), wayOf(block).join("; ")].map((text) => h("td", { class: "words" }, text)))));
    draw();
    if (aloud) bus.say("seek", { chunk: chunk.index });
    if (walk) map?.go(Math.min(chunk.frame, Math.max(...content.chunks.map((each) => each.frame + each.span)) - 1), row, false);
  }
  slider.addEventListener("input", () => { if (content) show(Number(slider.value), true); });
  bus.hear("moment", ({ chunk, group: of }) => {
    if (!content || of !== group) return;
    const to = content.chunks.findLastIndex((each) => each.index <= chunk);
    if (to >= 0 && to !== row) show(to, false);
  });
  root.append(h("div", { class: "bar" }, arm.field, which.field), h("label", { for: key }, "Chunk that is being generated"),
    h("div", { class: "slide" }, slider, head), status, lanes, marks, chart, note,
    h("details", {}, h("summary", {}, "This chunk's blocks as a table"), h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Blocks of this chunk" }, h("table", {}, h("thead", {}, h("tr", {}, ["block", "role", "held, tokens", "seen as"].map((name) => h("th", { scope: "col" }, name)))), body))));
  await load();
}

// A scale that leaves out stretches with nothing in them: a place for every span, a short gap for every hole.
function folded(spans, left, right) {
  const sorted = spans.filter(([, n]) => n > 0).sort((a, b) => a[0] - b[0]), runs = [];
  for (const [from, n] of sorted) {
    const run = runs.at(-1);
    if (run && from <= run[1] + 2) run[1] = Math.max(run[1], from + n);
    else runs.push([from, from + n]);
  }
  const hole = runs.length > 1 ? Math.min(26, (right - left) / (3 * runs.length)) : 0;
  const unit = (right - left - hole * (runs.length - 1)) / Math.max(1e-9, runs.reduce((sum, [a, b]) => sum + b - a, 0));
  let x = left;
  for (const run of runs) { run.push(x); x += (run[1] - run[0]) * unit + hole; }
  const at = (v) => { const run = runs.findLast(([from]) => from <= v + 1e-9) ?? runs[0]; return run[2] + (v - run[0]) * unit; };
  return { at, unit, runs, hole };
}

// Above, blocks where they stand in the video; below, where the model is told they are; lines join the two.
function strip(chunk, width) {
  if (!chunk) return { label: "Nothing to show", bare: true, marks: () => [] };
  const timed = chunk.blocks.filter((block) => block.span), shown = timed.flatMap((block) => block.seen.map((seen) => ({ block, seen })));
  const above = folded([...timed.map((block) => [block.frame, block.span]), [chunk.frame, chunk.span]], 4, width - 4);
  const below = folded([...shown.map(({ block, seen }) => [seen.at, block.span]), [chunk.at, chunk.span]], 4, width - 4);
  const box = (x, y, wide, high, kind, lines, extra = {}) => {
    const rect = s("rect", { x, y, width: Math.max(1, wide - (wide > 4 ? 1 : 0)), height: high, class: `fill ${kind}`, ...extra });
    rect.addEventListener("pointermove", (event) => hint(event, lines));
    rect.addEventListener("pointerleave", unhint);
    return rect;
  };
  const inks = (scale, y, text) => [scale.runs.map(([from, to, x], i) => [
    s("text", { x, y }, number(from, 6)),
    i === scale.runs.length - 1 && s("text", { x: width - 4, y, "text-anchor": "end" }, number(to - 1, 6)),
    i > 0 && s("text", { x: x - scale.hole / 2, y: y - 30, "text-anchor": "middle" }, "⋯"),
  ]), s("text", { x: 2, y: text[1], class: "name" }, text[0])];
  const most = Math.max(1, ...timed.map((block) => block.tokens / block.span));
  return {
    label: `Blocks that chunk ${chunk.index + 1} holds and sees`, bare: true,
    marks: () => [
      shown.map(({ block, seen }) => s("path", { class: `join ${colourOf(seen.form)}`, d: `M${above.at(block.frame) + (block.span * above.unit) / 2} 58C${above.at(block.frame) + (block.span * above.unit) / 2} 100 ${below.at(seen.at) + (block.span * below.unit) / 2} 82 ${below.at(seen.at) + (block.span * below.unit) / 2} 126` })),
      timed.map((block) => box(above.at(block.frame), 20, block.span * above.unit, 38, block.seen.length ? colourOf(block.seen[0].form) : "held", [`${frames(block.frame, block.span)}, ${block.role}`, `held: ${held(block)}`, ...wayOf(block)], { opacity: block.seen.length ? 0.35 + 0.65 * Math.max(...block.seen.map((seen) => seen.share)) : 1 })),
      box(above.at(chunk.frame), 20, chunk.span * above.unit, 38, "own", [`the chunk itself, ${frames(chunk.frame, chunk.span)}`]),
      shown.map(({ block, seen }) => { const high = 8 + 36 * Math.min(1, seen.tokens / block.span / most); return box(below.at(seen.at), 172 - high, block.span * below.unit, high, colourOf(seen.form), [`${frames(block.frame, block.span)}, ${block.role}`, ...wayOf(block)], { opacity: 0.35 + 0.65 * seen.share }); }),
      box(below.at(chunk.at), 128, chunk.span * below.unit, 44, "own", [`the chunk itself, place ${number(chunk.at, 6)}`, plural(chunk.tokens, "token")]),
      inks(above, 71, ["in the video, by latent frame", 12]), inks(below, 186, ["as the model sees it, by temporal position", 118]),
    ],
  };
}
