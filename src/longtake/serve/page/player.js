// Players of a live stream: H.264 fragments through Media Source Extensions, or JPEG pictures onto a canvas.
// Both: open(mime), push(ArrayBuffer), close(), and `go` (whether to play).

const Source = self.ManagedMediaSource ?? self.MediaSource; // phones have the first only
const KEEP = 60; // seconds behind the picture that can be looked at again
const SOON = 2.5, LATE = 6, CLOSE = 1; // seconds behind the newest: play a little faster above, jump above, to here
const FASTER = 1.08;
const GAP = 0.05; // seconds: a hole in the buffer is larger
const MOST = 1 << 20; // bytes appended at once

export const playsVideo = (mime) => Boolean(Source?.isTypeSupported(mime));
export const hasVideo = () => playsVideo('video/mp4; codecs="avc1.64000a"');

export class VideoPlayer {
  constructor(video, on) {
    this.video = video;
    this.on = on; // { blocked(): it may not play by itself; failed(): the stream must be opened anew }
    this.following = true;
    this.go = true;
    this.queue = [];
    this.timer = setInterval(() => this.tend(), 250);
  }

  // The next thing pushed is a header. A stream that goes on as it was goes on in the same buffer.
  open(mime) {
    this.queue = [];
    if (this.mime === mime && this.source?.readyState === "open") return;
    this.release();
    const source = new Source();
    this.mime = mime;
    this.source = source;
    this.video.disableRemotePlayback = true;
    this.url = URL.createObjectURL(source);
    this.video.src = this.url;
    source.addEventListener("sourceopen", () => {
      if (this.source !== source || this.buffer) return;
      this.buffer = source.addSourceBuffer(mime);
      this.buffer.addEventListener("updateend", () => this.pump());
      this.pump();
    });
  }

  push(data) {
    this.queue.push(new Uint8Array(data));
    this.pump();
  }

  pump() {
    const { buffer, source, video } = this;
    if (!buffer || buffer.updating || source.readyState !== "open" || !this.queue.length) return;
    let size = 0, count = 0;
    while (count < this.queue.length && (count === 0 || size + this.queue[count].length <= MOST)) {
      size += this.queue[count++].length;
    }
    const block = new Uint8Array(size);
    let at = 0;
    for (const part of this.queue.slice(0, count)) {
      block.set(part, at);
      at += part.length;
    }
    try {
      buffer.appendBuffer(block);
      this.queue.splice(0, count);
      this.tend();
    } catch (error) {
      if (error.name !== "QuotaExceededError") return this.on.failed();
      const end = this.end();
      if (end - video.currentTime > LATE) video.currentTime = end - CLOSE; // far behind: what lies between has no place
      buffer.remove(0, Math.max(video.currentTime - 5, GAP));
    }
  }

  end() {
    const ranges = this.buffer?.buffered;
    return ranges?.length ? ranges.end(ranges.length - 1) : 0;
  }

  // Seconds that can be looked at.
  range() {
    const ranges = this.buffer?.buffered;
    return ranges?.length ? [ranges.start(0), this.end()] : [0, 0];
  }

  // Stay near the newest, over holes, with bounded memory.
  tend() {
    const { video, buffer, source } = this;
    if (source?.readyState !== "open" || !buffer?.buffered.length) return;
    const ranges = buffer.buffered, now = video.currentTime, end = this.end();
    let inside = -1, next = ranges.length - 1;
    for (let i = 0; i < ranges.length; i++) {
      if (now >= ranges.start(i) - GAP && now < ranges.end(i) - GAP) inside = i;
      if (ranges.start(i) > now && ranges.start(i) < ranges.start(next)) next = i;
    }
    if (inside < 0 && ranges.start(next) > now) video.currentTime = ranges.start(next) + GAP / 5;
    else if (this.following && end - now > LATE) video.currentTime = Math.max(ranges.start(ranges.length - 1), end - CLOSE);
    video.playbackRate = this.following && end - now > SOON ? FASTER : 1;
    if (now - ranges.start(0) > KEEP + 15 && !buffer.updating) buffer.remove(0, now - KEEP);
    if (this.go && video.paused && !this.asked) {
      this.asked = true;
      video.play().then(() => (this.asked = false), (error) => {
        this.asked = false;
        if (error.name === "NotAllowedError") {
          this.go = false;
          this.on.blocked();
        }
      });
    }
    if (!this.go && !video.paused) video.pause();
  }

  seek(seconds) {
    this.following = false;
    const [first, last] = this.range();
    this.video.currentTime = Math.min(Math.max(seconds, first), last);
  }

  live() {
    this.following = true;
    if (this.end()) this.video.currentTime = Math.max(this.range()[0], this.end() - CLOSE);
  }

  get time() {
    return this.video.currentTime;
  }

  release() {
    this.queue = [];
    this.buffer = this.source = this.mime = undefined;
    if (this.url) {
      URL.revokeObjectURL(this.url);
      this.url = undefined;
      this.video.removeAttribute("src");
      this.video.load();
    }
  }

  close() {
    clearInterval(this.timer);
    this.release();
  }
}

// Pictures carry no clock: they are shown one after another at the stream's rate, and skipped when they pile up.
export class PicturePlayer {
  constructor(canvas, fps, frame) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.fps = fps;
    this.shown = frame; // of the stream
    this.queue = [];
    this.go = this.following = true;
    this.timer = setInterval(() => this.show(), 1000 / fps);
  }

  open() {
    this.queue = [];
  }

  push(data) {
    this.queue.push(data);
    if (this.queue.length > LATE * this.fps) this.shown += this.queue.splice(0, this.queue.length - CLOSE * this.fps).length;
  }

  async show() {
    if (!this.go || this.busy || !this.queue.length) return;
    this.busy = true;
    const data = this.queue.shift();
    this.shown += 1;
    try {
      const picture = await createImageBitmap(new Blob([data], { type: "image/jpeg" }));
      if (this.canvas.width !== picture.width || this.canvas.height !== picture.height) {
        this.canvas.width = picture.width;
        this.canvas.height = picture.height;
      }
      this.context.drawImage(picture, 0, 0);
      picture.close();
    } finally {
      this.busy = false;
    }
  }

  range() {
    return [this.time, this.time];
  }

  seek() {}

  live() {
    this.shown += this.queue.splice(0, Math.max(0, this.queue.length - 1)).length;
  }

  get time() {
    return this.shown / this.fps;
  }

  close() {
    clearInterval(this.timer);
    this.queue = [];
  }
}
