"""Every measure of a clip says by hand-computed cases what it means, and is bad where it must be."""

import numpy as np
import pytest

from longtake.evaluate.metrics import DEFINITIONS, Meter
from longtake.evaluate.metrics.light import brightness, contrast, flicker, sharpness
from longtake.evaluate.metrics.likeness import CAP, psnr_frames, ssim_frames
from longtake.evaluate.metrics.meter import lawful_steps
from longtake.evaluate.metrics.motion import speeds
from longtake.evaluate.metrics.repetition import repetition, similarity, thumbnails
from longtake.evaluate.metrics.trend import t_quantile, trend

RNG = np.random.default_rng(0)


def grey(values, height: int = 8, width: int = 8) -> np.ndarray:
    """uint8 [T, H, W, 3] of one level a frame."""
    return np.broadcast_to(np.asarray(values, np.uint8)[:, None, None, None], (len(values), height, width, 3)).copy()


def ball(places, size: int = 64) -> np.ndarray:
    """A red disc of radius 9 at (x, y) of every frame, on a dark ground."""
    yy, xx = np.mgrid[:size, :size]
    discs = [((xx - x) ** 2 + (yy - y) ** 2 < 81)[..., None] for x, y in places]
    return np.stack([np.where(disc, (220, 40, 40), (30, 30, 40)) for disc in discs]).astype(np.uint8)


def test_psnr_of_one_level_is_48_decibels():
    a, b = grey([100, 100]), grey([101, 100])
    assert psnr_frames(a, b) == pytest.approx([10 * np.log10(255**2), CAP])  # 48.13 dB
    assert psnr_frames(a, 255 - a).max() < 15


def test_ssim_is_one_for_equal_frames_and_low_for_what_lost_its_structure():
    noise = RNG.integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    flat = np.full_like(noise, round(noise.mean()))
    assert ssim_frames(noise, noise) == pytest.approx([1.0], abs=1e-5)
    assert ssim_frames(noise, flat)[0] < 0.05 and ssim_frames(noise, 255 - noise)[0] < 0
    # of flat frames only the luminance term is left: (2ab + c) / (a² + b² + c)
    c = (0.01 * 255) ** 2
    assert ssim_frames(grey([50], 32, 32), grey([100], 32, 32))[0] == pytest.approx((1e4 + c) / (12500 + c), rel=1e-4)


def test_light_of_half_black_and_half_white():
    frames = grey([0])
    frames[:, :, 4:] = 200
    assert brightness(frames) == pytest.approx([100], abs=1e-3) and contrast(frames) == pytest.approx([100], abs=1e-3)
    # the Laplacian is ±200 in the two columns at the edge, of six that have neighbours, and 0 elsewhere
    assert sharpness(frames) == pytest.approx([np.sqrt(200**2 / 3)], abs=1e-3)
    blurred = grey([0]) + np.linspace(0, 200, 8).astype(np.uint8)[None, None, :, None]
    assert sharpness(blurred)[0] < 2, "a ramp is not sharp"


def test_flicker_counts_what_comes_back_and_not_what_fades_or_moves():
    assert flicker(grey([100, 110, 100, 110])) == pytest.approx([10, 10], abs=1e-3)
    assert flicker(grey([100, 110, 107])) == pytest.approx([3], abs=1e-3)
    assert flicker(grey([100, 110, 120, 130])) == pytest.approx([0, 0])
    edge = grey([0, 0, 0, 0])
    for t in range(4):
        edge[t, :, : 2 + t] = 200
    assert flicker(edge) == pytest.approx([0, 0])


def test_a_trend_is_the_slope_a_minute_and_its_interval_holds_it():
    line = 100 + np.arange(160) / 16 / 60 * 30.0  # ten seconds, 30 levels a minute
    found = trend(line, 16)
    assert found.slope == pytest.approx(30) and (found.low, found.high) == pytest.approx((30, 30))
    assert trend(line[:79], 16) is None, "less than five seconds"
    hits = 0
    for _ in range(200):
        clip = trend(5 * RNG.standard_normal(30), 1)
        hits += clip.low <= 0 <= clip.high
    assert 180 <= hits <= 200, "95 % of the intervals hold the true slope, 0"


