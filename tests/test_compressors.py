"""Compressors: token counts, positions, and what a session makes of them."""

import copy
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from longtake import FullHistory, Geometry, LongtakeError, NonFiniteError, PlanError, Session, load, load_compressor
from longtake.compressors import Compressor, DualBranch, LowResolution, MeanPool, StreamingEncoder, TakeState, parse
from longtake.compressors.low_resolution import shrunk
from longtake.compressors.reading import WEIGHTS
from longtake.decoding import encode
from longtake.history import LayerView
from longtake.hosts.digest import weights_digest
from longtake.plan import COMPRESSED, Drop, Entry, Plan
from longtake.policies import KVPolicy
from longtake.session import history_shape

from .tiny import text, tiny_wan

CLOSE = {"atol": 1e-5, "rtol": 0}
WAN = Geometry(480, 832, 16, 4, 16)


@dataclass(frozen=True)
class Middle(KVPolicy):
    """The first block and the last one in full, all between them compressed and where they were."""

    identity: bool = False  # the compressed form has as many tokens as the full one
    requires: ClassVar[frozenset[str]] = frozenset({"compressed"})

    def plan(self, table, signals):
        entries, drops = [], []
        for i, block in enumerate(table.blocks):
            if "full" in block.forms and i in (0, len(table.blocks) - 1):
                entries.append(Entry(block.id))
                continue
            entries.append(Entry(block.id, COMPRESSED))
            if "full" in block.forms:
                drops.append(Drop(block.id))
        return Plan(tuple(entries), tuple(drops), forms=(COMPRESSED,) if table.frames_seen else ())

    def capacity(self, shape):
        return 3 * shape.chunk_tokens + 20 * shape.compressed_tokens


@dataclass(frozen=True)
class Identity(Compressor):
    """As many tokens as the chunk has: the compressed form is the full one."""

    def grid(self, geometry, span=None):
        return (geometry.chunk_frames if span is None else span, *geometry.grid)

    def positions(self, base, step, geometry, span):
        return base, step

    def compress(self, latents, pixels, state, model, geometry):
        return model.embed(latents), replace(state, frames=state.frames + latents.shape[2])


def take_of(host=None, policy=None, **options) -> Session:
    options = {"prompt_embeds": text(), "decode": False} | options
    return Session(host or tiny_wan(grid=(8, 8)), policy or Middle(), **options)


# --- token counts and positions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "chunk", "grid"),
    [(480, 832, 4, (2, 7, 13)), (480, 832, 3, (1, 7, 13)), (128, 128, 3, (1, 2, 2)), (64, 64, 3, (1, 1, 1))],
)
def test_a_chunk_is_compressed_to_the_published_count(height, width, chunk, grid):
    geometry = Geometry(height, width, 16, chunk, 16)
    assert MeanPool().grid(geometry) == grid
    assert MeanPool().tokens(geometry) == grid[0] * grid[1] * grid[2]


def test_the_shape_a_policy_sees_counts_182_tokens_for_four_frames_of_832x480():
    host = tiny_wan(grid=(30, 52), chunk_frames=4)
    assert history_shape(host, host.geometry()).compressed_tokens == 182


def test_midpoints_stand_in_the_middle_of_what_they_cover():
    host = tiny_wan(grid=(30, 52), chunk_frames=4)
    base, step = host.positions(host.geometry(), 12, 4)
    small, moves = MeanPool().positions(base, step, host.geometry(), 4)
    small = small.unflatten(0, (2, 7, 13))
    for i, j, k in ((0, 0, 0), (1, 6, 12), (1, 3, 5)):
        assert small[i, j, k].tolist() == [12 + 2 * i + 1, 4 * j + 2, 4 * k + 2]
    assert moves.tolist() == [[1, 0, 0]] * 182


def test_raster_positions_count_in_the_small_grid():
    host = tiny_wan(grid=(8, 12), chunk_frames=4)
    base, step = host.positions(host.geometry(), 8, 4)
    small, _ = MeanPool(where="raster").positions(base, step, host.geometry(), 4)
    assert small.unflatten(0, (2, 2, 3))[1, 1, 2].tolist() == [9, 1, 2]


