"""The embedded yardstick needs its memory: what it shows of a returning actor comes out of its history."""

import pytest
import torch

import longtake
from longtake.evaluate.compare.arms import NO_HISTORY, SHUFFLED, Arm
from longtake.evaluate.compare.footage import Footage
from longtake.evaluate.compare.protocols import Setting, run
from longtake.policies import SlidingWindow

SETTING = Setting(frames=27, gaps=(4, 8))
SCENES = range(3)


@pytest.fixture(scope="module")
def host():
    torch.set_num_threads(1)
    return longtake.load("tiny-wan", device="cpu")


@pytest.fixture(scope="module")
def recalled(host):
    """Share of returns with the right colour, by control."""

    def share(control: str) -> float:
        policy = SlidingWindow(3 if control == NO_HISTORY else host.config.training_frames, sink=0)
        arm = Arm(control or "window", policy, control)
        films = [Footage(host, seed, SETTING.length(host), SETTING.gaps) for seed in SCENES]
        events = [event for film in films for event in run(arm, film, SETTING)["events"]]
        assert len(events) >= 6
        return sum(event["colour"] for event in events) / len(events)

    return {control: share(control) for control in ("", NO_HISTORY, SHUFFLED)}


def test_actors_come_back_in_their_colours_with_history_and_not_without(recalled):
    assert recalled[""] - recalled[NO_HISTORY] >= 0.4


def test_somebody_elses_history_brings_back_somebody_else(recalled):
    assert recalled[SHUFFLED] <= 0.2 and recalled[""] - recalled[SHUFFLED] >= 0.4
