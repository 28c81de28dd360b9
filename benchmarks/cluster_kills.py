"""A Ray cluster of three nodes on this machine, whose workers, actors and nodes are killed at random.

    python benchmarks/cluster_kills.py [--kills 20] [--out FILE]      # some minutes

A stage that sleeps makes 220 shards. Every few seconds a worker process gets SIGKILL, Ray ends an actor, or a node is
removed and another one added. All files must equal those of one undisturbed process. A log of started shards must show
no more restarted shards than kills.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

NODE = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
SHARDS, ROWS, SECONDS = 220, 6, 0.25


class Killer(threading.Thread):
    """Kills a worker, an actor or a node every few seconds, until the number of kills is reached."""

    def __init__(self, cluster: Any, diary: Path, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.cluster, self.diary, self.kills, self.chance = cluster, diary, kills, random.Random(seed)
        self.landed: Counter[str] = Counter()
        self.over = threading.Event()

    def run(self) -> None:
        while self.landed.total() < self.kills and not self.over.is_set():
            self.over.wait(self.chance.uniform(2.0, 6.0))
            if self.diary.exists() and not self.over.is_set():
                kind = self.chance.choice(["worker", "worker", "actor", "node"])
                if getattr(self, f"kill_{kind}")():
                    self.landed[kind] += 1
                    print(f"kill {self.landed.total()}: {kind}", flush=True)

    def kill_worker(self) -> bool:
        """Sends SIGKILL to a process that started a shard recently."""
        pids = [int(line.split()[0]) for line in self.diary.read_text().splitlines()[-3:]]
        try:
            os.kill(self.chance.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def kill_actor(self) -> bool:
        """Ends an actor through Ray."""
        import ray
        from ray._private.state import actors

        living = [name for name, actor in actors().items() if actor["State"] == "ALIVE"]
        if not living:
            return False
        from ray._raylet import ActorID

        actor = ActorID(bytes.fromhex(self.chance.choice(living)))
        ray._private.worker.global_worker.core_worker.kill_actor(actor, True)
        return True

    def kill_node(self) -> bool:
        """Kills a raylet with all its workers, and adds another node."""
        node = self.chance.choice(list(self.cluster.worker_nodes))
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(**NODE, wait=False)
        return True


def run(kills: int, out: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Runs the stage. AssertionError if its files differ from those of an undisturbed run."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
    import torch
    from measuring import about, write
    from ray.cluster_utils import Cluster

    from data.shard_stages import Doubling, files, shards
    from data.shard_stages import run as make
    from diptych.data.engine import LocalEngine
    from diptych.data.ray_engine import connect
    from diptych.recipe.schema import Ray, Recipe

    logging.basicConfig(level=logging.WARNING)
    # Hooks for the exit are for the main thread alone, and the killer adds nodes from its own.
    cluster = Cluster(initialize_head=True, head_node_args=NODE, shutdown_at_exit=False)
    with tempfile.TemporaryDirectory() as scratch:
        folder, diary = Path(scratch), Path(scratch) / "diary"
        make(LocalEngine(), folder / "alone", Doubling(), shards(SHARDS, ROWS))
        try:
            for _ in range(2):
                cluster.add_node(**NODE)
            killer = Killer(cluster, diary, kills, seed)
            started = time.monotonic()
            with connect(cluster.address) as engine:
                killer.start()
                recipe = Recipe(name="kills", ray=Ray(retries=5, wait=120))
                make(engine.of(recipe), folder / "killed", Doubling(SECONDS, diary=diary), shards(SHARDS, ROWS))
                seconds = time.monotonic() - started
                killer.over.set()
                killer.join()
        finally:
            cluster.shutdown()
        assert killer.landed.total() == kills, f"only {killer.landed.total()} kills landed: lengthen the run"
        assert files(folder / "killed") == files(folder / "alone"), "a run that was killed at ended otherwise"
        firsts = Counter(int(line.split()[1]) for line in diary.read_text().splitlines())
        begun = Counter({first: n for first, n in firsts.items() if first % ROWS == 0})
        again = begun.total() - SHARDS
        assert len(begun) == SHARDS and again <= kills, f"{again} shards were begun again after {kills} kills"
    found = {
        "about": about(torch.device("cpu")),
        "kills": dict(killer.landed),
        "shards": SHARDS,
        "shards_begun_again": again,
        "files_equal": True,
        "seconds": round(seconds, 1),
        "seconds_of_sleep": SHARDS * ROWS * SECONDS,
    }
    print(write("cluster-kills", found, out))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print(run(given.kills, given.out))


if __name__ == "__main__":
    main()
