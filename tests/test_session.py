"""What a session promises: takes in lockstep, seeds, prompts, failures, callbacks, bytes and figures."""

import json
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import longtake
from longtake import (
    FullHistory,
    LongtakeError,
    NonFiniteError,
    PlanError,
    Session,
    SlidingWindow,
    generate,
    policies,
)
from longtake.evaluate.measure import live_tensor_bytes
from longtake.policies import KVPolicy
from longtake.session import history_shape

from .test_equivalences import image, latents_of, small
from .tiny import text, tiny_wan

CLOSE = {"atol": 1e-5, "rtol": 0}
NAMES = sorted(policies.available())


def take_of(host=None, policy=None, **options) -> Session:
    options = {"prompt_embeds": text(), "decode": False} | options
    return Session(host or tiny_wan(), policy or SlidingWindow(9, sink=3), **options)


# --- takes in lockstep, seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_take_in_lockstep_equals_the_take_alone(name, guidance):
    prompts, options = text(3), {"guidance_scale": guidance, "negative_prompt_embeds": text(seed=9)}
    together = latents_of(take_of(policy=small(name), prompt_embeds=prompts, seed=40, **options), 5)
    for b in range(3):
        alone = latents_of(take_of(policy=small(name), prompt_embeds=prompts[b : b + 1], seed=40 + b, **options), 5)
        torch.testing.assert_close(together[b], alone, **CLOSE)


def test_frames_of_takes_in_lockstep_equal_those_of_each_take_alone():
    host = tiny_wan(vae=True)
    pictures = torch.stack([image(1), image(2)])
    chunk = next(take_of(host, prompt_embeds=text(2), seed=[5, 8], image=pictures, decode=True))
    assert chunk.frames.shape == (2, 13, 32, 48, 3)
    for b, seed in enumerate((5, 8)):
        alone = next(take_of(host, prompt_embeds=text(2)[b : b + 1], seed=seed, image=pictures[b], decode=True))
        assert alone.frames.shape == (13, 32, 48, 3)
        assert int((chunk.frames[b].int() - alone.frames.int()).abs().max()) <= 1


def test_one_image_serves_all_takes():
    host = tiny_wan(vae=True)
    one, each = (take_of(host, prompt_embeds=text(2), image=i) for i in (image(), torch.stack([image(), image()])))
    torch.testing.assert_close(next(one).latents, next(each).latents, **CLOSE)


