"""Scaling and overhead of the Ray engine, with a stage that only sleeps.

    python benchmarks/scaling.py [--workers 1 2 4 8 16] [--rows 8] [--out FILE]      # about five minutes

Scaling: 256 shards, 50 ms a row, 1 to 16 workers on one Ray node with 16 logical CPUs (sleeping needs none). Efficiency
is sleep ÷ (workers × time). The clock starts when the last worker of the pool starts its first row, because starting
sixteen Python processes takes many seconds, which are reported separately. Overhead: one worker compared with this
process, shards of 64 rows, in turns.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

SECONDS = 0.05
SHARDS = 256


def timed(engine: Any, rows: int, count: int, workers: int) -> tuple[float, float, float]:
    """Seconds from the start of the last worker to the end, seconds slept by all workers in that time, and seconds
    before it."""
    from data.shard_stages import Doubling, run, shards

    class Timed(Doubling):
        def work(self, rows: list[Any]) -> list[Any]:
            began = time.time()
            made = super().work(rows)
            with (Path(folder) / "diary").open("a") as stream:
                stream.write(f"{os.getpid()} {began} {time.time()}\n")
            return made

    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        run(engine, f"{folder}/run", Timed(SECONDS), shards(count, rows))
        ended = time.time()
        lines = [line.split() for line in (Path(folder) / "diary").read_text().splitlines()]
    slept = [(pid, float(began), float(done)) for pid, began, done in lines]
    first = {pid: min(began for one, began, _ in slept if one == pid) for pid, *_ in slept}
    assert len(first) == workers, f"{len(first)} of {workers} workers had work: more shards are needed"
    ready = max(first.values())
    return ended - ready, sum(max(0.0, done - max(began, ready)) for _, began, done in slept), ready - started


def scaling(address: str, counts: list[int], rows: int) -> dict[str, Any]:
    """Seconds and efficiency by number of workers."""
    from diptych.data.ray_engine import connect
    from diptych.recipe.schema import Pool, Ray, Recipe

    found = {}
    with connect(address) as engine:
        for workers in counts:
            pool = Ray(evaluate=Pool(workers=workers))
            seconds, slept, start = timed(engine.of(Recipe(name="scaling", ray=pool)), rows, SHARDS, workers)
            efficiency = slept / workers / seconds
            found[str(workers)] = {
                "seconds": round(seconds, 2),
                "efficiency": round(efficiency, 3),
                "seconds_to_start": round(start, 1),
            }
            print(workers, found[str(workers)], flush=True)
    return found


def overhead(address: str, rounds: int = 3, count: int = 4, rows: int = 64) -> dict[str, Any]:
    """One worker compared with this process."""
    from diptych.data.engine import LocalEngine
    from diptych.data.ray_engine import connect
    from diptych.recipe.schema import Pool, Ray, Recipe

    times: dict[str, list[float]] = {"in_process": [], "ray": []}
    with connect(address) as engine:
        one = engine.of(Recipe(name="scaling", ray=Ray(evaluate=Pool(workers=1))))
        for _ in range(rounds):
            times["in_process"].append(timed(LocalEngine(), rows, count, 1)[0])
            times["ray"].append(timed(one, rows, count, 1)[0])
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    share = round(medians["ray"] / medians["in_process"] - 1, 4)
    print(medians, "overhead", share, flush=True)
    return {**medians, "overhead": share, "shards": count, "rows": rows, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rows", type=int, default=8, help="rows of a shard")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
    import torch
    from ray.cluster_utils import Cluster

    logging.basicConfig(level=logging.WARNING)
    node = {"num_cpus": max(given.workers), "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        found = {
            "shards": SHARDS,
            "rows": given.rows,
            "seconds_a_row": SECONDS,
            "workers": scaling(cluster.address, given.workers, given.rows),
            "overhead": overhead(cluster.address),
        }
    finally:
        cluster.shutdown()
    from measuring import about, write

    print(write("scaling", {"about": about(torch.device("cpu")), **found}, given.out))


if __name__ == "__main__":
    main()