def test_a_wandering_clip_has_a_wider_interval_than_a_noisy_one():
    noise = RNG.standard_normal(240)
    wander = np.convolve(noise, np.ones(12) / np.sqrt(12), "same")  # the same spread, neighbouring seconds alike
    width = lambda values: (found := trend(values, 1)).high - found.low
    assert width(wander) > 1.5 * width(noise)
    assert trend(np.abs(np.arange(20) - 9.5), 1).low is None, "too alike to tell"


def test_the_quantile_of_t():
    assert [t_quantile(n) for n in (3, 5, 10, 1e9)] == pytest.approx([3.182, 2.571, 2.228, 1.960], rel=0.01)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_moving_ball_has_its_speed(step):
    frames = ball([(16 + step * t, 32) for t in range(6)])
    found = speeds(frames, 16) * 64 / 16
    assert len(found) == 5 and np.median(found) == pytest.approx(step, rel=0.3, abs=0.6)


def test_nothing_moves_in_a_frozen_a_fading_and_a_noisy_picture():
    still = ball([(32, 32)] * 4)
    noisy = grey([100] * 4, 32, 32) + RNG.integers(0, 4, (4, 32, 32, 3)).astype(np.uint8)
    assert speeds(still, 16).max() < 1e-3 and speeds(noisy, 16).max() < 0.1
    assert speeds(grey([100, 110, 120], 32, 32), 16).max() < 1e-3
    assert len(speeds(still[:1], 16)) == 0


def test_a_loop_and_a_frozen_picture_repeat_themselves_and_a_long_walk_does_not():
    measure = lambda frames: repetition(similarity(thumbnails(frames)), 16)
    there_and_back = [*range(10, 54, 4), *range(54, 10, -4)]
    assert measure(ball([(x, 32) for x in there_and_back * 4])) > 0.9
    assert measure(ball([(32, 32)] * 48)) == 1.0
    assert measure(ball([(10 + t * 0.9, 32) for t in range(48)])) < 0.1
    assert repetition(np.ones(5), 16) is None, "less than a second"


def test_likeness_at_a_lag_is_a_correlation():
    values = np.array([[1.0], [-1.0], [1.0], [-1.0]]) * 10
    assert similarity(values) == pytest.approx([1, -1, 1])


def test_a_clock_that_jumps_or_stands_is_unlawful():
    lawful = np.arange(9) / 48
    jump = np.array([*lawful[:5], *(lawful[5:] + 0.3)])
    assert lawful_steps(lawful % 1, 48).mean() == 1 and lawful_steps(jump, 48).sum() == 7
    assert lawful_steps(np.zeros(9), 48).mean() == 0


def test_a_clip_measured_in_pieces_is_the_clip_measured_at_once():
    frames = ball([(10 + t % 40, 20 + t % 17) for t in range(96)], 48)
    frames += RNG.integers(0, 9, (96, 1, 1, 1)).astype(np.uint8)
    whole, pieces = Meter(16), Meter(16)
    whole.add(frames)
    for first, last in ((0, 1), (1, 2), (2, 45), (45, 96)):
        pieces.add(frames[first:last])
    assert pieces.summary() == whole.summary() and pieces.frames() == whole.frames()
    per_frame = whole.frames()["per_frame"]
    assert {len(values) for values in per_frame.values()} == {96}
    assert per_frame["motion"][0] is None and per_frame["flicker"][0] is None is per_frame["flicker"][-1]
    assert None not in per_frame["motion"][1:] and None not in per_frame["flicker"][1:-1]
    assert set(whole.summary()) <= set(DEFINITIONS)


def test_a_fading_clip_drifts():
    meter = Meter(16)
    meter.add(grey(200 - np.arange(160) // 2))
    told = meter.summary()
    assert told["brightness_drift"]["slope"] == pytest.approx(-480, rel=0.01)  # half a level a frame, 960 frames
    assert told["contrast_drift"]["slope"] == 0 and told["dynamic_degree"] == pytest.approx(0, abs=1e-3)
