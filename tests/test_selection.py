"""`longtake analyze selection`: what it records is what was shown, and what it says of it is arithmetic."""

import json

import pytest
from typer.testing import CliRunner

from longtake import LongtakeError, PackForcing
from longtake.cli import app
from longtake.evaluate.selection import Picks, SelectionReport, measure

from .test_equivalences import image
from .test_packforcing import picked_blocks, take_of
from .tiny import text, tiny_wan


def report_of(*chunks: Picks) -> SelectionReport:
    return SelectionReport("made up", {"policy": "p"}, {}, list(chunks))


@pytest.mark.parametrize("layers", ["each", "shared"])
def test_it_records_the_blocks_that_were_picked(layers):
    policy = PackForcing(sink=1, top_k=2, archive=12, layers=layers)
    report = measure(tiny_wan(), policy=policy, chunks=12, prompt_embeds=text())
    shown = picked_blocks(take_of(policy), 12)  # block ids, which are chunk numbers here
    assert [[list(layer) for layer in c.picked] for c in report.chunks] == [[list(x) for x in chunk] for chunk in shown]
    assert [c.chunk for c in report.chunks] == list(range(5, 12))
    assert report.chunks[-1].candidates == tuple(range(1, 10))


def test_a_first_image_does_not_shift_the_numbers():
    """Image, then chunks 0, 1, …: the image is the sink, chunk 0 the oldest block of the middle."""
    policy = PackForcing(sink=1, top_k=1, archive=9)
    host = tiny_wan(vae=True)
    report = measure(host, policy=policy, chunks=7, prompt_embeds=text(), image=image())
    assert [(c.chunk, c.candidates) for c in report.chunks] == [(n, tuple(range(n - 1))) for n in range(3, 7)]


def test_demand_counts_chances_and_spread_is_one_for_one_block():
    report = report_of(Picks(5, (1, 2, 3), ((3,), (3,))), Picks(6, (1, 2, 3, 4), ((3,), (4,))))
    demand = {age: (picked, random) for age, picked, random in report.demand()}
    assert demand[2] == ((2 + 1) / 4, (2 / 3 + 2 / 4) / 4) and demand[4] == (0.0, (2 / 3 + 2 / 4) / 4)
    assert demand[5] == (0.0, 1 / 4) and demand[3] == (1 / 4, (2 / 3 + 2 / 4) / 4)
    spread = report.spread()
    assert spread["effective_blocks"] == pytest.approx((1 + 2) / 2)
    assert spread["newest"] == pytest.approx((1 + 0.5) / 2)
    assert spread["jaccard_next_chunk"] == 0.5 and spread["jaccard_layers"] == 0.5
    assert spread["newest_at_random"] == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_picks_at_random_look_random():
    import random

    dice = random.Random(0)
    chunks = [Picks(i, tuple(range(40)), tuple(tuple(sorted(dice.sample(range(40), 8))) for _ in range(6)))
              for i in range(41, 141)]  # fmt: skip
    spread = report_of(*chunks).spread()
    assert spread["newest"] == pytest.approx(spread["newest_at_random"], abs=0.02)
    assert spread["jaccard_layers"] == pytest.approx(spread["jaccard_at_random"], abs=0.02)
    assert spread["jaccard_next_chunk"] == pytest.approx(spread["jaccard_at_random"], abs=0.02)


def test_the_command_writes_numbers_and_pictures(tmp_path):
    command = ["analyze", "selection", "--chunks", "8", "--policy", "packforcing:sink=1,top_k=2", "--size", "32x32",
               "--out", str(tmp_path), "--json"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "selection.json").read_text())
    assert told == json.loads(result.stdout) and len(told["chunks"]) == 3
    for name in ("map", "age"):
        assert (tmp_path / f"selection-{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": PackForcing(select="recent")}, "select=top"),
        ({"policy": PackForcing(sink=1, top_k=2), "chunks": 5}, "ask for 6 or more"),
    ],
)
def test_what_chooses_nothing_is_refused(options, message):
    with pytest.raises(LongtakeError, match=message):
        measure(tiny_wan(), prompt_embeds=text(), **options)
