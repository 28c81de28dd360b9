"""The processes of a training. Each computes its share of every batch, all take the same step, and all stop after the
same step.

`torchrun` and `accelerate launch` start them and set environment variables. With one process, nothing here has an
effect. Randomness is keyed by sample (`schedule`), so the losses equal those of one process with the same batch.

Every process has all weights (DDP), or, with `distill.sharding: full`, a part of every matrix (torch's `fully_shard`,
FSDP2). With that, 12 billion float32 weights and AdamW's state fit on eight 80 GB cards.
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
from diptych.student.families import family_of
from diptych.student.runtime import parallel

PATIENCE = timedelta(hours=6)  # one process may encode or sample for a long time while the others wait
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """This process's rank among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a batch, of equal length in all. UsageError if the batch does not divide."""
        if len(items) % self.count:
            raise UsageError(
                "option_invalid",
                f"distill.batch_size {len(items)} cannot be divided among {self.count} processes. Use a multiple of "
                f"{self.count}.",
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
        """The first process's value, in all processes."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def most(self, value: int) -> int:
        """The largest of all processes' values, in all processes."""
        if self.count == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    @contextmanager
    def together(self) -> Iterator[bool]:
        """A context that all processes leave together: if one fails, all fail with its error. Yields whether this is
        the first process."""
        failure: Exception | None = None
        try:
            yield self.first
        except Exception as error:
            failure = error
        if self.count > 1 and self.most(int(failure is not None)):
            errors: list[tuple[str, str] | None] = [None] * self.count
            code = failure.code if isinstance(failure, UserError) else "internal"
            dist.all_gather_object(errors, None if failure is None else (code, str(failure) or type(failure).__name__))
            failure = failure or UserError(*next(error for error in errors if error is not None))
            if isinstance(failure, UserError):
                failure.shared = True
        if failure is not None:
            raise failure


ALONE = Processes()


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """Connects to the other processes, if there are any. Returns this process's rank and device.

    UsageError if there are fewer GPUs than processes, or if the launcher is configured to shard the weights.
    """
    for engine in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true":
            raise UsageError(
                "option_conflict",
                f"accelerate is configured for {engine}, which this training does not use. Set distill.sharding=full "
                "to shard the weights, and launch with deploy/accelerate/8x80gb.yaml or torchrun.",
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
    """Shards the weights over all processes, in place. Each block is gathered for its computation and then freed."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in family_of(type(transformer).__name__).block_lists(transformer):
        fully_shard(block, mesh=mesh)
    # The root is freed after each forward pass too, because validation and samples have no backward pass.
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True)


def replicate(transformer: Any, device: torch.device) -> Any:
    """The transformer wrapped in DDP, which averages gradients over all processes during the backward pass."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(transformer, device_ids=None if device.type == "cpu" else [device])


@contextmanager
def accumulating(model: Any, more: bool) -> Iterator[None]:
    """The context of a backward pass. Gradients are exchanged only in the last one of a step, without `more`."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more)
    with model.no_sync() if more and hasattr(model, "no_sync") else nullcontext():
        yield


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, sharing its memory. The tensor itself if it is not sharded."""
    return parameter.to_local() if _sharded(parameter) else parameter


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from all processes, all of which must call this."""
    return tensor.full_tensor() if _sharded(tensor) else tensor


def collected(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered on the first process's CPU, for saving. An empty tensor (0,) in the others. All processes must
    call this."""
    if not _sharded(tensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0)


def spread_as(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor of which every process has its `local` part, sharded like `parameter`. The part itself if `parameter`
    is not sharded."""
    if not _sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A complete tensor sharded like `parameter`. The tensor itself if that is not sharded, or of another shape."""
    if not _sharded(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def _sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


class Interrupts:
    """Defers Ctrl-C and SIGTERM to the end of a step: `received` is the signal's number. A second signal interrupts
    immediately."""

    def __init__(self) -> None:
        self.received: int | None = None
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
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        log.warning("Stopping after this step. Run the same command again to resume.")
