"""MAGI-1's video autoencoder: two plain vision transformers under the published parameter names, and its decoder.

Every token sees every other of its tile, so a tile's frames come out together: latents are decoded 3 frames (12 pixel
frames) at a time without overlap, which makes streaming exact. In space, tiles of 256 pixels overlap by a quarter and
are blended linearly. Learned positions are interpolated to whatever size a tile has.

Shapes: B takes, f latent frames, h, w latent rows and columns, d channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ...errors import LongtakeError

EPS = 1e-5
TILE_FRAMES = 12  # pixels
TILE_SIDE = 256
OVERLAP = 0.25  # of a tile's side


class VaeAttention(nn.Module):
    """Full attention whose queries, keys and values are normalised per head, without weights."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        mean, std = qkv.mean(-1, keepdim=True), qkv.std(-1, keepdim=True, unbiased=False)
        q, k, v = ((qkv - mean) / (std + EPS)).permute(2, 0, 3, 1, 4)  # each [B, heads, n, d]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VaeMlp(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VaeBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, bias: bool) -> None:
        super().__init__()
        self.attn = VaeAttention(dim, heads, bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = VaeMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(self.norm2(x))


class VaeHalf(nn.Module):
    """What encoder and decoder share: a class token, learned positions on a reference grid, blocks, a last norm."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        dim, side = c["embed_dim"], c["video_size"] // c["patch_size"]
        self.grid = (c["video_length"] // c["patch_length"], side, side)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * side * side, dim))
        self.blocks = nn.ModuleList(
            VaeBlock(dim, c["num_heads"], c.get("mlp_ratio", 4), c.get("qkv_bias", False)) for _ in range(c["depth"])
        )
        self.norm = nn.LayerNorm(dim)

    def run(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens [B, n, d] of a grid through all blocks and the norm, without the class token."""
        place: Tensor = self.pos_embed
        if grid != self.grid:
            spread = place[:, 1:].unflatten(1, self.grid).permute(0, 4, 1, 2, 3)
            spread = F.interpolate(spread, size=grid, mode="trilinear", align_corners=False)
            place = torch.cat((place[:, :1], spread.flatten(2).transpose(1, 2)), 1)
        x = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), 1) + place
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, patch, patch)


class VaeEncoder(VaeHalf):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__(c)
        patch = (c["patch_length"], c["patch_size"], c["patch_size"])
        self.patch_embed = PatchEmbed(c.get("in_chans", 3), c["embed_dim"], patch)
        self.last_layer = nn.Linear(c["embed_dim"], 2 * c["z_chans"])

    def forward(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] → mean and log-variance [B, 2·C, f, h, w]."""
        x = self.patch_embed.proj(video)
        grid = (x.shape[2], x.shape[3], x.shape[4])
        out = self.last_layer(self.run(x.flatten(2).transpose(1, 2), grid))
        return out.transpose(1, 2).unflatten(2, grid)


class VaeDecoder(VaeHalf):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__(c)
        self.patch = (c["patch_length"], c["patch_size"], c["patch_size"])
        self.proj_in = nn.Linear(c["z_chans"], c["embed_dim"])
        channels = c["embed_dim"] // (self.patch[0] * self.patch[1] * self.patch[2])
        self.last_layer = nn.Conv3d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] → pixels [B, 3, T, H, W]."""
        grid = (z.shape[2], z.shape[3], z.shape[4])
        x = self.run(self.proj_in(z.flatten(2).transpose(1, 2)), grid)
        x = x.unflatten(1, grid).unflatten(-1, (*self.patch, -1))  # [B, f, h, w, pt, ph, pw, c]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return self.last_layer(x.flatten(6, 7).flatten(4, 5).flatten(2, 3))