def test_phasor_positions_are_the_direction_of_the_mean_phasor():
    host = tiny_wan(grid=(8, 12), chunk_frames=4, head_dim=24)
    base, step = host.positions(host.geometry(), 400, 4)
    small, _ = MeanPool(where="phasor").positions(base, step, host.geometry(), 4)
    phasors = torch.view_as_complex(host.rotary.phases(base).double().contiguous()).unflatten(0, (2, 2, 2, 4, 3, 4))
    mean = phasors.mean((1, 3, 5)).flatten(0, 2)
    ours = torch.view_as_complex(host.rotary.phases(small).double().contiguous())
    torch.testing.assert_close(ours, mean / mean.abs(), atol=1e-6, rtol=0)


# --- the compressed form in a take ------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_tokens_of_the_patch_embedding_get_the_keys_and_values_of_the_chunk_itself(residency):
    take = take_of(compressor=Identity(), residency=residency)
    for _ in range(3):
        next(take)
    store = take.history.stores["cond"]
    full, small = (store.held[(2, form)].rows for form in ("full", COMPRESSED))
    assert torch.equal(store.k[:, :, full], store.k[:, :, small])
    assert torch.equal(store.v[:, :, full], store.v[:, :, small])


def test_an_identity_compressor_changes_nothing():
    whole, packed = take_of(policy=FullHistory()), take_of(compressor=Identity())
    for _ in range(6):
        torch.testing.assert_close(next(packed).latents, next(whole).latents, **CLOSE)


# --- the low-resolution branch ----------------------------------------------------------------------------------------


def pixels_of(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, frames, height, width, 3), generator=generator, dtype=torch.uint8)


def test_video_encoded_in_pieces_equals_one_encode_of_all():
    vae = tiny_wan(vae=True).vae
    video = torch.randn(1, 3, 17, 16, 24)
    encoder, state, parts = StreamingEncoder(vae), TakeState(), []
    for piece in video.split((5, 4, 8), 2):
        latents, state = encoder.encode(piece, state)
        parts.append(latents)
    torch.testing.assert_close(torch.cat(parts, 2), encode(vae, video), atol=1e-6, rtol=0)
    assert state.frames == 17


def test_encoding_does_not_disturb_the_decoder_of_the_same_vae():
    host = tiny_wan(vae=True)
    latents = torch.randn(1, 4, 6, 4, 6)
    whole = host.decoder().decode(latents)
    decoder, state = host.decoder(), TakeState()
    parts = []
    for i, piece in enumerate(latents.split(3, 2)):
        parts.append(decoder.decode(piece))
        _, state = host.encoder().encode(torch.randn(1, 3, 5 if i == 0 else 8, 16, 24), state)
    assert torch.equal(torch.cat(parts, 2), whole)


def test_a_piece_that_the_encoder_would_crop_is_refused():
    encoder = StreamingEncoder(tiny_wan(vae=True).vae)
    with pytest.raises(LongtakeError, match="6 frames"):
        encoder.encode(torch.zeros(1, 3, 6, 16, 24), TakeState())
    _, state = encoder.encode(torch.zeros(1, 3, 5, 16, 24), TakeState())
    with pytest.raises(LongtakeError, match="5 frames"):
        encoder.encode(torch.zeros(1, 3, 5, 16, 24), state)


@pytest.mark.parametrize(("chunk", "frames"), [(4, (13, 16)), (3, (9, 12)), (1, (1, 4))])
@pytest.mark.parametrize("grid", [(8, 12), (6, 4), (2, 3), (1, 1)])
def test_pooled_pixels_become_the_counted_tokens_at_any_size(chunk, frames, grid):
    host = tiny_wan(grid=grid, chunk_frames=chunk, vae=True)
    geometry, low, state = host.geometry(), LowResolution(), TakeState()
    latents = torch.randn(1, 4, chunk, *geometry.latent_size)
    for n in frames:
        tokens, state = low.compress(latents, pixels_of(n, geometry.height, geometry.width), state, host, geometry)
        assert tokens.shape == (1, low.tokens(geometry), 24)


def test_pixels_of_832x480_are_pooled_as_published():
    """16 pixel frames pool to 8 x 120 x 208; encoded and embedded, the odd fifteenth row of cells is left out."""
    grid = LowResolution().grid(WAN)
    assert shrunk(pixels_of(16, 480, 832), grid, WAN, first=False).shape == (1, 3, 8, 120, 208)
    assert shrunk(pixels_of(13, 480, 832), grid, WAN, first=True).shape == (1, 3, 5, 120, 208)


def test_pooling_is_the_mean_of_the_pixels_a_cell_covers():
    geometry = Geometry(128, 128, 16, 4, 16)
    pixels = pixels_of(16, 128, 128)
    small = shrunk(pixels, LowResolution().grid(geometry), geometry, first=False)
    cell = pixels[0, 2:4, 8:12, 20:24, 1].float().mean() / 127.5 - 1
    torch.testing.assert_close(small[0, 1, 1, 2, 5], cell)


