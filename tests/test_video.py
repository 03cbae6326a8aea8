"""Video and picture files, checked by reading real ones back."""

import os
import signal
import subprocess
import sys
import time
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from longtake.errors import LongtakeError
from longtake.video import Mp4Writer, contact_sheet, read_image, read_video, save_png

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (12, 200, 90)]


def flat(colours, height=48, width=64):
    """One frame a colour, [T, H, W, 3]."""
    return np.broadcast_to(np.array(colours, np.uint8)[:, None, None], (len(colours), height, width, 3)).copy()


def noise(frames, height=64, width=96):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def in_child(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a real disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_written_video_comes_back_with_its_frames_colours_and_rate(tmp_path):
    path = tmp_path / "take.mp4"
    frames = flat(COLOURS * 3)
    with Mp4Writer(path, fps=16, height=48, width=64) as video:
        video.write(frames[:5])
        video.write(frames[5:5])
        video.write(torch.from_numpy(frames[5:]))
    assert video.frames == len(frames)
    assert os.listdir(tmp_path) == ["take.mp4"]
    back = read_video(path)
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames).max() <= 3  # limited range and 4:2:0 cost that much on flat colours
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.frames == len(frames)
        assert stream.average_rate == 16
        assert float(stream.duration * stream.time_base) == pytest.approx(len(frames) / 16)


def test_colours_are_bt709_and_say_so(tmp_path):
    path = tmp_path / "take.mp4"
    with Mp4Writer(path, fps=16, height=48, width=64, crf=1) as video:
        video.write(flat(COLOURS))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        for colour, frame in zip(COLOURS, container.decode(video=0), strict=True):
            planes = frame.to_ndarray(format="yuv420p").reshape(-1)
            y, u, v = planes[0], planes[48 * 64], planes[48 * 64 * 5 // 4]
            red, green, blue = (value / 255 for value in colour)
            luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
            expected = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748)
            assert np.abs(np.array([y, u, v], float) - expected).max() <= 2


WRITE_AMONG_GARBAGE = """
import hashlib, sys, numpy as np
from longtake.video import Mp4Writer
for height, width in [(64, 64), (64, 72), (47, 63)]:
    blocks = np.random.default_rng(1).integers(0, 256, (21, height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    frames = blocks.repeat(4, 1).repeat(4, 2)[:, :height, :width].copy()
    made = set()
    for run in range(2):
        with Mp4Writer(sys.argv[1], fps=8, height=height, width=width) as video:
            for start in range(0, 21, 5):
                chunk = frames[start : start + 5].copy()
                video.write(chunk)
                chunk.fill(run)  # the caller's memory is the caller's again
                del chunk
                [np.full(size * 997, run, np.uint8) for size in range(1, 60, 7)]
        made.add(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
    print(height, width, *made)
"""


def test_equal_frames_make_equal_files_whatever_memory_held_before(tmp_path):
    """Fresh memory holds another byte in each child (glibc; elsewhere what it happens to hold)."""
    outputs = []
    for filler in (1, 85, 255):
        environment = {**os.environ, "MALLOC_PERTURB_": str(filler)}
        command = [sys.executable, "-c", WRITE_AMONG_GARBAGE, str(tmp_path / "take.mp4")]
        outputs.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert [len(line.split()) for line in outputs[0].splitlines()] == [3] * 3  # one file a size in both runs


@pytest.mark.parametrize("fps", [8, 12.5, 23.976, Fraction(30000, 1001)])
def test_frame_rate_is_kept(tmp_path, fps):
    path = tmp_path / "take.mp4"
    with Mp4Writer(path, fps=fps, height=16, width=16) as video:
        video.write(flat(COLOURS, 16, 16))
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(float(fps), rel=1e-5)
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([i / float(fps) for i in range(len(COLOURS))], abs=1e-3)


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (3, 5), (1, 1)])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path, height, width):
    frames = flat([(90, 90, 90)] * 4, height, width)
    frames[:, -1] = frames[:, :, -1] = 200
    with Mp4Writer(tmp_path / "odd.mp4", fps=16, height=height, width=width, crf=1) as video:
        video.write(frames)
    back = read_video(tmp_path / "odd.mp4")
    assert back.shape == (4, height + height % 2, width + width % 2, 3)
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert np.abs(back.astype(int) - padded).max() <= 4


def test_writing_replaces_an_older_file_only_on_close(tmp_path):
    path = tmp_path / "take.mp4"
    path.write_bytes(b"older")
    with Mp4Writer(path, fps=16, height=48, width=64) as video:
        video.write(flat(COLOURS))
        assert path.read_bytes() == b"older"
    assert len(read_video(path)) == len(COLOURS)
    assert os.listdir(tmp_path) == ["take.mp4"]


