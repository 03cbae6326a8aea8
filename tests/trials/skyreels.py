"""A thin SkyReels-V2 diffusion-forcing host for tests: the stock diffusers model, one block of latent frames at a time.

The seam: self-attention of layer i hands `layers[i].attend(q, k, v)` its queries, keys and values [B, N, H, D] after QK
norm and **before** rotation, and gets the attention output [B, N, H, D] back. Rotation, K/V storage and visibility
belong to the layer.

`walk` replays recorded rows of the staggered sampler. For one row it does, in this order:

    for branch in (cond, uncond):                        # each with a memory of its own, nothing is shared
        for block in the blocks computed in this row:    # ascending, each forwarded alone
            memory.begin(block)                          # decides what is visible, and what is to be fused
            for layer i: memory.layers[i].attend(...)    # overwrites the block's K/V, fuses if begin said so, attends
            memory.end(block, finished)                  # the table changes here and nowhere else

* A block is *computed* when its update mask is set and it is not reused. Blocks that are reused, finished or not yet
  started are not forwarded: their K/V stay as their own last computed forward wrote them. There is no clean pass.
* `finished` is true for the forward of a block's last step, so the next block of the *same row and branch* already
  finds it finished.
* A given prefix block is forwarded once per branch, in row 0, with its own (nearly clean) timestep, and is finished by
  that forward.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, Protocol

import torch
from diffusers import SkyReelsV2Transformer3DModel
from safetensors import safe_open
from torch import Tensor

BRANCHES = ("cond", "uncond")


class Layer(Protocol):
    """Self-attention of one transformer layer on one branch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, N, H, D] un-rotated, of the block being forwarded; returns the attention output [B, N, H, D]."""
        ...


class Memory(Protocol):
    """The past of one guidance branch."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    def begin(self, block: int) -> None:
        """Block number `block` is about to be forwarded."""
        ...

    def end(self, block: int, finished: bool) -> None:
        """Every layer has attended; `finished`: this was the block's last forward."""
        ...


class SeamProcessor:
    """Attention processor of one self-attention: projections and QK norm here, everything about the past in `layer`."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, attn, hidden_states: Tensor, *unused: object) -> Tensor:
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        return attn.to_out[0](self.layer.attend(q, k, v).flatten(2))


def forward_block(
    model: SkyReelsV2Transformer3DModel, latents: Tensor, timestep: Tensor, context: Tensor, layers: Sequence[Layer]
) -> Tensor:
    """Velocity [1, C, F, H, W] of one block: latents [1, C, F, H, W], timestep [1, F], text [1, words, channels].

    The model takes the block for a whole video; the rotation table it makes for that is ignored by the seam.
    """
    for block, layer in zip(model.blocks, layers, strict=True):
        block.attn1.set_processor(SeamProcessor(layer))
    # Row 1 of the two-row fps table is "not 16 fps", what the goldens were made with.
    return model(latents, timestep, context, enable_diffusion_forcing=True, fps=[1], return_dict=False)[0]


@dataclass(frozen=True)
class Golden:
    """The recorded host: sizes, weights by their diffusers name, the facts of each run, and every input and output."""

    config: dict
    weights: dict[str, Tensor]
    runs: dict[str, dict]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> "Golden":
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        names = json.loads(about["diffusers_key_map"])
        return cls(
            config=json.loads(about["config"]),
            weights={ours: tensors[f"weights/{theirs}"] for theirs, ours in names.items()},
            runs={run["key"]: run for run in json.loads(about["runs"])},
            tensors=tensors,
        )

    def model(self) -> SkyReelsV2Transformer3DModel:
        """The tiny model in fp32, weights loaded strictly."""
        sizes = self.config["m"]
        model = SkyReelsV2Transformer3DModel(
            patch_size=tuple(self.config["patch_size"]),
            num_attention_heads=sizes["num_heads"],
            attention_head_dim=sizes["dim"] // sizes["num_heads"],
            in_channels=self.config["ch"],
            out_channels=self.config["ch"],
            text_dim=sizes["text_dim"],
            freq_dim=sizes["freq_dim"],
            ffn_dim=sizes["ffn_dim"],
            num_layers=sizes["num_layers"],
            inject_sample_info=self.config["inject_sample_info"],
        )
        model.load_state_dict(self.weights)
        return model.eval()


@dataclass(frozen=True)
class Output:
    """One computed block: `velocity` and the recorded `expected` one, both [C, F, H, W]."""

    row: int
    branch: str
    block: int
    velocity: Tensor
    expected: Tensor


def walk(
    model: SkyReelsV2Transformer3DModel,
    golden: Golden,
    run: str,
    memories: Mapping[str, Memory],
    order: Literal["branch", "block"] = "branch",
) -> Iterator[Output]:
    """Replay every row of `run`, inputs teacher-forced, in the event order of the module's docstring.

    With `order="block"` every block is forwarded in both branches before the next one: the same outputs, because the
    branches share nothing, and what a memory of both branches needs.
    Yields one output per computed block, right after its forward (the prefix is forwarded but yields nothing).
    """
    frames, steps = golden.config["BS"], golden.config["steps"]
    inputs = f"inputs/{'prefix' if golden.runs[run]['prefix'] else 'plain'}"
    latents, timestep = golden.tensors[f"{inputs}/latents"], golden.tensors[f"{inputs}/timestep"]
    updates = golden.tensors[f"{inputs}/update_mask"][:, ::frames].bool()  # [row, block]
    turns = list(product(range(len(BRANCHES)), range(golden.config["NB"])))
    if order == "block":
        turns.sort(key=lambda turn: turn[1])
    done = updates.cumsum(0)  # steps a block has taken after this row, reused ones included

    for row in range(len(latents)):
        for b, block in turns:
            branch = BRANCHES[b]
            prefix = golden.runs[run]["prefix"] and block == 0
            if golden.tensors[f"{run}/decision"][row, b, block] != 1 and not (prefix and row == 0):
                continue
            span = slice(block * frames, (block + 1) * frames)
            memory = memories[branch]
            memory.begin(block)
            with torch.no_grad():
                velocity = forward_block(
                    model,
                    latents[row : row + 1, :, span],
                    timestep[row : row + 1, span],
                    golden.tensors[f"inputs/context_{branch}"],
                    memory.layers,
                )
            memory.end(block, finished=bool(prefix or done[row, block] == steps))
            if not prefix:
                expected = golden.tensors[f"{run}/fp32/{branch}"][row, :, span]
                yield Output(row, branch, block, velocity[0], expected)
