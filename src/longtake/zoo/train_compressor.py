"""Training a compressor for a causal Wan model: `longtake train compressor`.

The model is frozen, or carries a LoRA that learns with the compressor; its takes are rolled out under the very policy
the compressor will serve. Without score models the loss is self-distillation, with them distribution matching
(`compressor_losses`). The high-resolution branch starts at zero, so training begins at the training-free compressor.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from ..compressors import CARRIES, DualBranch
from ..compressors.reading import WEIGHTS
from ..errors import LongtakeError, first_line
from ..hosts.loading import embedded, load
from ..hosts.wan import CausalWan
from ..named import spec
from ..policies import FullHistory, KVPolicy, parse
from ..samplers.chunked import Schedule
from ..session import history_shape
from . import compressor_losses as losses
from . import lanes
from .clips import CHUNKS, Library
from .lora import Adapter
from .rollout import Rollout, check_policy
from .stages import Setting, Stage, Stop, as_the_folder, circumstances, go_on

DISTILL_RATE, DMD_RATE, CRITIC_RATE = 2e-3, 2e-6, 1e-6
GUIDANCE = 3.0  # s of DMD; a conventional scale of 4
HELD_OUT = 1 << 40  # seeds from here on are for judging, not for learning
PASTS = ("own", "films")
FIRST_FILMS, FILMS, STEPS_A_FILM = 16, 256, 4  # encoded before the first step, in all, and how often another one


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, against what.

    chunks: length of a rollout; batch: takes in lockstep; policy: as for `longtake generate`.
    real, fake: folders of many-step Wan models for distribution matching; fake alone defaults to a copy of real.
    lora: rank of the adapter that learns along, 0 for a frozen model. rate: default by the kind of loss.
    carry, where, low: of the compressor, see `DualBranch`. past: what a rollout remembers when it distils, its own
    chunks or films of the procedural world.
    """

    chunks: int = 7
    batch: int = 2
    policy: str = "packforcing"
    real: Path | None = None
    fake: Path | None = None
    lora: int = 0
    rate: float | None = None
    carry: str = CARRIES[0]
    where: str = "midpoint"
    low: str = "pixels"
    past: str = PASTS[0]

    def options(self, policy: str, rate: float) -> dict[str, Setting]:
        """What a training may not change half-way, by the names of the options; `policy` written in full."""
        folder = lambda path: None if path is None else (str(path.expanduser().resolve()), str(path))
        return {
            "chunks": self.chunks, "batch": self.batch, "policy": policy, "real-score": folder(self.real),
            "fake-score": folder(self.fake), "lora-rank": self.lora, "rate": rate, "carry": self.carry,
            "positions": self.where, "low": self.low, "past": self.past,
        }  # fmt: skip


