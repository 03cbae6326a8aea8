"""Lumos-1 as everyone meets it: folders, prompts, images, windows, snapshots, the command line."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import longtake
from longtake import FullHistory, LongtakeError, PackCache, Session, SlidingWindow
from longtake.cli import app
from longtake.commands.generate import say_long_text
from longtake.hosts.lumos import Lumos, LumosConfig, LumosForVideoGeneration, LumosGeometry, Vocabulary
from longtake.hosts.lumos.host import PromptLayer
from longtake.hosts.lumos.loading import published
from longtake.hosts.lumos.sequence import text_positions
from longtake.rope import mm_rope_table
from longtake.session import history_shape

from .lumos import WORDS, Fed, tiny_codec, tiny_lumos, tiny_model, tiny_settings, tiny_words, write_folder

N = 4 * 9 + 4  # tokens of a frame of 32 x 64 pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("lumos") / "3B")


# --- model and files ------------------------------------------------------------------------------------------------


def test_our_network_is_the_stock_chameleon_with_another_rotation():
    """On text all three axes agree, so the stock rotation is the same; the stock class has a norm row per head."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    ours = tiny_model()
    sizes = {k: getattr(ours.config, k) for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )}  # fmt: skip
    vision = {
        "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 8, "embed_dim": 32,
        "latent_channels": 32, "num_embeddings": 4,
    }  # fmt: skip
    stock = ChameleonForConditionalGeneration(
        ChameleonConfig(**sizes, vq_config=vision, vocabulary_map={"<image>": 7, "IMGIMGA": 8})
    )
    state = ours.state_dict()
    for name in [n for n in state if "_norm." in n]:
        heads = ours.config.num_attention_heads if ".q_norm." in name else ours.config.num_key_value_heads
        state[name] = state[name].expand(heads, -1)
    report = stock.load_state_dict(state, strict=False)
    assert not report.unexpected_keys and all("vqmodel" in key for key in report.missing_keys)
    ids = torch.randint(9, 128, (2, 11), generator=torch.Generator().manual_seed(0))
    rotary = mm_rope_table(32)
    layers = [PromptLayer(rotary, rotary.phases(text_positions(11)[0])) for _ in range(2)]
    hidden = ours(ids, layers, causal=True)
    with torch.no_grad():
        theirs = stock.eval().model(ids).last_hidden_state
    torch.testing.assert_close(hidden, theirs, rtol=0, atol=1e-4)
    assert hidden.std() > 0.1


def test_weights_have_their_published_names():
    names = set(tiny_model().state_dict())
    layer = {
        f"model.layers.0.{part}.weight"
        for part in ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"),
                     *(f"mlp.{x}_proj" for x in ("gate", "up", "down")), "self_attn.q_norm", "self_attn.k_norm")
    } | {"model.layers.0.self_attn.q_norm.bias", "model.layers.0.self_attn.k_norm.bias"}  # fmt: skip
    rest = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert {n for n in names if ".1." not in n} == layer | rest
    assert tiny_model().state_dict()["model.layers.0.self_attn.q_norm.weight"].shape == (1, 32)


def test_a_sharded_folder_loads_and_generates(folder):
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    host = longtake.load(folder, device="cpu")
    assert isinstance(host, Lumos) and host.codes == 64 and host.dtype == torch.float32
    for name, tensor in tiny_model().state_dict().items():
        assert torch.equal(host.model.state_dict()[name], tensor)
    chunks = list(longtake.generate(host, chunks=3, prompt="red kite", seed=1))
    assert [tuple(c.frames.shape) for c in chunks] == [(1, 32, 64, 3), (4, 32, 64, 3), (4, 32, 64, 3)]
    assert chunks[0].frames.dtype == torch.uint8 and chunks[0].latents.dtype == torch.int64
    assert len({int(c.frames.float().mean() * 1e4) for c in chunks}) == 3


