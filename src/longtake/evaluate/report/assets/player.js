// Videos of one prompt and seed, side by side, on one clock.
const FIRST = 6; // videos shown at first
const LATE = 0.02, LOST = 0.3; // seconds: from here a follower hurries, or jumps

async function player(root, table, bus) {
  const fps = table.fps, kept = table.rows.filter((row) => row.takes.some((key) => table.takes[key]?.video));
  if (!kept.length) { root.append(h("p", {}, "No video was found beside this file when it was made.")); return; }
  let group = "", slots = [], urls = [], playing = false, rate = 1, count = 1, starts = [0];
  const groups = groupsOf(table);
  const which = choice("Prompt and seed", groups, load);
  const speed = choice("Speed", [["0.25", "¼"], ["0.5", "½"], ["1", "1"], ["2", "2"]], (value) => { rate = Number(value); });
  speed.select.value = "1";
  const arms = chips("Arms whose video is shown", kept, kept.slice(0, FIRST).map((row) => row.arm), load);
  const stage = h("div", { class: "stage" });
  const key = unique("frame"), again = h("input", { type: "checkbox", id: unique("again") });
  const over = h("input", { type: "checkbox", id: unique("over"), onchange: lay });
  const edge = h("input", { type: "range", min: 0, max: 100, value: 50, hidden: true, class: "edge", "aria-label": "Where the two videos meet", oninput: lay });
  const scrub = h("input", { type: "range", id: key, min: 0, max: 1, value: 0, class: "scrub" });
  const time = h("output", { for: key, class: "time" });
  const begin = h("button", { type: "button", class: "main" }, "Play");
  const step = (by, text) => h("button", { type: "button", "aria-label": text, title: text, onclick: () => seek(frame() + by) }, by < 0 ? "◀" : "▶");
  const frame = () => Number(scrub.value);
  const clock = () => slots.find((slot) => slot.video)?.video;

  function load() {
    const at = frame();
    pause();
    urls.forEach((url) => URL.revokeObjectURL(url));
    [group, urls] = [which.select.value, []];
    slots = kept.filter((row) => arms.set.has(row.arm)).map((row) => slot(row, takeOf(table, row, group)));
    stage.replaceChildren(...slots.map(({ box }) => box));
    const curves = slots.map(({ take }) => take?.curves).find((each) => each?.chunk_starts);
    starts = curves?.chunk_starts.values ?? [0];
    count = Math.max(1, ...slots.map(({ take }) => (take?.curves.brightness ? take.curves.brightness.values.length * take.curves.brightness.every : 0)));
    limit();
    lay();
    seek(Math.min(at, count - 1));
  }
  // Two videos in one place, with a border that moves.
  function lay() {
    over.disabled = slots.length !== 2;
    const on = over.checked && !over.disabled;
    stage.classList.toggle("over", on);
    edge.hidden = !on;
    slots.forEach(({ box }, i) => { box.firstElementChild.style.clipPath = on && i ? `inset(0 0 0 ${edge.value}%)` : ""; });
  }
  function slot(row, found) {
    const caption = h("figcaption", {}, swatch(row), row.arm);
    if (!found?.[1].video) {
      const why = found ? "The video of this take was not found." : "This take is missing: see the notes at the end of the page.";
      return { row, box: h("figure", {}, h("div", { class: "hole" }, why), caption) };
    }
    const [name, take] = found, told = take.video;
    if (!told.src) urls.push(URL.createObjectURL(new Blob([bytesOf(`mp4-${name}`)], { type: "video/mp4" })));
    const video = h("video", { src: told.src ?? urls.at(-1), preload: "auto", playsinline: true, class: table.height <= 256 && "pixels", "aria-label": `${row.arm}: ${take.prompt}, seed ${take.seed}` });
    video.muted = true;
    const made = { row, take, video, box: h("figure", {}, video, caption, h("p", { class: "small" }, `${amount(told.bytes)}${told.src ? ", linked" : ""}`)) };
    video.addEventListener("error", () => {
      made.video = null;
      video.replaceWith(h("div", { class: "hole" }, told.src ? `${told.src} cannot be played: it is linked and must lie beside this file.` : "This browser cannot play the video (H.264)."));
    });
    video.addEventListener("loadedmetadata", () => { count = Math.max(count, Math.round(video.duration * fps)); limit(); place(made); });
    video.addEventListener("seeked", () => { if (!playing) place(made); });
    return made;
  }
  const limit = () => { scrub.max = count - 1; };
  // Bring a video to the scrubber's frame, one jump at a time: the middle of a frame is safe from rounding.
  function place({ video }) {
    const target = Math.min((frame() + 0.5) / fps, Math.max(0, (video?.duration || Infinity) - 0.25 / fps));
    if (video && video.readyState > 0 && !video.seeking && Math.abs(video.currentTime - target) > 0.25 / fps) video.currentTime = target;
  }
  const chunkAt = (at) => Math.max(0, starts.findLastIndex((start) => start <= at));
  function tell(at) {
    scrub.value = at;
    const chunk = chunkAt(frame()), seconds = frame() / fps;
    time.textContent = `${seconds.toFixed(2)} s · frame ${frame() + 1} of ${count} · chunk ${chunk + 1}`;
    scrub.setAttribute("aria-valuetext", time.textContent);
    bus.say("moment", { seconds, chunk, group });
  }
  function seek(at) {
    tell(clamp(Math.round(at), 0, count - 1));
    slots.forEach(place);
  }
  function pause() {
    playing = false;
    begin.textContent = "Play";
    for (const { video } of slots) video?.pause();
  }
  function play() {
    if (frame() >= count - 1) seek(0);
    playing = true;
    begin.textContent = "Pause";
    for (const { video } of slots) video?.play().catch(() => {});
    requestAnimationFrame(follow);
  }
  // The first video is the clock; the others hurry, wait or jump to it.
  function follow() {
    const first = clock();
    if (!playing || !first) return;
    first.playbackRate = rate;
    for (const { video } of slots) {
      if (!video || video === first || video.seeking) continue;
      const late = first.currentTime - video.currentTime;
      if (Math.abs(late) > LOST) video.currentTime = first.currentTime;
      else video.playbackRate = rate * (1 + (Math.abs(late) > LATE ? clamp(2 * late, -0.3, 0.3) : 0));
      if (video.paused && !video.ended) video.play().catch(() => {});
    }
    if (!first.seeking) tell(clamp(Math.floor(first.currentTime * fps), 0, count - 1));
    if (first.ended) {
      pause();
      seek(count - 1);
      if (again.checked) { seek(0); setTimeout(play, 60); }
      return;
    }
    requestAnimationFrame(follow);
  }
  begin.addEventListener("click", () => (playing ? (pause(), seek(frame())) : play()));
  scrub.addEventListener("input", () => { const at = frame(); pause(); seek(at); });
  bus.hear("seek", ({ seconds, chunk }) => { pause(); seek(chunk != null ? starts[Math.min(chunk, starts.length - 1)] : seconds * fps); });
  root.append(h("div", { class: "bar" }, which.field), arms.field, stage, edge,
    h("div", { class: "deck" }, h("label", { for: key, class: "unseen" }, "Frame, of all videos"), scrub,
      h("div", { class: "bar" }, begin, step(-1, "One frame back"), step(1, "One frame on"), speed.field, h("label", { class: "check" }, again, "Loop"),
        h("label", { class: "check" }, over, "Lay over each other (two arms)"), time)));
  load();
}
