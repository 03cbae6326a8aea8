// The page: forms and buttons wired to the server's protocol. Players, views and the way to the server are beside it.

import { Link, Refusal, ask, pathOf, request, token } from "./link.js";
import { PicturePlayer, VideoPlayer, hasVideo, playsVideo } from "./player.js";
import { Meters, Strip, Timeline, bytes, clock, element } from "./views.js";

const $ = (id) => document.getElementById(id);
const MODES = {
  keep: "keep: it stays as it was made", recache: "recache: rewritten under the new prompt",
  flush: "flush: all but its ends is forgotten", cut: "cut: flush, and stand far off in time",
};
const LARGEST_IMAGE = 9_000_000; // bytes of a file: its base64 must fit into a request

let models = [], policies = [];
let take = null; // what the server last said of the session on the screen
let link = null, player = null, format = "mp4", broken = 0, greeted = false;
const meters = new Meters($("meters"));
const timeline = new Timeline($("track"), $("moments"));
const strip = new Strip($("strip"), $("strip-text"), $("strip-rows"));

// --- saying things ---------------------------------------------------------------------------------------------------

function say(text) {
  $("said").textContent = text;
}

function complain(error, offer) {
  if (error.status === 401) return askToken();
  $("wrong-text").textContent = error.message;
  const fits = error.problem?.fits, button = $("wrong-fits");
  button.hidden = !(fits && offer);
  if (fits && offer) {
    button.textContent = `Take ${fits.policy} instead (${bytes(fits.bytes)})`;
    button.onclick = () => {
      $("wrong").hidden = true;
      offer(fits.policy);
    };
  }
  $("wrong").hidden = false;
}

// Run what a button or form asks for, once at a time, and show what went wrong.
function on(target, event, work, offer) {
  $(target).addEventListener(event, async (happened) => {
    happened.preventDefault();
    const node = $(target), buttons = node.matches("form") ? node.querySelectorAll("button[type=submit]") : [node];
    if (node.getAttribute("aria-busy") === "true") return;
    node.setAttribute("aria-busy", "true");
    buttons.forEach((b) => b.setAttribute("aria-disabled", "true"));
    try {
      $("wrong").hidden = true;
      await work(happened);
    } catch (error) {
      if (!(error instanceof Refusal)) console.error(error);
      complain(error, offer);
    } finally {
      node.removeAttribute("aria-busy");
      buttons.forEach((b) => b.removeAttribute("aria-disabled"));
    }
  });
}

function askToken(words) {
  closeTake();
  for (const id of ["watch", "new", "takes"]) $(id).hidden = true;
  $("door").hidden = false;
  if (token.get()) {
    $("wrong-text").textContent = words ?? "The server does not know this token.";
    $("wrong-fits").hidden = true;
    $("wrong").hidden = false;
  }
  token.forget();
  $("token").focus();
}

// --- what the server offers ------------------------------------------------------------------------------------------

const named = (list, name) => list.find((one) => one.name === name);
const option = (value, text) => Object.assign(element("option", text ?? value), { value });

// A pair of fields for one `name[:options]`.
class PolicyPicker {
  constructor(prefix) {
    [this.select, this.field, this.about] = ["name", "options", "about"].map((part) => $(prefix[part]));
    this.select.addEventListener("change", () => {
      this.field.value = "";
      this.explain();
    });
  }

  fill(first) {
    this.select.replaceChildren(...(first ? [option("", first)] : []), ...policies.map((p) => option(p.name)));
    this.explain();
  }

  explain() {
    const policy = named(policies, this.select.value);
    this.field.disabled = !policy;
    this.field.placeholder = Object.entries(policy?.options ?? {}).map(([k, v]) => `${k}=${v}`).join(",");
    this.about.textContent = policy?.about ?? "";
  }

  get spec() {
    const options = this.field.value.trim();
    return this.select.value && (options ? `${this.select.value}:${options}` : this.select.value);
  }

  set spec(text) {
    const [name, ...options] = text.split(":");
    if (!named(policies, name)) return;
    this.select.value = name;
    this.explain();
    this.field.value = options.join(":");
  }
}

const newPolicy = new PolicyPicker({ name: "new-policy", options: "new-options", about: "new-policy-about" });
const takePolicy = new PolicyPicker({ name: "policy-name", options: "policy-options", about: "policy-about" });