class Critic:
    """The fake score and its optimizer."""

    def __init__(self, model: Any) -> None:
        self.model = model.train().requires_grad_(True)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=CRITIC_RATE, betas=(0.0, 0.999), weight_decay=0.01)

    def learn(self, clip: Tensor, text: Tensor, shift: float, generator: torch.Generator) -> float:
        """One step of flow matching on a clip of the rollout."""
        loss = losses.critic_loss(self.model, text, losses.noised(clip, shift, generator), clip)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Trainer:
    """A host, a compressor and the takes that train it."""

    def __init__(self, host: CausalWan, recipe: Recipe, prompts: Sequence[str] | Tensor) -> None:
        self.host, self.recipe = host, recipe
        self.geometry = host.geometry()
        wan = host.transformer.config
        width = wan.num_attention_heads * wan.attention_head_dim
        self.compressor = DualBranch.sized(
            wan.in_channels, width, carry=recipe.carry, where=recipe.where, low=recipe.low
        ).to(host.device)
        shape = history_shape(host, self.geometry, recipe.batch, 1, self.compressor)
        self.policy: KVPolicy = parse(recipe.policy).settle(shape)
        check_policy(self.policy, shape)
        self.schedule = Schedule.shifted(host.config.timesteps, host.config.shift)
        # every prompt is encoded once, for good
        embeds = prompts if isinstance(prompts, Tensor) else host.encode_prompt(list(prompts))
        self.embeds = embeds.to(host.device)
        self.real = self.critic = self.no_text = None
        if recipe.real is not None:
            self.no_text = host.encode_prompt([""]) if host.text_encoder is not None else torch.zeros_like(embeds[:1])
            self.real = self._score("real", recipe.real, host.dtype).eval().requires_grad_(False)
            fake = ("fake", recipe.fake) if recipe.fake is not None else ("real", recipe.real)
            self.critic = Critic(self._score(*fake, torch.float32))
        host.prompts_encoded()
        host.transformer.requires_grad_(False)
        self.adapter = Adapter(host.transformer, recipe.lora) if recipe.lora else None
        self._check_length()
        self.films = self._library(0) if recipe.past == "films" else None

    def modules(self) -> dict[str, torch.nn.Module]:
        """What learns."""
        return {"compressor": self.compressor, **({"lora": self.adapter.layers} if self.adapter else {})}

    def loss(self, seed: int, steps: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of one rollout, which `seed` and the number of steps done determine, and numbers for the log."""
        rng, generator = np.random.default_rng([seed, steps]), torch.Generator().manual_seed(seed * 1_000_003 + steps)
        embeds = self.embeds[torch.from_numpy(rng.integers(len(self.embeds), size=self.recipe.batch))]
        exit_step = int(rng.integers(len(self.schedule.sigmas)))
        draw = self._noise(generator)
        if self.films is not None:
            self.films.grow(min(FILMS, FIRST_FILMS + steps // STEPS_A_FILM) - self.films.films)
            return self._distill_films(self.films, rng, self.recipe.batch, [exit_step], draw), {}
        if self.critic is None:
            return self._distill(embeds, [exit_step], draw), {}
        numbers = {}
        for _ in range(losses.CRITIC_UPDATES):
            with torch.no_grad():
                clip = losses.clip_of(self._rollout(embeds), self.schedule, self.recipe.chunks, exit_step, draw)
            numbers["critic"] = self.critic.learn(clip, embeds, self.host.config.shift, generator)
        clip = losses.clip_of(self._rollout(embeds), self.schedule, self.recipe.chunks, exit_step, draw)
        at = losses.noised(clip, self.host.config.shift, generator)
        assert self.no_text is not None
        no_text = self.no_text.expand(len(clip), -1, -1)
        return losses.dmd_loss(clip, self.real, self.critic.model, embeds, no_text, GUIDANCE, at), numbers

    @torch.no_grad()
    def judge(self, takes: int = 4) -> dict[str, float]:
        """Self-distillation loss on takes that were never trained on, over all denoising steps: as trained, and of the
        low-resolution branch alone in the same places."""
        branch, kept = self.compressor.proj_out, [p.detach().clone() for p in self.compressor.proj_out.parameters()]
        fresh = None
        if self.films is not None:
            fresh = self._library(HELD_OUT)
            fresh.grow(2 * takes)
        result = {}
        for name in ("trained", "low_resolution_alone"):
            if name != "trained":
                for p in branch.parameters():
                    p.zero_()
            total = 0.0
            for i in range(takes):
                draw = self._noise(torch.Generator().manual_seed(HELD_OUT + i))
                steps = range(len(self.schedule.sigmas))
                if fresh is not None:
                    total += float(self._distill_films(fresh, np.random.default_rng([HELD_OUT, i]), 1, steps, draw))
                else:
                    total += float(self._distill(self.embeds[[i % len(self.embeds)]], steps, draw))
            result[name] = total / takes
        for p, old in zip(branch.parameters(), kept, strict=True):
            p.copy_(old)
        return result

    def teacher(self, embeds: Tensor) -> Rollout:
        """A rollout that sees its whole past, by the model as it was."""
        teacher = _Unadapted(self.host, FullHistory(), self.geometry, self.host.text_state(embeds))
        teacher.adapter = self.adapter
        return teacher

    # --- within -----------------------------------------------------------------------------------------------------

    def _distill(self, embeds: Tensor, steps: Sequence[int], draw: Any) -> Tensor:
        sized = lambda: draw(len(embeds))
        student, teacher = self._rollout(embeds), self.teacher(embeds)
        return losses.distill(student, teacher, self.schedule, self.recipe.chunks, steps, sized)

    def _distill_films(
        self, library: Library, rng: np.random.Generator, batch: int, steps: Sequence[int], draw: Any
    ) -> Tensor:
        window = library.draw(rng, batch, self.recipe.chunks)
        embeds = self.host.encode_prompt(window.captions).to(self.host.device)
        latents = window.latents.to(self.host.device, self.host.dtype)
        student, teacher = self._rollout(embeds), self.teacher(embeds)
        return losses.distill(
            student, teacher, self.schedule, self.recipe.chunks, steps, lambda: draw(batch), films=latents
        )

    def _library(self, seed: int) -> Library:
        if self.critic is not None:
            raise LongtakeError("--past films is for self-distillation: leave --real-score away")
        if self.host.config.world != lanes.WORLD or self.host.vae is None:
            raise LongtakeError(
                f"{self.host.name} was not trained on the procedural world, so there are no films for it: let rollouts "
                "remember their own chunks (--past own)"
            )
        if self.recipe.chunks > CHUNKS:
            raise LongtakeError(
                f"--past films: films have {CHUNKS} chunks, a rollout of {self.recipe.chunks} is too long; give "
                f"--chunks {CHUNKS}"
            )
        return Library(self.host.vae, "short", seed)

    def _rollout(self, embeds: Tensor) -> Rollout:
        return Rollout(self.host, self.policy, self.geometry, self.host.text_state(embeds), self.compressor, fast=True)

    def _noise(self, generator: torch.Generator) -> Any:
        shape = (self.geometry.channels, self.geometry.chunk_frames, *self.geometry.latent_size)

        def draw(batch: int = self.recipe.batch) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(self.host.device)

        return draw

    def _score(self, option: str, folder: Path, dtype: torch.dtype) -> Any:
        """A many-step Wan model: a model folder, its transformer's folder, or the name of an embedded model."""
        folder = embedded().get(str(folder), folder)
        inner = folder / "transformer"
        try:
            model = WanTransformer3DModel.from_pretrained(
                inner if inner.is_dir() else folder, torch_dtype=dtype, local_files_only=True
            )
        except Exception as error:  # loaders raise anything from OSError to SafetensorError
            raise LongtakeError(f"--{option}-score {folder} cannot be loaded: {first_line(error)}") from error
        ours, theirs = self.host.transformer.config, model.config
        for name in ("in_channels", "text_dim"):
            if ours[name] != theirs[name]:
                raise LongtakeError(
                    f"--{option}-score {folder} has {name} {theirs[name]}, {self.host.name} has {ours[name]}: give one "
                    "with the same VAE and text encoder"
                )
        return model.to(self.host.device)

    def _check_length(self) -> None:
        """A rollout in which no chunk sees compressed tokens would teach nothing."""
        probe = self._rollout(self.embeds[:1])
        with torch.no_grad():
            for _ in range(self.recipe.chunks):
                probe.begin()
                if losses.sees_compressed(probe):
                    return
                probe.commit(self._noise(torch.Generator())(1))
        raise LongtakeError(
            f"--chunks {self.recipe.chunks}: so soon policy {self.recipe.policy} shows no compressed chunks; give more "
            "chunks, or a --policy with a smaller sink"
        )


class _Unadapted(Rollout):
    """A rollout of the model without its adapter."""

    adapter: Adapter | None = None

    def _forward(self, x: Tensor, timestep: float, layers: Any) -> Tensor:
        if self.adapter is None:
            return super()._forward(x, timestep, layers)
        self.adapter.switch(False)
        try:
            return super()._forward(x, timestep, layers)
        finally:
            self.adapter.switch(True)


def train(
    source: str | Path | CausalWan, out: Path, minutes: float, *, recipe: Recipe | None = None,
    prompts: Sequence[str] | Tensor = (), device: str = "cpu", seed: int = 0, stop: Stop = go_on,
    ready: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Train, or go on training, a compressor for the model `source`, and write it to `out`/compressor.

    `ready` is called when everything is checked and the first step comes; before it nothing is written. `stop` ends the
    training after a step, by `Stopped`.

    prompts: what the takes are about, or their embeddings [prompts, T, d]; default the model's own examples.
    Returns what `out`/training.json says. Raises LongtakeError for a model, policy or score model that does not fit,
    and for an `out` that holds a training of other settings."""
    recipe = recipe or Recipe()
    begun = time.monotonic()
    policy = parse(recipe.policy)
    host = source if isinstance(source, CausalWan) else load(source, device=device)
    if not isinstance(host, CausalWan) or not host.config.timesteps or host.config.sampler != "chunked":
        raise LongtakeError(
            f"{host.name} is not a few-step causal Wan model: compressors are trained for those only, such as tiny-wan"
        )
    if not len(prompts):
        prompts = host.config.prompts
    if not len(prompts):
        raise LongtakeError(f"{host.name} names no prompts of its own: give some (--prompts FILE, one a line)")
    work, weights, digest = out / "work", host.weights_digest(), _digest(prompts)
    torch.manual_seed(seed)
    trainer = Trainer(host, recipe, prompts)
    rate = recipe.rate or (DISTILL_RATE if trainer.critic is None else DMD_RATE)
    stage = Stage(
        "compressor", work, trainer.modules(), minutes, rate,
        optimizers=None if trainer.critic is None else _published(rate),
        beside={} if trainer.critic is None else {"critic": trainer.critic},
        recipe={
            "model": (weights, host.name), "prompts": (digest, f"{len(prompts)} ({digest})"), "seed": seed,
            **recipe.options(spec(policy), rate),
        },
        stop=stop,
    )  # fmt: skip
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtakeError(f"cannot make folder {work}: {error.strerror}; give another --out") from error
    ready()
    for _ in _turns(stage):
        loss, numbers = trainer.loss(seed, stage.steps)
        stage.step(loss, **numbers)
    stage.finish()
    facts: dict[str, Any] = {
        **circumstances(host.device.type),
        "model": host.name, "loss": "self-distillation" if trainer.critic is None else "dmd",
        "recipe": {k: str(v) if isinstance(v, Path) else v for k, v in vars(recipe).items()},
        "seed": seed, "minutes": minutes, "steps": stage.steps, "prompts": len(prompts),
        "last_call_minutes": round((time.monotonic() - begun) / 60, 1),
        "held_out_distillation": trainer.judge(),
    }  # fmt: skip
    if trainer.adapter is None:  # an adapter makes another model of it, which convert has yet to write
        trainer.compressor.register_to_config(trained_for={"model": host.name, "weights": weights})
    _export(trainer, out, facts)
    return facts


def _export(trainer: Trainer, out: Path, facts: dict[str, Any]) -> None:
    """Write the result; a cut-off write leaves no half of it under its name."""
    new, folder = out / "compressor.new", out / "compressor"
    shutil.rmtree(new, ignore_errors=True)
    trainer.compressor.save_pretrained(new)
    as_the_folder([new / WEIGHTS], new / "config.json")
    if folder.exists():
        shutil.rmtree(folder)
    new.rename(folder)
    if trainer.adapter is not None:
        trainer.adapter.save(out / "lora.safetensors")
        as_the_folder([out / "lora.safetensors"], folder / "config.json")
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def _digest(prompts: Sequence[str] | Tensor) -> str:
    if isinstance(prompts, Tensor):
        content = prompts.detach().cpu().float().numpy().tobytes()
    else:
        content = "\n".join(prompts).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _turns(stage: Stage) -> Iterator[float]:
    """The stage's turns, with gradients on whatever mode the caller is in."""
    with torch.enable_grad():
        yield from stage


def _published(rate: float) -> Any:
    """PackForcing's optimizer."""
    return lambda parameters: [torch.optim.AdamW(parameters, lr=rate, betas=(0.0, 0.999), weight_decay=0.01)]
