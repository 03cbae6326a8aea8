"""The command line makes what the library makes, finishes its files whatever ends a take, and says what is wrong in one
line with exit code 2."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import longtake
import longtake.session
from longtake.cli import app
from longtake.commands import shell
from longtake.hosts.wan import CausalWan
from longtake.video import Mp4Writer, read_image, read_video
from tests.tiny_checkpoints import tiny_transformer, upstream_state, write_base

PROMPT = "red kite"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def write_model(folder: Path, **settings) -> Path:
    """A complete causal model folder of random weights: 32 x 16 pixels, two steps, trained on six latent frames."""
    from diffusers import AutoencoderKLWan

    write_base(folder)
    torch.manual_seed(3)
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics).save_pretrained(
        folder / "vae"
    )
    description = {
        "format": 1, "host": "wan", "causal": True, "chunk_frames": 2, "timesteps": [1000, 500], "height": 16,
        "width": 32, "fps": 8, "text_tokens": 5, "training_frames": 6, "prompts": ["red", "kite <b>&", PROMPT],
    }  # fmt: skip
    (folder / "longtake.json").write_text(json.dumps(description | settings))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def host(model) -> CausalWan:
    return longtake.load(model, device="cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def generate(model: Path, *arguments: object, prompt: str = PROMPT):
    return run("generate", prompt, "--model", model, "--device", "cpu", "-o", "a.mp4", *arguments)


def report(result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def beside_progress(stderr: str) -> list[str]:
    """The lines that do not only tell what is being done."""
    return [line for line in stderr.splitlines() if not line.startswith(("loading ", "making "))]


def refused(result, *words: str) -> None:
    """One line on stderr, after what was being done, that holds `words`; nothing on stdout; exit code 2."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    lines = beside_progress(result.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


def in_process(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "longtake", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options
    )


# --- what it makes --------------------------------------------------------------------------------------------------


def test_help_needs_no_torch_and_answers_at_once():
    heavy = {"torch", "diffusers", "transformers", "numpy", "rich", "av", "PIL", "safetensors"}
    probe = f"import sys, longtake.cli; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "[]\n"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out, err = in_process("--help").communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # other load does not count
    for command in ("generate", "demo", "convert", "models", "policies", "bench", "train"):
        assert command in out
    assert err == ""


def test_the_embedded_model_needs_a_prompt_and_a_name_only(folder):
    out, err = in_process("generate", "a red ball", "-o", "a.mp4", "--chunks", 2, "--json", cwd=folder).communicate()
    made = json.loads(out)
    assert beside_progress(err) == []  # no chatter of the libraries that read the weights
    video = read_video("a.mp4")
    assert made["model"] == "tiny-shapes" and made["chunks"] == 2 and made["device"] in ("cpu", "cuda")
    assert video.shape == (made["frames"], made["height"], made["width"], 3)
    assert made["video_seconds"] == pytest.approx(made["frames"] / made["fps"])
    assert made["realtime_factor"] == pytest.approx(made["video_seconds"] / made["wall_seconds"])
    assert made["chunks_per_second"] == pytest.approx(2 / made["wall_seconds"])
    assert made["memory"]["total"] == sum(v for k, v in made["memory"].items() if k != "total")
    assert 1e8 < made["peak_rss_bytes"] < 1e11
    assert os.listdir(folder) == ["a.mp4"]


@pytest.fixture
def written(monkeypatch) -> list[torch.Tensor]:
    """Frames as they are handed to the encoder, which rounds them."""
    frames: list[torch.Tensor] = []
    write = Mp4Writer.write

    def recording(self, given):
        frames.append(torch.as_tensor(given).clone())
        write(self, given)

    monkeypatch.setattr(Mp4Writer, "write", recording)
    return frames


def test_same_latents_and_frames_as_the_library(model, host, folder, written):
    made = report(generate(model, "--chunks", 3, "--seed", 5, "--latents", "a.safetensors", "--json"))
    take = longtake.generate(host, chunks=3, prompt=PROMPT, seed=5)
    chunks = list(take)
    latents = torch.cat([c.latents for c in chunks], 1).transpose(0, 1)  # frame-major, as the file has them
    assert torch.equal(load_file("a.safetensors")["latents"], latents)
    assert torch.equal(torch.cat(written), torch.cat([c.frames for c in chunks]))
    assert made["frames"] == len(read_video("a.mp4")) == 21
    assert made["memory"] == take.memory()
    assert sorted(os.listdir(folder)) == ["a.mp4", "a.safetensors"]