# --- the two branches -------------------------------------------------------------------------------------------------


def test_the_published_branch_has_33_million_parameters_and_17_gflop_a_chunk():
    with torch.device("meta"):
        branch = DualBranch()
        assert sum(p.numel() for p in branch.parameters()) == 33_355_424
        assert sum(p.numel() for p in DualBranch(kernel=None).parameters()) == 7_623_840
        counter = FlopCounterMode(display=False)
        with counter:
            assert branch.refine(torch.empty(1, 16, 4, 60, 104), (2, 7, 13)).shape == (1, 182, 1536)
    assert counter.get_total_flops() == pytest.approx(16.9e9, rel=0.01)


@pytest.mark.parametrize("kernel", [3, None])
@pytest.mark.parametrize(("chunk", "grid"), [(4, (30, 52)), (3, (8, 8)), (3, (4, 4))])
def test_both_branches_give_the_same_tokens_at_any_geometry(kernel, chunk, grid):
    if kernel is None and grid[0] < 4:
        pytest.skip("a kernel without padding needs eight cells")
    host = tiny_wan(grid=grid, chunk_frames=chunk, head_dim=12, vae=True)
    geometry = host.geometry()
    branch = DualBranch.sized(4, 24, kernel=kernel)
    latents = torch.randn(1, 4, chunk, *geometry.latent_size)
    pixels = pixels_of(4 * chunk - 3, geometry.height, geometry.width)
    low, _ = LowResolution().compress(latents, pixels, TakeState(), host, geometry)
    both, _ = branch.compress(latents, pixels, TakeState(), host, geometry)
    assert torch.equal(both, low)  # untrained, it is its low-resolution branch
    torch.nn.init.normal_(branch.proj_out.weight)
    trained, _ = branch.compress(latents, pixels, TakeState(), host, geometry)
    assert trained.shape == low.shape and not torch.allclose(trained, low, atol=1e-3)


def test_a_cell_of_the_high_resolution_branch_stands_over_the_tokens_its_position_covers():
    branch = DualBranch.sized(4, 24)
    torch.nn.init.normal_(branch.proj_out.weight)
    latents = torch.zeros(1, 4, 4, 60, 104)
    still = branch.refine(latents, (2, 7, 13))
    touched = latents.clone()
    touched[:, :, 2:, 24:32, 40:48] = 3.0  # tokens y 12..15, x 20..23 of the later two frames
    moved = (branch.refine(touched, (2, 7, 13)) - still).abs().sum(-1).view(2, 7, 13)
    assert moved.argmax() == (1 * 7 + 3) * 13 + 5


def test_a_compressor_is_saved_and_loaded_as_a_model_folder(tmp_path):
    branch = DualBranch.sized(4, 24, where="phasor", carry="projection", low="latents")
    torch.nn.init.normal_(branch.proj_out.weight)
    branch.save_pretrained(tmp_path / "compressor")
    again = DualBranch.from_pretrained(tmp_path, subfolder="compressor")
    assert again.describe() == branch.describe()
    assert (again.where, again.carry, again.wants_pixels) == ("phasor", "projection", False)
    latents = torch.randn(1, 4, 3, 16, 16)
    assert torch.equal(again.refine(latents, (1, 2, 2)), branch.refine(latents, (1, 2, 2)))


@pytest.mark.parametrize("settings", [{"carry": "x"}, {"where": "x"}, {"low": "x"}, {"channels": [1]}, {"kernel": 2}])
def test_settings_that_no_compressor_has_are_refused(settings):
    with pytest.raises(LongtakeError):
        DualBranch(**settings)


def test_compressors_go_by_name_or_folder(tmp_path):
    assert parse("mean-pool:where=raster") == MeanPool(where="raster")
    assert parse("low-resolution:streaming=false") == LowResolution(streaming=False)
    branch = DualBranch.sized(4, 24)
    branch.save_pretrained(tmp_path / "out" / "compressor")
    for folder in (tmp_path / "out", tmp_path / "out" / "compressor"):
        assert parse(str(folder)).describe() == branch.describe()


@pytest.mark.parametrize(
    ("spec", "word"),
    [("pool", "low-resolution"), ("mean-pool:kernel=3", "kernel"), ("mean-pool:carry=x", "projection")],
)
def test_a_compressor_nobody_knows_is_refused_in_one_line(spec, word, tmp_path):
    with pytest.raises(LongtakeError, match=word) as told:
        parse(spec)
    assert "\n" not in str(told.value)
    with pytest.raises(LongtakeError, match="holds no compressor"):
        parse(str(tmp_path))


