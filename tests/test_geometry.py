"""Pixel frames, latent frames, tokens, chunks; and what is refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake import Geometry, LongtakeError

WAN = {"height": 480, "width": 832, "channels": 16, "chunk_frames": 3, "fps": 16}


def test_wan_at_480p_has_1560_tokens_a_frame():
    g = Geometry(**WAN)
    assert (g.latent_size, g.grid, g.tokens_per_frame) == ((60, 104), (30, 52), 1560)


def test_lumos_at_384p_has_4032_codes_a_frame():
    g = Geometry(384, 672, 1, 1, 12, stride=(4, 8, 8), patch=(1, 1, 1))
    assert (g.grid, g.tokens_per_frame) == ((48, 84), 4032)


@pytest.mark.parametrize(("latent", "pixels"), [(0, 0), (1, 1), (2, 5), (3, 9), (21, 81), (30_001, 120_001)])
def test_the_first_latent_frame_is_one_pixel_frame_and_every_other_four(latent, pixels):
    g = Geometry(**WAN)
    assert g.pixel_frames(latent) == pixels
    assert g.latent_frames(pixels) == latent


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 10**6), st.integers(1, 8))
def test_latent_frames_are_the_fewest_that_decode_to_enough(pixels, stride):
    g = Geometry(64, 64, 16, 3, 16, stride=(stride, 8, 8))
    latent = g.latent_frames(pixels)
    assert g.pixel_frames(latent) >= pixels > g.pixel_frames(latent - 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(0.01, 7200), st.integers(1, 8), st.sampled_from([8, 12, 16, 23.976, 24, 30]), st.integers(0, 1))
def test_chunks_are_the_fewest_that_last_as_long_as_asked(seconds, chunk, fps, first_image):
    g = Geometry(64, 64, 16, chunk, fps)
    chunks = g.chunks(seconds, given=first_image)
    wanted = round(seconds * fps)
    assert g.pixel_frames(first_image + chunks * chunk) >= wanted
    assert chunks == 1 or g.pixel_frames(first_image + (chunks - 1) * chunk) < wanted


def test_published_lengths():
    g = Geometry(**WAN)
    assert g.chunks(81 / 16) == 7  # Self-Forcing: 21 latent frames, 81 pixel frames
    assert g.chunks(81 / 16, given=1) == 7  # 20 missing frames still take seven chunks
    assert g.chunks(120) == 161  # 480 latent frames and one more: the very first one lasts 1/16 s


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize(("pixels", "advice"), [(481, "480 or 496"), (490, "480 or 496"), (15, "16"), (-16, "16")])
def test_sides_that_do_not_fit_are_refused_with_the_nearest_that_do(side, pixels, advice):
    with pytest.raises(LongtakeError, match=rf"{side} {pixels} .*multiple of 16, e\.g\. {advice}"):
        Geometry(**{**WAN, side: pixels})


@pytest.mark.parametrize("pixels", [0, -16, -1, math.nan])
def test_sides_that_are_no_sizes_are_refused(pixels):
    with pytest.raises(LongtakeError, match=r"height .*use a multiple of 16"):
        Geometry(**{**WAN, "height": pixels})


def test_the_unit_of_a_side_is_stride_times_patch():
    Geometry(24, 40, 1, 1, 12, stride=(4, 8, 8), patch=(1, 1, 1))
    with pytest.raises(LongtakeError, match="multiple of 32"):
        Geometry(48, 64, 16, 3, 24, stride=(4, 16, 16), patch=(1, 2, 2))


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_has_at_least_one_frame(chunk):
    with pytest.raises(LongtakeError, match=f"chunk of {chunk} latent frames"):
        Geometry(**{**WAN, "chunk_frames": chunk})


def test_patches_in_time_are_refused():
    with pytest.raises(LongtakeError, match="temporal patch 2 is not supported"):
        Geometry(**WAN, patch=(2, 2, 2))


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, -math.inf])
def test_lengths_that_are_no_lengths_are_refused(seconds):
    with pytest.raises(LongtakeError, match="seconds: ask for a finite length above 0"):
        Geometry(**WAN).chunks(seconds)


def test_even_the_shortest_length_is_a_chunk():
    assert Geometry(**WAN).chunks(1e-9) == 1
