"""One rotary layout for every model: conventions, exactness far out, and moving a key instead of recomputing it."""

import math

import mpmath
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.rope import RotaryTable, mm_rope_table, wan_table

from .reference.rotation import rotate

TABLES = {
    "interleaved": RotaryTable((0, 1, 2, 2), (1.0, 0.5, 0.3, 0.01), "interleaved"),
    "half": RotaryTable((0, 1, 2, 0), (1.0, 0.5, 0.3, 0.01), "half"),
    "interleaved, part of the head": RotaryTable((2, 0, 1), (1.0, 0.25, 0.07), "interleaved"),
    "half, part of the head": RotaryTable((2, 0, 1), (1.0, 0.25, 0.07), "half"),
    "one axis": RotaryTable((0, 0, 0, 0), (1.0, 0.1, 0.01, 0.001), "half", axes=1),
}
EACH_TABLE = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
HEAD_DIM = 8  # four pairs; three pairs leave two channels alone
EXACT = {"rtol": 0, "atol": 2e-6}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(-50, 500, shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(params=["eager", "compiling"])
def path(request, monkeypatch):
    """Both bodies of the rotation: the complex one, and the real one that a compiler sees."""
    if request.param == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@EACH_TABLE
def test_rotation_equals_a_complex_product_pair_by_pair(table, path):
    x, at = tokens(2, 5, 3, HEAD_DIM), positions(5, table.axes)
    torch.testing.assert_close(table.rotate(x, table.phases(at)).double(), rotate(table, x, at), **EXACT)


@EACH_TABLE
def test_every_head_may_have_positions_of_its_own(table, path):
    x, at = tokens(2, 5, 3, HEAD_DIM), positions(2, 5, 3, table.axes)
    torch.testing.assert_close(table.rotate(x, table.phases(at)).double(), rotate(table, x, at), **EXACT)
    per_take = positions(2, 5, 1, table.axes)  # every take its own, shared by heads
    torch.testing.assert_close(table.rotate(x, table.phases(per_take)).double(), rotate(table, x, per_take), **EXACT)


@EACH_TABLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_out_receives_the_rotation_and_nothing_around_it_is_touched(table, dtype, out_dtype, path):
    x, at = tokens(1, 5, 3, HEAD_DIM).to(dtype), positions(5, table.axes)
    buffer = torch.full((1, 9, 3, HEAD_DIM), 77.0, dtype=out_dtype)
    out = table.rotate(x, table.phases(at), out=buffer[:, 2:7])
    expected = rotate(table, x, at)
    rounding = 2**-8 if out_dtype == torch.bfloat16 else 0
    torch.testing.assert_close(buffer[:, 2:7].double(), expected, rtol=rounding, atol=2e-6)
    assert out.data_ptr() == buffer[:, 2:7].data_ptr()
    assert (buffer[:, :2] == 77).all() and (buffer[:, 7:] == 77).all()


@EACH_TABLE
def test_bf16_is_rounded_once(table, path):
    x, at = tokens(2, 40, 3, HEAD_DIM).bfloat16(), positions(40, table.axes)
    turned = table.rotate(x, table.phases(at))
    assert turned.dtype == torch.bfloat16
    error = (turned.double() - rotate(table, x, at)).abs()
    assert bool((error <= rotate(table, x, at).abs() * 2**-8 + 2e-6).all())  # half an ulp, and fp32 noise


@EACH_TABLE
@pytest.mark.parametrize("layout", ["heads first", "slice of a fused projection", "channels apart"])
def test_layout_in_memory_does_not_matter(table, layout, path):
    x, at = tokens(2, 5, 3, HEAD_DIM), positions(5, table.axes)
    if layout == "heads first":
        odd = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "slice of a fused projection":
        odd = torch.stack((x, x + 1, x + 2), 2)[:, :, 0]
    else:
        odd = torch.stack((x, x + 1), -1)[..., 0]
    assert torch.equal(odd, x) and not odd.is_contiguous()
    phases = table.phases(at)
    ulp = {"rtol": 3e-7, "atol": 3e-7}  # complex products of vectorised and strided loops round differently
    torch.testing.assert_close(table.rotate(odd, phases), table.rotate(x, phases), **ulp)
    out = torch.empty(2, 3, 5, HEAD_DIM).transpose(1, 2)
    torch.testing.assert_close(table.rotate(odd, phases, out=out), table.rotate(x, phases), **ulp)


@EACH_TABLE
def test_channels_beyond_the_last_pair_are_left_alone(table, path):
    x = tokens(1, 5, 2, HEAD_DIM + 3)
    turned = table.rotate(x, table.phases(positions(5, table.axes)))
    assert torch.equal(turned[..., 2 * table.pairs :], x[..., 2 * table.pairs :])
    assert not torch.equal(turned[..., : 2 * table.pairs], x[..., : 2 * table.pairs])


def test_the_two_pairings_are_one_rotation_of_differently_ordered_channels():
    interleaved, half = TABLES["interleaved"], RotaryTable((0, 1, 2, 2), (1.0, 0.5, 0.3, 0.01), "half")
    x, at = tokens(1, 5, 2, HEAD_DIM), positions(5, 3)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # first channels of all pairs, then second
    turned = interleaved.rotate(x, interleaved.phases(at))
    torch.testing.assert_close(half.rotate(x[..., order], half.phases(at)), turned[..., order], **EXACT)


@pytest.mark.parametrize("head_dim", [12, 20, 64, 128])
def test_wan_table_equals_the_table_of_diffusers(head_dim):
    frames, height, width = 4, 6, 5
    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)(torch.zeros(1, 1, frames, 2 * height, 2 * width))
    grid = torch.cartesian_prod(*(torch.arange(n) for n in (frames, height, width)))
    phases = wan_table(head_dim).phases(grid)  # [N, P, 2]
    for ours, theirs in ((phases[..., 0], cos), (phases[..., 1], sin)):
        torch.testing.assert_close(ours.repeat_interleave(2, -1), theirs[0, :, 0], rtol=0, atol=1e-6)


