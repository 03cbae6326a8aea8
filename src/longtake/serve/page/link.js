// The way to the server: REST for what is done once, one WebSocket for what goes on.

const VERSION = 1;
const FIRST_WAIT = 500, LONGEST_WAIT = 8000; // milliseconds between two tries
const QUIET = 20000; // milliseconds without a word of a running take, after which the server is asked whether it is there
const NO_MORE = { 4400: "malformed", 4401: "token", 4404: "gone", 4426: "version" };

// The token lives in this tab's session storage: not in an address, not in a cookie, gone with the tab.
export const token = {
  get: () => sessionStorage.getItem("longtake-token"),
  set: (value) => sessionStorage.setItem("longtake-token", value),
  forget: () => sessionStorage.removeItem("longtake-token"),
};

export class Refusal extends Error {
  constructor(status, problem) {
    super(problem.message ?? `the server answered ${status}`);
    this.status = status; // 0: no server answered
    this.problem = problem;
  }
}

function headers() {
  const held = token.get();
  return held ? { authorization: `Bearer ${held}` } : {};
}

export async function request(method, path, body, signal) {
  const options = { method, headers: headers(), cache: "no-store", credentials: "omit", redirect: "error", signal };
  if (body !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refusal(0, { code: "network", message: "The server does not answer. Is it running, and are you online?" });
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Refusal(answer.status, told.error ?? {});
}

export async function ask(method, path, body, signal) {
  const answer = await request(method, path, body, signal);
  return answer.status === 204 ? null : answer.json();
}

export const pathOf = (session, ...parts) => ["/v1/sessions", session, ...parts].map(encodeURI).join("/");

/* A viewer's WebSocket, which is opened again after every loss of the network. It calls
   message(object), media(ArrayBuffer), state("connecting" | "on" | "lost" | "ended", why). */
export class Link {
  constructor(session, format, on) {
    Object.assign(this, { session, format, on, wait: FIRST_WAIT, ended: false, socket: null, timer: 0 });
    this.retry = () => this.again(0);
    this.drop = () => this.lose();
    addEventListener("online", this.retry);
    addEventListener("offline", this.drop);
    this.watchdog = setInterval(() => this.probe(), QUIET / 4);
    this.running = false; // whether the server ought to have something to say
    this.open();
  }

  open() {
    const socket = new WebSocket(`${location.origin.replace(/^http/, "ws")}${pathOf(this.session, "watch")}`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.heard = performance.now();
    this.on.state("connecting");
    socket.onopen = () => {
      const hello = { type: "hello", version: VERSION, format: this.format };
      socket.send(JSON.stringify(token.get() ? { ...hello, token: token.get() } : hello));
    };
    socket.onmessage = ({ data }) => {
      this.heard = performance.now();
      if (typeof data !== "string") return this.on.media(data);
      const told = JSON.parse(data);
      if (told.type === "welcome") {
        this.wait = FIRST_WAIT;
        this.why = undefined;
        this.on.state("on");
      } else if (told.type === "bye") {
        this.goodbye = told.reason;
      } else if (told.type === "error" && told.id == null) {
        this.why = told.error.message;
      }
      this.on.message(told);
    };
    socket.onclose = ({ code }) => {
      if (this.socket !== socket) return;
      if (NO_MORE[code] || this.goodbye === "deleted") this.end(NO_MORE[code] ?? "gone", this.why);
      else this.again(this.wait);
    };
  }

  again(wait) {
    if (this.ended || (this.socket?.readyState === WebSocket.OPEN && wait === 0)) return;
    this.leave();
    this.on.state("lost", this.goodbye ?? this.why);
    this.goodbye = undefined;
    this.wait = Math.min(LONGEST_WAIT, 2 * this.wait);
    this.timer = setTimeout(() => this.open(), wait * (0.75 + Math.random() / 2));
  }

  lose() {
    if (!this.ended) this.again(this.wait);
  }

  // A dead network closes no socket for minutes: when a running take says nothing, see whether the server answers.
  async probe() {
    if (!this.running || this.socket?.readyState !== WebSocket.OPEN || performance.now() - this.heard < QUIET) return;
    try {
      await ask("GET", pathOf(this.session), undefined, AbortSignal.timeout(QUIET / 4));
      this.heard = performance.now(); // it is there; the model is slow
    } catch (error) {
      if (error.status === 0) this.lose();
    }
  }

  leave() {
    clearTimeout(this.timer);
    const socket = this.socket;
    this.socket = null;
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
    }
  }

  end(why, words) {
    if (this.ended) return;
    this.ended = true;
    this.leave();
    clearInterval(this.watchdog);
    removeEventListener("online", this.retry);
    removeEventListener("offline", this.drop);
    this.on.state("ended", why, words);
  }
}