@pytest.fixture
def folder(tmp_path):
    """A compressor as training writes it."""
    DualBranch.sized(4, 24, low="latents").save_pretrained(tmp_path / "c" / "compressor")
    return tmp_path / "c" / "compressor"


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGED = {
    "no weights": (lambda c: (c / WEIGHTS).unlink(), "half-written"),
    "cut weights": (lambda c: cut(c / WEIGHTS), "damaged"),
    "empty weights": (lambda c: cut(c / WEIGHTS, 0), "damaged"),
    "cut config": (lambda c: cut(c / "config.json"), "config.json is damaged"),
    "no object": (lambda c: (c / "config.json").write_text("[]"), "config.json is damaged"),
    "another kind": (
        lambda c: (c / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}'),
        "AutoencoderKLWan",
    ),
    "another width": (lambda c: edit(c, width=48), "do not belong together"),
    "strange carry": (lambda c: edit(c, carry="pigeon"), "carry 'pigeon'"),
    "strange width": (lambda c: edit(c, width="wide"), "config.json is damaged"),
    "other names": (lambda c: save_file({"a": torch.zeros(1)}, c / WEIGHTS), "lacks"),
    "unfinished": (lambda c: unfinished(c), "the training in .* is not finished"),
}


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def unfinished(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder.parent / "work").mkdir()
    (folder.parent / "work" / "compressor.pt").touch()


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_folder_that_is_not_whole_is_one_line_of_ours(damage, folder):
    harm, word = DAMAGED[damage]
    harm(folder)
    with pytest.raises(LongtakeError, match=word) as told:
        parse(str(folder.parent))
    assert "\n" not in str(told.value) and "low_cpu_mem" not in str(told.value) and "c" in str(told.value)


@pytest.mark.parametrize("name", ["", " ", "nowhere/at/all"])
def test_a_name_of_nothing_is_refused_with_the_names_there_are(name):
    with pytest.raises(LongtakeError, match="give low-resolution, mean-pool, or the folder"):
        parse(name)


def test_a_compressor_goes_with_the_weights_it_was_trained_for_and_no_others(tmp_path):
    host, other = tiny_wan(), tiny_wan()
    with torch.no_grad():
        other.transformer.blocks[0].attn1.to_q.weight.add_(0.5)
    made_for = {"model": "mine", "weights": weights_digest(host.transformer)}
    DualBranch.sized(4, 24, low="latents", trained_for=made_for).save_pretrained(tmp_path)
    branch = load_compressor(tmp_path)
    branch.check(host)
    with pytest.raises(LongtakeError, match=f"compressor {tmp_path} was trained for another model: mine"):
        branch.check(other)
    DualBranch.sized(4, 24).check(other)  # it names none
    MeanPool().check(other)
    with pytest.raises(LongtakeError, match=r"of 4 latent channels and width 48: .* has 4 and 24"):
        DualBranch.sized(4, 48).check(host)


def test_weights_are_known_again_in_another_precision_and_layout_and_told_from_their_neighbours():
    net = torch.nn.Sequential(torch.nn.Conv3d(3, 5, 3), torch.nn.Linear(7, 2))
    net.register_parameter("scale", torch.nn.Parameter(torch.tensor(0.3)))
    digest = weights_digest(net)
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert weights_digest(net.to(memory_format=torch.channels_last_3d)) == digest
    assert (
        weights_digest(copy.deepcopy(net).bfloat16()) == weights_digest(copy.deepcopy(net).bfloat16().float()) == digest
    )
    for change in (
        lambda n: n[1].bias.data.add_(0.1),
        lambda n: n.scale.data.mul_(2),
        lambda n: n[0].weight.data.neg_(),
    ):
        changed = copy.deepcopy(net)
        change(changed)
        assert weights_digest(changed) != digest
    assert weights_digest(torch.nn.Linear(2, 2, bias=False)) != digest