def mm_rope_twin(x: torch.Tensor, at: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    """Lumos-1's rotation, written out: x [N, D], at [N, 3] of whole numbers → fp64 [N, D]. Channels i and i + D/2 are a
    pair; of every 16 pairs the first 4 turn with time, then two with height and two with width, three times over; pair
    i turns by θ^(−2i/D) for every position on its axis."""
    n, width = x.shape
    out = x.double().clone()
    for token in range(n):
        for i in range(width // 2):
            place = i % 16
            axis = 0 if place in (0, 1, 2, 3) else 1 if place in (4, 5, 8, 9, 12, 13) else 2
            angle = float(at[token, axis]) * theta ** (-2 * i / width)
            a, b = float(x[token, i]), float(x[token, i + width // 2])
            out[token, i] = a * math.cos(angle) - b * math.sin(angle)
            out[token, i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_mm_rope_is_the_written_out_rotation(head_dim, theta):
    table = mm_rope_table(head_dim, theta)
    x = tokens(1, 12, 1, head_dim)
    at = torch.cat((positions(8, 3), torch.arange(53_000, 53_004).double()[:, None].expand(4, 3)))  # structural ids
    turned = table.rotate(x, table.phases(at))[0, :, 0].double()
    torch.testing.assert_close(turned, mm_rope_twin(x[0, :, 0], at, theta), rtol=0, atol=1e-6)
    assert [table.axis.count(axis) * 32 // head_dim for axis in range(3)] == [4, 6, 6]  # 2 : 3 : 3


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_moving_an_mm_rope_key_in_time_leaves_its_pairs_of_height_and_width_bitwise(head_dim):
    table, x = mm_rope_table(head_dim), tokens(2, 9, 3, head_dim)
    key = table.rotate(x, table.phases(positions(9, 3)))
    moved = table.rotate(key, table.phases(torch.tensor([[-4.0, 0.0, 0.0]]).expand(9, 3)))
    still = torch.tensor([axis != 0 for axis in table.axis] * 2)
    assert torch.equal(moved[..., still], key[..., still])
    assert (moved[..., ~still] != key[..., ~still]).any(0).all()


# --- moving a key -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(TABLES)), st.integers(0, 5000), st.integers(-5000, 5000))
def test_rotating_further_equals_recomputing_at_the_new_position(name, start, delta):
    table = TABLES[name]
    x, at = tokens(1, 4, 2, HEAD_DIM), positions(4, table.axes) + start
    moved = table.rotate(table.rotate(x, table.phases(at)), table.phases(torch.full_like(at, delta)))
    torch.testing.assert_close(moved, table.rotate(x, table.phases(at + delta)), rtol=0, atol=5e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(TABLES)), st.integers(-(10**6), 10**6))
def test_a_constant_added_to_all_positions_changes_no_logit(name, constant):
    table = TABLES[name]
    q, k = tokens(1, 4, 1, HEAD_DIM), tokens(1, 6, 1, HEAD_DIM, seed=2)
    at_q, at_k = positions(4, table.axes), positions(6, table.axes, seed=3)
    logits = [
        table.rotate(q, table.phases(at_q + c))[0, :, 0] @ table.rotate(k, table.phases(at_k + c))[0, :, 0].T
        for c in (0, constant)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_rotating_bf16_keys_in_place_again_and_again_loses_what_one_rotation_keeps():
    """Why the history stores keys before rotation."""
    table, x = wan_table(64), tokens(1, 64, 2, 64).bfloat16()
    one = table.phases(torch.tensor([[1.0, 0.0, 0.0]]).expand(64, 3))
    repeated = x
    for _ in range(100):
        repeated = table.rotate(repeated, one)
    at = torch.tensor([[100.0, 0.0, 0.0]]).expand(64, 3)
    exact, once = rotate(table, x, at), table.rotate(x, table.phases(at))
    error = lambda y: float((y.double() - exact).norm() / exact.norm())
    assert error(once) < 2e-3 and error(repeated) > 5 * error(once)


# --- far out ----------------------------------------------------------------------------------------------------------


def exact_phases(position: float, frequency: float) -> tuple[float, float]:
    with mpmath.workdps(50):
        angle = mpmath.mpf(position) * mpmath.mpf(frequency)
        return float(mpmath.cos(angle)), float(mpmath.sin(angle))


@pytest.mark.parametrize("frame", [0, 81, 100_000, 100_000 * 4084])  # the last: a frame marker of Lumos-1 at frame 1e5
def test_phases_are_exact_at_any_frame(frame):
    table = wan_table(128)
    phases = table.phases(torch.tensor([frame, 29.0, 51.0]))
    place = (frame, 29, 51)
    for pair in range(table.pairs):
        exact = exact_phases(place[table.axis[pair]], table.frequency[pair])
        assert phases[pair].tolist() == pytest.approx(exact, abs=2e-7)


def test_angles_in_fp32_would_be_off_by_a_visible_amount():
    table = wan_table(128)
    angle = torch.tensor(100_001.0) * torch.tensor(table.frequency[:22])
    exact = torch.tensor([exact_phases(100_001, f) for f in table.frequency[:22]], dtype=torch.float64)
    assert float((angle.cos() - exact[:, 0]).abs().max()) > 1e-3


def test_whole_and_fractional_positions_of_any_dtype_are_numbers():
    table = wan_table(12)
    whole = positions(5, 3)
    assert torch.equal(table.phases(whole.long()), table.phases(whole))
    assert torch.equal(table.phases((whole + 0.5).float()), table.phases(whole + 0.5))
    assert not torch.equal(table.phases(whole), table.phases(whole + 0.5))