def latents_of(model: Path, *arguments: object, prompt: str = PROMPT) -> torch.Tensor:
    report(generate(model, "--latents", "l.safetensors", "--json", *arguments, prompt=prompt))
    return load_file("l.safetensors")["latents"].transpose(0, 1)


def test_every_option_of_a_take_reaches_the_session(model, host, folder):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("first.png")
    cases = {
        ("--size", "48x32"): {"width": 48, "height": 32},
        ("--steps", 3): {"num_inference_steps": 3},
        ("--guidance", 3, "--negative", "kite"): {"guidance_scale": 3.0, "negative_prompt": "kite"},
        ("--policy", "window:frames=4,sink=0"): {"policy": longtake.SlidingWindow(4, 0)},
        ("--policy", "window:frames=6,sink=2,positions=slots"): {"policy": longtake.SlidingWindow(6, 2, "slots")},
        ("--policy", "full", "--residency", "scratch"): {"policy": longtake.FullHistory(), "residency": "scratch"},
        ("--image", "first.png"): {
            "image": torch.from_numpy(read_image("first.png", (16, 32))).permute(2, 0, 1) / 127.5 - 1
        },
    }
    plain = latents_of(model, "--chunks", 4)
    for arguments, options in cases.items():
        expected = torch.cat([c.latents for c in longtake.generate(host, chunks=4, prompt=PROMPT, **options)], 1)
        made = latents_of(model, "--chunks", 4, *arguments)
        assert torch.equal(made, expected), arguments
        assert made.shape != plain.shape or not torch.equal(made, plain), arguments  # the option does something


def test_seconds_are_rounded_up_to_whole_chunks(model, folder):
    for seconds, chunks in ((0.1, 1), (0.6, 1), (0.7, 2), (1.6, 2)):  # they end after 5, 13, 21 … frames of 8 a second
        assert report(generate(model, "--seconds", seconds, "--json"))["chunks"] == chunks


def test_a_prompt_switch_acts_at_the_first_chunk_that_starts_at_its_second_or_later(model, host, folder):
    take = longtake.Session(host, prompt=PROMPT)
    expected = [next(take), next(take)]  # the third chunk starts after 13 frames, at 1.625 s
    take.prompt = "kite: red"
    expected += [next(take), next(take)]
    made = latents_of(model, "--chunks", 4, "--prompt-switch", "1.0:kite: red")
    assert torch.equal(made, torch.cat([c.latents for c in expected], 1))


def test_what_becomes_of_the_text_encoder_changes_no_frame_and_every_prompt_is_still_obeyed(model, folder):
    switched = ("--chunks", 4, "--prompt-switch", "1.0:kite: red", "--snapshot", "s.safetensors")
    takes = [latents_of(model, *switched, "--text-encoder", fate) for fate in ("offload", "keep", "free")]
    assert torch.equal(takes[0], takes[1]) and torch.equal(takes[0], takes[2])
    assert not torch.equal(takes[0], latents_of(model, "--chunks", 4))
    resumed = ("--resume", "s.safetensors", "--chunks", 2, "--text-encoder")
    kept, freed = (latents_of(model, *resumed, fate, prompt="red") for fate in ("keep", "free"))
    assert torch.equal(kept, freed)
    made = report(generate(model, *switched, "--text-encoder", "free", "--json"))
    assert made["prompt"] == "kite: red"  # the one in force at the end, though the session knows its numbers only


def test_an_embedded_model_runs_on_one_thread_and_others_on_torchs_own_unless_told(model, folder, monkeypatch):
    before = torch.get_num_threads()
    most = os.cpu_count()
    try:
        torch.set_num_threads(most)
        used = lambda *arguments: report(generate(model, "--chunks", 1, "--json", *arguments))["threads"]
        assert used() == most and used("--threads", 1) == 1
        monkeypatch.setattr("longtake.hosts.loading.embedded", lambda: {str(model): model})
        assert used() == 1 and used("--threads", most) == most
        assert torch.get_num_threads() == most  # as it was, for a program that calls the command
    finally:
        torch.set_num_threads(before)


def test_resuming_a_snapshot_equals_never_having_stopped(model, folder):
    whole = latents_of(model, "--chunks", 5, "--seed", 3)
    first = latents_of(model, "--chunks", 2, "--seed", 3, "--snapshot", "s.safetensors")
    made = report(
        run("generate", "--model", model, "--resume", "s.safetensors", "--seconds", 3, "-o", "b.mp4", "--latents",
            "m.safetensors", "--device", "cpu", "--json")
    )  # fmt: skip
    second = load_file("m.safetensors")["latents"].transpose(0, 1)
    assert torch.equal(torch.cat((first, second), 1), whole)
    assert made["frames"] == 24 == len(read_video("b.mp4"))  # no first frame of its own: 3 s are exactly three chunks
    assert made["prompt"] == PROMPT