function describeModel() {
  const model = named(models, $("new-model").value);
  newPolicy.fill(`the model's own (${model.policy})`);
  $("new-model-about").textContent = `${model.width} × ${model.height}, ${model.fps} frames a second. ${model.about}`;
  $("ideas").replaceChildren(...model.prompts.map((prompt) => {
    const button = element("button", prompt);
    button.type = "button";
    button.onclick = () => {
      $("new-prompt").value = prompt;
      $("new-prompt").focus();
    };
    return element("li", "", button);
  }));
}

async function enter() {
  [models, policies] = await Promise.all([ask("GET", "/v1/models"), ask("GET", "/v1/policies")]);
  $("door").hidden = true;
  $("new").hidden = $("takes").hidden = false;
  $("new-model").replaceChildren(...models.map((m) => option(m.name)));
  describeModel();
  takePolicy.fill();
  await listTakes();
  const wanted = location.hash.match(/^#take=([\w-]+)$/)?.[1];
  if (wanted) openTake(await ask("GET", pathOf(wanted)));
}

async function listTakes() {
  const takes = await ask("GET", "/v1/sessions");
  takes.sort((a, b) => b.created - a.created);
  $("takes").hidden = !takes.length;
  $("takes-list").replaceChildren(...takes.map((one) => {
    const open = element("button", "Watch");
    open.type = "button";
    open.setAttribute("aria-label", `Watch ${one.prompt}`);
    open.onclick = () => openTake(one, true);
    const about = `${clock(one.frames / one.fps)}, ${one.state}, ${one.policy}`;
    return element("li", "", element("span", "", one.prompt, element("br"), Object.assign(element("span", about), { className: "small" })), open);
  }));
}

// --- a take on the screen --------------------------------------------------------------------------------------------

function openTake(session, focus) {
  closeTake();
  history.replaceState(null, "", `#take=${session.id}`);
  timeline.clear();
  strip.clear();
  meters.clear();
  $("watch").hidden = false;
  broken = 0;
  greeted = false;
  show(session);
  takePolicy.spec = session.policy;
  $("steer-prompt").value = session.prompt;
  if (focus) $("watch-title").focus();
  reopen($("player").value);
}

function closeTake() {
  link?.end("left");
  player?.close();
  link = player = take = null;
  $("watch").hidden = true;
  $("play").hidden = true;
  history.replaceState(null, "", location.pathname);
}

// Watch the take on the screen, as video or as pictures.
function reopen(as) {
  link?.end("left");
  player?.close();
  player = null;
  format = as;
  link = new Link(take.id, format, { message: hear, media: (data) => player?.push(data), state: linkState });
}

function linkState(state, why, words) {
  const texts = {
    connecting: "Connecting", on: "Watching", lost: `Connection lost, trying again${why ? ` (${why})` : ""}`,
    ended: { gone: "This take is gone", left: "Not watching", version: "This page is too old: load it again" }[why] ?? "Not watching",
  };
  if (state === "connecting" && $("link").dataset.state === "lost") return;
  if ($("link").textContent !== texts[state]) $("link").textContent = texts[state];
  $("link").dataset.state = state;
  if (state !== "ended" || why === "left") return;
  if (why === "token") return askToken();
  const gone = why === "gone";
  closeTake();
  $("link").textContent = texts.ended;
  if (!gone && words) complain(new Error(words));
  listTakes().catch(complain);
}

function hear(told) {
  if (told.type === "welcome") welcome(told);
  else if (told.type === "chunk") chunk(told);
  else if (told.type === "changed") changed(told);
  else if (told.type === "dropped") say("This connection is too slow: some of the video is missing.");
}

function changed({ session, timeline: moments }) {
  show(session);
  if (moments?.length) timeline.set(moments);
}

function welcome({ session, mime, timeline: moments }) {
  timeline.end = Math.max(timeline.end, session.frames);
  show(session);
  if (moments?.length) timeline.set(moments);
  if (!timeline.moments.length) timeline.add({ frame: session.frames, prompt: session.prompt, policy: session.policy });
  if (!greeted && Object.keys(session.stats).length) meters.add(session.stats, session);
  greeted = true;
  if (format === "mp4" && !playsVideo(mime)) return queueMicrotask(() => reopen("jpeg"));
  const video = format === "mp4";
  $("video").hidden = !video;
  $("pictures").hidden = video;
  $("position").disabled = $("live").disabled = !video;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (!player) {
    player = video ? new VideoPlayer($("video"), { blocked: () => ($("play").hidden = false), failed: mend })
      : new PicturePlayer($("pictures"), session.fps, session.frames);
    player.go = !still;
    $("play").hidden = !still;
  }
  player.open(mime);
}

// What the decoder refuses is opened anew, and if that does not help, watched as pictures.
function mend() {
  broken += 1;
  setTimeout(() => take && reopen(broken > 2 ? "jpeg" : "mp4"), 500);
}

function chunk(told) {
  const frames = told.frame + told.frames;
  timeline.end = Math.max(timeline.end, frames);
  timeline.add({ frame: told.frame, prompt: told.prompt, policy: told.policy });
  take = { ...take, chunk: told.index + 1, frames, stats: told.stats };
  meters.add(told.stats, take);
  if (told.strip[0]?.length === 7) strip.add(told.index, told.strip);
  caption();
  if (take.recording) recorded();
}

const WORDS = { running: "running", paused: "paused", ended: "at its end", parked: "on disk", failed: "failed" };

function show(session) {
  if (take && take.state !== session.state) say(`The take is ${WORDS[session.state]}.`);
  if (take && take.prompt !== session.prompt) say(`From the next chunk on: ${session.prompt}`);
  if (take && take.policy !== session.policy) takePolicy.spec = session.policy;
  const trouble = session.error && session.error !== take?.error;
  const model = named(models, session.model);
  const modes = (model?.modes ?? ["keep"]).join(" ");
  if ($("steer-mode").dataset.modes !== modes) {
    $("steer-mode").dataset.modes = modes;
    $("steer-mode").replaceChildren(option("", "as the policy does"), ...modes.split(" ").map((m) => option(m, MODES[m] ?? m)));
  }
  take = session;
  timeline.fps = session.fps;
  if (link) link.running = session.state === "running";
  $("screen").classList.toggle("pixel", session.width < 256);
  $("screen").style.maxWidth = session.height > session.width ? `calc(70vh * ${session.width / session.height})` : "";
  $("video").style.aspectRatio = `${session.width} / ${session.height}`;
  $("video").setAttribute("aria-label", `Live video: ${session.prompt}`);
  $("pictures").setAttribute("aria-label", `Live pictures: ${session.prompt}`);
  $("pause").textContent = session.state === "paused" ? "Resume" : "Pause";
  $("pause").disabled = !["running", "paused"].includes(session.state);
  $("record").setAttribute("aria-pressed", String(session.recording));
  steerable(session.state !== "ended");
  timeline.saved = session.snapshots.map((s) => s.frame).filter((frame) => frame !== null);
  caption();
  recorded();
  snapshots();
  if (trouble) complain(new Error(session.error));
}

// A take with all its chunks has no next one, which a prompt, a policy or a recording could show in.
function steerable(goesOn) {
  $("ended").hidden = goesOn;
  for (const form of ["steer-form", "policy-form"]) for (const node of $(form).elements) node.disabled = !goesOn;
  if (goesOn) takePolicy.explain();
  $("record").disabled = !goesOn && !take.recording;
}

function caption() {
  const end = take.chunks ? ` of ${take.chunks}` : "";
  $("state").textContent =
    `${take.prompt} · ${WORDS[take.state]} · chunk ${take.chunk}${end} · ${clock(take.frames / take.fps)} · ${take.policy}`;
}

function recorded() {
  const rolling = take.recording ? "Recording. " : "";
  $("download").disabled = !take.recorded_frames && !take.recording;
  $("recorded").textContent = take.recorded_frames ? `${rolling}${clock(take.recorded_frames / take.fps)} recorded.` : rolling;
}

function snapshots() {
  $("snapshots-title").hidden = !take.snapshots.length;
  $("snapshots").replaceChildren(...take.snapshots.map((saved) => {
    const name = `${saved.chunk} chunks, ${saved.prompt}`;
    const button = (text, work) => {
      const made = element("button", text);
      made.type = "button";
      made.setAttribute("aria-label", `${text}: ${name}`);
      made.onclick = () => work().catch(complain);
      return made;
    };
    return element("li", "", element("span", `After ${name} (${bytes(saved.bytes)})`),
      button("Go back", () => steer({ type: "seek", snapshot: saved.id })),
      button("Fork", () => fork(saved.id)),
      button("Delete", () => ask("DELETE", pathOf(take.id, "snapshots", saved.id))));
  }));
}

// --- what people do --------------------------------------------------------------------------------------------------

const steer = (action) => ask("POST", pathOf(take.id, "steer"), { action });

async function fork(snapshot) {
  const child = await ask("POST", pathOf(take.id, "fork"), snapshot ? { snapshot } : {});
  await listTakes();
  openTake(child, true);
  say("This is the fork.");
}

async function begin(instead) {
  const length = parseFloat($("new-length").value), model = named(models, $("new-model").value);
  const image = $("new-image").files[0];
  if (image?.size > LARGEST_IMAGE) throw new Refusal(413, { message: `An image may have at most ${bytes(LARGEST_IMAGE)}.` });
  const spec = instead ?? newPolicy.spec;
  if (instead) newPolicy.spec = instead;
  const session = await ask("POST", "/v1/sessions", {
    model: model.name, prompt: $("new-prompt").value.trim(), pace: $("new-pace").value, record: $("new-record").checked,
    seed: $("new-seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number($("new-seed").value),
    ...(spec && { policy: spec }),
    ...(length > 0 && { chunks: Math.max(1, Math.ceil(length / model.chunk_seconds)) }),
    ...(image && { image: await base64(image) }),
  });
  openTake(session);
  $("steer-prompt").focus({ preventScroll: true });
  $("watch").scrollIntoView({ block: "start" });
  say("The take begins.");
  listTakes().catch(complain);
}

const base64 = (file) => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
  reader.onerror = () => failed(new Error("The image cannot be read."));
  reader.readAsDataURL(file);
});

