"""What the streaming decoder promises, on tiny Wan VAEs (2.1 and 2.2 layouts) with random weights."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longtake.decoding import StreamingDecoder, encode
from longtake.errors import LongtakeError

GOLDEN = Path(__file__).parent / "goldens" / "wan_vae_stream.safetensors"
WAN21 = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
WAN22 = WAN21 | {
    "decoder_base_dim": 8, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
    "scale_factor_spatial": 16,
}  # fmt: skip
PLAIN = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}  # model latents are the VAE's own, to the bit


def tiny_vae(config=WAN21, statistics=PLAIN, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoencoderKLWan(**config, **statistics).to(dtype).eval()


def latents(frames=7, seed=1, batch=1):
    return torch.randn(batch, 4, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def one_shot(vae, z):
    return vae.decode(z.to(vae.dtype)).sample


def stream(decoder, z, piece):
    return torch.cat([decoder.decode(part) for part in z.split(piece, dim=2)], dim=2)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del config["streaming_chunk_latent_frames"]
    vae = AutoencoderKLWan(**config).eval()
    vae.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return vae, tensors, mean, std


@pytest.mark.parametrize("piece", [1, 2, 3, 9])
def test_streamed_pieces_equal_the_golden_decode(golden, piece):
    vae, tensors, mean, std = golden
    normalised = (tensors["inputs/latent"] - mean) / std
    decoder = StreamingDecoder(vae)
    pieces = [decoder.decode(part) for part in normalised.split(piece, dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), tensors["outputs/pixels"], rtol=0, atol=2e-5)
    if piece == 3:
        assert [p.shape[2] for p in pieces] == [9, 12, 12]


def test_encode_equals_the_golden_posterior_means(golden):
    vae, tensors, mean, std = golden
    video = tensors["inputs/pixels_to_encode"]
    # The upstream encoder silently drops the last 3 of 8 frames; here the caller does, so 5 frames must give the same.
    for frames, name in ((9, "outputs/latent_mean_9_frames"), (5, "outputs/latent_mean_8_frames")):
        ours = encode(vae, video[:, :, :frames])
        torch.testing.assert_close(ours * std + mean, tensors[name], rtol=0, atol=2e-5)


def test_first_frame_latents_equal_the_first_latent_of_a_video(golden):
    vae, tensors, _, _ = golden
    video = tensors["inputs/pixels_to_encode"]
    first = encode(vae, video[:, :, :1])
    assert first.shape == (1, 4, 1, 2, 3)
    torch.testing.assert_close(first, encode(vae, video)[:, :, :1], rtol=0, atol=2e-5)
    assert torch.equal(first, encode(vae, video[:, :, :1]))


@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])
def test_streamed_decode_equals_one_shot_bitwise(config):
    vae = tiny_vae(config)
    z = latents(9, batch=2)
    expected = one_shot(vae, z)
    assert expected.std() > 0.01  # a constant picture would prove nothing
    assert torch.equal(stream(StreamingDecoder(vae), z, 3), expected)
    # One frame at a time torch picks other kernels for the 1x1x1 convolution: equal to rounding only.
    torch.testing.assert_close(stream(StreamingDecoder(vae), z, 1), expected, rtol=0, atol=2e-5)


def test_bfloat16_vae_streams_in_bfloat16():
    vae = tiny_vae(dtype=torch.bfloat16)
    z = latents().bfloat16()
    streamed = stream(StreamingDecoder(vae), z.float(), 3)
    assert streamed.dtype == torch.bfloat16
    torch.testing.assert_close(streamed, one_shot(vae, z), rtol=0, atol=0.05)


def test_latents_are_denormalised_by_the_vaes_own_statistics():
    statistics = {"latents_mean": [0.5, -0.2, 0.3, 0.0], "latents_std": [1.0, 1.5, 0.8, 2.0]}
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in statistics.values())
    vae = tiny_vae(statistics=statistics)
    z = latents(3)
    assert torch.equal(StreamingDecoder(vae).decode(z), one_shot(vae, z * std + mean))
    video = one_shot(vae, z * std + mean)
    posterior = vae.encode(video).latent_dist.mode()
    torch.testing.assert_close(encode(vae, video), (posterior - mean) / std, rtol=0, atol=1e-6)


def test_push_gives_rounded_uint8_frames_and_one_then_four_per_latent():
    vae = tiny_vae()
    z = latents(3)
    floats = StreamingDecoder(vae).decode(z)
    decoder = StreamingDecoder(vae)
    pushed = [decoder.push(z[:, :, i : i + 1]) for i in range(3)]
    assert [frames.shape for frames in pushed] == [(1, 1, 16, 24, 3), (1, 4, 16, 24, 3), (1, 4, 16, 24, 3)]
    frames = torch.cat(pushed, dim=1)
    assert frames.dtype == torch.uint8 and decoder.latent_frames == 3
    error = frames.permute(0, 4, 1, 2, 3) - (floats + 1) * 127.5
    assert error.abs().max() <= 0.501


def test_black_and_white_reach_0_and_255():
    vae = tiny_vae()
    decoder = StreamingDecoder(vae)
    with torch.no_grad():
        for value, level in ((9.0, 255), (-9.0, 0)):
            vae.decoder.conv_out.bias.fill_(value)
            assert (decoder.push(latents(1)) == level).all()


def test_interleaved_decoders_equal_separate_ones():
    vae = tiny_vae()
    takes = [latents(seed=1), latents(seed=2)]
    separate = [stream(StreamingDecoder(vae), z, 2) for z in takes]
    decoders = [StreamingDecoder(vae) for _ in takes]
    outputs = [[], []]
    for parts in zip(*(z.split(2, dim=2) for z in takes), strict=True):
        for output, decoder, part in zip(outputs, decoders, parts, strict=True):
            output.append(decoder.decode(part))
    for output, expected in zip(outputs, separate, strict=True):
        assert torch.equal(torch.cat(output, dim=2), expected)


def test_encode_and_decode_in_between_disturb_nothing():
    vae = tiny_vae()
    z = latents()
    expected = stream(StreamingDecoder(vae), z, 2)
    decoder = StreamingDecoder(vae)
    pieces = []
    for part in z.split(2, dim=2):
        pieces.append(decoder.decode(part))
        one_shot(vae, latents(seed=5))
        encode(vae, torch.rand(1, 3, 5, 16, 24) * 2 - 1)
    assert torch.equal(torch.cat(pieces, dim=2), expected)


def hand_streamed(vae, z):
    """The usual streaming recipe, whose state is the VAE's own feature map."""
    x = vae.post_quant_conv(z)
    for i in range(x.shape[2]):
        vae._conv_idx = [0]
        yield vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)


