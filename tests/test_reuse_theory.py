"""Relative L1 on paper: the closed form, the exact criterion for it to rise, and what it predicts."""

import json
from pathlib import Path

import pytest

from longtake import FlowCacheReuse
from longtake.reuse.theory import (
    magi_levels,
    power_levels,
    predicted_reuse,
    relative_l1,
    rises,
    skyreels_levels,
    steepest_power,
)

THEORY = json.loads((Path(__file__).parent / "goldens" / "relative_l1_theory.json").read_text())


@pytest.mark.parametrize("case", THEORY["l1rel"], ids=lambda c: f"{c['host']}-{c['num_steps']}-s{c['s']}")
def test_the_closed_form_on_the_hosts_schedules(case):
    steps = case["num_steps"]
    levels = magi_levels(steps) if case["host"] == "magi" else skyreels_levels(steps, case["shift"])
    assert levels == pytest.approx(case["sigmas"], rel=1e-12, abs=1e-15)
    values = relative_l1(levels, case["s"])
    assert values == pytest.approx(case["l1rel"], rel=1e-10)
    assert rises(values) == case["monotone"]


@pytest.mark.parametrize("case", THEORY["p_max"], ids=lambda c: f"s{c['s']}")
def test_the_steepest_power_that_rises(case):
    assert steepest_power(case["s"]) == pytest.approx(case["p_max"], abs=1e-12)


@pytest.mark.parametrize("case", THEORY["power_law"], ids=lambda c: f"s{c['s']}-p{c['p']}")
def test_power_laws(case):
    assert relative_l1(power_levels(64, case["p"]), case["s"]) == pytest.approx(case["l1rel_64"], rel=1e-10)
    assert (case["p"] <= steepest_power(case["s"])) == case["dense_limit_monotone"]


@pytest.mark.parametrize("s", [0.25, 0.5, 1.0, 2.0])
def test_the_criterion_is_sharp(s):
    """A little below it the values rise over 20,000 steps, a little above they do not."""
    p = steepest_power(s)
    assert rises(relative_l1(power_levels(20_000, p - 1e-3), s)[:-1])
    assert not rises(relative_l1(power_levels(20_000, p + 1e-3), s)[:-1])


def test_even_steps_do_not_rise_for_data_of_the_size_of_the_noise():
    """The published theorem says every power rises: with p = 1 and s = 1 the values peak in the middle."""
    values = relative_l1(power_levels(1000, 1.0), 1.0)
    assert not rises(values) and 400 < values.index(max(values)) < 600
    assert rises(relative_l1(power_levels(1000, 1.0), 0.0)[:-1])


@pytest.mark.parametrize("case", THEORY["magi_predicted_reuse"], ids=lambda c: f"s{c['s']}-{c['threshold']}")
def test_predicted_reuse(case):
    policy = FlowCacheReuse(case["threshold"], "latent", warmup=case["warmup"], last="take", rescale="identity")
    changes = relative_l1(magi_levels(case["num_steps"]), case["s"])
    assert predicted_reuse(policy, changes) == case["reused_steps"]
