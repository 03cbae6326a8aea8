"""MAGI-1's special tokens, null caption and video autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake import LongtakeError
from longtake.hosts.magi.model import MagiTransformer3DModel
from longtake.hosts.magi.text import SpecialTokens, Texts, lengths_of
from longtake.hosts.magi.vae import MagiDecoder, MagiVAE, _blend

from .magi import special_tokens, tiny_model, tiny_vae


@pytest.fixture(scope="module")
def model() -> MagiTransformer3DModel:
    return tiny_model()


def test_special_tokens_stand_before_the_prompt_last_name_first(tmp_path: Path) -> None:
    special = SpecialTokens.read(special_tokens(tmp_path / "special_tokens.npz"), ("hq", "duration"))
    assert special.rows(0) == [7, 1] and special.rows(3) == [10, 1]
    assert special.rows(7) == special.rows(40) == special.rows(None) == [14, 1]  # seven or more, or no end known
    assert torch.equal(special.tokens, special.tokens.half().float())
    assert SpecialTokens(special.tokens, ("static", "3d")).rows(2) == [15, 2]
    with pytest.raises(LongtakeError, match="duration"):
        SpecialTokens(special.tokens, ("best",))
    with pytest.raises(LongtakeError, match="has 14 tokens"):
        SpecialTokens(torch.zeros(14, 20), ("hq",))


def test_a_chunks_text_is_its_tokens_one_by_one(model: MagiTransformer3DModel, tmp_path: Path) -> None:
    """Keys and values put together from kept parts are those of the whole text at once, cut at the longest."""
    special = SpecialTokens.read(special_tokens(tmp_path / "special_tokens.npz"), ("hq", "duration"))
    texts = Texts(model, special, 50)
    prompt = torch.randn(2, 56, 20, generator=torch.Generator().manual_seed(0))
    prompt[1, 4:] = 0
    got = texts.of_chunk(texts.prompt(prompt), 2)
    for take, length in ((0, 56), (1, 4)):
        whole = torch.cat((special.tokens[[9, 1]], prompt[take, :length]))[None, :56]
        want = model.text_kv(whole)
        for layer in range(2):
            for mine, theirs in zip(got[layer][take], want[layer], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_passes_without_text_read_the_first_50_of_the_null_caption(model: MagiTransformer3DModel) -> None:
    texts = Texts(model, None, 50)
    want = model.text_kv(model.y_embedder.null_caption_embedding[None])
    for [(k, v)], (all_k, all_v) in zip(texts.null(), want, strict=True):
        torch.testing.assert_close(k, all_k[:, :50], rtol=0, atol=1e-6)
        torch.testing.assert_close(v, all_v[:, :50], rtol=0, atol=1e-6)


def test_padding_is_the_zeros_at_the_end() -> None:
    embeds = torch.ones(3, 5, 2)
    embeds[1, 3:] = 0
    embeds[1, 1] = 0  # in the middle: a token
    embeds[2] = 0
    assert lengths_of(embeds) == (5, 3, 0)


def test_the_published_sizes_have_the_published_count_of_parameters() -> None:
    with torch.device("meta"):
        model = MagiTransformer3DModel()
    layer = model.videodit_blocks.layers[0]
    big = sum(p.numel() for p in layer.parameters() if p.dim() == 2) - layer.ada_modulate_layer.proj[0].weight.numel()
    assert big == 2 * 3072**2 + 2 * 3072 * 1024 + 3072 * 2048 + 6144 * 3072 + 2 * 3072 * 12288
    assert len(model.videodit_blocks.layers) == 34
    assert 3 * len(model.rope.bands) == 48  # pairs: 96 of 128 channels turn


# --- the autoencoder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae() -> MagiVAE:
    return tiny_vae()


def latent(frames: int, rows: int = 4, columns: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(1, 4, frames, rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_token_becomes_its_patch_of_pixels(vae: MagiVAE) -> None:
    """Without its last convolution the decoder is tokens laid out as patches: written out, cell by cell."""
    z = latent(2, 2, 3)
    tokens = vae.decoder.run(vae.decoder.proj_in(z.flatten(2).transpose(1, 2)), (2, 2, 3))
    pixels = torch.zeros(1, 1, 8, 16, 24)
    for n, token in enumerate(tokens[0]):
        t, h, w = n // 6, n // 3 % 2, n % 3
        patch = token.view(4, 8, 8, 1).permute(3, 0, 1, 2)
        pixels[0, :, 4 * t : 4 * t + 4, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] = patch
    want = vae.decoder.last_layer(pixels)
    torch.testing.assert_close(vae.decode(z), want, rtol=0, atol=1e-5)


def test_queries_keys_and_values_are_normalised_per_head(vae: MagiVAE) -> None:
    attention = vae.decoder.blocks[0].attn
    x = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(1))
    q, k, v = attention.qkv(x).view(1, 7, 3, 4, 64).unbind(2)
    norm = lambda y: (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True).sqrt() + 1e-5)
    weights = torch.einsum("bqhd,bkhd->bhqk", norm(q), norm(k)).div(8).softmax(-1)
    want = attention.proj(torch.einsum("bhqk,bkhd->bqhd", weights, norm(v)).flatten(2))
    torch.testing.assert_close(attention(x), want, rtol=0, atol=1e-5)


def test_positions_are_interpolated_to_other_grids(vae: MagiVAE) -> None:
    half = vae.decoder
    assert half.grid == (2, 2, 2)
    place = half.pos_embed[0, 1:].view(2, 2, 2, -1).permute(3, 0, 1, 2)[None]
    want = F.interpolate(place, size=(1, 4, 6), mode="trilinear", align_corners=False)[0].flatten(1).T
    seen: list[Tensor] = []
    handle = half.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    half.run(torch.zeros(1, 24, 256), (1, 4, 6))
    handle.remove()
    torch.testing.assert_close(seen[0][0, 1:], want, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[0][0, :1], half.cls_token[0] + half.pos_embed[0, :1], rtol=0, atol=1e-6)


def test_streamed_decode_equals_one_shot_decode(vae: MagiVAE) -> None:
    """Tiles of three latent frames: a chunk of 6 is two of them, whatever came before."""
    z = latent(12)
    whole = MagiDecoder(vae, 0.18215).push(z)
    decoder = MagiDecoder(vae, 0.18215)
    pieces = torch.cat([decoder.push(piece) for piece in z.split(6, 2)], 1)
    assert whole.shape == (1, 48, 32, 48, 3) and whole.dtype == torch.uint8
    assert torch.equal(whole, pieces) and decoder.nbytes == 0


def test_an_image_is_one_latent_frame_and_a_video_a_quarter(vae: MagiVAE) -> None:
    video = torch.rand(1, 3, 12, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert vae.encode(video).shape == (1, 4, 3, 2, 3)
    still = vae.encode(video[:, :, :1])
    assert still.shape == (1, 4, 1, 2, 3)
    assert torch.equal(still, vae.encode(video[:, :, :1].expand(-1, -1, 4, -1, -1)))
    with pytest.raises(LongtakeError, match="1 frame or multiples of 4"):
        vae.encode(video[:, :, :6])


def test_tiles_of_a_function_without_context_leave_no_seam() -> None:
    """Overlaps are blended: where tiles agree, nothing changes; where they do not, the later one fades in."""
    picture = torch.arange(40 * 44, dtype=torch.float32).view(1, 1, 1, 40, 44)
    cut = lambda rows, columns: picture[..., rows, columns].repeat_interleave(2, 3).repeat_interleave(2, 4)
    out = _blend(cut, (40, 44), 16, (2, 2))
    torch.testing.assert_close(out, picture.repeat_interleave(2, 3).repeat_interleave(2, 4), rtol=0, atol=1e-2)
    steps = _blend(lambda rows, columns: torch.full((1, 1, 1, 8, columns.stop - columns.start), float(columns.start)),
                   (8, 28), 16, (1, 1))  # fmt: skip
    assert steps[0, 0, 0, 0, :12].eq(0).all()
    assert steps[0, 0, 0, 0, 12:16].tolist() == [0, 3, 6, 9]  # four columns of overlap, from 0 to 12
    assert steps[0, 0, 0, 0, 16:24].eq(12).all()


def test_other_kinds_of_autoencoder_are_refused() -> None:
    config = dict(tiny_vae().config.ddconfig)
    for wrong in ({"ln_in_attn": False}, {"use_rope": True}):
        with pytest.raises(LongtakeError, match=next(iter(wrong))):
            MagiVAE(ddconfig=config | wrong)