@torch.no_grad()
def test_streaming_leaves_the_vaes_own_state_alone():
    vae = tiny_vae()
    z = latents()
    vae.clear_cache()
    expected = torch.cat(list(hand_streamed(vae, z)), dim=2)
    vae.clear_cache()
    decoder = StreamingDecoder(vae)
    got = []
    for pixels in hand_streamed(vae, z):
        got.append(pixels)
        decoder.decode(latents(1, seed=3))
    assert torch.equal(torch.cat(got, dim=2), expected)


class Boom(Exception):
    pass


@torch.no_grad()
def test_exception_inside_the_vae_leaves_its_own_state_and_other_decoders_as_they_were():
    vae = tiny_vae()
    z = latents()
    expected = stream(StreamingDecoder(vae), z, 1)
    other, broken = StreamingDecoder(vae), StreamingDecoder(vae)
    before = other.decode(z[:, :, :2])
    broken.decode(z[:, :, :1])
    saved = broken.state_dict()
    vae.clear_cache()
    next(hand_streamed(vae, z))
    own = list(vae._feat_map), vae._conv_idx

    def explode(module, args):
        raise Boom

    handle = vae.decoder.up_blocks[1].register_forward_pre_hook(explode)
    with pytest.raises(Boom):
        broken.decode(z[:, :, 1:2])
    handle.remove()

    assert all(a is b for a, b in zip(own[0], vae._feat_map, strict=True)) and vae._conv_idx is own[1]
    torch.testing.assert_close(torch.cat([before, other.decode(z[:, :, 2:])], 2), expected, rtol=0, atol=2e-5)
    for refused in (lambda: broken.decode(z[:, :, 1:2]), broken.state_dict):
        with pytest.raises(LongtakeError, match="half-written"):
            refused()
    broken.load_state_dict(*saved)
    assert torch.equal(broken.decode(z[:, :, 1:2]), expected[:, :, 1:5])


def test_refused_latents_leave_the_decoder_as_it_was():
    vae = tiny_vae()
    z = latents()
    expected = stream(StreamingDecoder(vae), z, 3)
    decoder = StreamingDecoder(vae)
    first = decoder.decode(z[:, :, :3])
    for wrong in (z[:, :3], z[:, :, :0], z[..., :2], z[0], torch.cat([z, z])):
        with pytest.raises(LongtakeError, match="latents"):
            decoder.decode(wrong)
    rest = [decoder.decode(part) for part in z[:, :, 3:].split(3, dim=2)]
    assert torch.equal(torch.cat([first, *rest], dim=2), expected)