def test_a_seed_means_the_same_take_and_another_seed_another():
    first, second, other = (latents_of(take_of(seed=s), 3) for s in (4, 4, 5))
    assert torch.equal(first, second) and not torch.allclose(first, other, atol=1e-2)


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    host = tiny_wan(vae=True)
    torch.set_rng_state(before)
    first = latents_of(take_of(host, image=image()), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(latents_of(take_of(host, image=image()), 2), first)


def test_a_generator_takes_the_place_of_a_seed():
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(latents_of(take_of(generator=generator), 2), latents_of(take_of(seed=4), 2))
    each = [torch.Generator().manual_seed(s) for s in (7, 8)]
    lockstep = latents_of(take_of(generator=each, prompt_embeds=text(2)), 2)
    assert torch.equal(lockstep, latents_of(take_of(seed=7, prompt_embeds=text(2)), 2))


# --- the first image --------------------------------------------------------------------------------------------------


def test_a_first_image_is_latent_frame_zero_and_comes_out_with_the_first_chunk():
    host = tiny_wan(vae=True)
    take = take_of(host, image=image(), decode=True)
    assert take.frame == 1 and take.history.frames_seen == 1
    chunk, after = next(take), next(take)
    assert (len(chunk.frames), len(after.frames)) == (1 + 12, 12)
    alone = host.decoder().push(host.encode_image(image()[None]))
    assert torch.equal(chunk.frames[:1], alone[0])
    assert chunk.stats.frame == 1 and chunk.latents.shape == (4, 3, 4, 6)


def test_another_first_image_gives_another_take():
    host = tiny_wan(vae=True)
    assert not torch.allclose(*(next(take_of(host, image=image(s))).latents for s in (1, 2)), atol=1e-3)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_new_prompt_is_obeyed_from_the_next_chunk_on_and_not_before():
    steady, changed = take_of(), take_of()
    for _ in range(2):
        assert torch.equal(next(changed).latents, next(steady).latents)
    history = changed.history.stores["cond"].k.clone()
    changed.set_prompt_embeds(text(seed=50))
    assert torch.equal(changed.history.stores["cond"].k, history)
    assert not torch.allclose(next(changed).latents, next(steady).latents, atol=1e-3)


def test_a_prompt_set_during_a_chunk_waits_for_the_next():
    steady = take_of()
    expected = [next(steady).latents for _ in range(2)]
    take = take_of(
        callback_on_step_end=lambda session, step, *_: (step == 0 and session.set_prompt_embeds(text(seed=3))) or None
    )
    assert torch.equal(next(take).latents, expected[0])
    assert not torch.allclose(next(take).latents, expected[1], atol=1e-3)


def test_a_prompt_by_words_is_the_prompt_by_embeddings(words):
    host = words()
    embeds = host.encode_prompt(["red kite"])
    spoken = take_of(host, prompt="red kite", prompt_embeds=None)
    assert spoken.prompt == "red kite" and not spoken.lockstep
    given = take_of(host, prompt_embeds=embeds)
    assert torch.equal(next(spoken).latents, next(given).latents)
    spoken.prompt = "kite"
    given.set_prompt_embeds(host.encode_prompt(["kite"]))
    assert spoken.prompt == "kite"
    assert torch.equal(next(spoken).latents, next(given).latents)
    listed = take_of(host, prompt=["red kite"], prompt_embeds=None)
    assert listed.lockstep and next(listed).latents.shape == (1, 4, 3, 4, 6)


def test_an_empty_negative_prompt_is_the_default_under_guidance(words):
    host = words()
    takes = [
        take_of(host, prompt="red", prompt_embeds=None, guidance_scale=3.0, **o) for o in ({}, {"negative_prompt": ""})
    ]
    assert torch.equal(*(next(take).latents for take in takes))
    other = take_of(host, prompt="red", prompt_embeds=None, guidance_scale=3.0, negative_prompt="kite")
    takes[0] = take_of(host, prompt="red", prompt_embeds=None, guidance_scale=3.0)
    assert not torch.allclose(next(other).latents, next(takes[0]).latents, atol=1e-3)


def test_a_freed_text_encoder_serves_both_prompts_of_a_guided_take_and_then_none(words):
    host = words(text_encoder="free")
    take = take_of(host, prompt="red", prompt_embeds=None, negative_prompt="kite", guidance_scale=3.0)
    next(take)
    with pytest.raises(LongtakeError, match="prompt_embeds"):
        take.prompt = "kite"
    assert take.prompt == "red"
    next(take)


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """Makes hosts that understand two words, from a folder."""
    from .tiny_checkpoints import write_base

    folder = write_base(tmp_path_factory.mktemp("base") / "wan")
    settings = {
        "causal": True,
        "timesteps": [1000, 500],
        "height": 32,
        "width": 48,
        "text_tokens": 6,
        "training_frames": 12,
    }
    (folder / "longtake.json").write_text(json.dumps(settings))
    return lambda **options: longtake.load(folder, device="cpu", **options)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_text_keys_are_computed_once_per_prompt_and_layer(guidance):
    host = tiny_wan(layers=3)
    calls = Counter()
    for i, block in enumerate(host.transformer.blocks):
        for name in ("to_k", "to_v"):
            getattr(block.attn2, name).register_forward_hook(lambda *_, key=(i, name): calls.update([key]))
    take = take_of(host, guidance_scale=guidance, negative_prompt_embeds=text(seed=2))
    prompts = 1 if guidance == 1 else 2
    for _ in range(3):
        next(take)
        assert set(calls.values()) == {prompts} and len(calls) == 6
    take.set_prompt_embeds(text(seed=5))
    latents_of(take, 2)
    assert set(calls.values()) == {prompts + 1}


# --- failures leave the session where it stood ------------------------------------------------------------------------


def break_at(host, call: int, damage, where=None):
    """Do `damage` to the output of a module at its `call`-th use from now on, once."""
    count = [0]

    def hook(module, inputs, output):
        count[0] += 1
        return damage(output) if count[0] == call else None

    return (where or host.transformer.proj_out).register_forward_hook(hook)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(  # the velocity of the commit pass is not used
    ("call", "where"), [(1, "everywhere"), (1, "velocity"), (3, "everywhere")], ids=["step", "step-velocity", "commit"]
)
def test_a_chunk_with_nan_is_not_committed_and_the_take_goes_on_to_the_bit(name, call, where):
    host = tiny_wan()
    expected = [next(sound).latents for sound in [take_of(policy=small(name))] for _ in range(7)]
    take = take_of(host, small(name))
    before = [next(take).latents for _ in range(4)]
    frames, blocks = take.frame, [b.id for b in take.history.blocks]
    module = host.transformer.patch_embedding if where == "everywhere" else host.transformer.proj_out
    handle = break_at(host, call, lambda x: x * float("nan"), module)
    with pytest.raises(NonFiniteError, match="chunk 4"):
        next(take)
    handle.remove()
    assert (take.frame, take.index, take.stats.chunks) == (frames, 4, 4)
    # what the plan fused or dropped stays so; nothing of the failed chunk is there
    assert all(b.id in blocks or (b.role == "fused" and b.end <= frames) for b in take.history.blocks)
    assert all(bool(torch.isfinite(s.k[:, :, s.used]).all()) for s in take.history.stores.values())
    assert all(
        torch.equal(a, b) for a, b in zip(before + [next(take).latents for _ in range(3)], expected, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("call", [1, 2, 4, 5, 6])
def test_an_interrupted_forward_leaves_the_session_usable(name, error, call):
    def interrupt(_):
        raise error

    expected = latents_of(take_of(policy=small(name), guidance_scale=2.0, negative_prompt_embeds=text(seed=3)), 7)
    host = tiny_wan()
    take = take_of(host, small(name), guidance_scale=2.0, negative_prompt_embeds=text(seed=3))
    before = latents_of(take, 4)
    handle = break_at(host, call, interrupt, host.transformer.blocks[1].ffn)
    with pytest.raises(error):
        next(take)
    handle.remove()
    assert torch.equal(torch.cat((before, latents_of(take, 3)), 1), expected)


def test_after_an_interrupted_decode_the_session_says_how_to_go_on(tmp_path):
    host = tiny_wan(vae=True)
    take = take_of(host, decode=True)
    next(take)
    take.snapshot(tmp_path / "s")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = host.vae.decoder.conv_out.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(take)
    handle.remove()
    with pytest.raises(LongtakeError, match="snapshot"):
        next(take)
    again = Session.restore(tmp_path / "s", host)
    assert again.index == take.index == 1
    next(again)


def test_a_policy_that_breaks_its_promise_is_stopped_and_not_committed():
    class Greedy(SlidingWindow):
        """Keeps everything, and says it does not."""

        name = ""

        def plan(self, table, signals):
            return FullHistory().plan(table, signals)

    take = take_of(policy=Greedy(6, sink=0))
    latents_of(take, 2)
    with pytest.raises(PlanError, match="capacity"):
        next(take)
    assert take.index == 2 and len(take.history.blocks) == 2


# --- callbacks and ends -----------------------------------------------------------------------------------------------


def test_callbacks_see_every_step_and_every_chunk():
    steps, chunks = [], []
    take = take_of(
        tiny_wan(vae=True), decode=True,
        callback_on_step_end=lambda session, step, t, given: steps.append((session.index, step, t, given["latents"])),
        callback_on_chunk_end=lambda session, index, given: chunks.append((index, given)),
    )  # fmt: skip
    made = [next(take) for _ in range(2)]
    assert [(i, s, t) for i, s, t, _ in steps] == [
        (i, s, t) for i in range(2) for s, t in enumerate(take.schedule.timesteps)
    ]
    assert all(
        torch.equal(steps[2 * i + 1][3][0], made[i].latents) for i in range(2)
    )  # the last prediction is the chunk
    assert [i for i, _ in chunks] == [0, 1]
    for chunk, (_, given) in zip(made, chunks, strict=True):
        assert given["frames"] is chunk.frames and given["latents"] is chunk.latents and given["stats"] is chunk.stats


def test_a_step_callback_may_replace_the_prediction():
    replace = lambda session, step, t, given: {"latents": given["latents"] * 0 + 0.25} if step == 1 else None
    take = take_of(callback_on_step_end=replace)
    assert torch.equal(next(take).latents, torch.full((4, 3, 4, 6), 0.25))
    with pytest.raises(LongtakeError, match="shape"):
        next(take_of(callback_on_step_end=lambda *_: {"latents": torch.zeros(1)}))


def test_a_chunk_callback_may_replace_the_frames_and_nothing_of_the_take():
    host = tiny_wan(vae=True)
    take = take_of(host, decode=True, callback_on_chunk_end=lambda s, i, given: {"frames": given["frames"] * 0})
    plain = take_of(host, decode=True)
    for _ in range(3):
        chunk = next(take)
        assert int(chunk.frames.max()) == 0 and torch.equal(chunk.latents, next(plain).latents)


def test_an_error_in_a_step_callback_costs_the_chunk_and_nothing_else():
    expected = latents_of(take_of(), 3)
    trouble = [True]

    def callback(session, step, t, given):
        if trouble[0] and session.index == 1 and step == 1:
            raise ValueError("mine")

    take = take_of(callback_on_step_end=callback)
    first = next(take).latents
    with pytest.raises(ValueError, match="mine"):
        next(take)
    trouble[0] = False
    assert torch.equal(torch.cat((first, latents_of(take, 2)), 1), expected)


def test_a_take_of_known_length_ends_by_itself():
    take = take_of(chunks=3)
    assert [c.index for c in take] == [0, 1, 2]
    with pytest.raises(StopIteration):
        next(take)
    assert (
        len(list(generate(tiny_wan(), seconds=1.0, prompt_embeds=text(), decode=False))) == 2
    )  # 13 pixel frames are < 16
    assert len(list(generate(tiny_wan(), chunks=2, prompt_embeds=text(), decode=False))) == 2


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "residency"), [*((name, "resident") for name in NAMES), ("window", "scratch")])
def test_memory_is_what_the_session_holds_and_stays_so(name, residency):
    host = tiny_wan(vae=True)
    options = {"guidance_scale": 2.0, "residency": residency, "decode": True, "chunks": 12}
    before = live_tensor_bytes()
    take = take_of(
        host, small(name), prompt_embeds=text(2), negative_prompt_embeds=text(2, seed=4), image=image(), **options
    )

    def uncounted() -> int:
        """Bytes alive beyond what `memory` says, two numbers per held token and stream apart."""
        tokens = sum(int(store.used.sum()) for store in take.history.stores.values())
        return live_tensor_bytes() - before - take.memory()["total"] - 16 * tokens

    assert abs(uncounted()) < 4096
    figures = []
    for i in range(8):
        next(take)
        figures.append(take.memory())
        if i == 3:
            steady = uncounted()
            assert abs(steady) < 4096
            take.set_prompt_embeds(text(2, seed=6))
            assert take.memory()["text"] > figures[-1]["text"] and abs(uncounted() - steady) < 512
    assert abs(uncounted() - steady) < (512 if name != "full" else 4096)  # full history's table of blocks grows
    memory = figures[-1]
    assert memory["store"] > 8 * 4096 and memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert len({json.dumps(figure) for figure in figures[2:]}) == 1  # from chunk 3 on


def test_a_longer_take_holds_no_more():
    """60 chunks: the same bytes, the same operations and the same tokens at chunk 10 and at chunk 60.

    (Of equal parity: the two chunks behind the sink lie in the store in turns in this order and in that.)"""

    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.counts = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.counts[str(function)] += 1
            return function(*args, **(kwargs or {}))

    take = take_of(
        tiny_wan(vae=True),
        SlidingWindow(9, sink=3),
        decode=True,
        guidance_scale=2.0,
        negative_prompt_embeds=text(seed=3),
    )
    seen = {}
    for i in range(60):
        if i + 1 in (10, 34, 60):
            with Operations() as operations:
                chunk = next(take)
            latents, frames = chunk.latents.nbytes, chunk.frames.nbytes
            seen[i + 1] = (
                live_tensor_bytes(),
                operations.counts,
                chunk.stats.attended_tokens,
                chunk.stats.history_bytes,
                latents,
                frames,
            )
        else:
            next(take)
    assert seen[10] == seen[34] == seen[60]
    assert sum(seen[10][1].values()) > 1000 and seen[10][2] == 9 * 6


def test_a_memory_limit_makes_the_view_small_or_is_refused():
    host = tiny_wan()
    policy = SlidingWindow(9, sink=3)
    shape = history_shape(host, host.geometry())
    store = view = 9 * shape.frame_bytes
    assert take_of(host, policy, memory_limit=store + view).history.residency == "resident"
    tight = take_of(host, policy, memory_limit=store + view - 1)
    assert tight.history.residency == "scratch" and tight.memory()["view"] == view // shape.layers
    torch.testing.assert_close(latents_of(tight, 5), latents_of(take_of(host, policy), 5), **CLOSE)
    assert take_of(host, policy, memory_limit=store + view // shape.layers).history.residency == "scratch"
    with pytest.raises(LongtakeError, match="memory_limit") as error:
        take_of(host, policy, memory_limit=store + view // shape.layers - 1)
    assert "fit" in str(error.value)
    assert take_of(host, policy, memory_limit=store, residency="alias").memory()["view"] == 0
    guided = {"guidance_scale": 2.0, "negative_prompt_embeds": text()}
    assert take_of(host, policy, memory_limit=2 * store + view // shape.layers, **guided).history.residency == "scratch"
    with pytest.raises(LongtakeError, match="chunks="):
        take_of(host, FullHistory(), memory_limit=10**9)
    take_of(host, FullHistory(), memory_limit=10**9, chunks=4)


def test_full_history_of_known_length_is_allocated_once():
    take = take_of(tiny_wan(vae=True), FullHistory(), chunks=5, image=image())
    store = take.history.stores["cond"].k.data_ptr()
    assert len(list(take)) == 5
    assert take.history.stores["cond"].k.data_ptr() == store


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_stats_count_tokens_forwards_frames_and_bytes(guidance):
    host = tiny_wan(vae=True)
    calls = []
    host.transformer.register_forward_hook(lambda *_: calls.append(1))
    take = take_of(
        host, SlidingWindow(9, sink=3), decode=True, guidance_scale=guidance, negative_prompt_embeds=text(seed=3)
    )
    streams = 1 if guidance == 1 else 2
    token = 2 * 3 * 2 * 12 * 4  # K and V, layers, heads, channels, fp32
    for i, frames in enumerate((3, 6, 9, 9)):
        calls.clear()
        stats = next(take).stats
        assert (stats.index, stats.frame, stats.latent_frames) == (i, 3 * i, 3)
        assert stats.pixel_frames == (9 if i == 0 else 12)
        assert stats.attended_tokens == 6 * frames and stats.history_bytes == 6 * frames * token * streams
        assert stats.forwards == len(calls) == 3 * streams and stats.reused == 0
        assert stats.forward_seconds > 0 and stats.decode_seconds > 0 and 0 < stats.overhead_seconds < stats.seconds
    assert take.stats.chunks == 4 and take.stats.forwards == 12 * streams and take.stats.pixel_frames == 45
    assert take.stats.last is stats


def test_more_steps_are_more_forwards():
    assert next(take_of(num_inference_steps=5)).stats.forwards == 6


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_another_environment_is_warned_of(tmp_path):
    host = tiny_wan()
    take = take_of(host)
    next(take)
    take.snapshot(tmp_path / "s")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match="threads"):
            Session.restore(tmp_path / "s", host)
    finally:
        torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Session.restore(tmp_path / "s", host)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("hello"),
        lambda path: save_file({"x": torch.zeros(1)}, path),
        lambda path: save_file(load_file(path), path, {"longtake": "{"}),
        lambda path: save_file(load_file(path), path, {"longtake": "{}"}),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["missing", "truncated", "header-only", "empty", "text", "foreign", "spoilt", "wordless", "folder"],
)
def test_an_unreadable_snapshot_is_refused_in_one_line(spoil, tmp_path):
    path = tmp_path / "take.safetensors"
    take_of().snapshot(path)
    spoil(path)
    with pytest.raises(LongtakeError) as error:
        Session.restore(path, tiny_wan())
    assert "take.safetensors" in one_line(error)


@pytest.mark.parametrize(
    "other", [{"layers": 4}, {"heads": 4}, {"dtype": torch.float64}, {"head_dim": 18}, {"seed": 1}], ids=str
)
def test_a_snapshot_of_another_model_is_refused_in_one_line(other, tmp_path):
    take = take_of()
    next(take)
    take.snapshot(tmp_path / "s")
    with pytest.raises(LongtakeError) as error:
        Session.restore(tmp_path / "s", tiny_wan(**other))
    one_line(error)


def test_a_snapshot_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    take = take_of()
    with pytest.raises(LongtakeError, match="written") as error:
        take.snapshot(tmp_path / "no" / "folder" / "s")
    one_line(error)
    (tmp_path / "taken").mkdir()
    with pytest.raises(LongtakeError):
        take.snapshot(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_snapshot_takes_embeddings_that_share_memory(tmp_path):
    embeds = text()
    take = take_of(prompt_embeds=embeds, negative_prompt_embeds=embeds, guidance_scale=2.0)
    take.set_prompt_embeds(embeds)
    take.snapshot(tmp_path / "s")
    assert torch.equal(next(Session.restore(tmp_path / "s", tiny_wan())).latents, next(take).latents)


def test_a_policy_of_ones_own_is_asked_for_instead_of_taken_for_its_base(tmp_path):
    class Mine(SlidingWindow):
        """Like its base, and yet another policy."""

    assert policies.available()["window"] is SlidingWindow
    take = take_of(policy=Mine(9, sink=3))
    latents_of(take, 4)
    take.snapshot(tmp_path / "s")
    with pytest.raises(LongtakeError, match="policy=") as error:
        Session.restore(tmp_path / "s", tiny_wan())
    one_line(error)
    other = Session.restore(tmp_path / "s", tiny_wan(), Mine(9, sink=3))
    assert torch.equal(next(other).latents, next(take).latents)


def test_it_does_not_matter_where_embeddings_lie_in_memory():
    """As those of a snapshot do, which begin anywhere in the file."""
    host, memory = tiny_wan(), torch.zeros(100)
    elsewhere = memory[3:53].view(1, 5, 10).copy_(text())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here, there = host.text_state(text()), host.text_state(elsewhere)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip((*here.k, *here.v), (*there.k, *there.v), strict=True))
    memory.fill_(7)  # what the caller does with it later changes nothing
    assert torch.equal(there.embeds, text())


def test_a_snapshot_keeps_the_end_of_the_take(tmp_path):
    take = take_of(chunks=4)
    latents_of(take, 2)
    take.snapshot(tmp_path / "s")
    assert len(list(Session.restore(tmp_path / "s", tiny_wan()))) == 2


def test_noise_of_ones_own_cannot_be_snapshotted(tmp_path):
    class Still:
        def draw(self, *size):
            return torch.zeros(1, *size)

    take = take_of(noise=Still())
    next(take)
    with pytest.raises(LongtakeError, match="noise") as error:
        take.snapshot(tmp_path / "s")
    one_line(error)


# --- wrong inputs -----------------------------------------------------------------------------------------------------

WRONG = {
    "no prompt": {"prompt_embeds": None},
    "both prompts": {"prompt": "red"},
    "an empty list": {"prompt": [], "prompt_embeds": None},
    "words without a text encoder": {"prompt": "red", "prompt_embeds": None},
    "embeddings without a batch": {"prompt_embeds": torch.zeros(5, 10)},
    "embeddings of another width": {"prompt_embeds": torch.zeros(1, 5, 11)},
    "no embeddings": {"prompt_embeds": torch.zeros(0, 5, 10)},
    "embeddings that are a list": {"prompt_embeds": [[0.0]]},
    "two negatives for three takes": {
        "prompt_embeds": torch.zeros(3, 5, 10), "negative_prompt_embeds": torch.zeros(2, 5, 10), "guidance_scale": 2.0,
    },
    "two seeds for one take": {"seed": [1, 2]},
    "two generators for one take": {"generator": [torch.Generator(), torch.Generator()]},
    "one generator for two takes": {"generator": torch.Generator(), "prompt_embeds": torch.zeros(2, 5, 10)},
    "a crooked height": {"height": 40},
    "a height of zero": {"height": 0},
    "a negative width": {"width": -48},
    "no steps": {"num_inference_steps": 0},
    "no chunks": {"chunks": 0},
    "an unknown residency": {"residency": "somewhere"},
    "an image of another size": {"image": torch.zeros(3, 16, 48)},
    "an image without colours": {"image": torch.zeros(32, 48)},
    "whole numbers as an image": {"image": torch.zeros(3, 32, 48, dtype=torch.uint8)},
    "a list as an image": {"image": [[0]]},
    "three images for two takes": {"image": torch.zeros(3, 3, 32, 48), "prompt_embeds": torch.zeros(2, 5, 10)},
    "a window below one chunk": {"policy": SlidingWindow(4, sink=3)},
    "a policy by name": {"policy": "window"},
    "a reuse policy by name": {"reuse": "none"},
    "a policy class": {"policy": SlidingWindow},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_input_is_refused_in_one_line(wrong):
    with pytest.raises(LongtakeError) as error:
        take_of(tiny_wan(vae=True), **WRONG[wrong])
    one_line(error)


@pytest.mark.parametrize("model", [None, 42, object(), torch.nn.Linear(1, 1)], ids=lambda m: type(m).__name__)
def test_what_is_no_model_is_refused_in_one_line(model):
    with pytest.raises(LongtakeError) as error:
        Session(model, prompt="red")
    one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda take: take.set_prompt_embeds(text(2)),
        lambda take: take.set_prompt_embeds(torch.zeros(1, 10)),
        lambda take: take.set_prompt_embeds(torch.zeros(1, 5, 3)),
        lambda take: take.set_prompt_embeds("red"),
        lambda take: setattr(take, "prompt", "red"),
        lambda take: setattr(take, "prompt", None),
    ],
    ids=["two", "flat", "narrow", "word", "no-encoder", "none"],
)
def test_a_wrong_new_prompt_is_refused_and_the_old_one_stays(change):
    take, same = take_of(), take_of()
    next(take), next(same)
    with pytest.raises(LongtakeError) as error:
        change(take)
    one_line(error)
    assert torch.equal(next(take).latents, next(same).latents)


@pytest.mark.parametrize(
    "length",
    [{}, {"seconds": 1, "chunks": 1}, {"seconds": 0}, {"seconds": -1}, {"seconds": float("nan")}, {"chunks": 0}],
    ids=str,
)
def test_a_length_that_is_none_is_refused_in_one_line(length):
    with pytest.raises(LongtakeError) as error:
        generate(tiny_wan(), prompt_embeds=text(), **length)
    one_line(error)


def test_a_session_without_a_vae_says_how_to_go_without():
    with pytest.raises(LongtakeError, match="decode=False") as error:
        take_of(tiny_wan(vae=False), decode=True)
    one_line(error)


def test_the_default_policy_is_the_window_the_model_was_made_for():
    assert Session(tiny_wan(), prompt_embeds=text(), decode=False).policy == SlidingWindow(12, sink=3)
    assert isinstance(Session(tiny_wan(window=6, sink=0), prompt_embeds=text(), decode=False).policy, KVPolicy)
    assert Session(tiny_wan(window=6, sink=0), prompt_embeds=text(), decode=False).policy == SlidingWindow(6, sink=0)


# --- given latents ----------------------------------------------------------------------------------------------------


# What they forget is decided by the queries of noisy steps, which a given chunk has none of.
ASK_STEPS = ("deep-forcing", "flowcache")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ASK_STEPS])
def test_a_take_extended_with_its_own_latents_is_the_take(name):
    policy = small(name)
    if name == "packforcing":  # what it shows of the middle is decided by such queries, unless it is the newest
        policy = replace(policy, select="recent")
    made = take_of(policy=policy, seed=4)
    latents = latents_of(made, 5)
    given = take_of(made.host, policy, seed=4)
    given.extend(latents[None, :, :6])
    given.extend(latents[None, :, 6:])
    assert (given.frame, given.index) == (made.frame, made.index)
    seen, found = made.history.table(), given.history.table()
    assert [(b.frame, b.span, b.role, set(b.forms)) for b in seen.blocks] == [
        (b.frame, b.span, b.role, set(b.forms)) for b in found.blocks
    ]
    for stream, store in made.history.stores.items():
        other = given.history.stores[stream]
        assert torch.equal(store.used, other.used)
        assert torch.equal(store.k[:, :, store.used], other.k[:, :, other.used])
        assert torch.equal(store.v[:, :, store.used], other.v[:, :, other.used])
    given.noise = made.noise
    state = made.noise.state()
    expected = next(made).latents
    made.noise.restore(state)
    torch.testing.assert_close(next(given).latents, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ASK_STEPS)