def test_a_published_folder_needs_no_settings_of_ours(tmp_path):
    folder = write_folder(tmp_path / "stage-2-joint-384p", settings=False, codec=False)
    config = longtake.load(folder, device="cpu").config
    assert (config.width, config.height, config.fps, config.steps, config.guidance_scale) == (672, 384, 12, 50, 15)
    assert (config.compat, config.history_mask, config.training_frames) == ("upstream", 0.7, 7)
    assert (published("1B/stage-1-image").guidance_scale, published("1B/stage-2-joint").width) == (16, 448)


def test_leftovers_of_the_image_tokenizer_are_passed_over_and_missing_weights_are_not(tmp_path):
    folder = write_folder(tmp_path / "model", codec=False)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["lm_head.weight"]
    tensors = load_file(folder / shard)
    save_file({**tensors, "model.vqmodel.encoder.conv.weight": torch.ones(2)}, folder / shard, {"format": "pt"})
    index["weight_map"]["model.vqmodel.encoder.conv.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    longtake.load(folder, device="cpu")
    del tensors["lm_head.weight"], index["weight_map"]["lm_head.weight"]
    save_file(tensors or {"model.vqmodel.x": torch.ones(1)}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LongtakeError, match=r"lack 1 of the weights, lm_head\.weight"):
        longtake.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "a multiple of 32 channels, this model's have 16"),
        ({"vocab_size": 128}, "no visual codes from 128 on"),
        ({"vocabulary": {"visual": 128, "image": 3}}, "vocabulary names image"),
    ],
)
def test_models_that_cannot_be_run_are_refused_in_one_line(wrong, says):
    with pytest.raises(LongtakeError, match=says) as error:
        Lumos(tiny_model(**wrong), tiny_settings(), name="tiny")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant", [{"swin_norm": True}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}])
def test_variants_of_the_family_that_it_does_not_compute_are_refused(variant):
    with pytest.raises(LongtakeError, match="is not supported: give a Lumos-1 checkpoint"):
        LumosConfig(**variant)


def test_the_configs_rotary_base_is_read_in_either_spelling():
    assert LumosConfig(rope_theta=500_000.0).rope_theta == 500_000
    assert LumosConfig(rope_parameters={"rope_theta": 7.0, "rope_type": "default"}).rope_theta == 7


def test_the_3b_shapes_are_the_published_totals():
    with torch.device("meta"):
        large = LumosForVideoGeneration(LumosConfig())
        small = LumosForVideoGeneration(LumosConfig(
            hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64
        ))  # fmt: skip
    assert [round(sum(p.numel() for p in m.parameters()) / 1e9, 4) for m in (large, small)] == [3.6146, 1.5037]


# --- prompts --------------------------------------------------------------------------------------------------------


def test_a_frame_has_the_published_counts_and_ids():
    geometry = LumosGeometry(384, 672, 1, 1, 12, patch=(1, 1, 1))
    assert (geometry.codes, geometry.tokens_per_frame, geometry.grid) == (4032, 4084, (48, 85))
    assert geometry.packable == range(3, 4083) and geometry.structural.tolist() == [0, 1, 2, 4083]
    assert geometry.latent_frames(48) == 13
    with pytest.raises(LongtakeError, match="height 392 does not fit this model: use a multiple of 32"):
        LumosGeometry(392, 672, 1, 1, 12, patch=(1, 1, 1))
    with pytest.raises(LongtakeError, match=r"width 60 does not fit this model: use a multiple of 32, e\.g\. 64"):
        LumosGeometry(384, 60, 1, 1, 12, patch=(1, 1, 1))


def test_a_side_that_no_size_token_names_is_refused():
    host = tiny_lumos(codec=False)  # the next token would be another word, or a code
    most = 32 * WORDS["largest"]
    assert host.geometry(32, most).width == most
    with pytest.raises(LongtakeError, match=f"has words for sides of up to {most} pixels"):
        host.geometry(32, most + 32)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 32, 64, dtype=torch.uint8), torch.full((3, 32, 64), torch.nan)], ids=["bytes", "nan"]
)
def test_a_picture_that_codes_would_hide_is_refused(wrong):
    with pytest.raises(LongtakeError, match=r"give finite floats in \[-1, 1\]"):
        Session(tiny_lumos(), prompt="red kite", image=wrong)