@pytest.mark.parametrize("done", [0, 1, 2, 5])
@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])
def test_restored_snapshot_continues_bit_exactly(tmp_path, config, done):
    vae = tiny_vae(config)
    z = latents()
    decoder = StreamingDecoder(vae)
    if done:
        decoder.decode(z[:, :, :done])
    tensors, meta = decoder.state_dict()
    save_file(tensors, tmp_path / "state.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(meta))
    bytes_held = decoder.nbytes
    expected = decoder.decode(z[:, :, done:])  # goes on: the snapshot must not follow it

    restored = StreamingDecoder(vae)
    restored.decode(latents(3, seed=9))
    saved = load_file(tmp_path / "state.safetensors"), json.loads((tmp_path / "state.json").read_text())
    restored.load_state_dict(*saved)
    assert (restored.latent_frames, restored.nbytes) == (done, bytes_held)
    assert torch.equal(restored.decode(z[:, :, done:]), expected)


def test_snapshot_keeps_sentinels_empty_slots_and_memory_layout():
    vae = tiny_vae()
    decoder = StreamingDecoder(vae)
    decoder.decode(latents(1))
    kinds = {type(slot) for slot in decoder._cache}
    assert kinds == {torch.Tensor, str, type(None)}
    decoder.decode(latents(2))
    restored = StreamingDecoder(vae)
    restored.load_state_dict(*decoder.state_dict())
    assert any(not slot.is_contiguous() for slot in decoder._cache if isinstance(slot, torch.Tensor))
    for a, b in zip(decoder._cache, restored._cache, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b) and a.stride() == b.stride() and a.data_ptr() != b.data_ptr()
        else:
            assert a == b


def test_snapshot_of_another_vae_is_refused():
    decoder = StreamingDecoder(tiny_vae())
    decoder.decode(latents(2))
    tensors, meta = decoder.state_dict()
    with pytest.raises(LongtakeError, match="slots"):
        StreamingDecoder(tiny_vae(WAN21 | {"num_res_blocks": 2})).load_state_dict(tensors, meta)
    with pytest.raises(LongtakeError, match="bfloat16"):
        StreamingDecoder(tiny_vae(dtype=torch.bfloat16)).load_state_dict(tensors, meta)
    del tensors["slot.000"]
    with pytest.raises(LongtakeError, match="metadata"):
        decoder.load_state_dict(tensors, meta)


def test_state_stops_growing_and_nbytes_counts_its_storage():
    decoder = StreamingDecoder(tiny_vae())
    assert decoder.nbytes == 0
    held = []
    for _ in range(6):
        decoder.push(latents(1))
        held.append(decoder.nbytes)
        storages = {
            slot.untyped_storage().data_ptr(): slot.untyped_storage().nbytes()
            for slot in decoder._cache
            if isinstance(slot, torch.Tensor)
        }
        assert decoder.nbytes == sum(storages.values())
    assert held[0] < held[2] == held[3] == held[5]
    decoder.reset()
    assert decoder.nbytes == 0 == decoder.latent_frames


def test_reset_begins_a_new_take():
    vae = tiny_vae()
    decoder = StreamingDecoder(vae)
    expected = decoder.decode(latents())
    decoder.reset()
    assert torch.equal(decoder.decode(latents()), expected)


def test_nothing_is_recorded_for_gradients():
    vae = tiny_vae()
    decoder = StreamingDecoder(vae)
    assert not decoder.decode(latents(2).requires_grad_()).requires_grad
    assert not any(slot.requires_grad for slot in decoder._cache if isinstance(slot, torch.Tensor))
    assert not encode(vae, torch.zeros(1, 3, 1, 16, 24)).requires_grad


def test_offloaded_vae_is_called_back_before_it_decodes():
    vae = tiny_vae()
    called = []

    class Hook:
        def pre_forward(self, module, *args, **kwargs):
            called.append(module)

    vae._hf_hook = Hook()
    StreamingDecoder(vae).push(latents(1))
    assert called == [vae]


def test_tiled_vae_is_refused_only_where_it_would_tile():
    vae = tiny_vae()
    vae.enable_tiling(16, 16, 8, 8)
    with pytest.raises(LongtakeError, match=r"disable_tiling\(\)"):
        StreamingDecoder(vae).push(latents(1))
    vae.enable_tiling(24, 24, 16, 16)
    assert StreamingDecoder(vae).push(latents(1)).shape == (1, 1, 16, 24, 3)


@pytest.mark.parametrize(
    ("video", "advice"),
    [
        (torch.zeros(1, 3, 8, 16, 24), "first 5"),
        (torch.zeros(1, 3, 1, 20, 24), "16x24"),
        (torch.zeros(1, 3, 1, 16, 24, dtype=torch.uint8), "floating point"),
        (torch.zeros(1, 1, 3, 16, 24), r"\[B, 3, T, H, W\]"),
    ],
)
def test_video_the_vae_would_crop_or_misread_is_refused(video, advice):
    with pytest.raises(LongtakeError, match=advice):
        encode(tiny_vae(), video)


def test_something_that_is_no_wan_vae_is_refused():
    with pytest.raises(LongtakeError, match="AutoencoderKLWan, got Linear"):
        StreamingDecoder(torch.nn.Linear(1, 1))
