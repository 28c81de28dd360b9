"""Speed of curation without its judge, and growth of its memory.

    python benchmarks/curation.py speed [--grids 400] [--format jpeg] [--size 512] [--processes 2]     # a minute
    python benchmarks/curation.py speed --painted webp --tests      # as recipes/flux-subject.yaml has it, and more
    python benchmarks/curation.py memory [--rows 100000] [--size 16]                                   # some 20 minutes

Both run the real stage in the real engine, from grids in parquet files to candidates in parquet files: read, decode,
cut, compare, caption, encode, write. The judge is as small as possible, colors on a 4×4 raster; its time is measured
and reported separately. `speed` gives each process a separate dataset, as two runs have. Panels are written as
`--format`; grids are read in the same format, or as `--painted`. `--tests` turns on every test of a recipe: screens,
copies, and hashes and embeddings for duplicates. `memory` fails if resident memory grows by more than `BOUND` after the
first tenth of the rows.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import canvases
import numpy as np

from diptych.data import records
from diptych.data.engine import LocalEngine, Work
from diptych.data.images import image_cell
from diptych.data.store import Dataset
from diptych.recipe import load
from diptych.recipe.schema import Recipe
from diptych.stages.curate.stage import CurateStage
from diptych.utils.machine import machine, versions

if TYPE_CHECKING:
    from PIL.Image import Image

RESULTS = Path(__file__).with_name("results")
PICTURES = 16  # different grids; more are the same again under another id
BOUND = 32 * 2**20  # bytes of growth over nine tenths of the rows: no part of a row may stay behind
KINDS = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}
RECIPE = (
    "name: curation\ntask: subject\nseed: 1\nteacher: pocket\n"
    "curate: {batch_size: 16, thresholds: {same: -1.0}, format: %s%s}\n"
)
TESTS = ", screens: {dark: 0, flat: 0, blur: 0}, copies: {hash: null}, duplicates: {hash: 4, embedding: 0.95}"


class Colours:
    """The colors of a 4×4 raster as an embedding; counts the seconds it takes."""

    fingerprint = "colours"

    def __init__(self) -> None:
        self.seconds = 0.0

    def embed(self, images: Sequence[Image]) -> np.ndarray:
        """Images to float32 [N, 48] of length 1."""
        started = time.perf_counter()
        rows = np.stack([np.asarray(image.resize((4, 4)), np.float32).ravel() - 127.5 for image in images])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self.seconds += time.perf_counter() - started
        return rows

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosines (N,) of the rows."""
        return (a * b).sum(1)


class Stage(CurateStage):
    """Curation with `Colours` for a judge."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.judge = Colours()

    def load(self) -> Work:
        return self.work(self.judge, None)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Job:
    """One process's share of `speed`."""

    folder: str
    grids: int
    size: int
    format: str
    painted: str
    tests: bool


def recipe(folder: Path, format: str, tests: bool = False) -> Recipe:
    """A recipe that stores panels in a format, with all `tests` or only the tests of every recipe."""
    path = folder / "curation.yaml"
    path.write_text(RECIPE % (format, TESTS if tests else ""))
    return load(path)


def write_grids(folder: Path, count: int, size: int, format: str, shard: int) -> Dataset:
    """`count` grids of two panels, `shard` in each part; a few different images in turn."""
    names = ("plain", "gutter", "shared background", "off-centre")
    drawn = [canvases.make(7, n, names[n % len(names)], size, (1, 2)) for n in range(min(PICTURES, count))]
    cells = [image_cell(canvas.image, None, KINDS[format]) for canvas in drawn]
    data = Dataset(folder / "grids", records.schema(records.GRID))
    captions = ["a cat on the moon", "a cat in a kitchen"]
    for part, start in enumerate(range(0, count, shard)):
        rows = [
            {
                "id": f"g-{n:06d}",
                "image": cells[n % len(cells)],
                "prompt_id": f"p-{n:06d}",
                "prompt": "two pictures of a cat",
                "panels": captions,
                "subject": "cat",
                "task": "subject",
                "seed": n,
                "rows": 1,
                "cols": 2,
                "panel_size": size,
                "model": "none",
            }
            for n in range(start, min(start + shard, count))
        ]
        data.write_shard(part, rows)
    data.publish({"stage": "paint", "fingerprint": ""})
    return data


def curate(job: Job) -> dict[str, float]:
    """Curates a folder's grids. Returns total seconds, the judge's seconds, and the number of pairs."""
    folder = Path(job.folder)
    stage = Stage(recipe(folder, job.format, job.tests))
    grids = Dataset(folder / "grids")
    candidates = Dataset(folder / "candidates", records.schema(records.PAIR))
    failed = Dataset(folder / "failed", records.schema(records.FAILED))
    started = time.perf_counter()
    result = LocalEngine().run(stage, grids, candidates, failed, "benchmark")
    assert result.failed == 0 and result.rows == 2 * job.grids, f"{result} of {job.grids} grids"
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "judge_s": stage.judge.seconds, "pairs": result.rows, "started": time.time() - seconds}


