"""What every training stage shares: a budget in minutes, checkpoints that can be resumed, and a log of numbers.

A stage is measured in minutes rather than steps, so the same command suits two laptop cores and a GPU: the learning
rate follows the share of the budget that is used up, and the budget already used is part of the checkpoint. On a CPU
minutes are CPU time of the training's thread: a machine that is busy with other work makes a training last longer, and
its schedule does not end early.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from longtake.digest import file_sha256
from longtake.errors import LongtakeError
from longtake.zoo.muon import Muon

CHECKPOINT_SECONDS = 90.0
LOG_SECONDS = 10.0
PAUSE_SECONDS = 60.0  # a turn on a GPU that took longer was a stopped process: no more of it counts
# Parts of a parameter's name that mark embeddings, tables and outermost layers; those learn with AdamW.
ENDS = ("shared", "bias", "table", "embed", "patch_embedding", "proj_out", "conv_in", "conv_out", "quant_conv")


Stop = Callable[[], bool]  # whether a training is to end now
Setting = object  # one that a recipe names: a plain value, or a pair of what identifies it and how it is told


class Stopped(Exception):
    """A training that was asked to stop stands saved; the message says what is kept."""


def go_on() -> bool:
    """The `Stop` that never asks."""
    return False


def read_checkpoint(path: Path, device: str | torch.device) -> dict[str, Any]:
    """What `Stage.save` wrote. Raises LongtakeError if it is not whole."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= {"modules", "average"}:
            raise ValueError("it holds something else")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a file cut short, torch and pickle raise half a dozen kinds
        raise LongtakeError(
            f"checkpoint {path} cannot be read, it is damaged or cut short: delete it to begin anew, or put back a copy"
        ) from error
    return state


def begun_with(start: Path | None, folder: Path | None = None) -> Setting:
    """The setting "begin" of a recipe: the checkpoint of another training, none if it is of this one's `folder`."""
    if start is None or start.parent == folder:
        return None
    return file_sha256(start)[:16], str(start.parent.parent)


def as_the_folder(paths: Iterable[Path], beside: Path) -> None:
    """Give files that were written for their owner alone (safetensors does) the mode of one that was written under the
    user's umask."""
    mode = beside.stat().st_mode & 0o666
    for path in paths:
        path.chmod(mode)


