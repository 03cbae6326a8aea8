"""Samplers: how a chunk comes about. Which one is the host's to say, in its configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .base import Sampler, Sampling
from .chunked import ChunkedSampler, Schedule

if TYPE_CHECKING:
    from ..hosts.base import Host, HostConfig
    from .stagger import Stagger
    from .staggered import Staggered

__all__ = ["ChunkedSampler", "Sampler", "Sampling", "Schedule", "default_sampler", "runner_of"]


def runner_of(host: Host) -> type[Staggered]:
    """What runs the takes of a staggered host."""
    if host.config.host == "magi":
        from .magi import MagiStaggered

        return MagiStaggered
    from .staggered import Staggered

    return Staggered


def default_sampler(config: HostConfig, steps: int | None = None) -> Sampler | Stagger:
    """The sampler a model is configured for, with `steps` instead of its own number of them."""
    if config.sampler == "staggered":
        from .stagger import Stagger

        stagger = Stagger.of(config, steps)
        if steps and config.steps and config.host == "magi":  # as many chunks in flight, however many steps
            return replace(stagger, lag=max(1, config.lag * steps // config.steps))
        return stagger
    if config.sampler == "masked":
        from .masked import MaskedSampler

        steps = config.steps if steps is None else steps
        sampler = MaskedSampler(temperature=config.temperature, history_mask=config.history_mask, compat=config.compat)
        return sampler if steps is None else replace(sampler, steps=steps)
    if steps is None:
        return ChunkedSampler(Schedule.shifted(config.timesteps, config.shift))
    return ChunkedSampler(Schedule.of_steps(steps, config.shift))
