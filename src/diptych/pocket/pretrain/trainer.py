"""What the pocket trainings share: optimizers, averaged weights, a log, a state on disk that a killed run continues
from, and the reading of a subject's traits from a model's features.

Knowing every trait of every subject is the renderer's privilege. It helps the judges and the teacher to find features
that tell subjects apart (deep supervision, in the manner of REPA, arXiv 2410.06940); it never ships.
"""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diptych.utils.io import publish
from diptych.utils.machine import pick_precision

from .. import world
from ..world import Identity

CHOICES = {
    "kind": world.TRAIN_KINDS,
    "pattern": world.PATTERNS,
    "eyes": (1, 2, 3),
    "mouth": world.MOUTHS,
    "accessory": world.ACCESSORIES,
}
"""Attributes of an identity that are one of several; the other attributes are numbers."""
NUMBERS = ("width", "height", "roundness", "limb", "pattern_scale", "eye_size", "eye_gap", "marks")
TRAITS = 9 + len(NUMBERS) + 2
"""Numbers that describe an identity: three colours, `NUMBERS`, and the pattern's angle as a direction."""


def pick_device(name: str) -> torch.device:
    """What `--device` names; `auto` takes the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        # At these lengths (36 to 64 tokens), a fused attention's backward pass went out of its memory on an H100 with
        # torch 2.11, which the plain products (fast enough at any such length) never did.
        for switch in (torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.enable_flash_sdp):
            switch(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    return torch.device(name)


def resident(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor that batches are picked from: on a GPU all of it lies in the GPU's memory, on a CPU it stays
    where it is (mapped from disk, say)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a read-only map: nothing is written to it
        return torch.from_numpy(array).to(device)


def cores() -> int:
    """Processes to render and tokenize with: one for every core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mean(values: Sequence[torch.Tensor]) -> float:
    """Of losses that were left where they were computed."""
    return float(torch.stack(list(values)).mean())


def mixed(device: torch.device) -> torch.autocast:
    """A forward pass in bfloat16 where that is faster and safe, weights in float32. Most CPUs would emulate it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=pick_precision("auto", device)[0] == "bfloat16")


class Pretraining:
    """Trains `modules` together and keeps an exponential average of their weights.

    AdamW updates everything but `orthogonal`: matrices of hidden layers, which Muon updates (at AdamW's scale of step).

    State lives in `folder`: `state.pt` (weights, averages, optimizer, step; replaced whole) and `log.jsonl`.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, torch.nn.Module],
        rate: float,
        weight_decay: float = 0.0,
        ema: float = 0.999,
        warmup: int = 100,
        clip: float = 1.0,
        orthogonal: Sequence[torch.nn.Parameter] = (),
    ):
        self.folder, self.modules, self.rate, self.ema, self.warmup, self.clip = (
            folder,
            modules,
            rate,
            ema,
            warmup,
            clip,
        )
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        hidden = {id(p) for p in orthogonal}
        rest = [p for p in self.parameters if id(p) not in hidden]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        ]
        if orthogonal:
            self.optimizers.append(
                torch.optim.Muon(orthogonal, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        self.average = [p.detach().clone() for p in self.parameters]
        self.step, self.seconds = 0, 0.0
        self._finite: torch.Tensor | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            self._load()
        self._started = time.monotonic()

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        with torch.no_grad():
            for average, saved in zip(self.average, state["average"], strict=True):
                average.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def check(self) -> None:
        """Refuse to go on if any loss since the last check was not a number. Not looked at in every step, because a
        GPU would wait for it."""
        if self._finite is not None and not self._finite:
            raise RuntimeError(f"no finite loss by step {self.step}; the last good state is in {self.folder}")
        self._finite = None

    def save(self) -> None:
        self.check()
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.elapsed,
        }
        with publish(self.folder / "state.pt") as partial:
            torch.save(state, partial)

    @property
    def elapsed(self) -> float:
        """Seconds of training, all sittings together."""
        return self.seconds + time.monotonic() - self._started

    def update(self, loss: torch.Tensor, scale: float = 1.0) -> None:
        """One step down `loss`; `scale` multiplies the learning rate (a schedule)."""
        finite = torch.isfinite(loss.detach())
        self._finite = finite if self._finite is None else self._finite & finite
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * scale * min(1.0, (self.step + 1) / self.warmup)
            optimizer.step()
        self.step += 1
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def log(self, **values) -> str:
        self.check()
        line = json.dumps({"step": self.step, "seconds": round(self.elapsed, 1), **values})
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        return line

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the modules hold the averaged weights."""
        kept = [p.detach().clone() for p in self.parameters]
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def traits_of(identity: Identity) -> tuple[list[float], list[int]]:
    """An identity as numbers of about unit variance `[TRAITS]`, and the index of its value in each of `CHOICES`."""
    colours = np.array([*identity.body, *identity.second, *identity.accent])
    numbers = np.array([getattr(identity, name) for name in NUMBERS])
    angle = 2 * np.deg2rad(identity.pattern_angle)
    values = [*((colours - 0.6) * 3.5), *((numbers - 0.5) * 3.46), 1.4 * np.sin(angle), 1.4 * np.cos(angle)]
    return values, [options.index(getattr(identity, name)) for name, options in CHOICES.items()]


def traits_table(pairs: Iterable[tuple[Identity, Identity]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The traits of pairs of subjects: numbers float32 `[N, 2, TRAITS]` and choices int64 `[N, 2, 5]`."""
    read = [[traits_of(subject) for subject in pair] for pair in pairs]
    numbers = torch.tensor([[numbers for numbers, _ in pair] for pair in read], dtype=torch.float32)
    return numbers, torch.tensor([[choices for _, choices in pair] for pair in read])


class TraitHead(torch.nn.Module):
    """A linear layer that must read a subject's traits from features of `width` numbers."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = [TRAITS, *(len(options) for options in CHOICES.values())]
        self.linear = torch.nn.Linear(width, sum(self.sizes))

    def loss(self, features: torch.Tensor, numbers: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        """Of features `[N, width]` against numbers `[N, TRAITS]` and choices `[N, 5]`."""
        first, *rest = self.linear(features.float()).split(self.sizes, dim=1)
        named = [F.cross_entropy(logits, choices[:, column]) for column, logits in enumerate(rest)]
        return F.smooth_l1_loss(first, numbers) + sum(named, torch.zeros((), device=features.device)) / len(named)
