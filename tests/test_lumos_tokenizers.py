"""Video tokenizers: FSQ arithmetic, the TorchScript pair and its trust, and our own streaming one."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor, nn

import longtake
from longtake import LongtakeError
from longtake.hosts.lumos.fsq import FSQ
from longtake.hosts.lumos.fsq_tokenizer import FSQTokenizer
from longtake.hosts.lumos.tokenizer import COSMOS_LEVELS, CosmosTokenizer, to_uint8

from .lumos import tiny_codec, write_folder

COSMOS = FSQ(COSMOS_LEVELS)


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_every_code_of_sixty_four_thousand_comes_back_from_its_digits_and_from_its_values():
    codes = torch.arange(64_000)
    assert COSMOS.codes == 64_000 and COSMOS.basis == (1, 8, 64, 512, 2560, 12800)
    assert torch.equal(COSMOS.index(COSMOS.digits(codes)), codes)
    values = COSMOS.values(codes)
    assert torch.equal(COSMOS.nearest(values), codes)
    assert float(values.min()) == -1 and float(values.max()) == 1  # the odd levels; even ones stop short of 1
    assert torch.equal(COSMOS.digits(torch.tensor([8 * 8 * 8 + 9])), torch.tensor([[1, 1, 0, 1, 0, 0]]))


def test_quantising_gives_values_that_are_codes_and_lets_gradients_through():
    z = (3 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    values = COSMOS.quantise(z)
    assert torch.allclose(COSMOS.values(COSMOS.nearest(values)).to(values), values, atol=1e-6)
    values.sum().backward()
    assert (z.grad.abs() > 0).float().mean() > 0.99
    assert len(COSMOS.nearest(values).unique()) > 300


def test_levels_of_one_are_refused():
    with pytest.raises(LongtakeError, match="FSQ levels \\[8, 1\\]"):
        FSQ((8, 1))


# --- the TorchScript pair -------------------------------------------------------------------------------------------


class PairEncoder(nn.Module):
    """Codes from the first pixels of each cell, causal, as DV4x8x8 answers: indices, quantised values, a spare."""

    def __init__(self, space: int = 8, swap: bool = False) -> None:
        super().__init__()
        self.space, self.swap = space, swap
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("levels", torch.tensor(COSMOS_LEVELS))
        self.register_buffer("basis", torch.tensor(COSMOS.basis))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x[:, :, ::4, :: self.space, :: self.space].repeat(1, 2, 1, 1, 1) * self.gain  # [1, 6, f, h, w]
        half = (self.levels // 2).view(1, 6, 1, 1, 1)
        digits = (x * half).round().clamp(-1e9, 1e9) + half
        digits = torch.minimum(digits.clamp(min=0), (self.levels - 1).view(1, 6, 1, 1, 1))
        basis = self.basis.flip(0) if self.swap else self.basis
        return (digits * basis.view(1, 6, 1, 1, 1)).sum(1).int(), (digits - half) / half, x.sum()


class PairDecoder(nn.Module):
    """Pixels of a frame from its codes and the mean of all codes before: causal, with an endless memory."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, codes: Tensor) -> Tensor:
        x = (codes.float() / 32_000 - 1) * self.gain
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device).view(1, -1, 1, 1)
        x = (0.5 * x + 0.5 * past).repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(4, 1)[:, 3:]
        return x[:, None].repeat(1, 3, 1, 1, 1)


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "cosmos", PairEncoder())


def write_pair(folder, encoder):
    folder.mkdir()
    torch.jit.script(encoder).save(str(folder / "encoder.jit"))
    torch.jit.script(PairDecoder()).save(str(folder / "decoder.jit"))
    return folder


