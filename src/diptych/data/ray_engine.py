"""Shards on a Ray cluster. The only module that knows of Ray, of which it needs actors and `ray.wait`.

A pool of actors holds the stage's models, each actor works on one shard at a time and writes it itself, to storage that
all nodes share; the driver moves only shard numbers, keeps the list of what is missing, and publishes the manifest.
So one shard is what is under way in a worker, what a death costs, and what is given to another worker. A worker gets
its first shard when it runs: one that has no room yet waits in Ray's own queue, which is what makes Ray's autoscaler
add nodes, and holds up nothing. A worker with nothing left to do ends, so that nodes fall idle and can go.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from diptych.data.engine import Engine, Job, Row, Setup, Timed, Work, idle
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError, describe
from diptych.llm.vllm import IN_WORKERS
from diptych.recipe.schema import Pool, Recipe
from diptych.utils.machine import thread_variables

TICK = 2.0  # seconds between two looks at a cluster in which nothing has happened
GIB = 2**30
log = logging.getLogger(__name__)


@contextmanager
def connect(address: str | None = None) -> Iterator[RayEngine]:
    """The cluster at `address` (`auto`, HOST:PORT, ray://HOST:PORT). None is $RAY_ADDRESS, a cluster that runs on this
    machine, or else one of this machine alone, which ends with the block. A connection that is there already is used.

    UsageError if Ray is not installed, UserError if no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise UsageError(
            "dependency_missing", "--engine ray: Ray is not installed; pip install 'diptych[ray]'"
        ) from None
    if ray.is_initialized():
        yield RayEngine()
        return
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"at {address} " if address else ""
        raise UserError(
            f"no Ray cluster {where}can be used ({describe(error, limit=200)}); see `ray status`"
        ) from error
    try:
        yield RayEngine()
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class RayEngine(Engine):
    """Runs a stage on the cluster that `connect` has joined. `recipe` says what a stage's workers need."""

    recipe: Recipe | None = None

    def of(self, recipe: Recipe) -> RayEngine:
        """The same cluster, with the pools, device and threads of `recipe`."""
        return replace(self, recipe=recipe)

    def make(self, job: Job, missing: dict[int, int], report: Callable[..., None], timed: Timed) -> None:
        """Each shard by one worker; UserError, with what happened on which node, if shards were lost too often."""
        shards = list(missing)
        listed = None if isinstance(job.inputs, Dataset) else job.inputs
        setup = _Shards(job if listed is None else replace(job, inputs=()))
        # Rows that lie in no data set travel with their shard's number.
        items = [(shard, None if listed is None else listed[shard]) for shard in shards]
        seen: set[str] = set()
        count = 0

        def again(index: int) -> None:
            job.failed.drop_shard(shards[index])  # the next worker's failures may be fewer

        def news(note: str) -> None:
            report(count, note)

        pool = self._pool(job.stage.name, setup, items, again)
        for index, node, times in pool.results(news):
            if node not in seen and shards[index] not in job.output.shards():
                raise UserError(
                    f"{job.output.url}: what {node} wrote is not to be seen from here; --out must be on storage that "
                    "all nodes share: a network file system, s3://…"
                )
            seen.add(node)
            count += missing[shards[index]]
            for rows, seconds in times:
                timed(rows, seconds)
            report(count, pool.note())

    def each(
        self, name: str, setup: Setup, items: Sequence[Any], say: Callable[[str], None]
    ) -> Iterator[tuple[int, Any]]:
        """(index, result) of every item, as they come. `say` hears how many workers there are."""
        for index, _, result in self._pool(name, setup, items, lambda index: None).results(say):
            yield index, result

    def there(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """In a worker as those of the stage `where` are."""
        [(_, result)] = self.each(where, _Call(function, arguments), [None], lambda note: None)
        return result

    def _pool(self, name: str, setup: Setup, items: Sequence[Any], again: Callable[[int], None]) -> _Workers:
        recipe = self.recipe or Recipe(name="none")
        asked = recipe.ray.pool(name)
        variables = thread_variables(recipe.threads) if recipe.threads else {}
        if recipe.vllm(name) is not None:
            variables |= IN_WORKERS
        asked = asked.model_copy(update={"gpus": _gpus(recipe, name)})
        return _Workers(name, setup, items, again, asked, variables, recipe.ray.retries, recipe.ray.wait)


def _gpus(recipe: Recipe, stage: str) -> float:
    """GPUs of a worker; where a recipe leaves them open, those of its vLLM model, or one if it computes on GPUs, or
    would if there were any."""
    import ray

    gpus = recipe.ray.pool(stage).gpus
    if gpus is not None:
        return gpus
    if (model := recipe.vllm(stage)) is not None:
        return float(model.tensor_parallel_size)
    if stage == "write":
        return 0.0
    device = recipe.device
    return float(device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0))


@dataclass(frozen=True)
class _Shards:
    """What a worker does with a shard; its models are opened with the first that has rows."""

    job: Job

    def __call__(self) -> Callable[[Any], Any]:
        works: list[Work] = []

        def make(item: tuple[int, list[Row] | None]) -> list[tuple[int, float]]:
            shard, given = item
            rows = self.job.rows(shard) if given is None else given
            if rows and not works:
                works.append(self.job.stage.load())
            times: list[tuple[int, float]] = []
            self.job.make(shard, rows, works[0] if works else idle, lambda done: None, lambda *one: times.append(one))
            return times

        return make


@dataclass(frozen=True)
class _Call:
    """A function, once."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self) -> Callable[[Any], Any]:
        return lambda item: self.function(*self.arguments)


@dataclass(frozen=True)
class _Raised:
    """An exception in a worker. One that users can cause ends the run, as it does in one process."""

    message: str
    fatal: type[UserError] | None


class _Worker:
    """The actor: one process, which holds what `setup` opens."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.work: Callable[[Any], Any] | None = None

    def node(self) -> str:
        """Where it runs."""
        import ray

        return f"node {ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"

    def do(self, item: Any) -> Any:
        """The item's result, or a `_Raised`: an exception need not survive its way to the driver."""
        try:
            if self.work is None:
                self.work = self.setup()
            return self.work(item)
        except UserError as error:
            return _Raised(str(error), UsageError if isinstance(error, UsageError) else UserError)
        except Exception as error:
            return _Raised(describe(error, limit=500, kind=True), None)


@dataclass
class _Member:
    """A worker as the driver sees it: `node` is empty until it runs, `item` None until it has one."""

    actor: Any
    node: str = ""
    item: int | None = None


@dataclass
class _Workers:
    """The pool of one stage. `again(index)` is called before an item is given out once more."""

    name: str
    setup: Setup
    items: Sequence[Any]
    again: Callable[[int], None]
    asked: Pool
    variables: dict[str, str]
    retries: int
    patience: float
    members: dict[Any, _Member] = field(default_factory=dict)  # by the call that is under way
    losses: dict[int, list[str]] = field(default_factory=dict)  # item → where and how it was lost
    starts: list[str] = field(default_factory=list)  # how the last starts went wrong
    done: int = 0

    def results(self, say: Callable[[str], None]) -> Iterator[tuple[int, str, Any]]:
        """(index, node, result) of every item, as they come. UserError at the end if items were lost for good."""
        import ray

        self.waiting = deque(range(len(self.items)))
        self.seen = time.monotonic()  # when a worker was last known to run
        try:
            while self.waiting or any(member.item is not None for member in self.members.values()):
                self._fill()
                calls, _ = ray.wait(list(self.members), timeout=TICK)
                for call in calls:
                    yield from self._take(call)
                if any(member.node for member in self.members.values()):
                    self.seen = time.monotonic()
                elif time.monotonic() - self.seen > self.patience:
                    raise UserError(self._no_room())
                if not calls:
                    say(self.note())
        finally:
            for member in self.members.values():
                ray.kill(member.actor)
            self.members.clear()
        lost = [index for index, told in self.losses.items() if len(told) > self.retries]
        if lost:
            raise UserError(self._report(lost))

    def note(self) -> str:
        """`6 workers on 3 nodes`, and what was lost."""
        nodes = {member.node for member in self.members.values() if member.node}
        running = sum(bool(member.node) for member in self.members.values())
        starting = len(self.members) - running
        parts = [f"{_several(running, 'worker')} on {_several(len(nodes), 'node')}"]
        parts += [f"{starting} starting"] if starting else []
        parts += [f"{sum(map(len, self.losses.values()))} lost"] if self.losses else []
        return ", ".join(parts)

    def _fill(self) -> None:
        """Asks Ray for workers, as many as there is work for, at most as many as the recipe or the cluster allows."""
        import ray

        busy = sum(member.item is not None for member in self.members.values())
        wanted = len(self.waiting) + busy
        if len(self.members) >= wanted or len(self.members) >= (limit := self.asked.workers or self._room()):
            return
        options: dict[str, Any] = {"num_cpus": self.asked.cpus, "num_gpus": self.asked.gpus}
        if self.asked.memory is not None:
            options["memory"] = int(self.asked.memory * GIB)
        if self.variables:
            options["runtime_env"] = {"env_vars": self.variables}
        made = ray.remote(_Worker).options(**options)
        for _ in range(min(limit, wanted) - len(self.members)):
            actor = made.remote(self.setup)
            self.members[actor.node.remote()] = _Member(actor)

    def _take(self, call: Any) -> Iterator[tuple[int, str, Any]]:
        """A call that has ended: the worker gets its next item, and its result goes out."""
        import ray

        member = self.members.pop(call)
        try:
            value = ray.get(call)
        except ray.exceptions.RayError as error:  # the worker died, or its whole node
            self._lost(member, describe(error, limit=500, kind=True))
            return
        if isinstance(value, _Raised):
            if value.fatal is not None:
                raise value.fatal(f"{value.message} (on {member.node})")
            ray.kill(member.actor)  # after a CUDA error, say, it is good for nothing
            self._lost(member, value.message)
            return
        if member.item is None:
            member.node = value
            self.starts.clear()
        finished, member.item = member.item, None
        if self.waiting:
            member.item = self.waiting.popleft()
            self.members[member.actor.do.remote(self.items[member.item])] = member
        else:
            ray.kill(member.actor)
        if finished is not None:
            self.done += 1
            yield finished, member.node, value

    def _lost(self, member: _Member, reason: str) -> None:
        """Gives the item of a lost worker to another, if it was not lost too often."""
        index = member.item
        if index is None:
            self.starts.append(reason)
            if len(self.starts) > self.retries:
                raise UserError(f"{self.name}: {len(self.starts)} workers in turn did not start; the last: {reason}")
            return
        told = self.losses.setdefault(index, [])
        told.append(f"{member.node}: {reason}")
        if len(told) <= self.retries:
            log.warning("%s: shard %d was lost on %s; another worker takes it", self.name, index, told[-1])
            self.again(index)
            self.waiting.appendleft(index)
        elif not self.done:
            raise UserError(self._report([index]))  # nothing works: the other shards would go the same way

    def _report(self, lost: list[int]) -> str:
        told = "; ".join(f"shard {index}: {', '.join(self.losses[index])}" for index in lost[:3])
        return (
            f"{self.name}: {_several(len(lost), 'shard')} lost {self.retries + 1} times each ({told}); "
            "the same command tries again what is missing"
        )

    def _room(self) -> int:
        """How many such workers the cluster holds when it does nothing else; at least one, which may bring a node."""
        import ray

        memory = (self.asked.memory or 0) * GIB
        needs = {"CPU": self.asked.cpus, "GPU": self.asked.gpus or 0, "memory": memory}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fit = (min((int(has.get(k, 0) // n) for k, n in needs.items() if n), default=1) for has in nodes)
        return max(1, sum(fit))

    def _no_room(self) -> str:
        import ray

        has = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU", "memory")}
        return (
            f"{self.name}: for {self.patience:g} s no worker could start. One asks for {self.asked.cpus:g} CPUs, "
            f"{self.asked.gpus:g} GPUs{f', {self.asked.memory:g} GiB' if self.asked.memory else ''} (recipe: "
            f"ray.{self.name}); the whole cluster has {has['CPU']:g} CPUs, {has['GPU']:g} GPUs, "
            f"{has['memory'] / GIB:.1f} GiB"
        )


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