def test_the_document_s_example_runs(tmp_path, capsys):
    document = Path(__file__).parents[1] / "docs" / "compressor.md"
    example = document.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    DualBranch.sized(16, 128).save_pretrained(tmp_path / "compressor")
    assert "runs/compressor" in example
    exec(example.replace("runs/compressor", str(tmp_path)).replace("seconds=3", "seconds=0.5"), {})
    assert capsys.readouterr().out.startswith("0 ")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["-p", "window", "--compressor", "mean-pool"], "does not compress; give one that does"),
        (["--compressor", "mean-pool"], "policy window:.* does not compress"),
        (["-p", "packforcing", "--compressor", ""], "an empty name is no compressor"),
        (["-p", "packforcing", "--compressor", "DIR", "-m", "tiny-shapes"], "was trained for another model: mine"),
    ],
)
def test_a_compressor_that_the_command_cannot_use_is_refused(options, word, tmp_path):
    from typer.testing import CliRunner

    from longtake.cli import app

    made_for = {"model": "mine", "weights": "0" * 16}
    DualBranch.sized(16, 128, trained_for=made_for).save_pretrained(tmp_path / "c")
    told = [str(tmp_path / "c") if option == "DIR" else option for option in options]
    made = CliRunner().invoke(app, ["generate", "a ball", "-o", str(tmp_path / "v.mp4"), *told])
    assert made.exit_code == 2 and re.search(word, " ".join(made.output.split())), made.output
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "nothing was written"


def test_what_comes_with_longtake_still_fits():
    host = load("tiny-wan", device="cpu")
    assert isinstance(host.compressor, DualBranch) and host.compressor.config["trained_for"] is None
    host.compressor.check(host)


def test_a_model_folder_brings_its_compressor(tmp_path):
    from .tiny_checkpoints import write_base

    folder = write_base(tmp_path / "wan")
    wan = json.loads((folder / "transformer" / "config.json").read_text())
    width = wan["num_attention_heads"] * wan["attention_head_dim"]
    assert isinstance(load(folder, device="cpu", causal=True).compressor, LowResolution)
    branch = DualBranch.sized(wan["in_channels"], width, low="latents")
    branch.save_pretrained(folder / "compressor")
    assert load(folder, device="cpu", causal=True).compressor.describe() == branch.describe()
    edit(folder / "compressor", trained_for={"model": "another", "weights": "0" * 16})
    with pytest.raises(LongtakeError, match="trained for another model: another"):
        load(folder, device="cpu", causal=True)


# --- a take with compressed history -----------------------------------------------------------------------------------


def trained(**settings) -> DualBranch:
    torch.manual_seed(4)
    branch = DualBranch.sized(4, 24, **settings)
    torch.nn.init.normal_(branch.proj_out.weight, std=0.5)
    return branch