def clip(frames: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, frames, 32, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_torchscript_is_not_run_unless_trusted_and_its_digests_are_shown(pair):
    with pytest.raises(LongtakeError, match="allow_torchscript=True") as error:
        CosmosTokenizer(pair)
    digest = hashlib.sha256((pair / "encoder.jit").read_bytes()).hexdigest()
    assert digest in str(error.value) and "\n" not in str(error.value)
    assert CosmosTokenizer(pair, allow=True).sha256["encoder.jit"] == digest


def test_a_trusted_pair_encodes_and_decodes(pair):
    tokenizer = CosmosTokenizer(pair, allow=True)
    codes = tokenizer.encode(clip(9))
    assert codes.shape == (1, 1, 3, 4, 8) and codes.dtype == torch.int64
    assert tokenizer.decode(codes).shape == (1, 3, 9, 32, 64)
    assert torch.equal(tokenizer.encode(clip(9)[:, :, :1]), codes[:, :, :1])  # a single image is a first frame


@pytest.mark.parametrize(
    ("encoder", "says"), [(PairEncoder(space=16), "gives codes"), (PairEncoder(swap=True), "not the FSQ numbers")]
)
def test_another_tokenizer_is_told_from_dv4x8x8(tmp_path, encoder, says):
    with pytest.raises(LongtakeError, match=f"is not Cosmos-Tokenizer-DV4x8x8: .*{says}"):
        CosmosTokenizer(write_pair(tmp_path / "other", encoder), allow=True)


def test_files_that_are_no_torchscript_or_missing_are_named(tmp_path, pair):
    (pair / "decoder.jit").write_bytes(b"no program")
    with pytest.raises(LongtakeError, match="not loadable as TorchScript"):
        CosmosTokenizer(pair, allow=True)
    with pytest.raises(LongtakeError, match=r"has no encoder\.jit and no decoder\.jit"):
        CosmosTokenizer(tmp_path / "empty", allow=True)


@pytest.mark.parametrize("pieces", [(1,) * 6, (2, 4), (6,)])
def test_windowed_decode_equals_one_shot_while_the_window_holds_the_take(pair, pieces):
    tokenizer = CosmosTokenizer(pair, allow=True, context=5)
    codes = torch.cat([tokenizer.encode(clip(21, seed)) for seed in (0, 1)])  # two takes in lockstep
    decoder = tokenizer.decoder()
    frames = torch.cat([decoder.push(part) for part in codes.split(pieces, 2)], 1)
    assert torch.equal(frames, torch.cat([to_uint8(tokenizer.decode(take)) for take in codes.split(1)]))


def test_windowed_decode_holds_no_more_than_its_window_and_goes_on_from_its_state(pair):
    tokenizer = CosmosTokenizer(pair, allow=True, context=2)
    codes = tokenizer.encode(clip(25))
    decoder, held = tokenizer.decoder(), []
    for part in codes[:, :, :5].split(1, 2):
        decoder.push(part)
        held.append(decoder.nbytes)
    assert held[1:] == [held[1]] * 4  # two frames' codes
    other = tokenizer.decoder()
    other.load_state_dict(*decoder.state_dict())
    assert torch.equal(decoder.push(codes[:, :, 5:]), other.push(codes[:, :, 5:]))


def test_load_asks_for_trust_and_then_uses_the_pair(tmp_path, pair):
    folder = write_folder(tmp_path / "model", codec=False)
    with pytest.raises(LongtakeError, match="--allow-torchscript"):
        longtake.load(folder, tokenizer=pair, device="cpu")
    with pytest.raises(LongtakeError, match="was trained on 64 codes, the video tokenizer has 64000"):
        longtake.load(folder, tokenizer=pair, allow_torchscript=True, device="cpu")
    with pytest.raises(LongtakeError, match="is no video tokenizer"):
        longtake.load(folder, tokenizer=tmp_path, device="cpu")


def test_only_lumos_models_take_a_video_tokenizer(pair):
    with pytest.raises(LongtakeError, match="is no Lumos-1 model"):
        longtake.load("tiny-shapes", tokenizer=pair, allow_torchscript=True)


# --- our own --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(1,) * 5, (2, 3), (4, 1)])
def test_streamed_decode_equals_one_push_bitwise(pieces):
    codec = tiny_codec()
    codes = torch.randint(64, (2, 1, 5, 4, 8), generator=torch.Generator().manual_seed(0))
    streamed, once = codec.decoder(), codec.decoder().push(codes)
    assert once.shape == (2, 17, 32, 64, 3)
    assert torch.equal(torch.cat([streamed.push(part) for part in codes.split(pieces, 2)], 1), once)


def test_streamed_decode_equals_decoding_the_whole_clip():
    codec = tiny_codec()
    codes = torch.randint(64, (1, 1, 4, 4, 8), generator=torch.Generator().manual_seed(1))
    cache: dict[str, Tensor] = {}
    parts = [codec.decoder_net(codec.as_values(c), cache, first=i == 0) for i, c in enumerate(codes.split(1, 2))]
    whole = codec.pixels(codec.as_values(codes))
    assert whole.std() > 0.1
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-5)


def test_a_frames_codes_depend_on_no_later_frame_and_its_pixels_on_no_later_codes():
    codec = tiny_codec()
    a, b = clip(13, 0), clip(13, 1)
    b[:, :, :9] = a[:, :, :9]
    codes = codec.encode(a)
    assert torch.equal(codec.encode(b)[:, :, :3], codes[:, :, :3])
    assert not torch.equal(codec.encode(b), codes)
    other = codes.clone()
    other[:, :, 3:] = (other[:, :, 3:] + 1) % 64
    assert torch.equal(codec.decode(other)[:, :, :9], codec.decode(codes)[:, :, :9])
    assert not torch.equal(codec.decode(other), codec.decode(codes))


def test_the_past_of_a_frame_reaches_its_pixels():
    codec = tiny_codec()
    codes = torch.zeros(1, 1, 3, 4, 8, dtype=torch.long)
    other = codes.clone()
    other[:, :, 0] = 63
    assert not torch.equal(codec.decode(other)[:, :, -1], codec.decode(codes)[:, :, -1])


def test_the_decoders_state_is_constant_and_restores_bitwise():
    codec = tiny_codec()
    codes = torch.randint(64, (1, 1, 6, 4, 8), generator=torch.Generator().manual_seed(2))
    decoder, held = codec.decoder(), []
    for part in codes[:, :, :4].split(1, 2):
        decoder.push(part)
        held.append(decoder.nbytes)
    assert held == [held[0]] * 4 and held[0] > 0
    other = codec.decoder()
    other.load_state_dict(*decoder.state_dict())
    assert torch.equal(decoder.push(codes[:, :, 4:]), other.push(codes[:, :, 4:]))


def test_our_tokenizer_is_saved_and_loaded_with_its_levels(tmp_path):
    codec = tiny_codec()
    codec.save_pretrained(tmp_path)
    again = FSQTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert again.codes == 64 and torch.equal(again.encode(clip(5)), codec.encode(clip(5)))
    assert again.memory() == sum(p.nbytes for p in codec.parameters())


def test_a_clip_that_does_not_divide_is_refused():
    with pytest.raises(LongtakeError, match="give 1, 5, 9"):
        tiny_codec().encode(clip(4))


def test_our_tokenizer_can_be_trained():
    """Gradients reach every weight, through the quantiser and through time."""
    codec = FSQTokenizer(levels=(4, 4, 4), widths=(8, 8, 8))
    video = clip(9)
    (codec.pixels(codec.quantised(video)) - video).square().mean().backward()
    bare = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not [name for name in bare if "conv1" not in name and "norm" not in name]  # conv2 begins at zero
    assert math.isfinite(sum(float(p.grad.sum()) for p in codec.parameters() if p.grad is not None))
