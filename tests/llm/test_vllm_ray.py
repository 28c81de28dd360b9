"""Models that vLLM runs, in the workers of a real Ray cluster: GPUs are counted by Ray as they would be, though there
are none; what computes in vLLM's place is `stand_in_vllm`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coloured import grid
from data.shard_stages import FAILED, files
from diptych import recipe as recipes
from diptych.data import records
from diptych.data.engine import Engine, LocalEngine
from diptych.data.store import Dataset
from diptych.errors import UserError
from llm.curated_by_stand_in import StandInCurate, given
from llm.stand_in_vllm import modules
from llm.test_local import save_tiny_llava

pytest.importorskip("ray", reason="the extra `ray` is not installed")
NODE = {"num_cpus": 1, "num_gpus": 2, "object_store_memory": 100_000_000, "include_dashboard": False}
PAIRS = records.schema(records.COLUMNS["candidates"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a CPU and, as Ray counts, two GPUs each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        import ray
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=NODE)
        try:
            made.add_node(**NODE)
            made.wait_for_nodes()
            ray.init(made.address, log_to_driver=False, logging_level=logging.ERROR)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def recipe_for(model: str, *sets: str) -> recipes.Recipe:
    told = [f"curate.vlm.vllm.model={model}", "curate.vlm.vllm.tensor_parallel_size=2", "curate.thresholds.seam=-1"]
    return recipes.load("pocket", [*told, "device=cpu", "threads=1", "ray.wait=120", "ray.retries=1", *sets])


def engine_of(recipe: recipes.Recipe) -> Any:
    from diptych.data.ray_engine import RayEngine

    return RayEngine().of(recipe)


def curate(engine: Engine, folder: Path, stage: StandInCurate) -> None:
    inputs = [[grid(2 * shard + n, (0.8, 0.4)) for n in range(2)] for shard in range(4)]
    engine.run(stage, inputs, Dataset(f"{folder}/out", PAIRS), Dataset(f"{folder}/failed", FAILED), "f")


def test_a_worker_gets_the_gpus_that_its_model_is_spread_over(cluster: Any) -> None:
    engine = engine_of(recipe_for("owner/name"))
    # And the engine must not outlive a worker that is killed.
    assert engine.there("curate", given) == ("0,1", "0")
    gpus, own = engine.there("write", given)
    assert not gpus and own is None
    writer = engine_of(recipe_for("owner/name", "write.writer=llm", "write.vllm.model=owner/writer"))
    assert writer.there("write", given) in (("0", "0"), ("1", "0"))


def test_a_share_of_a_gpu_lets_workers_share_it(cluster: Any) -> None:
    sets = ["curate.vlm.vllm.tensor_parallel_size=1", "curate.vlm.vllm.gpu_memory_utilization=0.4"]
    engine = engine_of(recipe_for("owner/name", *sets, "ray.curate.gpus=0.5"))
    assert engine.there("curate", given)[0] in ("0", "1")


def test_more_gpus_than_there_are_is_told(cluster: Any, tmp_path: Path) -> None:
    recipe = recipe_for("owner/name", "curate.vlm.vllm.tensor_parallel_size=8", "ray.wait=0.1")
    with pytest.raises(UserError, match=r"1 CPUs, 8 GPUs .*ray\.curate.*has 2 CPUs, 4 GPUs"):
        curate(engine_of(recipe), tmp_path, StandInCurate(recipe, tmp_path / "diary"))


@pytest.mark.soak
def test_each_worker_holds_one_engine_and_the_rows_are_those_of_one_process(cluster: Any, tmp_path: Path) -> None:
    save_tiny_llava(tmp_path / "llava")
    recipe = recipe_for(str(tmp_path / "llava"))
    # The first batch of all breaks its engine: that worker is given up, and another makes the shard.
    stage = StandInCurate(recipe, tmp_path / "diary", breaks=tmp_path / "broken")
    curate(engine_of(recipe), tmp_path / "spread", stage)
    assert (tmp_path / "broken").exists()
    lines = [line.split(maxsplit=3) for line in (tmp_path / "diary").read_text().splitlines()]
    assert len(lines) == 4 and {tuple(line[1:]) for line in lines} == {("0,1", "0", "[2]")}
    assert len({line[0] for line in lines}) <= 2
    rows = Dataset(f"{tmp_path}/spread/out").columns("evidence")
    assert len(rows) == 16 and all('"status": "answered"' in row["evidence"] for row in rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        patch.setattr("torch.cuda.device_count", lambda: 2)
        for name, module in modules().items():
            patch.setitem(sys.modules, name, module)
        curate(LocalEngine(), tmp_path / "alone", StandInCurate(recipe, tmp_path / "second"))
    assert files(tmp_path / "alone") == files(tmp_path / "spread")