def test_policies_that_ask_the_steps_take_given_chunks_too(name):
    made, given = (take_of(policy=small(name), seed=4) for _ in range(2))
    latents = latents_of(made, 6)
    given.extend(latents[None])
    held = [sum(form.count for b in take.history.blocks for form in b.forms.values()) for take in (made, given)]
    assert held[0] == held[1] < 6 * 18 and given.frame == made.frame
    given.noise, state = made.noise, made.noise.state()
    expected = next(made).latents
    made.noise.restore(state)
    found = next(given).latents
    assert found.isfinite().all() and not torch.equal(found, expected)


def test_frames_of_given_latents_are_not_given_again():
    host = tiny_wan(vae=True)
    made, given = (take_of(host, decode=True, seed=1) for _ in range(2))
    first = next(made)
    given.extend(first.latents[None])
    assert given.stats.chunks == 0
    given.noise = made.noise
    state = made.noise.state()
    expected = next(made).frames
    made.noise.restore(state)
    assert torch.equal(next(given).frames, expected), "the decoder went on from the given latents"


def test_one_given_video_serves_all_takes_in_lockstep():
    host, given = tiny_wan(), torch.randn(1, 4, 3, 4, 6)
    both, alone = take_of(host, prompt_embeds=text(2), seed=[5, 8]), take_of(host, prompt_embeds=text(2)[1:], seed=8)
    both.extend(given)
    alone.extend(given)
    torch.testing.assert_close(next(both).latents[1], next(alone).latents, **CLOSE)


def test_latents_that_cannot_be_committed_are_refused_and_change_nothing():
    take = take_of(chunks=2)
    size = (take.geometry.channels, 3, *take.geometry.latent_size)
    for shape in (
        (2, *size),
        (1, size[0], 4, *size[2:]),
        (1, size[0], 0, *size[2:]),
        (1, size[0] + 1, *size[1:]),
        size,
    ):
        with pytest.raises(LongtakeError, match="whole chunks"):
            take.extend(torch.zeros(shape))
    with pytest.raises(NonFiniteError, match="given chunk 0"):
        take.extend(torch.full((1, *size), float("nan")))
    assert (take.frame, take.index) == (0, 0) and not take.history.table().blocks
    take.extend(torch.zeros(1, *size).repeat(1, 1, 2, 1, 1))
    with pytest.raises(LongtakeError, match="2 chunks and all of them are there"):
        take.extend(torch.zeros(1, *size))
