"""A quantised history: what it costs in precision, and that everything else of a take stays as it was.

The twin of every take here is a plain one whose keys and values are rounded, by a slow formula, before they are stored.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake import LongtakeError, PackForcing, Session, SlidingWindow, policies
from longtake.attention import attend
from longtake.commands.generate import fitted, generate
from longtake.commands.options import HISTORY_DTYPES
from longtake.evaluate.measure import live_tensor_bytes
from longtake.history import FORMS, History, storage_form
from longtake.plan import HistoryShape
from longtake.policies import FlowCacheKV
from longtake.rope import wan_table
from longtake.samplers.stagger import Stagger
from longtake.session import history_shape

from .skyreels import tiny_skyreels
from .test_equivalences import latents_of, small
from .tiny import text, tiny_wan

NAMES = sorted(policies.available())
LARGEST = {"int8": 127.0, "fp8": 448.0}


def take_of(policy=None, host=None, **options) -> Session:
    options = {"prompt_embeds": text(), "decode": False} | options
    return Session(host or tiny_wan(timesteps=(1000,)), policy or SlidingWindow(9, sink=3), **options)


def rounded(x: Tensor, name: str) -> Tensor:
    """x [..., D] as a code of its own scale says it."""
    scale = x.abs().max(-1, keepdim=True).values / LARGEST[name]
    units = x / torch.where(scale > 0, scale, 1.0)
    codes = units.round() if name == "int8" else units.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return codes * scale


def round_when_written(history: History, name: str) -> None:
    for store in history.stores.values():
        write = store.write
        store.write = lambda layer, at, k, v, write=write: write(layer, at, rounded(k, name), rounded(v, name))


# --- one token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FORMS))
@pytest.mark.parametrize("size", [1e-30, 3e-4, 1.0, 7e5])
def test_a_number_is_off_by_half_a_step_at_most_whatever_its_size(name, size):
    x = torch.randn(200, 3, 24, generator=torch.Generator().manual_seed(0)) * size
    x[::2, :, :2] *= 50  # outlier channels
    form = FORMS[name]
    codes, scale = form.pack(x)
    back = form.unpack(codes, scale, torch.empty_like(x))
    largest = x.abs().amax(-1, keepdim=True)
    bound = {
        "int8": (largest / 254).expand_as(x),
        "fp8": torch.maximum(x.abs() / 16, largest / 448 * 2**-10),  # 3 bits of mantissa; below 2^-6, even steps
    }[name]
    assert bool(((back - x).abs() <= bound * 1.0001).all())
    assert torch.equal(back, rounded(x, name))
    assert codes.itemsize == 1 and codes.shape == x.shape and scale.shape == x.shape[:-1]


@pytest.mark.parametrize("name", sorted(FORMS))
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(name):
    form = FORMS[name]
    x = torch.ones(4, 8)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    back = form.unpack(*form.pack(x), torch.empty_like(x))
    assert torch.equal(back[0], x[0]) and torch.equal(back[3], x[3])
    assert not torch.isfinite(back[1]).any() and not torch.isfinite(back[2, 5])


@pytest.mark.parametrize("name", sorted(FORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_code_is_read_in_any_dtype_with_one_rounding(name, dtype):
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    codes, scale = FORMS[name].pack(x)
    exact = FORMS[name].unpack(codes, scale, torch.empty_like(x))
    assert torch.equal(FORMS[name].unpack(codes, scale, torch.empty_like(x, dtype=dtype)), exact.to(dtype))


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.012), ("fp8", 0.045)])
def test_attention_over_a_quantised_past_is_off_by_about_a_percent(name, bound):
    """Of normal queries, keys and values; relative, root mean square."""
    normal = lambda *size: torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))
    q, k, v = normal(1, 64, 4, 64), normal(1, 500, 4, 64), normal(1, 501, 4, 64)[:, :500]
    exact = attend(q, k, v)
    off = attend(q, rounded(k, name), rounded(v, name)) - exact
    assert bound / 4 < float(off.norm() / exact.norm()) < bound


# --- every policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_quantised_take_is_the_take_whose_keys_and_values_were_rounded_when_written(name, form):
    """For every policy, to the bit, wherever the view lives; and the plans are those of the take as it was."""
    options = {"guidance_scale": 3.0, "negative_prompt_embeds": text(seed=9), "seed": 5}
    quantised = take_of(small(name), history_dtype=form, residency="scratch", **options)
    twin = take_of(small(name), residency="resident", **options)
    round_when_written(twin.history, form)
    for _ in range(6):
        ours, theirs = next(quantised), next(twin)
        assert torch.equal(ours.latents, theirs.latents)
        assert ours.stats.attended_tokens == theirs.stats.attended_tokens
    for store in quantised.history.stores.values():
        assert all(t.dtype in (torch.int8, torch.uint8) for t in (store.k, store.v))


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_fitted_to_bytes_holds_more_of_a_quantised_past_and_no_byte_too_many(name):
    host = tiny_wan(timesteps=(1000,))
    plain, shape = history_shape(host, host.geometry()), history_shape(host, host.geometry(), history_dtype="int8")
    assert (plain.token_bytes, shape.token_bytes) == (2 * 3 * 2 * 12 * 4, 2 * 3 * 2 * (12 + 4))
    assert shape.view_token_bytes == plain.token_bytes
    budget = 14 * plain.frame_bytes
    try:
        before, policy = (policies.available()[name]().fit(budget, each) for each in (plain, shape))
        policy.check(shape)
    except LongtakeError:
        pytest.skip(f"{name} is not fitted to bytes")
    assert policy.capacity(shape) > before.capacity(plain)
    take = take_of(policy, host, history_dtype="int8")
    latents_of(take, 3)
    for store in take.history.stores.values():
        held = sum(t.nbytes for t in store.kept)
        assert held == policy.capacity(shape) * shape.token_bytes <= budget
        assert held <= store.nbytes
    assert take.history.held_bytes <= budget


@pytest.mark.parametrize("name", NAMES)
def test_a_quantised_take_goes_on_from_its_snapshot_to_the_bit(name, tmp_path):
    form = sorted(FORMS)[NAMES.index(name) % 2]
    take = take_of(small(name), history_dtype=form, seed=2)
    latents_of(take, 4)
    take.snapshot(tmp_path / "s")
    again = Session.restore(tmp_path / "s", tiny_wan(timesteps=(1000,)))
    assert again.history_dtype == form
    for key, store in take.history.stores.items():
        other = again.history.stores[key]
        for a, b in zip(store.kept, other.kept, strict=True):
            assert torch.equal(a[:, :, store.used], b[:, :, other.used])
    for _ in range(3):
        assert torch.equal(next(again).latents, next(take).latents)
    assert again.memory() == take.memory()


# --- the rest of the history ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_archive_in_host_memory_is_quantised_too(form):
    options = {"sink": 1, "top_k": 2, "recent": 1, "archive": 3, "layers": "shared"}
    here, away = (take_of(PackForcing(**options, offload=offload), history_dtype=form) for offload in (False, True))
    for _ in range(8):
        assert torch.equal(next(here).latents, next(away).latents)
    archive, staging = away.history.archives["cond"], away.history.staging["cond"]
    assert archive.held and {t.dtype for t in (archive.k, staging.k)} == {FORMS[form].codes}
    plain = take_of(PackForcing(**options, offload=True))
    assert plain.memory()["archive"] > 2 * away.memory()["archive"]


@pytest.mark.parametrize("policy", [SlidingWindow(20, sink=0), FlowCacheKV(chunks=5, queries="next")])
def test_chunks_in_flight_see_each_other_as_the_store_has_them(policy, tmp_path):
    """Several at a time: the residencies agree to the bit, and a snapshot with chunks in flight goes on to the bit."""
    host = tiny_skyreels(training_frames=30, overlap=None)
    scratch, resident = (
        Session(
            host, policy, prompt_embeds=text(), negative_prompt_embeds=text(seed=4), decode=False, chunks=7, seed=3,
            sampler=Stagger(steps=6, lag=2), residency=residency, history_dtype="int8",
        )
        for residency in ("scratch", "resident")
    )  # fmt: skip
    for _ in range(4):
        assert torch.equal(next(scratch).latents, next(resident).latents)
    assert resident.history.table().live
    resident.snapshot(tmp_path / "s")
    again = Session.restore(tmp_path / "s", host)
    for chunk in resident:
        assert torch.equal(chunk.latents, next(again).latents) and torch.equal(chunk.latents, next(scratch).latents)


def test_bytes_that_are_counted_are_bytes_that_are_held():
    host = tiny_wan(timesteps=(1000,))
    before = live_tensor_bytes()
    take = take_of(host=host, history_dtype="int8")
    latents_of(take, 5)
    counted = take.memory()
    assert counted["store"] < take_of(host=host).memory()["store"] / 1.5
    held = live_tensor_bytes() - before
    assert abs(held - counted["total"]) < 0.05 * counted["total"] + 4096


def test_a_memory_limit_counts_codes_for_the_store_and_numbers_for_the_view():
    host = tiny_wan(timesteps=(1000,))
    shape, rows = history_shape(host, host.geometry(), history_dtype="fp8"), 9 * 6
    need = rows * shape.token_bytes + rows * shape.view_token_bytes
    assert take_of(host=host, history_dtype="fp8", memory_limit=need).history.residency == "resident"
    assert take_of(host=host, history_dtype="fp8", memory_limit=need - 1).history.residency == "scratch"


def test_what_cannot_be_quantised_is_refused_in_one_line():
    for options, words in (
        ({"history_dtype": "int4"}, "int8, fp8"),
        ({"history_dtype": "int8", "residency": "alias"}, "use residency='scratch'"),
    ):
        with pytest.raises(LongtakeError, match=words) as error:
            take_of(**options)
        assert "\n" not in str(error.value)
    assert storage_form(None) is None


def test_the_command_line_keeps_a_quantised_history_and_says_what_it_accepts():
    assert set(HISTORY_DTYPES) == set(FORMS)
    host, budget = tiny_wan(timesteps=(1000,)), 20000
    plain, quantised = (fitted(SlidingWindow(9), budget, host, None, None, None, form) for form in (None, "int8"))
    assert quantised.frames > 2 * plain.frames
    with pytest.raises(LongtakeError, match="--history-dtype 'int4': use one of"):
        generate(Path("a.mp4"), "a ball", history_dtype="int4")


def test_a_moved_form_keeps_its_codes():
    """Fused survivors, and blocks sent to another store, are never quantised a second time."""
    shape = HistoryShape(1, 1, 12, 4, 2, 1)
    history = History(shape, wan_table(12), capacity=8, history_dtype="int8", offloaded=(8, 8))
    store, other = history.stores["cond"], history.archives["cond"]
    rows = store.take((0, "full"), torch.zeros(4, 3), torch.zeros(4, 3))
    store.write(0, (slice(None), rows.rows), *torch.randn(2, 1, 4, 1, 12))
    before = [t[:, :, rows.rows].clone() for t in store.kept]
    store.send((0, "full"), other)
    assert all(torch.equal(a, b[:, :, other.held[0, "full"].rows]) for a, b in zip(before, other.kept, strict=True))
