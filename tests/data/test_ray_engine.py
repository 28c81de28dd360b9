"""The Ray engine on a real cluster of three nodes (separate raylets): the same files as in one process, dead workers or
not."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import plain_stages
from data import shard_stages as stages
from data.shard_stages import Doubling, Trouble, files, shards
from diptych.cli.app import call
from diptych.data.engine import LocalEngine
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.llm.endpoint import Endpoint
from diptych.recipe import load
from diptych.recipe.schema import Pool, Ray, Recipe, Write
from diptych.run import runner as runs
from diptych.utils.console import Display
from llm.chat_server import ChatServer
from llm.counting import right
from raising import raises

pytest.importorskip("ray", reason="the extra `ray` is not installed")
SMALL = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes with a CPU each, and this process connected to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)  # workers open these stages
        import ray
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=SMALL)
        try:
            for _ in range(2):
                made.add_node(**SMALL, wait=False)
            made.wait_for_nodes()
            ray.init(made.address, log_to_driver=False, logging_level=logging.ERROR)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def engine(cluster: Any) -> Iterator[Any]:
    """The engine with a recipe that gives a lost shard to one more worker."""
    from diptych.data.ray_engine import connect

    with connect() as found:
        yield found.of(Recipe(name="test", device="cpu", threads=1, ray=Ray(retries=1, wait=60)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of nine shards."""
    folder = tmp_path_factory.mktemp("alone")
    stages.run(LocalEngine(), folder, Doubling(), shards(9, 6))
    return files(folder)