def test_interrupted_video_is_finished_and_playable(tmp_path):
    path = tmp_path / "take.mp4"
    with pytest.raises(KeyboardInterrupt), Mp4Writer(path, fps=16, height=48, width=64) as video:
        video.write(flat(COLOURS))
        raise KeyboardInterrupt
    assert np.abs(read_video(path).astype(int) - flat(COLOURS)).max() <= 3
    assert os.listdir(tmp_path) == ["take.mp4"]


WRITE_UNTIL_INTERRUPTED = """
import signal, sys, numpy as np
from longtake.video import Mp4Writer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with Ctrl-C ignored
levels = (np.arange(60) * 3 + 40).astype(np.uint8)
try:
    with Mp4Writer(sys.argv[1], fps=16, height=64, width=96) as video:
        for written in range(10_000):
            video.write(np.broadcast_to(levels[:, None, None, None], (60, 64, 96, 3)))
            if written == 0:
                print("writing", flush=True)
except KeyboardInterrupt:
    print(video.frames, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("delay", [0.0, 0.013, 0.2])  # seconds; wherever the signal falls, no frame is torn or lost
def test_ctrl_c_at_any_moment_leaves_every_frame_written_so_far(tmp_path, delay):
    path = tmp_path / "take.mp4"
    child = in_child(WRITE_UNTIL_INTERRUPTED, path)
    assert child.stdout.readline() == "writing\n", child.communicate(timeout=60)[1]
    time.sleep(delay)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    back = read_video(path)
    assert len(back) == int(out) > 0
    expected = (np.arange(len(back)) % 60) * 3 + 40
    assert np.abs(back.mean(axis=(1, 2, 3)) - expected).max() <= 3
    assert os.listdir(tmp_path) == ["take.mp4"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_impatient_second_ctrl_c_does_not_cost_the_file(tmp_path):
    path = tmp_path / "take.mp4"
    child = in_child(WRITE_UNTIL_INTERRUPTED, path)
    assert child.stdout.readline() == "writing\n", child.communicate(timeout=60)[1]
    for _ in range(2):
        child.send_signal(signal.SIGINT)
        time.sleep(0.002)
    child.communicate(timeout=60)
    assert len(read_video(path)) >= 60
    assert os.listdir(tmp_path) == ["take.mp4"]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, LongtakeError])
def test_any_other_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), Mp4Writer(tmp_path / "take.mp4", fps=16, height=48, width=64) as video:
        video.write(flat(COLOURS))
        raise error("stop")
    assert os.listdir(tmp_path) == []
    with pytest.raises(LongtakeError, match="closed"):
        video.write(flat(COLOURS))


def test_writer_that_nobody_closes_leaves_nothing(tmp_path):
    video = Mp4Writer(tmp_path / "take.mp4", fps=16, height=48, width=64)
    video.write(flat(COLOURS))
    assert len(os.listdir(tmp_path)) == 1
    del video
    assert os.listdir(tmp_path) == []


def test_video_without_frames_is_an_error_and_no_file(tmp_path):
    with pytest.raises(LongtakeError, match="no frames"), Mp4Writer(tmp_path / "a.mp4", fps=16, height=48, width=64):
        pass
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "b.mp4", fps=16, height=48, width=64):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_closing_twice_is_harmless(tmp_path):
    video = Mp4Writer(tmp_path / "take.mp4", fps=16, height=48, width=64)
    video.write(flat(COLOURS))
    video.close()
    video.close()
    video.discard()
    assert len(read_video(tmp_path / "take.mp4")) == len(COLOURS)


@pytest.mark.parametrize("wrong", [flat(COLOURS)[:, :, :-1], flat(COLOURS)[0], flat(COLOURS) / 255.0])
def test_frames_of_another_kind_are_refused_in_one_line(tmp_path, wrong):
    with (
        pytest.raises(LongtakeError, match=r"takes uint8 \[T, 48, 64, 3\]") as caught,
        Mp4Writer(tmp_path / "take.mp4", fps=16, height=48, width=64) as video,
    ):
        video.write(wrong)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"codec": "nope"}, "libx264"),
        ({"codec": "aac"}, "libx264"),
        ({"preset": "instant"}, "preset instant"),
        ({"height": 40000, "width": 40000}, "40000x40000"),
        ({"height": 0}, "at least 1 pixel"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
    ],
)
def test_settings_the_encoder_refuses_fail_at_once_and_leave_nothing(tmp_path, settings, says):
    with pytest.raises(LongtakeError, match=says) as caught:
        Mp4Writer(tmp_path / "take.mp4", **({"fps": 16, "height": 48, "width": 64} | settings))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def bad_paths(folder):
    (folder / "file").write_bytes(b"")
    os.mkfifo(folder / "pipe")
    return {
        "a folder": folder,
        "there is no folder": folder / "missing" / "x",
        "Not a directory": folder / "file" / "x",
        "too long": folder / ("x" * 300),
        "null byte": folder / "a\0b",
        "not a regular file": folder / "pipe",
    }


@pytest.mark.skipif(os.name != "posix", reason="messages and pipes of POSIX")
def test_paths_that_cannot_be_written_fail_before_the_first_frame(tmp_path):
    for says, path in bad_paths(tmp_path).items():
        for write in (lambda: Mp4Writer(path, 16, 48, 64), lambda: save_png(path, flat(COLOURS)[0])):  # noqa: B023
            with pytest.raises(LongtakeError, match=says) as caught:
                write()
            assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_unwritable_folder_is_one_clear_line(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for write in (lambda p: Mp4Writer(p, 16, 48, 64), lambda p: save_png(p, flat(COLOURS)[0])):
        with pytest.raises(LongtakeError, match=r"cannot write into folder .*Read-only"):
            write(small_disk / "take.mp4")


def test_full_disk_is_one_clear_line_and_leaves_nothing(small_disk):
    with (
        pytest.raises(LongtakeError, match=r"cannot write .*take\.mp4: No space left on device$") as caught,
        Mp4Writer(small_disk / "take.mp4", fps=16, height=64, width=96) as video,
    ):
        for _ in range(50):
            video.write(noise(4))
    assert "\n" not in str(caught.value)
    assert 0 < video.frames < 200  # it failed while writing, not at the end
    with pytest.raises(LongtakeError, match="No space left on device"):
        save_png(small_disk / "a.png", noise(1, 400, 400)[0])
    assert os.listdir(small_disk) == []


def test_disk_that_fills_up_only_at_close_leaves_nothing(small_disk):
    video = Mp4Writer(small_disk / "take.mp4", fps=16, height=160, width=256)
    video.write(noise(4, 160, 256))  # all of it waits in the encoder until close
    with pytest.raises(LongtakeError, match="No space left on device"):
        video.close()
    assert os.listdir(small_disk) == []


WRITE_BEYOND_LIMIT = """
import os, resource, sys, numpy as np
from longtake.errors import LongtakeError
from longtake.video import Mp4Writer, save_png
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
rng = np.random.default_rng(0)
try:
    with Mp4Writer(sys.argv[1] + "/take.mp4", fps=16, height=128, width=192) as video:
        for _ in range(int(sys.argv[3])):
            video.write(rng.integers(0, 256, (1, 128, 192, 3), dtype=np.uint8))
