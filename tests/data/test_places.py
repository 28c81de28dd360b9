"""Runs at an address: on a real server that speaks the S3 protocol, and in fsspec's memory."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import plain_stages
from diptych.cli.app import call
from diptych.data import places
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.recipe import load
from diptych.run.runner import run
from diptych.utils.console import Display
from diptych.utils.paths import place
from raising import raises

QUIET = Display(quiet=True)
pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
pytest.importorskip("upath", reason="the extra `s3` is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server on this machine."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    moto_server = moto.ThreadedMotoServer(port=0)
    moto_server.start()
    host, port = moto_server.get_host_and_port()
    yield f"http://{host}:{port}"
    moto_server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A new bucket, `s3://…`, that this process may write to. The desks of its runs are in `tmp_path`."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    name = uuid.uuid4().hex
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    plain_stages.use(monkeypatch)
    for name in ("teacher", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    path = tmp_path / "small.yaml"
    path.write_text(
        f"name: small\nteacher: {tmp_path}/teacher\ndevice: cpu\nthreads: 1\nwrite: {{count: 23, shard_size: 5}}\n"
        f"curate: {{judge: {tmp_path}/judge, thresholds: {{same: 0.3}}}}\n"
    )
    return path


def contents(url: str) -> dict[str, bytes]:
    """Every file of a run at an address that must not differ between two runs of one recipe."""
    root = place(url)
    files = {file.relative_to(root): file for file in root.rglob("*") if file.is_file()}
    return {str(name): file.read_bytes() for name, file in files.items() if str(name) != "log.jsonl"}


def test_a_whole_run_in_a_bucket_has_the_bytes_of_one_on_disk(bucket: str, recipe_file: Path, tmp_path: Path) -> None:
    url = f"{bucket}/runs/small"
    recipe = load(recipe_file)
    summary = run(recipe, url, display=QUIET)
    run(recipe, tmp_path / "disk", display=QUIET)
    assert contents(url) == plain_stages.data(tmp_path / "disk")
    assert summary["run"] == url and summary["report"] == f"{url}/report/report.html"
    assert {event["event"] for event in places.read(url)} == {"start", "stage"} and len(places.read(url)) == 6
    assert (places.desk(url) / "student" / "student.json").is_file()


def test_a_run_in_a_bucket_resumes(bucket: str, recipe_file: Path) -> None:
    url = f"{bucket}/small"
    assert call(["write", str(recipe_file), "--out", url]) == 0
    assert call(["paint", str(recipe_file), "--out", url]) == 0
    before = contents(url)
    Dataset(f"{url}/grids").drop_shard(3)
    place(f"{url}/grids/manifest.json").unlink()
    assert run(load(recipe_file), url, ["paint"], QUIET)["stages"]["paint"]["processed"] == 5
    assert contents(url) == before
    # The folder is a recipe, too, and belongs to it.
    assert run(load(url), url, ["paint"], QUIET)["stages"]["paint"]["processed"] == 0
    with raises("recipe_mismatch", "seed (0 there, 1 here)", kind=UsageError):
        run(load(recipe_file, ["seed=1"]), url, ["paint"], QUIET)


def test_what_one_machine_trained_another_fetches(
    bucket: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/small"
    run(load(recipe_file), url, ["write", "paint", "curate", "distill"], QUIET)
    for name in ("training/step-000003/weights.safetensors", "training/latents/part-0", "training/summary.json"):
        file = places.desk(url) / "student" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    places.send(url, "student")
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    assert not places.desk(url).exists()
    student = places.bring(url, "student")
    assert sorted(str(file.relative_to(student)) for file in student.rglob("*") if file.is_file()) == [
        "student.json",
        "training/summary.json",
    ]
    (student / "student.json").write_text("x")
    assert (places.bring(url, "student") / "student.json").read_text() != "x", "a file of another size is fetched again"


def test_two_processes_of_one_machine_do_not_write_to_one_address(bucket: str, recipe_file: Path) -> None:
    url = place(f"{bucket}/small")
    with places.lock(url), raises("output_busy", os.getpid(), "s3://"), places.lock(url):
        pass


def test_a_lock_outlives_its_block_no_longer_and_does_not_follow_links(tmp_path: Path) -> None:
    for _ in range(2):
        with places.lock(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"run/\.lock"), places.lock(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    with raises("path_unwritable", tmp_path / "file"), places.lock(tmp_path / "file"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_bucket_that_is_not_there_is_one_line(
    bucket: str, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["write", str(recipe_file), "--out", f"{bucket}-not/run"]) == 1
    error = capsys.readouterr().err
    assert "bucket" in error and "Traceback" not in error


def test_replies_are_stored_with_the_run_or_on_each_machine(tmp_path: Path) -> None:
    assert places.answers(tmp_path, everywhere=False) == tmp_path / "answers.sqlite"
    local = places.answers(tmp_path, everywhere=True)
    assert local.parts[:3] == ("~", ".cache", "diptych") and local.name == "answers.sqlite"
    assert local != places.answers(tmp_path / "other", everywhere=True)
    assert places.answers("s3://bucket/run", everywhere=True) == places.answers("s3://bucket/run/", everywhere=True)


def test_addresses_need_their_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe_file: Path
) -> None:
    monkeypatch.setitem(sys.modules, "upath", None)
    assert call(["write", str(recipe_file), "--out", "s3://bucket/run"]) == 2
    assert "pip install 'diptych[s3]'" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(["write", str(recipe_file), "--out", "nothing://bucket/run"]) == 2
    assert "nothing://bucket/run" in capsys.readouterr().err


def test_a_run_in_memory_is_read_by_its_address(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(recipe_file.parent / "home"))
    url = f"memory://{uuid.uuid4().hex}/run"
    run(load(recipe_file), url, ["write"], QUIET)
    assert json.loads(place(f"{url}/prompts/manifest.json").read_text())["rows"] == 23
