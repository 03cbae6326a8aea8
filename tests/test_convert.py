"""Published checkpoint layouts become folders that stock diffusers loads, or one clear line says why not."""

import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longtake.errors import LongtakeError
from longtake.hosts.convert import FAMILIES, convert, writing
from longtake.hosts.convert.families import family_of
from tests.tiny_checkpoints import (
    fsdp,
    longlive_lora,
    prefixed,
    tiny_transformer,
    upstream_name,
    upstream_state,
    write_base,
)

GOLDEN = Path(__file__).parent / "goldens" / "self_forcing_rollout_global.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "wan")


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    return tiny_transformer(seed=0)


@pytest.fixture(scope="module")
def upstream(model) -> dict[str, torch.Tensor]:
    return upstream_state(model)


def saved(tree, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tree, path)
    return path


def velocity(transformer: WanTransformer3DModel) -> torch.Tensor:
    noise = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 3, 4, 6, generator=noise)
    text = torch.randn(1, 5, 16, generator=noise)
    with torch.no_grad():
        return transformer(latents, torch.tensor([833.333]), text, return_dict=False)[0]


def loaded(out: Path, **options) -> WanTransformer3DModel:
    transformer, info = WanTransformer3DModel.from_pretrained(out / "transformer", output_loading_info=True, **options)
    assert not any(info.values()), info
    return transformer.eval()


def refuses(match: str, *args, **options) -> None:
    """convert fails with one line, and neither creates nor changes anything at or beside `out`."""
    out = Path(args[1])
    before = sorted(os.listdir(out.parent)) if out.parent.exists() else None
    with pytest.raises(LongtakeError, match=match) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value)
    assert (sorted(os.listdir(out.parent)) if out.parent.exists() else None) == before


# --- what comes out ------------------------------------------------------------------------------------------------