def circumstances(device: str) -> dict[str, object]:
    """When, where and with what a training runs, as `training.json` has it."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "versions": {lib.__name__: lib.__version__ for lib in (torch, diffusers, transformers)},
    }


class Stage:
    """One resumable training stage of `minutes` minutes over `modules`, kept in `folder` under `name`.

    Iterate to train: each turn yields the share of the budget used (0..1); call `step(loss)` in it.
    """

    def __init__(
        self, name: str, folder: Path, modules: dict[str, nn.Module], minutes: float, rate: float, *,
        optimizers: Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]] | None = None,
        beside: dict[str, Any] | None = None, recipe: Mapping[str, Setting] | None = None, stop: Stop = go_on,
    ) -> None:  # fmt: skip
        """`optimizers` replaces the choice of them; what is `beside` has a `state_dict` and goes into the checkpoint
        without being trained by the stage. `recipe` names the settings under which it may be gone on with: what is
        learnt under one batch is not to be called the result of another. `stop` is asked after every turn.

        Raises LongtakeError for a checkpoint in the folder that is damaged, or of another recipe. One without a recipe,
        as earlier versions wrote them, is gone on with."""
        self.recipe, self.stop = dict(recipe or {}), stop
        self.beside = beside or {}
        self.name, self.folder, self.modules, self.minutes, self.rate = name, folder, modules, minutes, rate
        named = [(n, p) for module in modules.values() for n, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        inner = {n for n, p in named if p.ndim >= 2 and not any(part in n for part in ENDS)}
        outer = [p for n, p in named if n not in inner]
        self.optimizers: list[torch.optim.Optimizer] = (
            [
                Muon([p for n, p in named if n in inner], lr=rate),
                torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
            ]
            if optimizers is None
            else optimizers(self.parameters)
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.steps, self.used, self.sums = 0, 0.0, dict[str, list[float]]()
        self.checkpoint = folder / f"{name}.pt"
        if self.checkpoint.exists():
            self._restore()

    def __iter__(self) -> Iterator[float]:
        on_cpu = all(p.device.type == "cpu" for p in self.parameters)
        clock = time.thread_time if on_cpu else time.monotonic
        saved = logged = time.monotonic()
        last = clock()
        if self.stop():
            raise self._stopped()
        while self.used < self.minutes * 60:
            share = self.used / (self.minutes * 60)
            warm = min(1.0, (self.steps + 1) / 50)
            for group in [group for optimizer in self.optimizers for group in optimizer.param_groups]:
                group["lr"] = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            yield share
            turned, now = clock(), time.monotonic()
            self.used, last = self.used + (turned - last if on_cpu else min(turned - last, PAUSE_SECONDS)), turned
            asked = self.stop()
            if self.sums and (now - logged > LOG_SECONDS or asked):
                self._log()
                logged = now
            if asked and self.used < self.minutes * 60:
                self.save()
                raise self._stopped()
            if now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = now
        if self.sums:
            self._log()
        self.save()

    def step(self, loss: torch.Tensor, **numbers: float) -> None:
        """One optimiser step on `loss`; `numbers` are averaged into the log."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        decay = min(0.995, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list[torch.Tensor](self.parameters), 1 - decay)
        for key, value in {"loss": float(loss.detach()), "norm": float(norm), **numbers}.items():
            self.sums.setdefault(key, []).append(value)

    def finish(self) -> None:
        """Put the running average of the weights into the modules."""
        with torch.no_grad():
            torch._foreach_copy_(list[torch.Tensor](self.parameters), self.average)

    def save(self) -> None:
        """Write the checkpoint; a cut-off write leaves the old one intact."""
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "beside": {key: part.state_dict() for key, part in self.beside.items()},
            "steps": self.steps,
            "used": self.used,
            "recipe": self.recipe,
        }
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)

    def _restore(self) -> None:
        state = read_checkpoint(self.checkpoint, self.parameters[0].device)
        self._check(state.get("recipe", {}))
        try:
            for key, module in self.modules.items():
                module.load_state_dict(state["modules"][key])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            for key, part in self.beside.items():
                part.load_state_dict(state["beside"][key])
            average = state["average"]
            if [p.shape for p in average] != [p.shape for p in self.parameters]:
                raise ValueError("other parameters")
            self.average, self.steps, self.used = average, state["steps"], state["used"]
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise LongtakeError(
                f"checkpoint {self.checkpoint} is not of this training, or of another version: give another --out, or "
                "the settings it was begun with"
            ) from error

    def _check(self, held: Mapping[str, Setting]) -> None:
        """Raise LongtakeError if the checkpoint was made by another recipe than the stage's."""
        other = [name for name in self.recipe if name in held and _identity(held[name]) != _identity(self.recipe[name])]
        if other:
            was, now = (", ".join(f"{name}={_told(of[name])}" for name in other) for of in (held, self.recipe))
            raise LongtakeError(
                f"{self.folder} holds a training with {was}, now {now}: give another --out, or the same settings"
            )

    def _stopped(self) -> Stopped:
        if not self.checkpoint.exists():
            return Stopped(f"stopped before the first step of stage {self.name}")
        return Stopped(
            f"stopped after {self.steps} steps of stage {self.name}, {self.used / 60:.1f} of {self.minutes:g} minutes: "
            f"kept in {self.checkpoint}; the same command goes on from there"
        )

    def _log(self) -> None:
        means = {key: sum(values) / len(values) for key, values in self.sums.items()}
        row = {"stage": self.name, "step": self.steps, "minutes": round(self.used / 60, 2), **means}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.sums.clear()


def _identity(setting: Setting) -> Setting:
    return setting[0] if isinstance(setting, tuple) else setting


def _told(setting: Setting) -> Setting:
    return setting[1] if isinstance(setting, tuple) else setting
