"""The world of lanes keeps its laws, and the reader of pictures sees what is in them."""

import numpy as np
import pytest

from longtake.errors import LongtakeError
from longtake.zoo import lanes, readback


def frames_of(first: int, last: int) -> tuple[int, int]:
    """Pixel frame at which latent frame `first` begins, and the number of pixel frames of [first, last)."""
    return lanes.STRIDE * (first - 1) + 1, lanes.STRIDE * (last - first)


def events(seeds: range, length: int = 48) -> list[tuple[lanes.Scene, int, readback.Return]]:
    """Returns of actors in scenes with short gaps: scene, first latent frame of a six-frame window, return."""
    found = []
    for seed in seeds:
        scene = lanes.scene(seed, length, gaps=(1, 2, 4, 8))
        for first in range(9, length - 6, 3):
            found += [(scene, first, event) for event in readback.returns(scene, first, first + 3)]
    return found


def test_same_seed_same_video_and_any_frame_can_be_drawn_alone():
    long, caption = lanes.sample(5, 60)
    again, same = lanes.sample(5, 60)
    assert long.dtype == np.uint8 and long.shape == (60, 128, 128, 3)
    assert np.array_equal(long, again) and caption == same
    assert np.array_equal(lanes.sample(5, 10, start=40)[0], long[40:50])
    assert not np.array_equal(long[:5], lanes.sample(6, 5)[0])


def test_captions_name_shapes_and_nothing_else():
    for seed in range(40):
        scene = lanes.scene(seed)
        words = set(scene.caption.replace(",", "").split()) - {"a", "and"}
        assert words == {lane.shape for lane in scene.lanes if lane}
        assert 3 <= sum(lane is not None for lane in scene.lanes) <= 4


def test_half_of_the_actors_are_first_seen_after_the_sink_and_a_fifth_is_repainted():
    actors = [lane for seed in range(300) for lane in lanes.scene(seed).lanes if lane]
    late = np.mean([lane.visits[0].start >= lanes.SINK for lane in actors])
    painted = np.mean([lane.painted is not None for lane in actors])
    assert 0.45 < late < 0.55
    assert 0.1 < painted < 0.25  # some would have been repainted before the take began
    for lane in actors:
        if lane.painted:
            assert any(v.start < lane.paint < v.end for v in lane.visits), "repainted where nobody sees it"
            assert lane.painted.colour != lane.look.colour


def test_every_gap_hides_the_actor_for_exactly_so_many_latent_frames():
    seen = set()
    for seed in range(12):
        scene = lanes.scene(seed, 120)
        for number, lane in enumerate(scene.lanes):
            for before, after in zip(lane.visits, lane.visits[1:], strict=False) if lane else ():
                if before.end < 1 or after.start > 110:
                    continue
                start, count = frames_of(before.end - 1, after.start + 1)
                reading = readback.read(scene.render(count, max(start, 0)), scene, number)
                gap = after.start - before.end
                assert (reading.count[-4 * gap - 4 : -4] == 0).all()
                seen.add(gap)
    assert set(lanes.GAPS) <= seen


def test_the_bar_tells_side_and_time_of_a_return():
    lane = next(lane for lane in lanes.scene(1, gaps=(16,)).lanes if lane and lane.visits[0].end > 0)
    visit = lane.visits[1]
    frames = np.array([lanes.STRIDE * (visit.start - k) for k in (12, 8, 4, 1)])
    lit = [
        (image[16:24, lane.post : lane.post + lanes.PILLAR].mean(-1) > 180).sum(1).mean() for image in lane.draw(frames)
    ]
    assert lit == [16, 16, 8, 2]
    right = (lane.draw(frames[:1])[0, 20, lane.post : lane.post + lanes.PILLAR].mean(-1) > 180)[
        lanes.PILLAR // 2 :
    ].all()
    assert right == (visit.side > 0)


def test_a_disguised_scene_differs_in_its_actors_only():
    scene = lanes.scene(7)
    other = scene.disguised(0)
    free = readback.off_actors(scene, 0, 60)
    assert np.array_equal(scene.render(60)[free], other.render(60)[free])
    for mine, theirs in zip(scene.lanes, other.lanes, strict=True):
        assert mine is None or (mine.look.colour != theirs.look.colour and mine.look.texture != theirs.look.texture)


def test_the_clock_moves_in_every_frame_and_is_read():
    scene = lanes.scene(2)
    video = scene.render(96)
    assert (readback.clock_error(video, scene, 0) < 0.02).all()
    face = video[:, :16, lanes.TRACK :].astype(int)
    assert (np.abs(np.diff(face, axis=0)).max((1, 2, 3)) > 0).all()


def test_true_pictures_are_read_without_a_mistake():
    verdicts = []
    for scene, first, event in events(range(6)):
        start, count = frames_of(first, first + 6)
        if verdict := readback.judge(scene.render(count, start), scene, start, event):
            verdicts.append(verdict)
    assert len(verdicts) > 25
    assert all(v.lawful and v.colour and v.texture and not v.missing and not v.duplicated for v in verdicts)


def test_a_frozen_picture_and_a_loop_recall_nothing_to_speak_of():
    frozen, looped = [], []
    for scene, first, event in events(range(6)):
        start, count = frames_of(first, first + 6)
        before = scene.render(count, start - count)
        for pictures, found in ((before[-1:].repeat(count, 0), frozen), (before, looped)):
            if verdict := readback.judge(pictures, scene, start, event):
                found.append(verdict.colour)
    assert len(frozen) > 25 and np.mean(frozen) <= 1 / 8 and np.mean(looped) <= 1 / 8


def test_another_colour_a_second_actor_and_an_empty_lane_are_noticed():
    for scene, first, event in events(range(2))[:8]:
        start, count = frames_of(first, first + 6)
        truth = scene.render(count, start)
        if readback.judge(truth, scene, start, event) is None:
            continue
        disguised = readback.judge(scene.disguised(3).render(count, start), scene, start, event)
        assert disguised.lawful and not disguised.colour and not disguised.texture
        lane = scene.lanes[event.lane]
        rows = slice(event.lane * lanes.LANE, (event.lane + 1) * lanes.LANE)
        visit = lane.visits[event.visit]
        other = 6 if visit.side > 0 else lanes.TRACK - 24  # on the far side of the pillar
        twice = truth.copy()
        twice[:, rows.start + 11 : rows.start + 29, other : other + 18] = lanes.PALETTE[lane.look.colour]
        verdict = readback.judge(twice, scene, start, event)
        assert verdict.duplicated and not verdict.lawful and not verdict.colour
        empty = truth.copy()
        empty[:, rows, : lanes.TRACK] = lanes.WALLS[lane.wall]
        verdict = readback.judge(empty, scene, start, event)
        assert verdict.missing and not verdict.colour


def test_impossible_worlds_are_refused():
    with pytest.raises(LongtakeError, match="at least one frame"):
        lanes.sample(0, 0)
    with pytest.raises(LongtakeError, match="gaps of 1"):
        lanes.scene(0, gaps=(0,))