def test_a_resumed_take_finds_its_model_and_obeys_a_new_prompt(model, host, folder):
    latents_of(model, "--chunks", 2, "--snapshot", "s.safetensors")
    result = run("generate", "kite", "--resume", "s.safetensors", "--chunks", 1, "-o", "b.mp4", "--latents",
                 "m.safetensors", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    take = longtake.Session.restore("s.safetensors", host)
    take.prompt = "kite"
    assert torch.equal(load_file("m.safetensors")["latents"].transpose(0, 1), next(take).latents)


def test_a_memory_budget_is_kept_and_fills_the_window(model, host, folder):
    shape = longtake.session.history_shape(host, host.geometry())
    made = report(generate(model, "--chunks", 1, "--memory", f"{(8.5 * shape.frame_bytes) / 1024:.3f}KiB", "--json"))
    assert made["policy"] == "window:frames=8,sink=2,positions=absolute"
    refused(generate(model, "--memory", "1KB"), "1000 bytes", "at least the 2 in flight")
    refused(generate(model, "--memory", "1GB", "--policy", "full"), "full", "cannot be fitted")


def test_what_a_budget_makes_of_a_named_option_is_said(model, host, folder):
    kibibytes = 8.5 * longtake.session.history_shape(host, host.geometry()).frame_bytes / 1024
    asked = ("--chunks", 1, "--policy", "window:frames=20,sink=1", "--memory", f"{kibibytes:.3f}KiB")
    result = generate(model, *asked)
    chosen = "window:frames=8,sink=1,positions=absolute"
    [note] = beside_progress(result.stderr)
    assert note.startswith("note: --memory") and "window:frames=20,sink=1,positions=absolute into" in note
    assert note.endswith(chosen)
    assert f"policy {chosen}, fitted to " in result.stdout
    made = report(generate(model, *asked, "--json"))
    assert made["policy"] == chosen and made["fitted_to_bytes"] == shell.parse_bytes(asked[-1])
    fits = generate(model, "--chunks", 1, "--policy", chosen, "--memory", asked[-1])
    assert beside_progress(fits.stderr) == []  # nothing was changed


def test_a_prompt_that_is_cut_is_said_to_be(model, folder):
    result = generate(model, "--chunks", 1, prompt="red kite " * 3)
    [line] = beside_progress(result.stderr)
    assert result.exit_code == 0 and line.startswith("warning: prompt 'red kite red")
    assert "has 6 tokens" in line and line.endswith("sees the first 5")
    assert beside_progress(generate(model, "--chunks", 1, prompt="red  kite red kite \n red").stderr) == []


def test_a_negative_prompt_without_guidance_is_refused(model, folder):
    refused(generate(model, "--negative", "kite"), "--negative needs guidance", "--guidance")
    refused(generate(model, "--negative", "kite", "--guidance", 1), "--negative needs guidance")
    assert os.listdir(folder) == []


def test_a_policy_from_a_file_is_used_with_its_options(model, folder):
    Path("mine.py").write_text(
        "from dataclasses import dataclass\nfrom longtake import SlidingWindow\n"
        "@dataclass(frozen=True)\nclass Mine(SlidingWindow):\n    frames: int = 4\n    sink: int = 0\n    name = ''\n"
    )
    made = latents_of(model, "--chunks", 4, "--policy", "mine.py:Mine:frames=6,sink=2")
    assert torch.equal(made, latents_of(model, "--chunks", 4, "--policy", "window:frames=6,sink=2"))
    refused(generate(model, "--policy", "mine.py:Other"), "no KVPolicy 'Other'", "Mine")
    refused(generate(model, "--policy", "none.py:Mine"), "no file none.py")


def test_the_report_for_people_names_length_speed_and_bytes(model, folder):
    result = generate(model, "--chunks", 2)
    assert result.exit_code == 0
    for words in ("a.mp4: 13 frames, 1.62 s of video, 32x16 at 8 fps", "2 chunks,", "chunks/s", "x realtime",
                  "policy window:frames=6,sink=2", "history", "view", "decoder", "peak RSS"):  # fmt: skip
        assert words in result.stdout
    loading, making = result.stderr.splitlines()
    assert loading == f"loading {model}"
    assert making == "making 2 chunks of 4 tokens, 32x16 pixels, under window:frames=6,sink=2,positions=absolute"


def test_what_is_tried_is_said_before_memory_is_taken_for_it(model, folder, monkeypatch):
    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(longtake.session, "History", full)
    result = generate(model, "--size", "320x160", "--chunks", 1)
    refused(result, "out of memory", "--size")
    assert "making 1 chunk of 400 tokens, 320x160 pixels" in result.stderr


def test_an_existing_video_is_replaced_only_by_a_complete_one(model, folder):
    Path("a.mp4").write_bytes(b"precious")
    refused(generate(model, "--policy", "window:frames=2,sink=2"), "use frames=4")
    assert Path("a.mp4").read_bytes() == b"precious"
    assert generate(model, "--chunks", 1).exit_code == 0
    assert len(read_video("a.mp4")) == 5


# --- what ends it -----------------------------------------------------------------------------------------------------


def wait_for_frames(child: subprocess.Popen, folder: Path) -> None:
    """Until more of the child's files is on the disk than the 4 kB that are written ahead of the first chunk."""
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if any(part.stat().st_size > 5000 for part in folder.glob(".longtake-*.part")):
            return
        time.sleep(0.05)
    raise AssertionError("no frames were written")


def test_ctrl_c_leaves_a_playable_file_and_a_snapshot_that_fits_it(model, folder):
    child = in_process("generate", PROMPT, "--model", model, "--chunks", 100000, "-o", "a.mp4", "--snapshot",
                       "s.safetensors", "--device", "cpu", "--json", cwd=folder)  # fmt: skip
    wait_for_frames(child, folder)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    made = json.loads(out)
    assert made["status"] == "interrupted" and 1 <= made["chunks"] < 100000
    assert len(read_video("a.mp4")) == made["frames"] == 8 * made["chunks"] - 3
    assert "stopping after this chunk" in err and "Traceback" not in err
    take = longtake.Session.restore("s.safetensors", longtake.load(model, device="cpu"))
    assert take.index == made["chunks"]
    assert sorted(os.listdir(folder)) == ["a.mp4", "s.safetensors"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_terminated_take_ends_like_one_at_ctrl_c(name, model, folder):
    number = getattr(signal, name)
    child = in_process("generate", PROMPT, "--model", model, "--chunks", 100000, "-o", "a.mp4", "--snapshot",
                       "s.safetensors", "--latents", "l.safetensors", "--device", "cpu", "--json", cwd=folder,
                       preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # fmt: skip
    wait_for_frames(child, folder)
    child.send_signal(number)
    child.send_signal(number)  # unlike a second Ctrl-C, it cuts into nothing
    out, err = child.communicate(timeout=30)
    assert child.returncode == 128 + number, err
    made = json.loads(out)
    assert made["status"] == "interrupted" and 1 <= made["chunks"] < 100000
    assert len(read_video("a.mp4")) == made["frames"] == 8 * made["chunks"] - 3
    assert len(load_file("l.safetensors")["latents"]) == 2 * made["chunks"]
    assert longtake.Session.restore("s.safetensors", longtake.load(model, device="cpu")).index == made["chunks"]
    assert sorted(os.listdir(folder)) == ["a.mp4", "l.safetensors", "s.safetensors"]


def test_a_terminal_that_is_closed_ends_the_take_and_its_file_plays(model, folder):
    """The kernel sends SIGHUP, and the progress bar cannot be drawn any more."""
    ours, theirs = os.openpty()

    def control():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    command = [sys.executable, "-m", "longtake", "generate", PROMPT, "--model", str(model), "--chunks", "100000", "-o",
               "a.mp4", "--snapshot", "s.safetensors", "--device", "cpu", "--json"]  # fmt: skip
    with open("out.json", "wb") as out:
        child = subprocess.Popen(
            command, stdin=theirs, stdout=out, stderr=theirs, env=ENVIRONMENT | {"TERM": "xterm"}, cwd=folder,
            preexec_fn=control,
        )  # fmt: skip
    os.close(theirs)
    wait_for_frames(child, folder)
    os.close(ours)
    assert child.wait(timeout=30) == 129
    made = json.loads(Path("out.json").read_text())
    assert len(read_video("a.mp4")) == made["frames"] == 8 * made["chunks"] - 3
    assert sorted(os.listdir(folder)) == ["a.mp4", "out.json", "s.safetensors"]


def test_signals_are_handled_within_a_take_only_and_ignored_ones_stay_so():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with shell.StopAsked() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked and stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with shell.StopAsked() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before[2])


def interrupting(monkeypatch, chunk: int, times: int) -> None:
    """Ctrl-C, `times` times, while chunk number `chunk` is being handed to the video."""
    write = Mp4Writer.write
    calls = []

    def interrupted(self, frames):
        calls.append(1)
        if len(calls) == chunk:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        write(self, frames)

    monkeypatch.setattr(Mp4Writer, "write", interrupted)


def test_one_ctrl_c_finishes_the_chunk_and_a_second_ends_at_once(model, folder, monkeypatch):
    found = signal.getsignal(signal.SIGINT)  # a shell's background job is started deaf to it
    for times, chunks in ((1, 3), (2, 2)):
        with monkeypatch.context() as patch:
            interrupting(patch, 3, times)
            result = generate(model, "--chunks", 9, "--latents", "l.safetensors", "--snapshot", f"s{times}.safetensors")
        assert result.exit_code == 130
        frames = 8 * chunks - 3
        assert f"stopped; a.mp4: {frames} frames, {frames / 8:.2f} s of video" in result.stdout
        assert len(read_video("a.mp4")) == frames
        assert len(load_file("l.safetensors")["latents"]) == 2 * chunks
        assert Path(f"s{times}.safetensors").exists() == (times == 1)
    assert "no snapshot" in result.stderr
    assert not list(folder.glob(".longtake*"))
    assert signal.getsignal(signal.SIGINT) is found


def test_ctrl_c_before_the_first_chunk_leaves_nothing(model, folder, monkeypatch):
    interrupting(monkeypatch, 1, 2)
    result = generate(model)
    assert result.exit_code == 130 and "nothing was written" in result.stdout
    assert os.listdir(folder) == []


def test_a_chunk_that_is_not_finite_ends_the_take_but_keeps_what_was_made(model, folder, monkeypatch):
    forward = CausalWan.forward
    calls = []

    def broken(self, *arguments):
        calls.append(1)
        return forward(self, *arguments) * (1 if len(calls) <= 6 else float("nan"))  # three forwards a chunk

    monkeypatch.setattr(CausalWan, "forward", broken)
    result = generate(model, "--chunks", 5, "--json")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: chunk 2 has NaN")
    assert json.loads(result.stdout)["status"] == "non-finite"
    assert len(read_video("a.mp4")) == 13
    calls[:] = [1] * 6
    result = generate(model, "--chunks", 5, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["output"] is None
    assert len(read_video("a.mp4")) == 13  # of the earlier take: nothing new was made


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a disk of 4 kB, and whether this machine let us mount one; elsewhere files are limited to that."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place)]
    mounted = sys.platform.startswith("linux") and os.geteuid() == 0 and not subprocess.run(command).returncode
    yield place, mounted
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("what", ["video", "latents", "snapshot"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(what, model, folder, full_disk):
    place, mounted = full_disk
    names = {"video": folder / "a.mp4", "latents": folder / "l.safetensors", "snapshot": folder / "s.safetensors"}
    names[what] = place / names[what].name
    chunks = 60 if what == "video" else 1  # a video of one chunk is smaller than the limit
    arguments = ["generate", PROMPT, "--model", model, "--chunks", chunks, "--device", "cpu", "-o", names["video"]]
    if what != "video":
        arguments += [f"--{what}", names[what]]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if mounted:
        result = run(*arguments)
        code, err = result.exit_code, result.stderr
    else:
        child = in_process(*arguments, preexec_fn=limit)
        _, err = child.communicate(timeout=60)
        code = child.returncode
    assert code == 2, err
    assert len(beside_progress(err)) == 1 and str(names[what]) in err
    assert ("No space left" if mounted else "File too large") in err or what == "snapshot"
    assert os.listdir(place) == []
    assert not list(folder.glob(".*"))
    if what == "snapshot":  # what was finished before the disk was full stays
        assert len(read_video(names["video"])) == 5


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], ["no model 'nowhere'", "tiny-wan"]),
        (["--policy", "best"], ["no policy 'best'", "full", "window"]),
        (["--policy", "window:size=3"], ["no option 'size'", "frames (int)"]),
        (["--policy", "window:frames=many"], ["frames='many' is not int"]),
        (["--policy", "window:frames"], ["key=value"]),
        (["--reuse", "all"], ["no reuse policy 'all'", "none"]),
        (["--seconds", "0"], ["0 seconds", "above 0"]),
        (["--seconds", "-3"], ["-3 seconds"]),
        (["--seconds", "nan"], ["nan seconds"]),
        (["--chunks", "0"], ["0 chunks"]),
        (["--chunks", "2", "--seconds", "3"], ["--seconds and --chunks"]),
        (["--steps", "0"], ["0 steps"]),
        (["--size", "32"], ["WIDTHxHEIGHT"]),
        (["--size", "33x16"], ["width 33", "multiple of 16"]),
        (["--size", "0x16"], ["width 0"]),
        (["--image", "none.png"], ["none.png", "No such file"]),
        (["--image", "text.png"], ["cannot read image text.png"]),
        (["--prompt-switch", "soon:red"], ["SECONDS:PROMPT"]),
        (["--prompt-switch", "1"], ["SECONDS:PROMPT"]),
        (["--seconds", "2", "--prompt-switch", "30:red"], ["30 s comes too late"]),
        (["--memory", "much"], ["'much'", "500MB"]),
        (["--residency", "cloud"], ["'cloud'", "resident, scratch, alias"]),
        (["--device", "abacus"], ["'abacus'", "cuda"]),
        (["--threads", "0"], ["0 threads", "from 1 to"]),
        (["--threads", "100000"], ["100000 threads"]),
        (["--text-encoder", "burn"], ["'burn'", "offload, keep, free"]),
        (["--dtype", "int8"], ["--dtype 'int8'", "float32, bfloat16, float16"]),
        (["--dtype", "float64"], ["--dtype 'float64'", "float32, bfloat16, float16"]),
        (["--seconds", "inf"], ["inf seconds", "finite length above 0"]),
        (["--guidance", "nan"], ["--guidance nan", "finite"]),
        (["--guidance", "inf"], ["--guidance inf", "finite"]),
        (["--family", "longdead"], ["--family 'longdead'", "longlive"]),
        (["--resume", "text.png"], ["text.png is not a readable snapshot"]),
        (["--resume", "text.png", "--seed", "3", "--image", "x"], ["--seed, --image"]),
        (["-o", "a.avi"], ["a.avi", ".mp4"]),
        (["-o", "."], [".mp4"]),
        (["-o", "no/a.mp4"], ["no folder no"]),
        (["--snapshot", "no/s"], ["no folder no"]),
        (["--latents", "."], ["is a folder"]),
    ],
)
def test_wrong_input_is_one_line_and_code_2_and_writes_nothing(arguments, words, model, folder):
    Path("text.png").write_text("no picture")
    refused(generate(model, *arguments), *words)
    assert os.listdir(folder) == ["text.png"]


def test_two_options_never_name_one_file(model, folder):
    Path("a.png").write_text("picture")
    Path("s").write_text("snapshot")
    Path("link.mp4").symlink_to("s")
    (folder / "sub").mkdir()
    cases = {
        ("--latents", "a.mp4"): ("-o", "--latents"),
        ("--latents", "sub/../a.mp4"): ("-o", "--latents"),
        ("--snapshot", folder / "a.mp4"): ("-o", "--snapshot"),
        ("--latents", "x", "--snapshot", "x"): ("--latents", "--snapshot"),
        ("--image", "a.png", "--latents", "a.png"): ("--image", "--latents"),
        ("--image", "a.png", "--snapshot", "a.png"): ("--image", "--snapshot"),
        ("--image", "a.mp4"): ("--image", "-o"),
        ("--resume", "s", "--latents", "s"): ("--resume", "--latents"),
        ("--resume", "s", "-o", "link.mp4"): ("--resume", "-o"),
    }
    for arguments, names in cases.items():
        refused(run("generate", PROMPT, "--model", "nowhere", "-o", "a.mp4", *arguments), *names, "the same file")
    assert sorted(os.listdir(folder)) == ["a.png", "link.mp4", "s", "sub"]
    assert Path("a.png").read_text() == "picture" and Path("s").read_text() == "snapshot"


def test_a_snapshot_may_take_the_place_of_the_one_gone_on_from(model, host, folder):
    whole = latents_of(model, "--chunks", 3)
    latents_of(model, "--chunks", 1, "--snapshot", "s.safetensors")
    resumed = ("generate", "--model", model, "--resume", "s.safetensors", "--snapshot", "s.safetensors", "--chunks", 1,
               "--device", "cpu", "-o", "b.mp4", "--latents", "m.safetensors", "--json")  # fmt: skip
    for chunk in (1, 2):
        report(run(*resumed))
        made = load_file("m.safetensors")["latents"].transpose(0, 1)
        assert torch.equal(made, whole[:, 2 * chunk : 2 * chunk + 2])
    assert longtake.Session.restore("s.safetensors", host).index == 3


def test_every_file_of_a_take_has_the_rights_that_the_umask_leaves(model, folder):
    before = os.umask(0o027)
    try:
        report(generate(model, "--chunks", 1, "--latents", "l", "--snapshot", "s", "--json"))
    finally:
        os.umask(before)
    assert {name: oct(os.stat(name).st_mode & 0o777) for name in os.listdir(folder)} == dict.fromkeys(
        ("a.mp4", "l", "s"), "0o640"
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_model_without_a_part_that_the_take_needs_is_refused(part, model, tmp_path, folder):
    copy = tmp_path / "part"
    shutil.copytree(model, copy)
    shutil.rmtree(copy / part)
    result = generate(copy)
    refused(result, f"has no {part}/")
    assert "decode=" not in result.stderr and "embeds" not in result.stderr


def test_a_take_without_prompt_or_with_an_empty_device_is_refused(model, folder, monkeypatch):
    refused(run("generate", "--model", model, "-o", "a.mp4"), "needs a prompt")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(generate(model, "--device", "cuda"), "0 CUDA devices", "--device cpu")
    assert os.listdir(folder) == []


def test_a_bidirectional_model_is_refused_until_it_is_said_to_be_causal(model, tmp_path, folder):
    copy = tmp_path / "plain"
    shutil.copytree(model, copy)
    (copy / "longtake.json").unlink()
    refused(generate(copy), "bidirectional", "--causal", "longtake convert")
    made = report(generate(copy, "--causal", "--size", "32x16", "--chunks", 1, "--json"))
    assert made["policy"] == "window:frames=21,sink=0,positions=absolute"
    made = report(generate(copy, "--family", "longlive", "--size", "32x16", "--chunks", 1, "--json"))
    assert made["policy"] == "window:frames=12,sink=3,positions=absolute"
    refused(generate(copy, "--family", "longdead"), "longdead", "longlive")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_truncated_weights_are_refused(part, model, tmp_path, folder):
    copy = tmp_path / "cut"
    shutil.copytree(model, copy)
    weights = next((copy / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(generate(copy), str(copy), "cannot be loaded")
    assert os.listdir(folder) == []


def test_a_snapshot_of_another_model_or_cut_short_is_refused(model, tmp_path, folder):
    latents_of(model, "--chunks", 1, "--snapshot", "s.safetensors")
    os.remove("a.mp4")
    refused(generate("tiny-wan", "--resume", "s.safetensors"), "s.safetensors")
    Path("s.safetensors").write_bytes(Path("s.safetensors").read_bytes()[:-9])
    refused(generate(model, "--resume", "s.safetensors"), "not a readable snapshot")
    save_file({"latents": torch.zeros(1)}, "plain.safetensors")
    refused(generate(model, "--resume", "plain.safetensors"), "not a longtake snapshot", "--snapshot")
    assert not Path("a.mp4").exists()


def test_usage_errors_are_one_line_and_code_2_too():
    refused(run("generate", PROMPT), "--output", "-o", "generate --help")
    refused(run("generate", PROMPT, "-o", "a.mp4", "--seconds", "abc"), "--seconds", "generate --help")
    refused(run("generate", PROMPT, "-o"), "-o", "argument")
    refused(run("generate", PROMPT, "-o", "a.mp4", "--sparkle"), "--sparkle")
    refused(run("generate", PROMPT, "another", "-o", "a.mp4"), "another")
    refused(run("paint"), "paint")
    refused(run("train", "paint"), "paint", "train --help")
    refused(run("bench", "take", "--chunks", "x"), "--chunks", "bench take --help")
    out, err = in_process("generate", PROMPT).communicate()
    assert out == "" and err.startswith("error: missing option") and len(err.splitlines()) == 1


def test_a_group_without_a_command_shows_its_help():
    for arguments, word in (((), "generate"), (("analyze",), "decay"), (("train",), "tiny-wan")):
        result = run(*arguments)
        assert result.exit_code == 2 and "Usage" in result.output and word in result.output
    for command in ("generate", "train"):
        result = run(command, "--help")
        assert result.exit_code == 0 and "Usage" in result.stdout
    assert run("--version").stdout == f"longtake {longtake.__version__}\n"


# --- the other commands -----------------------------------------------------------------------------------------------


def test_models_lists_what_is_embedded_known_and_convertible():
    listed = json.loads(run("models", "--json").stdout)
    own = listed["embedded"]["tiny-wan"]
    assert own["width"] == 128 and own["steps"] == 4 and 1e6 < own["bytes"] < 6 * 2**20 and "come back" in own["about"]
    assert listed["embedded"]["tiny-shapes"]["width"] == 64 and listed["embedded"]["tiny-skyreels"]["steps"] == 50
    assert "gueraf/Self-Forcing-diffusers" in listed["hub"]
    assert listed["families"]["longlive"]["window"] == 12
    text = run("models").stdout
    for name in ("tiny-wan", "128x128", "tiny-shapes", "gueraf/Self-Forcing-diffusers", "rolling-forcing"):
        assert name in text


def test_policies_lists_every_policy_with_types_defaults_and_a_line():
    listed = json.loads(run("policies", "--json").stdout)["policies"]
    assert listed["window"]["options"]["frames"] == {"type": "int", "default": 21}
    assert listed["full"]["options"] == {}
    for name, policy in listed.items():
        assert policy["about"], name
    text = run("policies").stdout
    assert "    positions: str = absolute" in text and "my_file.py:MyPolicy" in text


def test_a_converted_checkpoint_is_a_model_that_generate_takes(model, tmp_path, folder):
    torch.save({"generator_ema": upstream_state(tiny_transformer(seed=0))}, tmp_path / "self_forcing_dmd.pt")
    checkpoint = [tmp_path / "self_forcing_dmd.pt", "out", "--base", model, "--dtype", "float32"]
    made = report(run("convert", *checkpoint, "--json"))
    assert made["family"] == "self-forcing" and made["ema"] is True and made["dtype"] == "float32"
    refused(run("convert", *checkpoint), "out exists", "--overwrite")
    assert "self-forcing" in run("convert", *checkpoint, "--overwrite", "--family", "self-forcing").stdout
    refused(run("convert", tmp_path / "none.pt", "out2", "--base", model, "--family", "longlive"), "does not exist")
    refused(run("convert", "none.pt", "out2", "--base", model), "none.pt does not exist")  # whatever its family
    refused(run("convert", *checkpoint[:1], "out2", "--base", tmp_path), str(tmp_path))
    assert report(generate(folder / "out", "--size", "32x16", "--chunks", 1, "--json"))["frames"] == 9
    assert sorted(os.listdir(folder)) == ["a.mp4", "out"]


def test_bench_shares_the_exit_codes(folder):
    result = run("bench", "take", "--shape", "huge")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.strip().startswith("error: no shape 'huge'") and "cpu-small" in result.stderr
    assert os.listdir(folder) == []


def test_training_refuses_what_cannot_work_before_it_starts(folder):
    Path("file").write_text("")
    refused(run("train", "tiny-wan", "--out", "m", "--vae-minutes", "0"), "--vae-minutes 0")
    refused(run("train", "tiny-wan", "--out", "m", "--many-minutes", "nan"), "--many-minutes nan")
    refused(run("train", "tiny-wan", "--out", "m", "--batch", "0"), "--batch 0")
    refused(run("train", "tiny-wan", "--out", "m", "--device", "abacus"), "'abacus'")
    refused(run("train", "tiny-wan", "--out", "m", "--threads", "0"), "0 threads")
    refused(run("train", "tiny-wan", "--out", "file"), "file/work", "--out")
    assert os.listdir(folder) == ["file"]


def test_amounts_of_memory_are_read_and_said_in_the_usual_units():
    read = {"500MB": 500e6, "1.5GB": 1.5e9, "2GiB": 2**31, "64 kb": 64e3, "7": 7, "3K": 3e3}
    assert {text: shell.parse_bytes(text) for text in read} == read
    for text in ("", "0", "MB", "-1MB", "1XB", "i"):
        with pytest.raises(longtake.LongtakeError):
            shell.parse_bytes(text)
    said = {0: "0 B", 999: "999 B", 1000: "1 kB", 2_080_512: "2.08 MB", 123_400_000_000: "123 GB"}
    assert {count: shell.bytes_text(count) for count in said} == said


def test_a_long_log_gets_a_line_now_and_then_on_stderr(model, folder, monkeypatch):
    monkeypatch.setattr("longtake.commands.progress._LOG_SECONDS", 0)
    result = generate(model, "--chunks", 2, "--json")
    assert json.loads(result.stdout)["chunks"] == 2
    lines = beside_progress(result.stderr)
    assert len(lines) == 2
    for words in ("a.mp4: 1/2 chunks", "chunks/s", "x realtime", "held"):
        assert words in lines[0]