def speed(
    grids: int, size: int, format: str, processes: int, painted: str | None = None, tests: bool = False
) -> dict[str, Any]:
    """Pairs a second of `processes` parallel processes, without the judge's time."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(processes, context) as pool:
        share = max(1, grids // processes)
        jobs = [Job(f"{scratch}/{n}", share, size, format, painted or format, tests) for n in range(processes)]
        for job in jobs:
            Path(job.folder).mkdir()
        list(pool.map(prepare, jobs))  # imports what they need as well, outside the clock
        done = list(pool.map(curate, jobs))
    wall = max(d["started"] + d["seconds"] for d in done) - min(d["started"] for d in done)
    judge = max(d["judge_s"] for d in done)
    pairs = int(sum(d["pairs"] for d in done))
    return {
        "format": format,
        "painted": painted or format,
        "tests": tests,
        "panel_size": size,
        "processes": processes,
        "pairs": pairs,
        "wall_s": round(wall, 2),
        "judge_s": round(judge, 2),
        "pairs_per_s": round(pairs / (wall - judge), 1),
        "ms_per_pair_and_process": round(1000 * (wall - judge) * processes / pairs, 2),
    }


def prepare(job: Job) -> None:
    """A process's grids."""
    write_grids(Path(job.folder), job.grids, job.size, job.painted, 64)
    recipe(Path(job.folder), job.format, job.tests)


def memory(rows: int, size: int, format: str) -> dict[str, Any]:
    """Resident memory over a run that ends with `rows` pairs."""
    grids = max(rows // 2, 20)
    shard = max(1, min(500, grids // 20))
    samples: list[tuple[int, int]] = []

    def sample(done: int, _: int) -> None:
        if not samples or done - samples[-1][0] >= grids // 100:
            samples.append((done, resident()))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_grids(folder, grids, size, format, shard)
        candidates = Dataset(folder / "candidates", records.schema(records.PAIR))
        failed = Dataset(folder / "failed", records.schema(records.FAILED))
        stage = Stage(recipe(folder, format))
        result = LocalEngine().run(stage, data, candidates, failed, "benchmark", sample)
        assert result.rows == 2 * grids and result.failed == 0, result
    early = max(held for done, held in samples if done <= max(grids // 10, shard))
    late = max(held for done, held in samples if done > grids // 10)
    return {
        "format": format,
        "panel_size": size,
        "pairs": 2 * grids,
        "first_tenth_mib": round(early / 2**20, 1),
        "highest_after_mib": round(late / 2**20, 1),
        "growth_mib": round((late - early) / 2**20, 1),
        "bound_mib": BOUND // 2**20,
        "flat": late - early <= BOUND,
        "samples_mib": [[done, round(held / 2**20, 1)] for done, held in samples[:: max(1, len(samples) // 50)]],
    }


def resident() -> int:
    """Resident bytes of this process (Linux)."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def profile(size: int, format: str, grids: int, painted: str | None = None, tests: bool = False) -> str:
    """Seconds of each function for a few grids."""
    import cProfile
    import pstats

    with tempfile.TemporaryDirectory() as scratch:
        job = Job(scratch, grids, size, format, painted or format, tests)
        prepare(job)
        with cProfile.Profile() as watch:
            curate(job)
    out = io.StringIO()
    pstats.Stats(watch, stream=out).sort_stats("tottime").print_stats(14)
    return out.getvalue()


def write(name: str, found: dict[str, Any], out: Path | None) -> Path:
    """Writes a result with its machine and date."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = out or RESULTS / f"curation-{name}-{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": date, "machine": machine(), "versions": versions()}
    path.write_text(json.dumps({"about": about, **found}, indent=1) + "\n", "utf8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("speed", "memory", "profile"))
    parser.add_argument("--grids", type=int, default=400)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--size", type=int, help="of a panel; 512 for speed, 16 for memory")
    parser.add_argument("--format", choices=tuple(KINDS), default="jpeg")
    parser.add_argument("--painted", choices=tuple(KINDS), help="of the grids; as --format")
    parser.add_argument("--tests", action="store_true", help="all tests on")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.mode == "profile":
        print(profile(given.size or 512, given.format, given.grids, given.painted, given.tests))
        return
    if given.mode == "speed":
        found = speed(given.grids, given.size or 512, given.format, given.processes, given.painted, given.tests)
    else:
        found = memory(given.rows, given.size or 16, given.format)
    print(json.dumps({key: value for key, value in found.items() if key != "samples_mib"}, indent=1))
    more = f"-painted-{given.painted}" if given.painted else ""
    print(write(f"{given.mode}-{given.format}{more}{'-tests' if given.tests else ''}", found, given.out))
    if not found.get("flat", True):
        raise SystemExit(f"memory grew by {found['growth_mib']} MiB, more than {found['bound_mib']}")


if __name__ == "__main__":
    main()
