"""The processes of a training: each has its share of every batch, all take the same step, and all stop after one.

`torchrun` and `accelerate launch` start them and say so in the environment; alone, there is one process and nothing
here does anything. Chance is keyed by sample (`schedule`), so the losses are those of one process with the same batch.

Weights are whole in every process (DDP), or, with `distill.sharding: full`, each holds a part of every matrix (torch's
`fully_shard`, FSDP2): then 12 billion float32 weights and AdamW's state fit on eight 80 GB cards.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diptych.errors import UsageError, UserError
from diptych.student.runtime import parallel

PATIENCE = timedelta(hours=6)  # one process may encode or draw for long while the others wait
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a batch, of equal length in all. UsageError if it does not divide."""
        if len(items) % self.count:
            raise UsageError(
                f"distill.batch_size {len(items)} does not divide among {self.count} processes: "
                f"take a multiple of {self.count}"
            )
        return list(items[self.rank :: self.count])

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over all processes of each of these numbers."""
        if self.count == 1:
            return list(values)
        return (self.sum(torch.tensor(values, dtype=torch.float64)) / self.count).tolist()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of a tensor on the CPU."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def shared(self, value: T) -> T:
        """What the first process gives here, in all of them."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def most(self, value: int) -> int:
        """The largest of all processes' numbers: what one was told, all know."""
        if self.count == 1:
            return value
        told = torch.tensor(value)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    @contextmanager
    def together(self) -> Iterator[bool]:
        """A block that all leave together: where one fails, all do, with its message. Gives whether this is the first
        process."""
        failure: Exception | None = None
        try:
            yield self.first
        except Exception as error:
            failure = error
        if self.count > 1 and self.most(int(failure is not None)):
            told: list[str | None] = [None] * self.count
            dist.all_gather_object(told, None if failure is None else str(failure) or type(failure).__name__)
            failure = failure or UserError(next(text for text in told if text is not None))
            if isinstance(failure, UserError):
                failure.shared = True
        if failure is not None:
            raise failure


ALONE = Processes()


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """Meets the other processes, if there are any; this one's place, and its own device.

    Raises UsageError when there are fewer GPUs than processes, or the launcher was told to split the weights.
    """
    for engine in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true":
            raise UsageError(
                f"accelerate was told to use {engine}, which this training would not do: distill.sharding=full splits "
                "the weights; launch it with deploy/accelerate/8x80gb.yaml or torchrun"
            )
    count = parallel.processes()
    if count == 1:
        return ALONE, device
    if device.type != "cpu":
        device = parallel.join(device, PATIENCE)
    elif not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), count), device


def shard(transformer: Any, device: torch.device) -> None:
    """Spreads the weights over all processes, in place: each block is gathered when it computes, and let go again."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    # The root too is let go after each forward pass: validation and samples have no backward pass that would do it.
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True)


def replicate(transformer: Any, device: torch.device) -> Any:
    """The transformer as DDP has it: gradients are averaged over all processes while they are made."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(transformer, device_ids=None if device.type == "cpu" else [device])


@contextmanager
def accumulating(model: Any, more: bool) -> Iterator[None]:
    """A backward pass whose gradients stay here if `more` of the step's are to come; the last one's are exchanged."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more)
    with model.no_sync() if more and hasattr(model, "no_sync") else nullcontext():
        yield


def own(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, sharing its memory; the tensor itself where it is not spread."""
    return parameter.to_local() if _spread(parameter) else parameter


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from all processes, all of which must call this."""
    return tensor.full_tensor() if _spread(tensor) else tensor


def collected(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered into the memory of the first process's CPU, for saving; nothing (0,) in the others. All must
    call this."""
    if not _spread(tensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0)


def spread_as(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor of which every process holds its `own` part, split as `parameter` is; the part itself if that is not
    spread."""
    if not _spread(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor spread as `parameter` is; itself where that is not, or where the shapes differ."""
    if not _spread(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def _spread(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


class Interrupts:
    """Ctrl-C and SIGTERM are answered between two steps, when the weights are whole; a second one is not waited for."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number
        log.warning("stopping after this step; the run can be continued with the same command")
