"""Frames to many viewers: encoded once, queued for each, and no viewer makes another one, or the take, wait."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fmp4 import Track, sample
from .protocol import Dropped, Message
from .recording import Recording

Frames = NDArray[np.uint8]

_BT709 = 1  # ITU-T H.273, for matrix, primaries and transfer curve
_TEXTS = 512  # messages waiting for one viewer, above which it is given up
_JPEG_QUALITY = 80


class Encoder:
    """H.264 without delay: a frame in, its sample out. Key frames are where they are asked for."""

    def __init__(self, width: int, height: int, fps: float) -> None:
        import av
        from av.codec.context import Flags
        from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

        context: Any = av.CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        self._base = 1 / _fraction(fps)
        context.time_base, context.framerate = self._base, _fraction(fps)
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        context.gop_size, context.thread_count = 1 << 20, 1
        context.flags |= Flags.global_header
        context.options = {
            "preset": "veryfast", "tune": "zerolatency", "crf": "21", "mbtree": "0", "forced-idr": "1",
            "sc_threshold": "0",
        }  # fmt: skip
        context.open()
        self._context, self._reformat = context, VideoReformatter().reformat
        self._yuv = {"format": "yuv420p", "dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
        self._count = 0
        self.track = Track(width, height, fps, bytes(context.extradata))

    def encode(self, rgb: Frames, key: bool) -> bytes:
        """One frame [H, W, 3] to its H.264 in Annex B form."""
        import av
        from av.video.frame import PictureType

        reformat: Any = self._reformat
        frame = reformat(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"), **self._yuv)
        frame.pts, frame.time_base = self._count, self._base
        frame.pict_type = PictureType.I if key else PictureType.NONE
        self._count += 1
        return b"".join(bytes(packet) for packet in self._context.encode(frame))


@dataclass(frozen=True)
class Item:
    """What waits for a viewer: a message, or bytes of video; `key` is None for what is never dropped."""

    payload: str | bytes
    key: bool | None = None
    frame: int = 0
    lost: int = 0  # fragments that this message is about


class Viewer:
    """A bounded queue between the threads that make and the event loop that sends."""

    def __init__(self, loop: asyncio.AbstractEventLoop, kind: str, limit: int, owner: str = "") -> None:
        self.kind, self.owner = kind, owner  # "mp4" or "jpeg"
        self.dropped = 0  # fragments, in all
        self.closed = False
        self._loop, self._limit = loop, limit
        self._items: deque[Item] = deque()
        self._bytes = self._lost = 0
        self._lock, self._event = threading.Lock(), asyncio.Event()

    def offer(self, item: Item) -> None:
        """Queue it, or drop it (and all video before it) if too much is waiting; never waits."""
        with self._lock:
            if self.closed:
                return
            if item.key is None:
                if len(self._items) - self._media > _TEXTS:
                    self.closed = True
                self._items.append(item)
            else:
                self._offer_video(item)
        self._wake()

    def tell(self, message: Message) -> None:
        self.offer(Item(message.model_dump_json()))

    def close(self, last: Message | None = None) -> None:
        """Nothing more will come, after `last`."""
        with self._lock:
            if last is not None and not self.closed:
                self._items.append(Item(last.model_dump_json()))
            self.closed = True
        self._wake()

    @property
    def waiting(self) -> bool:
        """Whether `next` would answer at once."""
        return bool(self._items)

    async def next(self) -> Item | None:
        """The next item; None at the end."""
        while True:
            with self._lock:
                if self._items:
                    item = self._items.popleft()
                    self._bytes -= 0 if item.key is None else len(item.payload)
                    return item
                if self.closed:
                    return None
                self._event.clear()
            await self._event.wait()

    @property
    def _media(self) -> int:
        return sum(item.key is not None for item in self._items)

    def _offer_video(self, item: Item) -> None:
        if self._bytes and self._bytes + len(item.payload) > self._limit:
            gone = self._media + (not item.key)
            told = sum(note.lost for note in self._items)  # of what went before, told once for all
            self._items = deque(kept for kept in self._items if kept.key is None and not kept.lost)
            self._bytes, self._lost, self.dropped = 0, self._lost + told + gone, self.dropped + gone
            if not item.key:
                return
        elif self._lost and not item.key:
            self._lost, self.dropped = self._lost + 1, self.dropped + 1
            return
        if self._lost:
            note = Dropped(fragments=self._lost, frame=item.frame)
            self._items.append(Item(note.model_dump_json(), lost=self._lost))
            self._lost = 0
        self._items.append(item)
        self._bytes += len(item.payload)

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)


class Channel:
    """The stream of one session: its clock, its encoder, its viewers and its recording.

    `publish` is called by one thread at a time; viewers come and go on others.
    """

    def __init__(self, width: int, height: int, fps: float, keyframe_seconds: float, frame: int = 0) -> None:
        self.width, self.height, self.fps = width, height, fps
        self.frame = frame  # next of the stream's timeline
        self.recording: Recording | None = None
        self.dropped = 0  # fragments of viewers who have left
        self._every = max(1, round(keyframe_seconds * fps))
        self._encoder: Encoder | None = None
        self._since_key = self._every
        self._group: list[Item] = []  # fragments since the last key frame, for whoever joins
        self._viewers: list[Viewer] = []
        self._lock = threading.RLock()

    @property
    def viewers(self) -> int:
        return len(self._viewers)

    @property
    def drops(self) -> int:
        return self.dropped + sum(viewer.dropped for viewer in self._viewers)

    @property
    def mime(self) -> str:
        return f'video/mp4; codecs="{self._ready().track.codec}"'

    def attach(self, viewer: Viewer, welcome: Message) -> None:
        """Let a viewer in: the welcome, the header, what there is since the last key frame, then whatever comes."""
        with self._lock:
            viewer.tell(welcome)
            if viewer.kind == "mp4":
                viewer.offer(Item(self._ready().track.header()))
                for item in self._group:
                    viewer.offer(item)
            self._viewers.append(viewer)

    def detach(self, viewer: Viewer) -> None:
        with self._lock:
            if viewer in self._viewers:
                self._viewers.remove(viewer)
                self.dropped += viewer.dropped

    def tell(self, message: Message) -> None:
        """A message to every viewer."""
        item = Item(message.model_dump_json())
        with self._lock:
            for viewer in self._viewers:
                viewer.offer(item)

    def close(self, last: Message) -> None:
        with self._lock:
            for viewer in self._viewers:
                viewer.close(last)

    def rest(self) -> None:
        """Give the encoder back; the next frame is a key frame."""
        with self._lock:
            self._encoder, self._since_key, self._group = None, self._every, []

    def record(self, recording: Recording | None) -> None:
        """Write to `recording` from the next frame on, which will be a key frame; None: no more."""
        with self._lock:
            if self.recording is not None:
                self.recording.close()
            self.recording, self._since_key = recording, self._every

    def publish(self, frames: Frames) -> None:
        """Encode the frames [T, H, W, 3] of a chunk and hand them out. A key frame opens a chunk where one is due."""
        for i, rgb in enumerate(frames):
            with self._lock:
                encoder = self._ready()
                key = self._since_key >= self._every and (i == 0 or self._since_key >= 2 * self._every)
                data, is_key = sample(encoder.encode(rgb, key))
                item = Item(encoder.track.fragment(data, is_key, self.frame), is_key, self.frame)
                self._group = [item] if is_key else [*self._group, item]
                self._since_key = 1 if is_key else self._since_key + 1
                if self.recording is not None:
                    self.recording.write(encoder.track, data, is_key)
                self._hand_out(item, rgb)
                self.frame += 1

    def _hand_out(self, item: Item, rgb: Frames) -> None:
        picture = None
        for viewer in self._viewers:
            if viewer.kind == "mp4":
                viewer.offer(item)
                continue
            picture = picture or Item(jpeg(rgb), True, item.frame)
            viewer.offer(picture)

    def _ready(self) -> Encoder:
        with self._lock:
            if self._encoder is None:
                self._encoder = Encoder(self.width, self.height, self.fps)
            return self._encoder


def jpeg(rgb: Frames) -> bytes:
    """A frame [H, W, 3] as a JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _fraction(fps: float) -> Any:
    from fractions import Fraction

    return Fraction(fps).limit_denominator(1001)