COMPRESSORS = {
    "mean-pool": MeanPool,
    "low-resolution": LowResolution,
    "dual-branch": trained,
    "projection": lambda: trained(carry="projection"),
    "raster": lambda: LowResolution(where="raster"),
    "phasor": lambda: LowResolution(where="phasor"),
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_restored_take_goes_on_to_the_bit(name, tmp_path):
    host, compressor = tiny_wan(grid=(8, 8), vae=True), COMPRESSORS[name]()
    take = take_of(host, compressor=compressor, decode=True)
    for _ in range(4):
        next(take)
    take.snapshot(tmp_path / "s")
    expected = [next(take) for _ in range(3)]
    again = Session.restore(tmp_path / "s", host, policy=Middle(), compressor=compressor)
    for chunk in expected:
        ours = next(again)
        assert torch.equal(ours.latents, chunk.latents) and torch.equal(ours.frames, chunk.frames)


def test_a_snapshot_asks_for_the_compressor_it_was_made_with(tmp_path):
    host = tiny_wan(grid=(8, 8), vae=True)
    take = take_of(host, compressor=trained())
    next(take)
    take.snapshot(tmp_path / "s")
    with pytest.raises(LongtakeError, match="compressor"):
        Session.restore(tmp_path / "s", host, policy=Middle(), compressor=DualBranch.sized(4, 24))


def test_each_way_to_compress_leads_to_a_take_of_its_own():
    host = tiny_wan(grid=(8, 8), vae=True)
    ends = []
    for make in COMPRESSORS.values():
        take = take_of(host, compressor=make())
        ends.append([next(take).latents for _ in range(5)][-1])
    for i, a in enumerate(ends):
        assert all(not torch.allclose(a, b, atol=1e-5, rtol=0) for b in ends[:i])


def test_frames_are_shown_only_if_they_are_wanted_and_are_the_same():
    host = tiny_wan(grid=(8, 8), vae=True)
    seen, unseen = take_of(host, decode=True), take_of(host, decode=False)
    for _ in range(4):
        a, b = next(seen), next(unseen)
        assert b.frames is None and a.frames is not None and torch.equal(a.latents, b.latents)


def test_the_encoder_goes_with_the_take_and_its_bytes_are_counted_and_steady():
    take = take_of(tiny_wan(grid=(8, 8), vae=True))
    held = []
    for _ in range(5):
        next(take)
        held.append(take.memory()["compressor"])
    assert held[0] > 0 and held[1] == held[4]
    assert held[4] == sum(slot.nbytes for slot in take.rollout.compressing.slots if slot is not None)
    assert take.memory()["total"] == sum(v for k, v in take.memory().items() if k != "total")


def test_a_first_image_is_seen_by_the_compressor_too():
    host = tiny_wan(grid=(8, 8), vae=True)
    take = take_of(host, image=torch.rand(3, 128, 128) * 2 - 1, decode=True)
    assert take.rollout.compressing.frames == 1
    assert len(next(take).frames) == 13
    assert take.rollout.compressing.frames == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failure_while_compressing_leaves_the_take_where_it_was(error, call):
    host = tiny_wan(grid=(8, 8), vae=True, layers=2)
    sound = take_of(host, decode=True)
    expected = [next(sound) for _ in range(5)]
    take = take_of(host, decode=True)
    for _ in range(2):
        next(take)
    where = {1: host.vae.encoder, 2: host.transformer.patch_embedding, 3: host.transformer.blocks[1]}[call]
    # the chunk's own forwards come first: two steps and the commit pass
    count, at = [0], {1: 1, 2: 4, 3: 4}[call]

    def stop(*_):
        count[0] += 1
        if count[0] == at:
            raise error("stop")

    handle = where.register_forward_pre_hook(stop)
    with pytest.raises(error):
        next(take)
    handle.remove()
    assert take.index == 2
    for chunk in expected[2:]:
        ours = next(take)
        assert torch.equal(ours.latents, chunk.latents) and torch.equal(ours.frames, chunk.frames)


def test_a_compressor_that_gives_nan_is_stopped_before_the_history():
    branch = trained(low="latents")
    take = take_of(tiny_wan(grid=(8, 8)), compressor=branch)
    next(take)
    with torch.no_grad():
        branch.proj_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="compressed"):
        next(take)
    assert take.index == 1 and len(take.history.blocks) == 1


def test_rebuild_rewrites_both_forms_of_a_chunk():
    take = take_of(tiny_wan(grid=(8, 8), vae=True), keep_latents=True)
    for _ in range(3):
        next(take)
    store = take.history.stores["cond"]

    def keys(block: int, form: str) -> torch.Tensor:
        return store.k[:, :, store.held[(block, form)].rows].clone()

    before = {(block, form): keys(block, form) for block in (1, 2) for form in ("full", COMPRESSED)}
    assert take.rebuild() == 3
    for at, k in before.items():
        torch.testing.assert_close(keys(*at), k, **CLOSE)
    next(take)  # of chunk 1 the compressed form is left alone
    take.set_prompt_embeds(text(seed=8))
    assert take.rebuild() == 3
    for form in ("full", COMPRESSED):
        assert not torch.allclose(keys(2, form), before[(2, form)], atol=1e-3)
    assert torch.equal(keys(1, COMPRESSED), before[(1, COMPRESSED)])


def test_every_layer_of_the_commit_pass_sees_the_same_history():
    """A published bug: the registry of blocks changed in the first layer, and later ones saw another history."""
    take = take_of(tiny_wan(grid=(8, 8)))
    seen: dict[int, list[int]] = {i: [] for i in range(take.host.layers)}
    attend = LayerView.attend

    def counting(view, q, k, v, **options):
        at = next(i for i, p in enumerate(take.host._self) if p.view is view)
        seen[at].append(view.k.shape[1] - k.shape[1])
        return attend(view, q, k, v, **options)

    LayerView.attend = counting
    try:
        for _ in range(4):
            next(take)
    finally:
        LayerView.attend = attend
    assert seen[0] == seen[1] == seen[2] and max(seen[0]) > 0
    per_chunk = [set(seen[0][3:7]), set(seen[0][7:11]), set(seen[0][11:15])]  # chunk 0 makes no compressed form
    assert all(len(sizes) == 1 for sizes in per_chunk)


def test_a_policy_that_asks_for_compressed_forms_without_saying_so_is_told():
    @dataclass(frozen=True)
    class Silent(Middle):
        requires: ClassVar[frozenset[str]] = frozenset()

    take = take_of(policy=Silent())
    next(take)
    with pytest.raises(PlanError, match="requires"):
        next(take)
