"""Frames in and out of files: MP4 through PyAV, pictures through Pillow; a file appears only when it is complete."""

from __future__ import annotations

import bisect
import contextlib
import math
import os
import secrets
import stat
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from longtake.errors import LongtakeError

Frames = NDArray[np.uint8]

# x264's macroblock tree reads memory that nobody wrote where the processor has AVX-512 (seen in PyAV 18.1), so that
# equal frames became files that decode differently, up to two in three for noisy frames of 64x64. Without it a take of
# tiny-wan keeps size and PSNR at a crf four higher.
_LIBX264 = {"mbtree": "0"}
_BT709 = 1  # code point of matrix, primaries and transfer curve in ITU-T H.273, which the file's tags use
# 8192 x 8192: above any video frame, below what fills a small machine's memory (200 MB as RGB).
_MAX_IMAGE_PIXELS = 1 << 26


class Mp4Writer:
    """Encodes frames to an MP4 file as they come, so that a take of any length is written in bounded memory.

    ```
    with Mp4Writer("take.mp4", fps=16, height=480, width=832) as video:
        for chunk in take:
            video.write(chunk.frames)
    ```
    Until it is closed the video is a hidden file in the same folder; `close` renames it to `path`. Leaving the `with`
    block by Ctrl-C closes it too (a playable file); by any other exception removes it. Colours are BT.709, limited
    range, and tagged so. Odd heights and widths are padded to the next even number by repeating the last row or column,
    which yuv420p needs.

    path: the file, replaced if it exists. fps: frames per second. height, width: pixels. codec: any video encoder of
    FFmpeg that takes yuv420p. crf, preset: quality and speed, handed to the encoder as they are; None leaves its own.
    With libx264, equal frames make equal files on one machine.
    Raises LongtakeError, here or while writing: bad path or argument, full disk. Nothing is left behind then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float | Fraction,
        height: int,
        width: int,
        *,
        codec: str = "libx264",
        crf: int | None = 20,
        preset: str | None = "veryfast",
    ):
        if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
            raise LongtakeError(f"fps is {fps}; give frames per second from 0.01 to 1000")
        if height < 1 or width < 1:
            raise LongtakeError(f"video size is {height}x{width}; height and width must be at least 1 pixel")
        self.path = Path(path)
        self.frames = 0  # frames written so far
        self._size = (height, width)
        self._closed = False
        self._error: LongtakeError | None = None
        self._file = _PendingFile(self.path)
        self._opened: list[Any] = []
        weakref.finalize(self, _drop, self._opened, self._file)  # a writer that nobody closed leaves no fragment behind
        # PyAV's objects; its types do not tell a video stream from others.
        self._container: Any
        self._stream: Any
        self._reformat: Callable[..., Any]
        # FFmpeg runs on a thread of its own because Ctrl-C is raised on the main one: it must not fall between an
        # encoded packet and its place in the file, or inside PyAV's write callback, which would swallow it.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mp4")
        options = {"crf": crf, "preset": preset}
        try:
            self._call(self._open, Fraction(fps).limit_denominator(1001), codec, options)
        except BaseException:
            self.discard()
            raise

    def write(self, frames: Any) -> None:
        """Append RGB frames, uint8 [T, H, W, 3], array or tensor. Raises LongtakeError for others, or a full disk."""
        if self._closed:
            raise LongtakeError(f"{self.path} is closed; open a new Mp4Writer to write more frames")
        array = _as_array(frames)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (*self._size, 3):
            raise LongtakeError(
                f"frames are {array.dtype} {array.shape}; "
                f"this video takes uint8 [T, {self._size[0]}, {self._size[1]}, 3]"
            )
        self._call(self._encode, array)

    def close(self) -> None:
        """Finish the file and give it its name; again, it does nothing. Raises LongtakeError if there are no frames."""
        if not self._closed:
            self._closed = True
            self._call(self._finish, True)
            self._thread.shutdown()

    def discard(self) -> None:
        """Remove what has been written; after this the writer is closed."""
        if not self._closed:
            self._closed = True
            # Behind an encode that Ctrl-C may have left running.
            self._thread.submit(_drop, self._opened, self._file).result()
            self._thread.shutdown()

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt) and not self._closed:
            # One job for all of it: a second Ctrl-C while waiting here cannot stop it half-way.
            self._closed = True
            self._call(self._finish, False)
            self._thread.shutdown()
        elif kind is None:
            self.close()
        else:
            self.discard()

    def _call(self, work: Callable[..., None], *args: Any) -> None:
        """Run `work` on FFmpeg's thread and wait; Ctrl-C ends the waiting, not the work."""
        self._thread.submit(self._guarded, work, *args).result()

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        """Any failure removes the file; a failure of the system becomes one clear line, said again by later calls."""
        import av

        if self._error is not None:
            raise self._error
        try:
            work(*args)
        except BaseException as error:
            _drop(self._opened, self._file)
            if isinstance(error, LongtakeError):
                self._error = error
                raise
            self._error = LongtakeError(f"cannot write {self.path}: {_reason(error)}")
            if isinstance(error, (OSError, av.FFmpegError)):
                raise self._error from error
            raise

    def _open(self, fps: Fraction, codec: str, options: dict[str, Any]) -> None:
        import av
        from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

        # A buffered file, because a bare one may take half a block on a full disk and call that a success.
        self._container = av.open(self._file.file, "w", format="mp4")
        self._opened.append(self._container)
        given = {key: str(value) for key, value in options.items() if value is not None}
        fixed = _LIBX264 if codec == "libx264" else {}
        try:
            if av.Codec(codec, "w").type != "video":
                raise ValueError(f"{codec} encodes no video")
            self._stream = self._container.add_stream(codec, rate=fps, options={**given, **fixed})
        except (ValueError, av.FFmpegError) as error:
            raise LongtakeError(
                f"codec {codec!r} is no MP4 video encoder of this PyAV build; use libx264, libx265, libsvtav1 or mpeg4"
            ) from error
        context = self._stream.codec_context
        height, width = (side + side % 2 for side in self._size)
        context.width, context.height, context.pix_fmt, context.time_base = width, height, "yuv420p", 1 / fps
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        self._reformat = VideoReformatter().reformat
        self._yuv = {"format": "yuv420p", "dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
        try:
            self._container.start_encoding()  # opens the encoder, which otherwise says no at the first frame
        except av.FFmpegError as error:
            settings = ", ".join(f"{key} {value}" for key, value in given.items())
            raise LongtakeError(
                f"encoder {codec} refuses {height}x{width} yuv420p at {fps} fps with {settings}: {_reason(error)}; "
                "change the size, crf, preset or codec"
            ) from error

    def _encode(self, frames: Frames) -> None:
        import av

        height, width = self._size
        if height % 2 or width % 2:
            frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for rgb in frames:
            frame = self._reformat(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"), **self._yuv)
            frame.pts, frame.time_base = self.frames, self._stream.codec_context.time_base
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def _finish(self, frames_expected: bool) -> None:
        if self.frames == 0:
            if not frames_expected:
                return _drop(self._opened, self._file)
            raise LongtakeError(f"no frames were written to {self.path}, so no file was made; write at least one")
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._file.commit()


def read_video(path: str | os.PathLike[str]) -> Frames:
    """All frames of a video file, uint8 [T, H, W, 3] RGB. Raises LongtakeError if it is missing, damaged, no video."""
    import av
    from av.video.reformatter import Colorspace, VideoReformatter

    reformat: Callable[..., Any] = VideoReformatter().reformat
    frames: list[Frames] = []
    try:
        # An open file, not its name: FFmpeg takes some names for network addresses.
        with open(path, "rb") as file, av.open(file, "r") as container:
            if not container.streams.video:
                raise LongtakeError(f"{os.fspath(path)} holds no video stream; give a video file such as an MP4")
            for frame in container.decode(video=0):
                height, width = frames[0].shape[:2] if frames else (frame.height, frame.width)
                # Named, because older PyAV (15) heeds the frame's tag only where source and target differ.
                matrix = Colorspace.ITU709 if frame.colorspace == _BT709 else None
                rgb = reformat(frame, width, height, "rgb24", src_colorspace=matrix, dst_colorspace=Colorspace.ITU601)
                frames.append(rgb.to_ndarray())
    except (OSError, ValueError, av.FFmpegError) as error:
        if isinstance(error, LongtakeError):
            raise
        raise LongtakeError(f"cannot read video {os.fspath(path)}: {_reason(error)}") from error
    if not frames:
        raise LongtakeError(f"{os.fspath(path)} holds no frames; was its writing cut short?")
    return np.stack(frames)


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Frames:
    """A picture as uint8 [H, W, 3] RGB, upright as its camera says; transparent parts become white.

    size: (height, width) to scale it to: the picture covers it, what hangs over is cropped equally on both sides.
    Raises LongtakeError if the file is missing, no picture, damaged, or larger than 67 megapixels.
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise LongtakeError(f"image size is {size}; give (height, width) in pixels, each at least 1")
    name = os.fspath(path)
    try:
        with warnings.catch_warnings():
            # Pillow would warn on stderr about a size that is refused two lines below anyway.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(path)  # reads the header only
        with image:
            if image.width * image.height > _MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            image = _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise LongtakeError(
            f"image {name} is too large ({_reason(error)}); at most {_MAX_IMAGE_PIXELS} pixels are read: scale it down"
        ) from error
    except Exception as error:  # Pillow's decoders raise a dozen types for a damaged file, SyntaxError among them
        raise LongtakeError(f"cannot read image {name}: {_reason(error)}; give a PNG, JPEG or WebP file") from error
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.LANCZOS)
    return np.array(image)


def save_png(path: str | os.PathLike[str], array: Any) -> None:
    """Write uint8 [H, W, 3] as a PNG, whole or not at all. Raises LongtakeError for another array or a failing disk."""
    pixels = _as_array(array)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise LongtakeError(f"image is {pixels.dtype} {pixels.shape}; a PNG is saved from uint8 [H, W, 3]")
    pending = _PendingFile(Path(path))
    try:
        Image.fromarray(pixels).save(pending.file, "PNG")
        pending.commit()
    except BaseException as error:
        pending.discard()
        if isinstance(error, OSError):
            raise LongtakeError(f"cannot write {os.fspath(path)}: {_reason(error)}") from error
        raise


def contact_sheet(
    rows: Sequence[tuple[str, Any]], columns: int = 6, scale: float = 1.0, *, fps: float | None = None
) -> Frames:
    """One picture that compares videos: a labelled row each, the same moments under one another.

    rows: (label, frames uint8 [T, H, W, 3]); a video shorter than the longest leaves its last cells empty. Labels are
    drawn in Pillow's own font, which shows letters beyond ASCII as boxes.
    columns: moments shown, spread evenly over the longest video. scale: size of a cell relative to the frame.
    fps: labels the columns in seconds; without it they say the frame's number. Returns uint8 [H, W, 3].
    Raises LongtakeError if there is nothing to show or an array has another shape.
    """
    if not rows or columns < 1 or not scale > 0 or (fps is not None and not fps > 0):
        raise LongtakeError(
            f"contact sheet of {len(rows)} rows, {columns} columns, scale {scale}, fps {fps}; "
            "give at least one row and one column, scale and fps above 0"
        )
    videos = [(" ".join(label.split()), _as_array(frames)) for label, frames in rows]
    for label, video in videos:
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape:
            raise LongtakeError(f"row {label!r} is {video.dtype} {video.shape}; give uint8 [T, H, W, 3]")

    longest = max(len(video) for _, video in videos)
    moments = np.linspace(0, longest - 1, min(columns, longest)).round().astype(int).tolist()
    times = [f"{moment / fps:.2f} s" if fps else f"frame {moment}" for moment in moments]
    sizes = [tuple(max(1, round(side * scale)) for side in video.shape[1:3]) for _, video in videos]  # (h, w) of a cell

    font, line, gap = ImageFont.load_default(size=14), 20, 4  # pixels
    column = max(*(width for _, width in sizes), *(math.ceil(font.getlength(time)) for time in times)) + gap
    # Labels widen a narrow sheet, within reason; what is longer still ends in dots.
    width = max(column * len(moments), min(640, max(math.ceil(font.getlength(label)) for label, _ in videos))) + gap
    height = sum(cell_height + line + gap for cell_height, _ in sizes) + line
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (label, video), (cell_height, cell_width) in zip(videos, sizes, strict=True):
        draw.text((gap, top + 2), _shortened(label, font, width - 2 * gap), fill="black", font=font)
        top += line
        for i, moment in enumerate(moments):
            if moment < len(video):
                cell = Image.fromarray(video[moment]).resize((cell_width, cell_height), Image.Resampling.LANCZOS)
                sheet.paste(cell, (gap + i * column, top))
        top += cell_height + gap
    for i, time in enumerate(times):
        draw.text((gap + i * column, top), time, fill="black", font=font)
    return np.array(sheet)


class _PendingFile:
    """A file that gets its name only when it is complete; until then it is a hidden one in the same folder."""

    def __init__(self, path: Path):
        self._path = path
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise LongtakeError(f"cannot write {path}: there is no folder {path.parent}; create it first") from None
        except (OSError, ValueError) as error:  # a name too long, a file where a folder should be, a NUL byte
            raise LongtakeError(f"cannot write {str(path)!r}: {_reason(error)}; give another path") from error
        else:
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
                raise LongtakeError(f"cannot write {path}: it is {kind}; give the name of a file")
            if not os.access(path, os.W_OK):
                raise LongtakeError(f"cannot write {path}: it is write-protected; give another name")
        self._hidden = path.with_name(f".longtake-{secrets.token_hex(6)}.part")
        try:
            self.file = open(self._hidden, "xb")  # noqa: SIM115 - closed by commit or discard
        except OSError as error:
            raise LongtakeError(f"cannot write into folder {path.parent}: {_reason(error)}") from error

    def commit(self) -> None:
        """Give the file its name. Raises OSError: some disks report that they are full only at one of these calls."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self._hidden, self._path)

    def discard(self) -> None:
        """Remove the file if it has not got its name yet."""
        with contextlib.suppress(OSError):  # a full disk fails the last flush too, but the descriptor is closed
            self.file.close()
        with contextlib.suppress(OSError):
            self._hidden.unlink(missing_ok=True)


def _drop(opened: list[Any], file: _PendingFile) -> None:
    """Close the containers, then remove the file: the other way round, older PyAV (15) crashes on collection."""
    for container in opened:
        with contextlib.suppress(Exception):  # its last words on a full disk
            container.close()
    file.discard()


def _as_array(frames: Any) -> NDArray[Any]:
    """An array of what may be a tensor on any device."""
    return np.asarray(frames.detach().cpu() if hasattr(frames, "detach") else frames)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _shortened(text: str, font: Any, width: float) -> str:
    """`text`, or as much of it as fits into `width` pixels together with dots."""
    if font.getlength(text) <= width:
        return text
    kept = bisect.bisect_right(range(len(text)), width, key=lambda n: font.getlength(f"{text[:n]}...")) - 1
    return f"{text[: max(0, kept)]}..."


def _reason(error: BaseException) -> str:
    """What the system or FFmpeg said, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
