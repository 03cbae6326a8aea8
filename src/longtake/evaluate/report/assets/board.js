// A map of rectangles on a grid, for eyes, pointers and keys: a cursor walks over its cells and what it stands on is told.
// `paint(rect)` calls rect(column, row, columns, rows, colour, alpha?); `tell(column, row)` gives lines of text.
function board(holder, { columns, rows, height, label, across, down, paint, tell, pick, start = [0, 0] }) {
  const face = h("canvas", { class: "board", tabindex: 0, role: "img", "aria-label": label });
  const status = h("p", { class: "readout", role: "status" });
  let [column, row] = start, width = 0;
  const colours = new Map();
  const colour = (name) => {
    if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
    return colours.get(name);
  };
  function draw() {
    if (!width) return;
    colours.clear();
    const sharp = Math.max(2, devicePixelRatio), pen = face.getContext("2d");
    face.width = width * sharp;
    face.height = height * sharp;
    face.style.height = `${height}px`;
    pen.scale(sharp, sharp);
    pen.fillStyle = colour("card");
    pen.fillRect(0, 0, width, height);
    const dx = width / columns, dy = height / rows, gap = Math.min(dx, dy) > 5 ? 1 : 0;
    paint((c, r, w, n, name, alpha = 1) => {
      pen.globalAlpha = alpha;
      pen.fillStyle = colour(name);
      pen.fillRect(c * dx, r * dy, Math.max(w * dx - gap, 0.75), Math.max(n * dy - gap, 0.75));
    });
    pen.globalAlpha = 1;
    pen.strokeStyle = colour("ink");
    pen.lineWidth = 2;
    pen.strokeRect(column * dx, row * dy, Math.max(dx, 2), Math.max(dy, 2));
  }
  function go(c, r, picked = true) {
    [column, row] = [clamp(c, 0, columns - 1), clamp(r, 0, rows - 1)];
    draw();
    if (picked) status.textContent = tell(column, row).filter(Boolean).join(" · ");
    if (picked) pick?.(column, row);
  }
  const under = (event) => {
    const box = face.getBoundingClientRect();
    return [clamp(Math.floor(((event.clientX - box.left) / box.width) * columns), 0, columns - 1), clamp(Math.floor(((event.clientY - box.top) / box.height) * rows), 0, rows - 1)];
  };
  face.addEventListener("pointermove", (event) => hint(event, tell(...under(event))));
  face.addEventListener("pointerleave", unhint);
  face.addEventListener("click", (event) => go(...under(event)));
  face.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-columns, 0], End: [columns, 0], PageUp: [0, -10], PageDown: [0, 10] }[event.key];
    if (!move) return;
    event.preventDefault();
    go(column + move[0], row + move[1]);
  });
  holder.append(h("figure", { class: "map" }, h("div", { class: "down", "aria-hidden": true }, down), face, h("figcaption", { class: "across", "aria-hidden": true }, across)), status);
  new ResizeObserver(([entry]) => { width = Math.floor(entry.contentRect.width); draw(); }).observe(face);
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
  return { go, draw, face };
}