class MagiVAE(ModelMixin, ConfigMixin):
    """The published `ViTVAE`: `ddconfig` as in its config.json (24 layers of 1024, patches of 4×8×8, 16 channels)."""

    @register_to_config
    def __init__(self, ddconfig: dict[str, Any], model_type: str = "vit") -> None:
        super().__init__()
        fixed = {"double_z": True, "ln_in_attn": True, "with_cls_token": True}
        plain = {"norm_code": False, "use_rope": False, "use_final_proj": False}
        odd = [k for k, v in {**fixed, **plain}.items() if ddconfig.get(k, v) != v]
        if model_type != "vit" or odd:
            raise LongtakeError(f"a MAGI-1 VAE with {odd[0] if odd else 'model_type ' + model_type!r} is not supported")
        self.encoder, self.decoder = VaeEncoder(ddconfig), VaeDecoder(ddconfig)
        self.stride = self.decoder.patch
        self.channels: int = ddconfig["z_chans"]

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in −1 … 1 to the posterior's mode [B, C, f, h, w], tile by tile. T is 1 (a frame that
        stands still for one latent frame) or a multiple of the temporal stride."""
        frames = self.stride[0]
        if video.shape[2] == 1:
            video = video.expand(-1, -1, frames, -1, -1)
        if video.shape[2] % frames or any(n % s for n, s in zip(video.shape[3:], self.stride[1:], strict=True)):
            raise LongtakeError(
                f"video of {tuple(video.shape[2:])} frames, rows and columns: give 1 frame or multiples of {frames}, "
                f"and sides that are multiples of {self.stride[1]}"
            )
        step = TILE_FRAMES // frames * frames or frames
        return torch.cat([self._tiled_encode(piece) for piece in video.split(step, 2)], 2)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] of a chunk to pixels [B, 3, T, H, W], about −1 … 1. One latent frame at the end of
        the tiles' rhythm still gives all its pixel frames."""
        step = max(1, TILE_FRAMES // self.stride[0])
        return torch.cat([self._tiled_decode(piece) for piece in z.split(step, 2)], 2)

    def _tiled_encode(self, video: Tensor) -> Tensor:
        side = TILE_SIDE // self.stride[1]
        h, w = video.shape[3] // self.stride[1], video.shape[4] // self.stride[2]
        encode = lambda rows, columns: self.encoder(
            video[:, :, :, _scaled(rows, self.stride[1]), _scaled(columns, self.stride[2])]
        )
        return _blend(encode, (h, w), side, (1, 1), chained=True).chunk(2, 1)[0]

    def _tiled_decode(self, z: Tensor) -> Tensor:
        side = TILE_SIDE // self.stride[1]
        decode = lambda rows, columns: self.decoder(z[:, :, :, rows, columns])
        return _blend(decode, (z.shape[3], z.shape[4]), side, self.stride[1:])


class MagiDecoder:
    """Chunks of latents to frames. A chunk's tiles see nothing of other chunks, so there is no state to keep."""

    nbytes = 0

    def __init__(self, vae: MagiVAE, scale: float) -> None:
        self.vae, self.scale = vae, scale

    def push(self, latents: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] → uint8 frames [B, 4·f, H, W, 3]."""
        weight = self.vae.decoder.proj_in.weight
        pixels = self.vae.decode((latents.float() / self.scale).to(weight))
        return (pixels.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        if tensors or meta:
            raise LongtakeError("this snapshot's decoder state is of another model: MAGI-1's has none")


def _scaled(cells: slice, by: int) -> slice:
    return slice(cells.start * by, cells.stop * by)


def _blend(tile: Any, size: tuple[int, int], side: int, scale: tuple[int, ...], chained: bool = False) -> Tensor:
    """`tile(rows, columns)` of latent cells for overlapping tiles of `side` cells, joined: along an overlap the later
    tile fades in linearly over the neighbour above, then over the one to the left. `scale`: output cells per latent
    cell. `chained`: over the neighbour as it was blended itself."""
    over = int(side * OVERLAP)
    step = side - over
    starts = [range(0, n, step) for n in size]
    cut = lambda start, axis: slice(start, min(start + side, size[axis]))
    grid = [[tile(cut(r, 0), cut(c, 1)) for c in starts[1]] for r in starts[0]]
    rows = []
    for i, row in enumerate(grid):
        joined = []
        for j, part in enumerate(row):
            if i:
                part = _fade(grid[i - 1][j], part, over * scale[0], 3)
            if j:
                part = _fade(row[j - 1], part, over * scale[1], 4)
            if chained:
                row[j] = part
            joined.append(part[..., : step * scale[0], : step * scale[1]])
        rows.append(torch.cat(joined, 4))
    return torch.cat(rows, 3)


def _fade(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    extent = min(before.shape[dim], after.shape[dim], extent)
    shape = [1] * after.dim()
    shape[dim] = extent
    rise = (torch.arange(extent, dtype=torch.float32, device=after.device) / extent).view(shape)
    start = after.narrow(dim, 0, extent).float() * rise
    start = start + before.narrow(dim, before.shape[dim] - extent, extent).float() * (1 - rise)
    return torch.cat((start.to(after.dtype), after.narrow(dim, extent, after.shape[dim] - extent)), dim)
