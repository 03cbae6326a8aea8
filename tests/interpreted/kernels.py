"""Triton kernels beside their slow twins, on the CPU, in Triton's interpreter: `tests/test_kernels.py` runs this file
in a process of its own, since the interpreter has to be chosen before Triton is imported."""

import pytest
import torch
from torch import Tensor

from longtake import PackForcing, Session, SlidingWindow, policies
from longtake.history import FORMS
from longtake.history.view import LayerView
from longtake.kernels import attend_history, gather_rotate
from longtake.policies import FlowCacheKV
from longtake.rope import RotaryTable, mm_rope_table, wan_table
from longtake.samplers.stagger import Stagger

from ..reference.attention import attention
from ..skyreels import tiny_skyreels
from ..test_equivalences import latents_of, small
from ..tiny import text, tiny_wan

TABLES = {
    "interleaved": (wan_table(12), 12),
    "half": (mm_rope_table(32), 32),
    "half, a quarter left alone": (RotaryTable((0, 1, 2), (1.0, 0.5, 0.1), "half"), 8),
    "interleaved, a quarter left alone": (RotaryTable((0, 1, 2), (1.0, 0.5, 0.1), "interleaved"), 8),
}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def turned(rotary: RotaryTable, x: Tensor, phases: Tensor) -> Tensor:
    return rotary.rotate(x.float(), phases)


@pytest.mark.parametrize("layout", sorted(TABLES))
@pytest.mark.parametrize("form", [None, *sorted(FORMS)])
@pytest.mark.parametrize("per_take", [False, True])
def test_gather_and_rotate(layout, form, per_take):
    rotary, dim = TABLES[layout]
    store, place = normal(2, 50, 3, dim), normal(50, 3, seed=1) * 9
    rows = torch.randint(0, 50, (2, 37) if per_take else (37,), generator=torch.Generator().manual_seed(2))
    phases = rotary.phases(place[rows]).unsqueeze(2) if per_take else rotary.phases(place[rows])
    scale, codes, meant = None, store, store
    if form is not None:
        codes, scale = FORMS[form].pack(store)
        meant = FORMS[form].unpack(codes, scale, torch.empty_like(store))
        codes = codes.view(FORMS[form].number)
    took = meant[torch.arange(2)[:, None], rows] if per_take else meant[:, rows]
    whole = torch.full((2, 60, 3, dim), torch.nan)
    out = whole[:, 5:42]  # a window of a longer buffer
    gather_rotate(codes, scale, rows, phases, rotary, out)
    torch.testing.assert_close(out, turned(rotary, took, phases), atol=1e-5, rtol=1e-5)
    assert bool(whole[:, :5].isnan().all()) and bool(whole[:, 42:].isnan().all())
    gather_rotate(codes, scale, rows, None, rotary, out)
    assert torch.equal(out, took)
    half = torch.empty(2, 37, 3, dim, dtype=torch.bfloat16)
    gather_rotate(codes, scale, rows, phases, rotary, half)
    torch.testing.assert_close(half.float(), turned(rotary, took, phases), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("layout", sorted(TABLES))
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("past", [0, 70])
def test_attention_over_codes_and_a_tail(layout, form, past):
    """Grouped queries, two takes, lengths that no tile divides."""
    rotary, dim = TABLES[layout]
    keys, values = normal(2, 90, 2, dim), normal(2, 90, 2, dim, seed=1)
    rows = torch.randperm(90, generator=torch.Generator().manual_seed(3))[:past]
    phases = rotary.phases(normal(past, 3, seed=4) * 9)
    q, k_tail, v_tail = (normal(2, n, h, dim, seed=5 + n) for n, h in ((67, 4), (21, 2), (22, 2)))
    v_tail = v_tail[:, :21].contiguous()
    packed = [FORMS[form].pack(x) for x in (keys, values)]
    meant = [FORMS[form].unpack(*x, torch.empty_like(keys)) for x in packed]
    given = [(codes.view(FORMS[form].number), scale) for codes, scale in packed]
    k = torch.cat((turned(rotary, meant[0][:, rows], phases), k_tail), 1)
    v = torch.cat((meant[1][:, rows], v_tail), 1)
    out = attend_history(q, *given, rows, phases, rotary, k_tail, v_tail)
    torch.testing.assert_close(out, attention(q, k, v)[0].float(), atol=1e-5, rtol=1e-4)


def take_of(policy, host=None, **options) -> Session:
    options = {"prompt_embeds": text(), "decode": False, "residency": "scratch"} | options
    return Session(host or tiny_wan(layers=2, timesteps=(1000,)), policy, **options)


@pytest.mark.parametrize("name", sorted(policies.available()))
def test_a_take_by_kernels_is_the_take_by_pytorch(name, monkeypatch):
    """Every policy; attention reads the codes wherever a policy's view allows it."""
    read = []
    direct = LayerView.attend

    def spied(self, *args, **options):
        read.append(self.direct is not None and self.observe is None)
        return direct(self, *args, **options)

    plain = take_of(small(name), history_dtype="int8")
    expected = latents_of(plain, 5)
    monkeypatch.setattr(LayerView, "attend", spied)
    take = take_of(small(name), history_dtype="int8", kernels="triton")
    first = latents_of(take, 4)
    read.clear()
    torch.testing.assert_close(torch.cat((first, latents_of(take, 1)), -3), expected, atol=2e-4, rtol=0)
    assert any(read) == (name not in WITHOUT)


# their views hold fused blocks, or heads that see different keys
WITHOUT = {"deep-forcing", "dummy-forcing", "flowcache"}


@pytest.mark.parametrize("form", [None, "fp8"])
@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_views_are_gathered_by_kernels_choices_too(residency, form):
    for policy in (SlidingWindow(9, sink=3), PackForcing(sink=1, top_k=2, recent=1, archive=3)):
        options = {"residency": residency, "history_dtype": form}
        both = (take_of(policy, kernels=kernels, **options) for kernels in (None, "triton"))
        expected, got = (latents_of(take, 6) for take in both)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_chunks_in_flight_are_read_as_the_store_has_them():
    host = tiny_skyreels(training_frames=30, overlap=None)
    for policy in (SlidingWindow(20, sink=0), FlowCacheKV(chunks=5, queries="next")):
        expected, got = (
            latents_of(take_of(policy, host, chunks=5, sampler=Stagger(steps=4, lag=2), negative_prompt_embeds=text(),
                               history_dtype="int8", kernels=kernels), 5)
            for kernels in (None, "triton")
        )  # fmt: skip
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