except LongtakeError as error:
    print(error)
try:
    save_png(sys.argv[1] + "/a.png", rng.integers(0, 256, (400, 400, 3), dtype=np.uint8))
except LongtakeError as error:
    print(error)
print(os.listdir(sys.argv[1]))
"""


@pytest.mark.skipif(os.name != "posix", reason="resource limits")
@pytest.mark.parametrize(("limit", "frames"), [(4096, 2), (40_000, 60), (400, 1)])
def test_file_size_limit_is_one_clear_line_and_leaves_nothing(tmp_path, limit, frames):
    out, err = in_child(WRITE_BEYOND_LIMIT, tmp_path, limit, frames).communicate(timeout=120)
    lines = out.splitlines()
    assert len(lines) == 3, err
    assert lines[0] == f"cannot write {tmp_path}/take.mp4: File too large"
    assert lines[1] == f"cannot write {tmp_path}/a.png: File too large"
    assert lines[2] == "[]"


def test_what_is_no_video_is_refused(tmp_path):
    whole = tmp_path / "whole.mp4"
    with Mp4Writer(whole, fps=16, height=64, width=96) as video:
        video.write(noise(8))
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:-1500])
    for name in ("text.mp4", "empty.mp4", "cut.mp4", "missing.mp4", ".", "http://localhost/a.mp4"):
        path = name if "://" in name else tmp_path / name
        with pytest.raises(LongtakeError) as caught:
            read_video(path)
        assert "\n" not in str(caught.value)


def test_png_comes_back_exactly_and_covers_are_cropped_in_the_middle(tmp_path):
    picture = noise(1, 40, 60)[0]
    save_png(tmp_path / "a.png", picture)
    assert os.listdir(tmp_path) == ["a.png"]
    assert np.array_equal(read_image(tmp_path / "a.png"), picture)

    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, :20], stripes[:, 20:40], stripes[:, 40:] = COLOURS[0], COLOURS[1], COLOURS[2]
    save_png(tmp_path / "wide.png", torch.from_numpy(stripes))
    square = read_image(tmp_path / "wide.png", size=(20, 20))
    assert square.shape == (20, 20, 3) and (square == COLOURS[1]).all()
    assert read_image(tmp_path / "wide.png", size=(31, 17)).shape == (31, 17, 3)


def test_pictures_are_upright_opaque_and_8_bit(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: shown turned by 90 degrees
    Image.fromarray(flat([COLOURS[0]], 10, 30)[0]).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (30, 10, 3)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png") == 0x80).all()


def test_damaged_and_missing_pictures_are_one_clear_line(tmp_path):
    save_png(tmp_path / "a.png", noise(1)[0])
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png", "missing.png", "."):
        with pytest.raises(LongtakeError, match="cannot read image") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    for position in range(8, len(whole), len(whole) // 40):  # wherever it is damaged: pixels or that one error
        (tmp_path / "bad.png").write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            assert read_image(tmp_path / "bad.png").dtype == np.uint8
        except LongtakeError as error:
            assert "\n" not in str(error)
    with pytest.raises(LongtakeError, match=r"\(height, width\)"):
        read_image(tmp_path / "a.png", size=(0, 10))


@pytest.mark.parametrize("side", [8300, 12000, 20000])  # below, between and above Pillow's own two limits
def test_decompression_bombs_are_refused_unopened_and_without_warnings(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with warnings.catch_warnings(), pytest.raises(LongtakeError, match="too large"):
        warnings.simplefilter("error")
        read_image(tmp_path / "bomb.png")


def test_wrong_arrays_are_no_png(tmp_path):
    for wrong in (noise(2), noise(1)[0] / 255.0, noise(1)[0][..., :2], noise(1)[0][:0]):
        with pytest.raises(LongtakeError, match=r"uint8 \[H, W, 3\]"):
            save_png(tmp_path / "a.png", wrong)
    assert os.listdir(tmp_path) == []


def pixels_of(picture, colour):
    return (np.abs(picture.astype(int) - colour).max(axis=-1) <= 1).sum()


def test_contact_sheet_shows_the_same_moments_under_one_another():
    colours = [COLOURS[i] for i in (0, 1, 2, 5, 6)]
    long, short = flat(colours, 40, 80), flat(colours[:2], 40, 80)
    sheet = contact_sheet([("policy one", long), ("policy two", short)], columns=5, fps=16)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    for i, colour in enumerate(colours):
        column = sheet[:, 4 + i * 84 : 4 + i * 84 + 80]  # gap, cell, gap
        assert pixels_of(column[:, 40], colour) == (80 if i < 2 else 40)  # only two moments exist in the short video
        rows = np.flatnonzero((column[:, 40] == colour).all(axis=-1))
        assert rows[0] == 20 and (i >= 2 or rows[-1] - rows[0] == 20 + 4 + 40 + 40 - 1)
    labels, times = sheet[:20], sheet[-20:]
    assert pixels_of(labels, (0, 0, 0)) > 20 and pixels_of(times, (0, 0, 0)) > 20
    numbered = contact_sheet([("policy one", long), ("policy two", short)], columns=5)
    assert np.array_equal(numbered[:-20], sheet[:-20]) and not np.array_equal(numbered[-20:], times)


def test_contact_sheet_scales_cells_and_spreads_moments_over_the_longest_video():
    video = flat([(0, 0, i) for i in range(100)], 40, 80)
    picture = contact_sheet([("a", video)], columns=3, scale=0.5)
    row = picture[20 + 10]  # the middle of the cells, below the label
    shown = sorted({int(b) for r, g, b in row if (r, g) == (0, 0)})
    assert shown == [0, 50, 99]
    assert ((row[:, :2] == 0).all(axis=-1)).sum() == 3 * 40
    assert contact_sheet([("a", video[:2])], columns=9).shape == contact_sheet([("a", video[:2])], columns=2).shape


def test_contact_sheet_widens_for_a_label_and_shortens_an_endless_one():
    video = flat(COLOURS[:1], 16, 16)
    narrow, wide, endless = (
        contact_sheet([(label, video)], columns=1) for label in ("a", "PackForcing, 16 blocks", "word " * 500)
    )
    assert narrow.shape[1] < wide.shape[1] < endless.shape[1] < 700
    assert pixels_of(endless[:20], (0, 0, 0)) > 100 and not pixels_of(endless[:20, -4:], (0, 0, 0))


@pytest.mark.parametrize(
    "arguments",
    [
        {"rows": []},
        {"rows": [("a", flat(COLOURS))], "columns": 0},
        {"rows": [("a", flat(COLOURS))], "scale": 0},
        {"rows": [("a", flat(COLOURS))], "fps": -1},
        {"rows": [("a", flat(COLOURS)[0])]},
        {"rows": [("a", flat(COLOURS)[:0])]},
    ],
)
def test_contact_sheet_of_nothing_is_refused(arguments):
    with pytest.raises(LongtakeError):
        contact_sheet(**arguments)


def test_importing_the_module_does_not_import_av():
    out, err = in_child("import sys, longtake.video; print('av' in sys.modules)").communicate(timeout=60)
    assert out == "False\n", err
