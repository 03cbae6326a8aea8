"""One forward of each distinct shape: so many tokens, so many keys, random weights and keys.

Every layer reads the same keys and values: that is one layer's bytes to allocate, and as many to read as a take has.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...history import LayerView
from ...hosts.base import Host, TextState
from ...hosts.lumos.sequence import MASKED
from ...planner.anatomy import Forward
from ...planner.lumos import LumosShape
from ...planner.registry import family_of
from .models import TIMESTEP, Model, prompt_of

Size = tuple[int, int, int]  # tokens of the pass, keys it attends to, text tokens
WARMUP, REPEATS = 2, 7


def sizes(model: Model) -> tuple[dict[str, Counter[Size]], dict[str, str]]:
    """How often a forward of each size is made in a take, by policy; and the policies that the planner cannot walk."""
    found: dict[str, Counter[Size]] = {}
    beyond: dict[str, str] = {}
    for spec, request in model.requests().items():
        try:
            made: list[Forward] = list(family_of(request)[1].forwards(request))
        except (ValueError, RuntimeError) as error:
            beyond[spec] = str(error)
            continue
        counts: Counter[Size] = Counter()
        for each in made:
            counts[each.tokens, each.keys, each.text] += each.count
        found[spec] = counts
    return found, beyond


def forward_of(model: Model, host: Host, size: Size) -> Callable[[], Tensor]:
    """A forward of this size, ready to be called again and again. Raises ValueError for one that is no whole number of
    latent frames."""
    tokens, keys, _ = size
    geometry = host.geometry()
    frames, rest = divmod(tokens, geometry.tokens_per_frame)
    if rest:
        raise ValueError(f"a pass of {tokens} tokens is no whole number of latent frames")
    device, dtype = host.device, host.dtype
    noise = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=noise, device=device)
    k, v = (draw(1, keys, host.kv_heads, host.head_dim).to(dtype) for _ in range(2))
    base, _ = host.positions(geometry, 0, frames)
    phases = host.rotary.phases(base.to(device))
    view = lambda: LayerView(host.rotary, phases, k, v, slice(keys - tokens, keys), None, None, None, None)
    layers = [view() for _ in range(host.layers)]
    text = _text(model, host, size)
    if isinstance(model.shape, LumosShape):
        latents = torch.full((1, 1, 1, *geometry.grid), MASKED, device=device)
    else:
        latents = draw(1, geometry.channels, frames, *geometry.latent_size)
    timestep = TIMESTEP[model.family]
    return lambda: host.forward(latents, timestep, text, layers)


def _text(model: Model, host: Host, size: Size) -> TextState:
    if isinstance(model.shape, LumosShape):  # part of the sequence: its keys are counted among the others
        return TextState(torch.zeros(1, 0, dtype=torch.long, device=host.device), [], [])
    return host.text_state(prompt_of(model, host, max(1, size[2])))


@contextmanager
def memory_of(device: torch.device) -> Iterator[None]:
    """What is made within it is gone afterwards."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
