// Which steps of which chunks were computed, and which reused an earlier result; why stands under the cursor.
const REASONS = {
  first: "the first step is always computed", "warm-up": "warm-up: computed", last: "the last step is always computed",
  entered: "a chunk entered beside it", moved: "it has moved too far: computed", still: "it hardly moved: reused",
};

async function decisions(root, table, bus) {
  const rows = table.rows.filter((row) => row.takes.some((key) => table.takes[key]?.decisions));
  let group = groupsOf(table)[0][0], wait = 0;
  const which = choice("Prompt and seed", groupsOf(table), (value) => { group = value; load(); });
  const shown = h("div", { class: "maps" });
  const mark = (colour, text) => h("li", {}, s("svg", { class: "swatch", viewBox: "0 0 24 12", "aria-hidden": true }, s("rect", { width: 24, height: 12, class: `fill ${colour}` })), text);
  root.append(h("div", { class: "bar" }, which.field), h("ul", { class: "legend", "aria-label": "Legend" }, mark("computed", "computed"), mark("reused", "reused"), mark("gone", "no such step")), shown);
  async function load() {
    const mine = ++wait, made = [];
    for (const row of rows) {
      const take = takeOf(table, row, group);
      made.push([row, take?.[1].decisions ? await data(take[1].decisions) : null]);
    }
    if (mine !== wait) return;
    shown.replaceChildren();
    for (const [row, list] of made) shown.append(list ? one(row, list) : h("p", {}, `${row.arm}: no decisions were found for this take.`));
  }
  function one(row, list) {
    const cells = new Map(), columns = Math.max(...list.map(([chunk]) => chunk)) + 1, steps = Math.max(...list.map(([, step]) => step)) + 1;
    for (const each of list) cells.set(`${each[0]},${each[1]}`, [...(cells.get(`${each[0]},${each[1]}`) ?? []), each]);
    const reused = list.filter((each) => each[2]).length;
    const holder = h("div", {}, h("h4", {}, swatch(row), row.arm), h("p", { class: "small" }, `${number((100 * reused) / list.length)} % of ${plural(list.length, "step")} reused.`));
    board(holder, {
      columns, rows: steps, height: clamp(steps * 16, 64, 400), label: `Map of reuse, ${row.arm}: a column for each chunk, a row for each step; ${reused} of ${list.length} reused. Arrow keys walk over it.`,
      across: "chunk →", down: "step ↓",
      paint(rect) {
        rect(0, 0, columns, steps, "gone");
        for (const [key, found] of cells) { const [chunk, step] = key.split(",").map(Number); rect(chunk, step, 1, 1, found.every((each) => each[2]) ? "reused" : "computed"); }
      },
      tell(c, r) {
        const found = cells.get(`${c},${r}`);
        return [`chunk ${c + 1}, step ${r + 1}`, ...(found ?? []).flatMap(([, , again, change, sum, time, reason]) => [again ? "reused" : "computed",
          `change ${number(change)}, accumulated ${number(sum)}`, time == null ? "" : `timestep ${number(time, 5)}`, REASONS[reason] ?? reason]), found ? "" : "no such step"];
      },
      pick: (c) => bus.say("seek", { chunk: c }),
    });
    return holder;
  }
  await load();
}
