// Every view finds its place in the page; those of one table hear of each other through a bus.
const VIEWS = { tradeoff, key, gaps, curves, player, sight, decisions };

function makeBus() {
  const ears = [];
  return {
    hear: (what, listen) => ears.push([what, listen]),
    say: (what, told) => { for (const [wanted, listen] of ears) if (wanted === what) listen(told); },
  };
}

const buses = new Map();
async function begin(root) {
  const from = root.dataset.from;
  if (!buses.has(from)) buses.set(from, makeBus());
  try {
    const table = await data(from);
    if (!table.dressed) { dress(table.rows); table.dressed = true; }
    await VIEWS[root.dataset.view](root, table, buses.get(from));
  } catch (error) {
    root.append(h("p", { class: "warn" }, `This part could not be drawn: ${error.message}. The tables hold the numbers; a browser of 2023 or later draws the rest.`));
    console.error(error);
  }
}

// A click on a column's title sorts by it; numbers that are not there come last.
function sortable(table) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const words = [...cell.childNodes];
    const button = h("button", { type: "button", class: "sort" });
    button.append(...words);
    cell.append(button);
    button.addEventListener("click", () => {
      const up = cell.getAttribute("aria-sort") === "descending", rows = [...table.tBodies[0].rows];
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => (column ? Number(row.cells[column].dataset.value ?? NaN) : row.cells[0].textContent);
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (!column) return up ? y.localeCompare(x) : x.localeCompare(y);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return up ? x - y : y - x;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

document.querySelectorAll("table[id]").forEach(sortable);
Promise.all([...document.querySelectorAll("[data-view]")].map(begin)).then(() => { document.documentElement.dataset.ready = "yes"; });