def test_codes_have_no_compressed_form_and_a_policy_that_asks_for_one_says_what_to_do():
    host = tiny_lumos(codec=False)
    for compressor in (None, longtake.MeanPool()):
        with pytest.raises(LongtakeError, match="has no compressed form: use middle=full"):
            Session(host, longtake.PackForcing(), prompt="red kite", decode=False, compressor=compressor)
    with pytest.raises(LongtakeError, match="has no compressed form: use middle=full"):
        longtake.PackForcing().fit(10**6, history_shape(host, host.geometry()))
    next(Session(host, longtake.PackForcing(middle="full"), prompt="red kite", decode=False))


class Letters:
    """A text tokenizer that shows what it was given."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, text: str, **options: object):
        assert options == {"add_special_tokens": False}
        self.read.append(text)
        return type("Encoded", (), {"input_ids": [48] * len(text.split())})()


@pytest.mark.parametrize(
    ("frames", "seconds", "fps", "counted"), [(13, 4, 12, 48), (7, 2, 12, 24), (None, 2, 12, 24), (1, 1, 1, 1)]
)
def test_the_prompt_says_size_length_and_rate_as_in_training(frames, seconds, fps, counted):
    letters = Letters()
    host = Lumos(tiny_model(), published("384p"), tokenizer=letters, name="tiny")
    ids = host.encode_for(["a red kite"], host.geometry(), frames)[0].tolist()
    assert letters.read == [
        f"Generate a video with a resolution of 672x384, consisting of {counted} frames at {fps} frames per second, "
        "according to the following prompt:\n a red kite"
    ]
    text = len(letters.read[0].split())
    end = [WORDS["video_begin"], WORDS["integer"] + seconds, WORDS["integer"] + fps]
    assert ids == [WORDS["bos"], *[48] * text, WORDS["separator"], *end]
    assert host.unconditional(torch.tensor([ids])).tolist() == [end]


def test_one_frame_is_an_image_of_its_own_kind():
    session = longtake.generate(tiny_lumos(), chunks=1, prompt="red ball")
    header = session.texts["uncond"].embeds[0].tolist()
    assert header == [WORDS["video_begin"], WORDS["integer"] + 1, WORDS["integer"] + 1]
    (image,) = session
    assert image.frames.shape == (1, 32, 64, 3)


def test_a_prompts_keys_are_computed_once_for_several_takes():
    host = tiny_lumos(codec=False)
    passes = []
    forward = host.model.forward

    def spy(ids, layers, **how):
        passes.append((tuple(ids.shape), how))
        return forward(ids, layers, **how)

    host.model.forward = spy
    text = host.text_state(host.encode_prompt(["red kite"]))
    prompts = lambda: [shape for shape, how in passes if how == {"causal": True}]
    assert len(prompts()) == 1
    again = [next(Session(host, FullHistory(), prompt_embeds=text, seed=s, decode=False)).latents for s in (0, 1)]
    assert prompts()[1:] == [(1, 3)] * 2  # headers
    fresh = [next(Session(host, FullHistory(), prompt="red kite", seed=s, decode=False)).latents for s in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True)) and not torch.equal(*again)
    passes.clear()
    next(Session(host, FullHistory(), prompt=["red kite"] * 3, decode=False))
    assert {shape[0] for shape in prompts()} == {1} and passes[-1][0][0] == 3  # one prompt, three frames


def test_prompts_in_lockstep_may_differ_but_not_in_length():
    host = tiny_lumos(codec=False)
    both = next(Session(host, FullHistory(), prompt=["red kite", "red ball"], seed=[4, 4], decode=False)).latents
    alone = next(Session(host, FullHistory(), prompt="red ball", seed=4, decode=False)).latents
    assert torch.equal(both[1], alone) and not torch.equal(both[0], alone)
    with pytest.raises(LongtakeError, match="cannot run in lockstep") as error:
        Session(host, prompt=["red kite", "red red kite"], decode=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.zeros(1, 4, 8), "takes whole-number ids"),
        (torch.tensor([[0, 48, 3]]), "do not end in a video header"),
        ([0, 48], "takes whole-number ids"),
    ],
)
def test_ids_that_are_no_prompt_are_refused(ids, says):
    with pytest.raises(LongtakeError, match=says):
        Session(tiny_lumos(codec=False), prompt_embeds=ids, decode=False)


def test_a_prompt_without_a_text_tokenizer_is_refused_with_what_to_do():
    with pytest.raises(LongtakeError, match="has no text tokenizer: put Alpha-VLLM"):
        Session(Lumos(tiny_model(), tiny_settings(), name="tiny"), prompt="red kite", decode=False)


def test_frames_without_a_video_tokenizer_are_refused_with_what_to_do():
    with pytest.raises(LongtakeError, match=r"without a video tokenizer: .* \(--tokenizer\)"):
        Session(tiny_lumos(codec=False), prompt="red kite")


@pytest.mark.parametrize("new", ["red ball", "red red red ball", "ball"])
def test_a_prompt_set_before_the_first_frame_is_the_prompt(new):
    host = tiny_lumos(codec=False)
    switched = Session(host, SlidingWindow(3, sink=0), prompt="red kite", seed=2, decode=False)
    switched.rollout._prompts()  # the first prompt is in the history already
    switched.prompt = new
    plain = Session(host, SlidingWindow(3, sink=0), prompt=new, seed=2, decode=False)
    kept = Session(host, SlidingWindow(3, sink=0), prompt="red kite", seed=2, decode=False)
    takes = [[next(take).latents for _ in range(4)] for take in (switched, plain, kept)]
    assert all(torch.equal(a, b) for a, b in zip(takes[0], takes[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(takes[0], takes[2], strict=True))


def test_a_switched_prompt_ends_where_the_old_one_did_and_frames_stay():
    host = tiny_lumos(codec=False)
    take = Session(host, FullHistory(), prompt="red kite", decode=False)
    next(take)
    before = {b.frame: take.history.stores["cond"].held[(b.id, "full")].rows for b in take.history.table().blocks[1:]}
    base = take.history.stores["cond"].base.clone()
    take.prompt = "red red red kite"
    next(take)
    table, store = take.history.table(), take.history.stores["cond"]
    assert [(b.role, b.span) for b in table.blocks] == [("anchor", 0), ("committed", 1), ("committed", 1)]
    held = store.held[(table.blocks[0].id, "full")]
    old, new = 2 + 2 + 3, 2 + 4 + 3  # with BOS, separator and header; the template of the tiny model adds its own
    words = len(re.findall(r"\w+|[^\w\s]+", host.model.config.prompt_template.format(
        width=64, height=32, frames=16, fps=8, prompt=""
    )))  # fmt: skip
    assert store.base[held.rows][:, 0].tolist() == list(range(old - new, old + words))
    assert torch.equal(store.base[before[0]], base[before[0]])


# --- images, windows, memory ----------------------------------------------------------------------------------------


def test_a_first_image_is_an_anchor_and_comes_out_first():
    host = tiny_lumos()
    image = torch.rand(3, 32, 64) * 2 - 1
    take = Session(host, SlidingWindow(2, sink=0), prompt="red kite", image=image, chunks=4)
    chunks = list(take)
    assert [len(c.frames) for c in chunks] == [5, 4, 4, 4]
    roles = [(b.role, b.frame, b.span) for b in take.history.table().blocks]
    assert roles[:2] == [("anchor", 0, 0), ("anchor", 0, 1)]
    shown = host.decoder().push(host.encode_image(image[None]))
    assert torch.equal(chunks[0].frames[:1], shown[0])


@pytest.mark.parametrize(
    ("policy", "image"),
    [(SlidingWindow(3, sink=0), False), (PackCache(), True), (PackCache(max_frames=2), False)],
)
@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_history_bytes_are_constant_after_the_window_fills_and_equal_the_formula(policy, image, residency):
    host = tiny_lumos()
    take = Session(
        host, policy, prompt="red kite", image=torch.zeros(3, 32, 64) if image else None, residency=residency
    )
    held, total = [], []
    for _ in range(9):
        held.append(next(take).stats.history_bytes)
        total.append(take.memory()["total"])
    assert held[5:] == [held[5]] * 4 and total[5:] == [total[5]] * 4
    per_token = 2 * host.layers * host.kv_heads * host.head_dim * 4
    prompts = sum(text.embeds.shape[1] for text in take.texts.values())
    # beside the prompts: a given image, the history as the policy keeps it, and the frame just committed
    frames = {3: 3 * N}.get(getattr(policy, "frames", 0))
    if isinstance(policy, PackCache):
        frames = image * N + 4 * 9 + 4 * policy.max_frames + N
    assert held[-1] == per_token * (prompts + 2 * frames)
    anchors = max(text.embeds.shape[1] for text in take.texts.values())
    layers = host.layers * len(take.history.streams) if residency == "resident" else 1
    rows = frames + anchors
    assert take.memory()["view"] == 2 * layers * rows * host.kv_heads * host.head_dim * 4


def test_a_memory_limit_counts_history_and_view():
    with pytest.raises(LongtakeError, match="memory_limit is 1000"):
        Session(tiny_lumos(), PackCache(), prompt="red kite", memory_limit=1000)


# --- snapshots, command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [PackCache(), FullHistory(), SlidingWindow(3, sink=0)])
@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_a_restored_take_goes_on_bit_for_bit(tmp_path, policy, compat):
    host = tiny_lumos(compat=compat)
    take = Session(host, policy, prompt="red kite", image=torch.zeros(3, 32, 64), seed=3, num_inference_steps=3)
    for _ in range(2):
        next(take)
    take.prompt = "red red ball"
    next(take)
    take.snapshot(tmp_path / "take.safetensors")
    again = Session.restore(tmp_path / "take.safetensors", host)
    assert again.sampler == take.sampler
    for _ in range(3):
        a, b = next(take), next(again)
        assert torch.equal(a.latents, b.latents) and torch.equal(a.frames, b.frames)


def test_two_interleaved_takes_equal_two_runs():
    host = tiny_lumos()
    make = lambda seed: Session(host, PackCache(), prompt="red kite", seed=seed, decode=False)
    apart = [[next(take).latents for _ in range(3)] for take in (make(1), make(2))]
    a, b = make(1), make(2)
    together = [(next(a).latents, next(b).latents) for _ in range(3)]
    for i, pair in enumerate(zip(*together, strict=True)):
        assert all(torch.equal(x, y) for x, y in zip(pair, apart[i], strict=True))


def test_the_command_line_makes_a_video_of_text_and_of_an_image(folder, tmp_path):
    out = tmp_path / "take.mp4"
    run = CliRunner().invoke(app, [
        "generate", "red kite", "--model", str(folder), "--chunks", "3", "-o", str(out), "--policy", "packcache",
        "--compat", "upstream", "--steps", "3", "--device", "cpu", "--json",
    ])  # fmt: skip
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert out.exists() and (report["frames"], report["chunks"], report["forwards"]) == (9, 3, 3 * 2 * 3 + 2 * 2)
    # frames of 36 content tokens and 4 structural ones; the third is the last and was not written
    assert report["slots"] == [{"frame": 0, "tokens": 18 + 4}, {"frame": 1, "tokens": 18 + 4}]
    assert "warning: the prompt's" in run.stderr
    picture, codes = tmp_path / "first.png", tmp_path / "codes.safetensors"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    run = CliRunner().invoke(app, [
        "generate", "red kite", "--model", str(folder), "--chunks", "3", "-o", str(out), "--image", str(picture),
        "--steps", "3", "--device", "cpu", "--latents", str(codes), "--json",
    ])  # fmt: skip
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert (report["frames"], report["chunks"]) == (1 + 3 * 4, 3)  # the image is a frame beside the chunks
    host = longtake.load(folder, device="cpu")
    given = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    twin = Session(host, prompt="red kite", image=given, chunks=3, num_inference_steps=3, decode=False)
    made = torch.cat([next(twin).latents for _ in range(3)], 1)
    told = load_file(codes)["latents"][-3:]  # [F, C, h, w]
    assert torch.equal(told, made.transpose(0, 1).float())
    alone = Session(host, prompt="red kite", chunks=3, num_inference_steps=3, decode=False)
    assert not torch.equal(told, torch.cat([next(alone).latents for _ in range(3)], 1).transpose(0, 1).float())
    run = CliRunner().invoke(app, [
        "generate", "red kite", "--model", "tiny-wan", "--compat", "upstream", "-o", str(out), "--chunks", "1",
    ])  # fmt: skip
    assert run.exit_code == 2 and "--compat upstream: it is for Lumos-1 models" in run.output


def test_a_prompt_longer_than_a_tenth_of_a_packed_history_is_pointed_out(capsys):
    host = tiny_lumos(codec=False)
    content = host.geometry().grid[0] * host.geometry().grid[1]

    def said(policy, image: int = 0) -> str:
        given = torch.zeros(3, 32, 64) if image else None
        host.codec = tiny_codec() if image else None
        take = Session(host, policy, prompt="red kite", image=given, decode=False)
        say_long_text(take, image)
        return capsys.readouterr().err

    text = Session(host, FullHistory(), prompt="red kite", decode=False).history.shape.anchor_tokens
    exact = 10 * text / content  # the prompt is a tenth of the history's tokens
    for image in (0, 1):
        assert said(PackCache(history_frames=exact + 0.1, max_frames=20), image) == ""
        found = said(PackCache(history_frames=exact - 0.1, max_frames=20), image)
        assert f"warning: the prompt's {text} tokens stay whole beside a history of" in found
    assert said(FullHistory()) == ""


def test_the_published_vocabulary_holds_the_published_ids():
    words = Vocabulary()
    assert words.mask in words and words.integer + 12 in words and words.bos in words
    assert 16_400 not in words and 8804 + 199 not in range(words.integer, words.integer + words.largest + 1)
    ids = {words.mask, words.video_begin, words.frame_begin, words.frame_end, words.newline, words.separator}
    assert ids == {9003, 9004, 8197, 8196, 8803, 8710}


def test_a_prompt_may_not_contain_special_tokens():
    mask = lambda text, **_: type("Encoded", (), {"input_ids": [WORDS["mask"]]})()
    host = Lumos(tiny_model(), tiny_settings(), tokenizer=mask, name="tiny")
    with pytest.raises(LongtakeError, match=r"special token \(id 5\)"):
        host.encode_prompt(["<mask>"])


def test_every_pass_sees_frames_of_the_right_ids():
    host = tiny_lumos(codec=False)
    fed = Fed(host)
    next(Session(host, FullHistory(), prompt="red kite", decode=False))
    from longtake.hosts.lumos.sequence import frame_ids

    ids = frame_ids(fed.content[0], host.geometry(), host.words)[0].tolist()
    row = [WORDS["mask"]] * 8 + [WORDS["newline"]]
    assert ids == [WORDS["frame_begin"], WORDS["integer"] + 1, WORDS["integer"] + 2, *row * 4, WORDS["frame_end"]]


def test_codec_and_words_are_the_models_own(folder):
    host = longtake.load(folder, device="cpu")
    assert torch.equal(host.codec.encoder_net.enter.conv.weight, tiny_codec().encoder_net.enter.conv.weight)
    assert host.tokenizer("red kite").input_ids == tiny_words()("red kite").input_ids
    assert host.memory()["tokenizer"] == tiny_codec().memory()