// A link can carry no token, so with one the file comes through memory; without, straight to disk.
async function download() {
  const path = pathOf(take.id, "recording"), anchor = element("a");
  anchor.download = "take.mp4";
  anchor.href = token.get() ? URL.createObjectURL(await (await request("GET", path)).blob()) : path;
  anchor.click();
  if (token.get()) setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
}

on("door-form", "submit", async () => {
  const given = $("token").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) throw new Refusal(0, { message: "A token has letters, digits and signs, without spaces." });
  token.set(given);
  $("token").value = "";
  await enter();
  $("new-prompt").focus();
});
on("new-form", "submit", () => begin(), (policy) => begin(policy).catch(complain));
on("steer-form", "submit", async () => {
  const mode = $("steer-mode").value, text = $("steer-prompt").value.trim();
  const done = await steer({ type: "prompt", text, ...(mode && { mode }) });
  say(`The new prompt is in force from chunk ${done.chunk} on.`);
});
on("policy-form", "submit", async () => {
  const done = await steer({ type: "policy", policy: takePolicy.spec });
  say(`The policy is ${done.policy} from chunk ${done.chunk} on.`);
}, (policy) => steer({ type: "policy", policy }).catch(complain));
on("pause", "click", () => steer({ type: take.state === "paused" ? "resume" : "pause" }));
on("record", "click", () => steer({ type: "record", on: !take.recording }));
on("save", "click", async () => {
  await steer({ type: "save" });
  say("The snapshot is saved.");
});
on("fork", "click", () => fork());
on("download", "click", download);
on("delete", "click", async () => {
  if (!confirm("Delete this take with its recording and snapshots?")) return;
  const gone = take.id;
  closeTake();
  await ask("DELETE", pathOf(gone));
  await listTakes();
  $("new-prompt").focus();
  say("The take is deleted.");
});
on("full", "click", () => {
  const node = format === "mp4" ? $("video") : $("pictures");
  return node.requestFullscreen ? node.requestFullscreen() : node.webkitEnterFullscreen?.();
});
on("read", "click", () => say(`${meters.words()}. ${$("strip-text").textContent}`));
on("play", "click", () => {
  player.go = true;
  $("play").hidden = true;
  if (format === "mp4") $("video").play();
});
on("live", "click", () => player?.live());
on("wrong-close", "click", () => $("main").focus());
$("position").addEventListener("input", () => player?.seek(Number($("position").value)));
$("new-model").addEventListener("change", describeModel);
$("player").addEventListener("change", () => take && reopen($("player").value));
for (const area of ["new", "steer"]) {
  $(`${area}-prompt`).addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $(`${area}-form`).requestSubmit();
  });
}

// The position follows the picture, a few times a second.
setInterval(() => {
  if (!player || !take) return;
  const [first, last] = player.range(), behind = Math.max(0, last - player.time), slider = $("position");
  slider.min = first;
  slider.max = last;
  slider.value = player.time;
  slider.setAttribute("aria-valuetext", `${behind.toFixed(0)} seconds behind the newest frame`);
  $("live").setAttribute("aria-pressed", String(player.following));
  timeline.drawTrack(player.time);
}, 250);

if (!hasVideo()) $("player").value = "jpeg";
enter().catch(complain);