def test_three_nodes_make_the_same_files_as_one_process(engine: Any, alone: dict[str, bytes], tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []
    timed: list[int] = []
    result = stages.run(
        engine,
        tmp_path,
        Doubling(0.03),
        shards(9, 6),
        progress=lambda *news: seen.append(news),
        timed=lambda rows, seconds: timed.append(rows),
    )
    assert files(tmp_path) == alone
    assert (result.inputs, result.rows, result.failed, result.processed) == (54, 94, 7, 54)
    assert seen[0] == (0, 54) and seen[-1][:2] == (54, 54) and sum(timed) == 54
    assert "on 3 nodes" in " ".join(news[2] for news in seen if len(news) > 2)
    assert stages.run(engine, tmp_path, Doubling(), shards(9, 6)).processed == 0


def test_workers_share_one_rate_limit(engine: Any, tmp_path: Path) -> None:
    server = ChatServer(right)
    try:
        endpoint = Endpoint(base_url=server.url, model="tiny", concurrency=4, requests_per_minute=300)
        recipe = engine.recipe.model_copy(update={"write": Write(writer="llm", endpoint=endpoint)})
        asking = stages.Asking(endpoint, tmp_path / "diary")
        result = stages.run(engine.of(recipe), tmp_path, asking, shards(6, 4))
    finally:
        server.close()
    assert (result.rows, result.failed) == (24, 0)
    assert len(set((tmp_path / "diary").read_text().split())) > 1, "one worker did everything"
    times = sorted(call.time for call in server.calls)
    # A fifth of a second apart, whoever asks, so at most six in a second; a limit of its own would let each send six.
    assert len(times) == 24 and max(sum(start <= time < start + 1 for time in times) for start in times) <= 7


def test_a_worker_that_dies_costs_its_shard_alone(
    engine: Any, alone: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diary = tmp_path / "diary"
    trouble = Trouble("25", "die", tmp_path / "once")
    stages.run(engine, tmp_path / "run", Doubling(0.01, trouble, diary), shards(9, 6))
    assert files(tmp_path / "run") == alone
    begun = [line.split()[1] for line in diary.read_text().splitlines()]
    assert sorted(begun, key=int) == sorted([*(str(i + j) for i in range(0, 54, 6) for j in (0, 4)), "24"], key=int)
    assert "shard 4 was lost on node" in caplog.text and "another worker takes it" in caplog.text


@pytest.mark.soak
def test_a_shard_that_is_lost_every_time_is_reported_by_node_and_the_rest_is_made(engine: Any, tmp_path: Path) -> None:
    broken = Doubling(0.02, Trouble("25", "crash"))
    with pytest.raises(UserError) as found:
        stages.run(engine, tmp_path, broken, shards(9, 6))
    text = str(found.value)
    assert "doubling: 1 shard lost 2 times each (shard 4: node" in text and text.count("RuntimeError: CUDA error") == 2
    output = Dataset(tmp_path / "out")
    assert output.shards() == [0, 1, 2, 3, 5, 6, 7, 8] and output.manifest is None
    assert stages.run(engine, tmp_path, Doubling(), shards(9, 6)).processed == 6


def test_where_nothing_works_it_stops_at_once(engine: Any, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with raises("process_failed", "2 times", "RuntimeError: CUDA"):
        stages.run(engine, tmp_path / "run", Doubling(0.01, Trouble("load", "crash"), diary), shards(30, 1))
    assert not diary.exists()


@pytest.mark.parametrize(("kind", "error"), [("stop", UserError), ("misuse", UsageError)])
def test_an_error_of_the_users_ends_the_run_as_in_one_process(
    engine: Any, tmp_path: Path, kind: str, error: type[UserError]
) -> None:
    with pytest.raises(error, match=r"(the server is down|no such size) \(on node ") as found:
        stages.run(engine, tmp_path, Doubling(0, Trouble("load", kind)), shards(3, 2))
    assert type(found.value) is error


def test_storage_that_the_driver_cannot_see_is_an_error(engine: Any) -> None:
    with raises("path_not_found", "memory://not-shared", "--out"):
        stages.run(engine, "memory://not-shared", Doubling(), shards(2, 2))


def test_a_pool_larger_than_the_cluster_waits_for_room_without_holding_shards(engine: Any, tmp_path: Path) -> None:
    wide = engine.of(engine.recipe.model_copy(update={"ray": Ray(evaluate=Pool(workers=8))}))
    seen: list[tuple[Any, ...]] = []
    stages.run(wide, tmp_path, Doubling(0.1), shards(24, 3), progress=lambda *news: seen.append(news))
    told = " ".join(news[2] for news in seen if len(news) > 2)
    assert re.search(r"[23] workers on [23] nodes, [56] starting", told)  # a slow machine may not see the third
    assert len(Dataset(tmp_path / "out").shards()) == 24


def test_resources_that_no_node_has_are_an_error_with_those_of_the_cluster(engine: Any, tmp_path: Path) -> None:
    greedy = engine.of(engine.recipe.model_copy(update={"ray": Ray(wait=0.1, evaluate=Pool(gpus=4, cpus=2))}))
    with raises("process_failed", "2 CPUs, 4 GPUs", "ray.doubling", "3 CPUs, 0 GPUs"):
        stages.run(greedy, tmp_path, Doubling(), shards(2, 2))


def test_workers_use_the_recipes_threads(engine: Any) -> None:
    import os

    assert engine.there("paint", os.getenv, "OMP_NUM_THREADS") == "1"
    with pytest.raises(UsageError, match="no such size"):
        engine.there("paint", stages.misuse)


def test_a_run_on_the_cluster_is_the_run_of_one_process(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_stages.use(monkeypatch)
    for name in ("teacher", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    (tmp_path / "small.yaml").write_text(
        f"name: small\nteacher: {tmp_path}/teacher\ndevice: cpu\nthreads: 1\n"
        "write: {count: 23, shard_size: 5}\n"
        f"curate: {{judge: {tmp_path}/judge, thresholds: {{same: 0.3}}}}\n"
    )
    recipe = load(tmp_path / "small.yaml")
    runs.run(recipe, tmp_path / "alone", display=Display(quiet=True))
    spread = load(tmp_path / "small.yaml", ["ray.paint.workers=2"])
    runs.run(spread, tmp_path / "spread", display=Display(quiet=True), engine="ray")
    there, here = plain_stages.data(tmp_path / "spread"), plain_stages.data(tmp_path / "alone")
    assert there.pop("recipe.yaml") != here.pop("recipe.yaml") and there == here
    # The resources of a cluster change no row, so the same run may resume without one.
    assert runs.run(recipe, tmp_path / "spread", display=Display(quiet=True))["stages"]["paint"]["processed"] == 0


@pytest.mark.soak
def test_a_killed_driver_is_started_again_and_loses_nothing(
    cluster: Any, alone: dict[str, bytes], tmp_path: Path
) -> None:
    command = [sys.executable, stages.__file__, str(tmp_path / "run"), cluster.address, "9", "6"]
    process = subprocess.Popen([*command, "0.1"], stderr=subprocess.DEVNULL)
    output = Dataset(tmp_path / "run" / "out")
    while len(output.shards()) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert output.manifest is None
    subprocess.run([*command, "0"], check=True, capture_output=True)
    assert files(tmp_path / "run") == alone


def test_without_ray_it_says_which_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call(["write", "pocket", "--out", str(tmp_path / "run"), "--engine", "ray"]) == 2
    assert (
        capsys.readouterr().err.strip()
        == "error[dependency_missing]: --engine ray: Ray is not installed; pip install 'diptych[ray]'"
    )
    assert not (tmp_path / "run").exists()


def test_an_unknown_engine_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(["write", "pocket", "--out", str(tmp_path), "--engine", "rya"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[option_invalid]: ") and "rya" in err and "did you mean 'ray'?" in err
    assert call(["write", "pocket", "--out", str(tmp_path), "--address", "auto"]) == 2
    assert capsys.readouterr().err.startswith("error[option_conflict]: --address")


def test_only_two_modules_know_of_ray() -> None:
    source = Path(runs.__file__).parents[1]
    knowing = [p.name for p in source.rglob("*.py") if "import ray\n" in p.read_text() or "from ray" in p.read_text()]
    assert sorted(knowing) == ["ray_engine.py", "ray_pace.py"]
