"""Shards on a Ray cluster. Only this module and `ray_pace` use Ray, and they need only actors and `ray.wait`.

A pool of actors holds the stage's models. Each actor works on one shard at a time and writes it to storage that all
nodes share. The driver sends shard numbers, keeps the list of missing shards, and publishes the manifest, so a worker
that dies costs one shard, which another worker gets. A worker gets its first shard once it runs: a worker without room
waits in Ray's queue, which makes Ray's autoscaler add nodes, and delays nothing. A worker without work ends, so that
idle nodes can be removed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from diptych.data.engine import Engine, LocalEngine, Row, Setup, StageJob, Timed, Work, idle
from diptych.data.ray_pace import SharedLimit, shared
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError, describe, nearest
from diptych.llm.endpoint import Endpoint
from diptych.llm.vllm import IN_WORKERS
from diptych.recipe.schema import Pool, Recipe
from diptych.utils.machine import thread_variables

TICK = 2.0  # seconds between two checks of an idle cluster
GIB = 2**30
ENGINES = ("local", "ray")
log = logging.getLogger(__name__)


@contextmanager
def open_engine(name: str = "local", address: str | None = None) -> Iterator[Engine]:
    """Opens an engine: `local`, in this process, or `ray`, on the cluster at `address`. UsageError for other names."""
    if name == "ray":
        with connect(address) as engine:
            yield engine
        return
    if name != "local":
        hint = nearest(name, ENGINES)
        raise UsageError("option_invalid", f"--engine {name}: unknown engine; use local or ray{hint}")
    if address is not None:
        raise UsageError("option_conflict", "--address is the address of a Ray cluster; add --engine ray")
    yield LocalEngine()


@contextmanager
def connect(address: str | None = None) -> Iterator[RayEngine]:
    """Connects to the cluster at `address` (`auto`, HOST:PORT, ray://HOST:PORT), or uses an existing connection.

    None is $RAY_ADDRESS, or a cluster that runs on this machine, or a new one on this machine alone, which ends with
    the block. UsageError if Ray is not installed, UserError if no cluster answers.
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
        reason = describe(error, limit=200)
        raise UserError(
            "process_failed", f"cannot use a Ray cluster {where}({reason}); check it with `ray status`"
        ) from error
    try:
        yield RayEngine()
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class RayEngine(Engine):
    """Runs a stage on the cluster of `connect`, with the workers that `recipe` requests."""

    recipe: Recipe | None = None

    def of(self, recipe: Recipe) -> RayEngine:
        """The same cluster with the pools, device and threads of `recipe`."""
        return replace(self, recipe=recipe)

    def make(self, job: StageJob, missing: dict[int, int], report: Callable[..., None], timed: Timed) -> None:
        """Makes each shard in one worker. UserError, with the reason and the node, if shards were lost too often."""
        shards = list(missing)
        listed = None if isinstance(job.inputs, Dataset) else job.inputs
        setup = _Shards(job if listed is None else replace(job, inputs=()))
        # Rows that are not in a data set are sent with the number of their shard.
        items = [(shard, None if listed is None else listed[shard]) for shard in shards]
        seen: set[str] = set()
        count = 0

        def again(index: int) -> None:
            job.failed.drop_shard(shards[index])  # the next worker may have fewer failures

        def news(note: str) -> None:
            report(count, note)

        pool = self._pool(job.stage.name, setup, items, again)
        for index, node, times in pool.results(news):
            if node not in seen and shards[index] not in job.output.shards():
                raise UserError(
                    "path_not_found",
                    f"{job.output.url}: shards that {node} wrote are not visible here; choose an --out that all nodes "
                    "share, such as a network file system or s3://…",
                )
            seen.add(node)
            count += missing[shards[index]]
            for rows, seconds in times:
                timed(rows, seconds)
            report(count, pool.note())

    def each(
        self, name: str, setup: Setup, items: Sequence[Any], say: Callable[[str], None]
    ) -> Iterator[tuple[int, Any]]:
        """Yields (index, result) of every item as it finishes. Calls `say` with the number of workers."""
        for index, _, result in self._pool(name, setup, items, lambda index: None).results(say):
            yield index, result

    def there(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the function in a worker like those of the stage `where`."""
        [(_, result)] = self.each(where, _Call(function, arguments), [None], lambda note: None)
        return result

    def _pool(self, name: str, setup: Setup, items: Sequence[Any], again: Callable[[int], None]) -> _Workers:
        recipe = self.recipe or Recipe(name="none")
        request = recipe.ray.pool(name).model_copy(update={"gpus": _gpus(recipe, name)})
        variables = thread_variables(recipe.threads) if recipe.threads else {}
        if recipe.vllm(name) is not None:
            variables |= IN_WORKERS
        server = recipe.endpoint(name)
        return _Workers(name, setup, items, again, request, variables, recipe.ray.retries, recipe.ray.wait, server)


def _gpus(recipe: Recipe, stage: str) -> float:
    """GPUs of a worker. If the recipe does not set them, those of its vLLM model, or one if the stage computes on a
    GPU."""
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
    """Makes a shard in a worker. The models are opened for the first shard that has rows."""

    job: StageJob

    def __call__(self) -> Callable[[Any], Any]:
        works: list[Work] = []

        def make(item: tuple[int, list[Row] | None]) -> list[tuple[int, float]]:
            shard, listed = item
            rows = self.job.rows(shard) if listed is None else listed
            if rows and not works:
                works.append(self.job.stage.load())
            times: list[tuple[int, float]] = []
            self.job.make(shard, rows, works[0] if works else idle, lambda done: None, lambda *one: times.append(one))
            return times

        return make


@dataclass(frozen=True)
class _Call:
    """Calls a function once."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self) -> Callable[[Any], Any]:
        return lambda item: self.function(*self.arguments)


@dataclass(frozen=True)
class _Raised:
    """An exception in a worker. A UserError ends the run, as it does in one process."""

    message: str
    kind: type[UserError] | None = None
    code: str = ""


class _Worker:
    """The actor: one process, which holds the models that `setup` opens."""

    def __init__(self, setup: Setup, limit: SharedLimit | None) -> None:
        if limit is not None:
            limit.use()
        self.setup = setup
        self.work: Callable[[Any], Any] | None = None

    def node(self) -> str:
        """The node that it runs on."""
        import ray

        return f"node {ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"

    def do(self, item: Any) -> Any:
        """The item's result, or a `_Raised`, because not every exception can be sent to the driver."""
        try:
            if self.work is None:
                self.work = self.setup()
            return self.work(item)
        except UserError as error:
            return _Raised(str(error), UsageError if isinstance(error, UsageError) else UserError, error.code)
        except Exception as error:
            return _Raised(describe(error, limit=500, kind=True))


@dataclass
class _Member:
    """A worker, as the driver sees it. `node` is empty until it runs, `item` is None until it has one."""

    actor: Any
    node: str = ""
    item: int | None = None


@dataclass
class _Workers:
    """The pool of one stage. `again(index)` is called before an item is sent to another worker."""

    name: str
    setup: Setup
    items: Sequence[Any]
    again: Callable[[int], None]
    request: Pool
    variables: dict[str, str]
    retries: int
    patience: float
    endpoint: Endpoint | None
    members: dict[Any, _Member] = field(default_factory=dict)  # by their current call
    losses: dict[int, list[str]] = field(default_factory=dict)  # item → the node and reason of each loss
    starts: list[str] = field(default_factory=list)  # reasons of the last failed starts
    done: int = 0

    def results(self, say: Callable[[str], None]) -> Iterator[tuple[int, str, Any]]:
        """Yields (index, node, result) of every item as it finishes. UserError at the end if items were lost for
        good."""
        with shared(self.endpoint) as limit:
            yield from self._results(limit, say)

    def _results(self, limit: SharedLimit | None, say: Callable[[str], None]) -> Iterator[tuple[int, str, Any]]:
        import ray

        self.waiting = deque(range(len(self.items)))
        self.seen = time.monotonic()  # when a worker last ran
        try:
            while self.waiting or any(member.item is not None for member in self.members.values()):
                self._fill(limit)
                calls, _ = ray.wait(list(self.members), timeout=TICK)
                for call in calls:
                    yield from self._take(call)
                if any(member.node for member in self.members.values()):
                    self.seen = time.monotonic()
                elif time.monotonic() - self.seen > self.patience:
                    raise UserError("process_failed", self._no_room())
                if not calls:
                    say(self.note())
        finally:
            for member in self.members.values():
                ray.kill(member.actor)
            self.members.clear()
        lost = [index for index, losses in self.losses.items() if len(losses) > self.retries]
        if lost:
            raise UserError("process_failed", self._report(lost))

    def note(self) -> str:
        """The state of the pool: `6 workers on 3 nodes, 1 lost`."""
        nodes = {member.node for member in self.members.values() if member.node}
        running = sum(bool(member.node) for member in self.members.values())
        starting = len(self.members) - running
        parts = [f"{_several(running, 'worker')} on {_several(len(nodes), 'node')}"]
        parts += [f"{starting} starting"] if starting else []
        parts += [f"{sum(map(len, self.losses.values()))} lost"] if self.losses else []
        return ", ".join(parts)

    def _fill(self, limit: SharedLimit | None) -> None:
        """Requests workers from Ray: one for each item, up to the limit of the recipe or the cluster."""
        import ray

        busy = sum(member.item is not None for member in self.members.values())
        wanted = len(self.waiting) + busy
        if len(self.members) >= wanted or len(self.members) >= (most := self.request.workers or self._room()):
            return
        options: dict[str, Any] = {"num_cpus": self.request.cpus, "num_gpus": self.request.gpus}
        if self.request.memory is not None:
            options["memory"] = int(self.request.memory * GIB)
        if self.variables:
            options["runtime_env"] = {"env_vars": self.variables}
        worker = ray.remote(_Worker).options(**options)
        for _ in range(min(most, wanted) - len(self.members)):
            actor = worker.remote(self.setup, limit)
            self.members[actor.node.remote()] = _Member(actor)

    def _take(self, call: Any) -> Iterator[tuple[int, str, Any]]:
        """Handles a finished call: yields its result and gives the worker its next item."""
        import ray

        member = self.members.pop(call)
        try:
            value = ray.get(call)
        except ray.exceptions.RayError as error:  # the worker died, or its whole node
            self._lost(member, describe(error, limit=500, kind=True))
            return
        if isinstance(value, _Raised):
            if value.kind is not None:
                raise value.kind(value.code, f"{value.message} (on {member.node})")
            ray.kill(member.actor)  # it may be unusable, for instance after a CUDA error
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
        """Gives the item of a lost worker to another one, unless it was lost too often."""
        index = member.item
        if index is None:
            self.starts.append(reason)
            if len(self.starts) > self.retries:
                count = len(self.starts)
                raise UserError(
                    "process_failed", f"{self.name}: {count} workers in a row did not start; the last: {reason}"
                )
            return
        losses = self.losses.setdefault(index, [])
        losses.append(f"{member.node}: {reason}")
        if len(losses) <= self.retries:
            log.warning("%s: shard %d was lost on %s; another worker takes it", self.name, index, losses[-1])
            self.again(index)
            self.waiting.appendleft(index)
        elif not self.done:
            raise UserError("process_failed", self._report([index]))  # the other shards would fail in the same way

    def _report(self, lost: list[int]) -> str:
        losses = "; ".join(f"shard {index}: {', '.join(self.losses[index])}" for index in lost[:3])
        return (
            f"{self.name}: {_several(len(lost), 'shard')} lost {self.retries + 1} times each ({losses}); "
            "run the same command again to make what is missing"
        )

    def _room(self) -> int:
        """Number of workers that fit into the idle cluster; at least one, for which the autoscaler may add a node."""
        import ray

        memory = (self.request.memory or 0) * GIB
        needs = {"CPU": self.request.cpus, "GPU": self.request.gpus or 0, "memory": memory}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fit = (min((int(has.get(k, 0) // n) for k, n in needs.items() if n), default=1) for has in nodes)
        return max(1, sum(fit))

    def _no_room(self) -> str:
        import ray

        has = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU", "memory")}
        return (
            f"{self.name}: no worker started within {self.patience:g} s. Each needs {self.request.cpus:g} CPUs, "
            f"{self.request.gpus:g} GPUs{f', {self.request.memory:g} GiB' if self.request.memory else ''} (recipe: "
            f"ray.{self.name}); the whole cluster has {has['CPU']:g} CPUs, {has['GPU']:g} GPUs, "
            f"{has['memory'] / GIB:.1f} GiB"
        )


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