def layouts(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict:
    """name → (dict as published, options): `state` is the set that must be taken, `other` the one that must not."""
    critic = prefixed({name: tensor + 1 for name, tensor in state.items()})
    return {
        "self_forcing_dmd.pt": ({"generator": prefixed(other), "generator_ema": prefixed(state), "critic": critic}, {}),
        "rolling_forcing_dmd.pt": ({"generator": fsdp(other), "generator_ema": fsdp(state)}, {}),
        "framewise/causal_forcing.pt": ({"generator": prefixed(other), "generator_ema": fsdp(state), "step": 7}, {}),
        "chunkwise/causal_forcing.pt": ({"generator": fsdp(state), "generator_ema": prefixed(other)}, {}),
        "longlive_base.pt": ({"generator": prefixed(state), "critic": critic}, {}),
        "ours/model.pt": ({"state_dict": prefixed(state, "module.")}, {"family": "self-forcing"}),
        "ours/flat.pth": (state, {"family": "causal-forcing"}),
        "ours/tables.pt": (
            state | {"freqs": torch.ones(4, 2), "rope.freqs_cos": torch.ones(3)},
            {"family": "longlive"},
        ),
    }


@pytest.mark.parametrize("name", list(layouts({}, {})))
def test_every_published_layout_gives_the_same_network(name, base, model, upstream, tmp_path):
    other = {key: tensor + 0.5 for key, tensor in upstream.items()}
    tree, options = layouts(upstream, other)[name]
    report = convert(saved(tree, tmp_path / "in" / name), tmp_path / "out", base, dtype="float32", **options)
    assert torch.equal(velocity(loaded(tmp_path / "out")), velocity(model))
    assert report["tensors"] == len(upstream) and report["lora_layers"] == 0
    assert report["bytes"] == 4 * report["parameters"] == 4 * sum(p.numel() for p in model.parameters())
    json.dumps(report)


@pytest.mark.parametrize("spelling", ["original", "diffusers", "nested"])
def test_safetensors_sources_equal_the_pt_one(spelling, base, model, upstream, tmp_path):
    state = {
        "original": prefixed(upstream),
        "diffusers": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "nested": prefixed(upstream, "generator.model."),
    }[spelling]
    save_file(state, tmp_path / "longlive.safetensors")
    report = convert(tmp_path / "longlive.safetensors", tmp_path / "out", base, dtype="float32")
    assert torch.equal(velocity(loaded(tmp_path / "out")), velocity(model))
    assert report["ema"] is (False if spelling == "nested" else None)


def test_a_sharded_folder_equals_its_single_file(base, model, tmp_path):
    model.save_pretrained(tmp_path / "self-forcing", max_shard_size="20KB")
    assert len(list((tmp_path / "self-forcing").glob("*.safetensors"))) > 1
    convert(tmp_path / "self-forcing", tmp_path / "out", base, dtype="float32")
    assert torch.equal(velocity(loaded(tmp_path / "out")), velocity(model))


def test_upstream_weights_reproduce_the_velocity_upstream_computed(tmp_path):
    golden = load_file(GOLDEN)
    with safe_open(GOLDEN, framework="pt") as file:
        sizes = json.loads(file.metadata()["config"])
    base = write_base(
        tmp_path / "base",
        num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["head_dim"],
        in_channels=sizes["in_dim"],
        out_channels=sizes["out_dim"],
        text_dim=sizes["text_dim"],
        freq_dim=sizes["freq_dim"],
        ffn_dim=sizes["ffn_dim"],
        num_layers=sizes["num_layers"],
    )
    weights = {name.removeprefix("weights/"): t for name, t in golden.items() if name.startswith("weights/")}
    source = saved({"generator_ema": prefixed(weights)}, tmp_path / "self_forcing_dmd.pt")
    convert(source, tmp_path / "out", base, dtype="float32")

    first = golden["inputs/noise"][:, : sizes["chunk_frames"]].transpose(1, 2)  # [B, F, C, h, w] → [B, C, F, h, w]
    with torch.no_grad():
        got = loaded(tmp_path / "out")(
            first, golden["inputs/timesteps"][:1], golden["inputs/text_embeds"], return_dict=False
        )[0]
    expected = golden["outputs/first_velocity"].transpose(1, 2)
    assert expected.std() > 0.5
    assert (got - expected).abs().max() <= 1e-4


def test_the_folder_is_a_pipeline_whose_other_parts_are_the_base_s(base, model, upstream, tmp_path):
    convert(saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt"), tmp_path / "out", base)
    pipeline = WanPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert type(pipeline.transformer) is WanTransformer3DModel
    assert pipeline.tokenizer("red kite").input_ids == [3, 4]
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert {f.name: f.read_bytes() for f in (tmp_path / "out" / part).iterdir()} == {
            f.name: f.read_bytes() for f in (base / part).iterdir()
        }


def test_bfloat16_is_the_default_and_loads_with_the_modules_diffusers_keeps_in_fp32(base, model, upstream, tmp_path):
    convert(saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt"), tmp_path / "out", base)
    out = loaded(tmp_path / "out", torch_dtype=torch.bfloat16)
    expected = model.state_dict()
    kept = set()
    for name, tensor in out.state_dict().items():
        if tensor.dtype == torch.float32:
            kept.add(name)
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert kept == {n for n in expected if {"time_embedder", "scale_shift_table", "norm2"} & set(n.split("."))}


def test_a_transformer_larger_than_a_shard_is_split_and_still_loads(base, model, upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_SHARD_BYTES", 20_000)
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    report = convert(source, tmp_path / "out", base, dtype="float32")
    shards = list((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert report["shards"] == len(shards) > 2
    assert {f.stat().st_mode for f in shards} == {(tmp_path / "out" / "transformer" / "config.json").stat().st_mode}
    assert torch.equal(velocity(loaded(tmp_path / "out")), velocity(model))


def test_tensors_that_share_memory_or_are_strided_in_the_source_are_written_apart(base, model, upstream, tmp_path):
    odd = dict(upstream)
    odd["blocks.0.self_attn.k.bias"] = odd["blocks.0.self_attn.q.bias"]
    odd["blocks.1.ffn.0.weight"] = odd["blocks.1.ffn.0.weight"].t().contiguous().t()
    source = saved({"generator": prefixed(odd)}, tmp_path / "longlive_base.pt")
    convert(source, tmp_path / "out", base, dtype="float32")
    expected = model.state_dict() | {"blocks.0.attn1.to_k.bias": upstream["blocks.0.self_attn.q.bias"]}
    for name, tensor in loaded(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_result_holds_no_links_and_outlives_its_base(base, model, upstream, tmp_path):
    cache = tmp_path / "cache"  # a Hub cache: names are symlinks to blobs
    shutil.copytree(base, cache / "blobs")
    for file in [f for f in (cache / "blobs").rglob("*") if f.is_file()]:
        link = cache / "snapshot" / file.relative_to(cache / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    large = cache / "blobs" / "text_encoder" / "large.bin"
    large.write_bytes(bytes(2 << 20))
    (cache / "snapshot" / "text_encoder" / "large.bin").symlink_to(large)

    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    convert(source, tmp_path / "out", cache / "snapshot", dtype="float32")
    files = [f for f in (tmp_path / "out").rglob("*") if f.is_file()]
    assert not any(f.is_symlink() for f in files)
    copy = tmp_path / "out" / "text_encoder" / "large.bin"
    assert copy.samefile(large)  # large files share their bytes, small ones can be edited freely
    assert not any(f.stat().st_nlink > 1 for f in files if f != copy)
    shutil.rmtree(cache)
    assert copy.stat().st_size == 2 << 20
    assert torch.equal(velocity(WanPipeline.from_pretrained(tmp_path / "out").transformer), velocity(model))


def test_a_base_that_names_a_class_of_its_publisher_becomes_a_stock_pipeline(base, upstream, tmp_path):
    theirs = shutil.copytree(base, tmp_path / "theirs")
    for path, change in (
        (theirs / "model_index.json", {"transformer": ["diffusers", "CausalWanTransformer3DModel"]}),
        (theirs / "transformer" / "config.json", {"_class_name": "CausalWanTransformer3DModel"}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    convert(saved({"generator": prefixed(upstream)}, tmp_path / "longlive.pt"), tmp_path / "out", theirs)
    assert type(WanPipeline.from_pretrained(tmp_path / "out").transformer) is WanTransformer3DModel


# --- longtake.json, families, EMA ----------------------------------------------------------------------------------


def test_longtake_json_says_how_the_family_is_run_and_where_it_came_from(base, upstream, tmp_path):
    source = saved({"generator_ema": prefixed(upstream)}, tmp_path / "rolling_forcing_dmd.pt")
    convert(source, tmp_path / "out", base)
    assert json.loads((tmp_path / "out" / "longtake.json").read_text()) == {
        "format": 1,
        "host": "wan",
        "causal": True,
        "chunk_frames": 3,
        "timesteps": [1000, 800, 600, 400, 200],
        "shift": 5.0,
        "guidance_scale": 1.0,
        "fps": 16,
        "height": 480,
        "width": 832,
        "text_tokens": 512,
        "training_frames": 27,
        "window": 21,
        "sink": 3,
        "source": {
            "file": "rolling_forcing_dmd.pt",
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "family": "rolling-forcing",
            "ema": True,
        },
    }


@pytest.mark.parametrize(
    ("family", "chunk", "steps", "window", "sink"),
    [
        ("self-forcing", 3, 4, None, 0),
        ("causal-forcing", 3, 4, None, 0),
        ("causal-forcing-framewise", 1, 4, None, 0),
        ("longlive", 3, 4, 12, 3),
        ("rolling-forcing", 3, 5, 21, 3),
    ],
)
def test_each_family_has_its_own_schedule(family, chunk, steps, window, sink, base, upstream, tmp_path):
    convert(saved(upstream, tmp_path / "model.pt"), tmp_path / "out", base, family=family)
    said = json.loads((tmp_path / "out" / "longtake.json").read_text())
    assert (said["chunk_frames"], len(said["timesteps"]), said["window"], said["sink"]) == (chunk, steps, window, sink)
    assert said["source"]["family"] == family and said["source"]["ema"] is None


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("checkpoints/self_forcing_dmd.pt", "self-forcing"),
        ("checkpoints/rolling_forcing_dmd.pt", "rolling-forcing"),
        ("models/longlive_base.pt", "longlive"),
        ("chunkwise/causal_forcing.pt", "causal-forcing"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("causal-forcing++/framewise-2step.pt", "causal-forcing-framewise"),
        ("Self-Forcing/model.safetensors", "self-forcing"),
        ("longlive/self_forcing.pt", "self-forcing"),
        ("checkpoints/causal_forcing.pt", None),
        ("chunkwise/longvideo.pt", None),
        ("checkpoints/ode_init.pt", None),
        ("LongLive-2.0/model.pt", None),
        ("longlive/self_forcing_rolling_forcing.pt", None),
    ],
)
def test_the_family_is_read_from_a_published_name_only_when_it_names_one(path, family):
    if family:
        assert family_of(Path("/data") / path, None) == (family, FAMILIES[family])
    else:
        with pytest.raises(LongtakeError, match=r"--family with one of self-forcing, causal-forcing, "):
            family_of(Path("/data") / path, None)


def test_ema_can_be_chosen_against_the_family(base, model, upstream, tmp_path):
    other = {name: tensor + 0.5 for name, tensor in upstream.items()}
    source = saved({"generator": prefixed(upstream), "generator_ema": prefixed(other)}, tmp_path / "self_forcing.pt")
    report = convert(source, tmp_path / "out", base, ema=False, dtype="float32")
    assert report["ema"] is False
    assert torch.equal(velocity(loaded(tmp_path / "out")), velocity(model))


def test_missing_ema_weights_are_named_not_replaced(base, upstream, tmp_path):
    tree = {"generator": prefixed(upstream), "critic": {}, "step": 3}
    source = saved(tree, tmp_path / "self_forcing_dmd.pt")
    for ema in (None, True):
        refuses(r"no EMA weights .*holds generator, critic, step; .*ema=False", source, tmp_path / "out", base, ema=ema)
    only = saved({"generator_ema": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    refuses(r"no non-EMA weights .*holds generator_ema; .*ema=True", only, tmp_path / "out", base)
    flat = saved(upstream, tmp_path / "self_forcing_flat.pt")
    refuses(r"no EMA weights: it holds \S+, \S+, \S+, … \d+ more", flat, tmp_path / "out", base, ema=True)


# --- LoRA ----------------------------------------------------------------------------------------------------------


def lora_spellings(adapter: dict[str, torch.Tensor]) -> dict[str, dict]:
    default = {n.replace(".weight", ".default.weight"): t for n, t in adapter.items()}
    wrapped = {
        n.replace("base_model.model.", "_fsdp_wrapped_module.base_model.model.model."): t for n, t in default.items()
    }
    inside = {n.replace(".self_attn", "._fsdp_wrapped_module.self_attn"): t for n, t in wrapped.items()}
    return {
        "peft": {"generator_lora": adapter, "critic_lora": {}},
        "default": {"generator_lora": default},
        "fsdp": inside,
    }


@pytest.mark.parametrize("spelling", ["peft", "default", "fsdp", "diffusers", "safetensors"])
def test_a_merged_lora_equals_adding_b_a_by_hand(spelling, base, model, upstream, tmp_path):
    adapter = longlive_lora(model)
    back = {upstream_name(n).removesuffix(".weight"): n.removesuffix(".weight") for n in model.state_dict()}
    lora = tmp_path / ("lora.safetensors" if spelling == "safetensors" else "lora.pt")
    if spelling == "safetensors":
        save_file(adapter, lora)
    elif spelling == "diffusers":
        layers = {n: n.removeprefix("base_model.model.").split(".lora_")[0] for n in adapter}
        saved({n.replace(layers[n], back[layers[n]]): t for n, t in adapter.items()}, lora)
    else:
        saved(lora_spellings(adapter)[spelling], lora)

    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    report = convert(source, tmp_path / "out", base, lora=lora, lora_scale=0.5, dtype="float32")
    weights = loaded(tmp_path / "out").state_dict()
    merged = 0
    for name, before in model.state_dict().items():
        layer = "base_model.model." + upstream_name(name).removesuffix(".weight")
        if name.endswith(".weight") and f"{layer}.lora_A.weight" in adapter:
            before = before + 0.5 * (adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"])
            merged += 1
        assert torch.equal(weights[name], before), name
    assert report["lora_layers"] == merged == 3 * 10
    origin = json.loads((tmp_path / "out" / "longtake.json").read_text())["source"]["lora"]
    assert origin == {"file": lora.name, "sha256": hashlib.sha256(lora.read_bytes()).hexdigest(), "scale": 0.5}


def test_a_lora_is_merged_in_fp32_before_the_weights_are_rounded(base, model, upstream, tmp_path):
    adapter = {name: tensor.bfloat16() for name, tensor in longlive_lora(model).items()}
    half = {name: tensor.bfloat16() for name, tensor in upstream.items()}
    source = saved({"generator": prefixed(half)}, tmp_path / "longlive_base.pt")
    convert(source, tmp_path / "out", base, lora=saved({"generator_lora": adapter}, tmp_path / "lora.pt"))
    got = loaded(tmp_path / "out", torch_dtype=torch.bfloat16).blocks[1].attn2.to_k.weight
    a, b = (adapter[f"base_model.model.blocks.1.cross_attn.k.lora_{side}.weight"].float() for side in "AB")
    weight = half["blocks.1.cross_attn.k.weight"]
    assert torch.equal(got, (weight.float() + b @ a).bfloat16())
    assert not torch.equal(got, weight + (b.bfloat16() @ a.bfloat16()))


def test_a_lora_that_does_not_fit_is_an_error(base, model, upstream, tmp_path):
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    adapter = longlive_lora(model)
    layer = "base_model.model.blocks.0.self_attn.q"
    wrong = {
        "1 keys that fit no layer .*blocks.9": adapter
        | {f"{layer.replace('.0.', '.9.')}.lora_A.weight": torch.ones(4, 24)},
        "fit no layer .*alpha": adapter | {f"{layer}.alpha": torch.ones(())},
        "fit no layer .*self_attn.q.lora_A": adapter | {f"{layer}.lora_A.default.weight": torch.ones(4, 24)},
        "fit no layer .*has only lora_A": {n: t for n, t in adapter.items() if n != f"{layer}.lora_B.weight"},
        r"B \[24, 4\] @ A \[4, 25\] for blocks.0.attn1.to_q.weight \[24, 24\]": adapter
        | {f"{layer}.lora_A.weight": torch.ones(4, 25)},
        "no LoRA keys": {},
        "fit no layer": upstream,
    }
    for match, tree in wrong.items():
        lora = saved({"generator_lora": tree}, tmp_path / "lora.pt")
        refuses(match, source, tmp_path / "out", base, lora=lora)
    refuses("nowhere.pt does not exist", source, tmp_path / "out", base, lora=tmp_path / "nowhere.pt")


# --- wrong inputs --------------------------------------------------------------------------------------------------


def test_keys_that_do_not_fit_are_named_and_counted(base, upstream, tmp_path):
    def source(state):
        return saved({"generator": prefixed(state)}, tmp_path / "longlive_base.pt")

    extra = upstream | {f"blocks.{i}.gate": torch.ones(1) for i in range(5)}
    refuses(r"5 unknown keys \(blocks.0.gate, .*… 2 more\)", source(extra), tmp_path / "out", base)
    less = {name: tensor for name, tensor in upstream.items() if "ffn.2" not in name}
    refuses(r"6 missing keys \(blocks.0.ffn.net.2", source(less), tmp_path / "out", base)
    unswapped = {name.replace("norm3", "norm2"): tensor for name, tensor in upstream.items()}
    refuses(r"6 unknown keys .*norm2.*6 missing keys", source(unswapped), tmp_path / "out", base)
    twice = upstream | {"_orig_mod.head.modulation": upstream["head.modulation"]}
    refuses(r"1 repeated keys \(head.modulation\)", source(twice), tmp_path / "out", base)
    refuses("unknown keys", source({"hello": torch.ones(2)}), tmp_path / "out", base)


def test_a_shape_that_differs_from_the_base_is_named_with_both_sizes(base, tmp_path):
    wide = upstream_state(tiny_transformer(ffn_dim=40))
    source = saved({"generator": prefixed(wide)}, tmp_path / "longlive_base.pt")
    refuses(
        r"9 tensors of another size: .*ffn.* is \[40, 24\], the base says \[32, 24\]", source, tmp_path / "out", base
    )


class _Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-was-run",)


def test_files_that_are_no_checkpoint_are_refused_unread(base, upstream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    refuses("does not exist", tmp_path / "nowhere.pt", out, base, family="longlive")
    (tmp_path / "longlive.ckpt").write_bytes(b"x")
    refuses("not a checkpoint longtake reads; give a .pt", tmp_path / "longlive.ckpt", out, base)
    (tmp_path / "longlive").mkdir()
    refuses("holds no .safetensors file", tmp_path / "longlive", out, base)
    refuses("holds pickled Python objects", saved({"generator": _Payload()}, tmp_path / "longlive_evil.pt"), out, base)
    assert not (tmp_path / "payload-was-run").exists()
    refuses("holds a list, not a dict", saved([torch.ones(1)], tmp_path / "longlive_list.pt"), out, base)

    good = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt").read_bytes()
    (tmp_path / "longlive_cut.pt").write_bytes(good[: len(good) // 2])
    refuses("longlive_cut.pt is not a complete torch.save file", tmp_path / "longlive_cut.pt", out, base)
    (tmp_path / "longlive_pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    refuses("Git LFS pointer", tmp_path / "longlive_pointer.pt", out, base)
    torch.save(upstream, tmp_path / "longlive_old.pt", _use_new_zipfile_serialization=False)
    refuses("torch older than 1.6", tmp_path / "longlive_old.pt", out, base)
    shutil.make_archive(str(tmp_path / "longlive_other"), "zip", base / "scheduler")
    (tmp_path / "longlive_other.zip").rename(tmp_path / "longlive_other.pt")
    refuses("longlive_other.pt cannot be read", tmp_path / "longlive_other.pt", out, base)

    save_file(upstream, tmp_path / "longlive_cut.safetensors")
    data = (tmp_path / "longlive_cut.safetensors").read_bytes()
    (tmp_path / "longlive_cut.safetensors").write_bytes(data[:-100])
    refuses("no complete .safetensors file", tmp_path / "longlive_cut.safetensors", out, base)


def test_an_incomplete_sharded_folder_names_the_missing_shard(base, model, tmp_path):
    folder = tmp_path / "self-forcing"
    model.save_pretrained(folder, max_shard_size="20KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    refuses(f"lacks {gone.name}", folder, tmp_path / "out", base)
    next(folder.glob("*.index.json")).write_text("{")
    refuses("index.json cannot be read", folder, tmp_path / "out", base)


def test_weights_that_are_not_finite_are_refused(base, upstream, tmp_path):
    large = upstream | {"head.head.weight": upstream["head.head.weight"] * 1e6}
    source = saved({"generator": prefixed(large)}, tmp_path / "longlive_base.pt")
    refuses("proj_out.weight is not finite in torch.float16", source, tmp_path / "out", base, dtype="float16")
    convert(source, tmp_path / "out", base, dtype=torch.float32)


def test_unknown_family_and_dtype_list_what_is_accepted(base, upstream, tmp_path):
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    refuses("unknown family 'wan'; .*self-forcing", source, tmp_path / "out", base, family="wan")
    refuses("dtype int8 is not supported; give one of bfloat16", source, tmp_path / "out", base, dtype="int8")
    refuses("dtype torch.int8 is not supported", source, tmp_path / "out", base, dtype=torch.int8)


def test_a_base_that_is_not_a_whole_wan_model_is_refused(base, upstream, tmp_path):
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    out = tmp_path / "out"
    refuses("neither a folder nor a Hub id", source, out, tmp_path / "no" / "such" / "folder")
    part = shutil.copytree(base, tmp_path / "part")
    shutil.rmtree(part / "vae")
    refuses("lacks vae; give a complete Wan model", source, out, part)
    shutil.copytree(base / "vae", part / "vae")
    config = json.loads((part / "transformer" / "config.json").read_text())
    (part / "transformer" / "config.json").write_text(
        json.dumps(config | {"_class_name": "SkyReelsV2Transformer3DModel"})
    )
    refuses("holds a SkyReelsV2Transformer3DModel; give a Wan model", source, out, part)
    (part / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": "three"}))
    refuses("describes no Wan transformer", source, out, part)
    (part / "transformer" / "config.json").write_text("not json")
    refuses("config.json cannot be read", source, out, part)
    (part / "transformer" / "config.json").write_text(json.dumps(config))
    (part / "transformer_2").mkdir()
    refuses("two transformers", source, out, part)


def test_a_hub_base_that_cannot_be_downloaded_is_one_clear_line(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    refuses(
        "base longtake-tests/not-there is no local folder and could not be downloaded .*or give a folder",
        source,
        tmp_path / "out",
        "longtake-tests/not-there",
    )


def test_a_hub_base_is_asked_for_without_its_transformer_weights(base, model, upstream, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append(repo)
        files = [str(f.relative_to(base)) for f in base.rglob("*") if f.is_file()]
        wanted = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns))
        for name in wanted:
            (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(base / name, tmp_path / "hub" / name)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    convert(source, tmp_path / "out", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype="float32")
    assert asked == ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    assert [f.name for f in (tmp_path / "hub" / "transformer").iterdir()] == ["config.json"]
    assert torch.equal(velocity(WanPipeline.from_pretrained(tmp_path / "out").transformer), velocity(model))


# --- the out folder ------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_on_request_and_only_if_convert_wrote_it(base, model, upstream, tmp_path):
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    out = tmp_path / "models" / "out"
    convert(source, out, base, dtype="float32")
    (out / "leftover").write_text("of the first conversion")
    refuses("exists; choose another folder, or pass overwrite=True", source, out, base)
    convert(source, out, base, dtype="float32", overwrite=True)
    assert not (out / "leftover").exists()
    assert torch.equal(velocity(loaded(out)), velocity(model))
    assert os.listdir(out.parent) == ["out"]

    refuses("holds the input .*and is not replaced", source, out, out, overwrite=True)
    home = tmp_path / "home"
    (home / "letters").mkdir(parents=True)
    refuses("was not written by longtake convert", source, home, base, overwrite=True)
    assert (home / "letters").exists()


def test_a_failed_overwrite_keeps_the_old_model(base, model, upstream, tmp_path):
    good = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    bad = upstream | {"head.head.bias": upstream["head.head.bias"] * torch.nan}
    convert(good, tmp_path / "out", base, dtype="float32")
    bad = saved({"generator": prefixed(bad)}, tmp_path / "longlive_bad.pt")
    refuses("not finite", bad, tmp_path / "out", base, overwrite=True)
    assert torch.equal(velocity(loaded(tmp_path / "out")), velocity(model))


def test_too_little_disk_space_is_said_before_anything_is_written(base, upstream, tmp_path, monkeypatch):
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refuses(r"needs 0\.0 GB and .* has 0\.0 GB free", source, tmp_path / "new" / "out", base)
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_half_way_leaves_nothing(base, upstream, tmp_path):
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # a real write error: no file may exceed 8 KiB
    try:
        refuses("writing .* failed .* left nothing behind", source, tmp_path / "out", base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_place_that_cannot_be_written_is_one_clear_line(base, upstream, tmp_path):
    source = saved({"generator": prefixed(upstream)}, tmp_path / "longlive_base.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(LongtakeError, match=r"cannot create .*choose another folder"):
        convert(source, tmp_path / "file" / "out", base)
