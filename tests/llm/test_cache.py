"""The cache of answers: threads, processes, kills, and files that are something else."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diptych.llm.cache import Cache
from diptych.llm.question import Reply, Usage
from raising import raises

REPLY = Reply("«ñ 猫»\n{}", "tiny-1", Usage(1, 100, 10), refused="", cut=True)
WRITER = """
import sys
from diptych.llm.cache import Cache
from diptych.llm.question import Reply, Usage

cache, name, count = Cache(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for n in range(count):
    cache.put(f"{name}-{n}", Reply(f"{name} says {n} " + "x" * 2000, "tiny", Usage(1, n, 1)))
    print(n, flush=True)
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    """Another process that puts replies, and says the number of each after it."""
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_reply_comes_back_whole_after_the_file_was_closed(tmp_path: Path) -> None:
    path = tmp_path / "made" / "here" / "answers.sqlite"
    with Cache(path) as cache:
        assert cache.get("a") is None
        cache.put("a", REPLY)
    with Cache(path) as cache:
        assert cache.get("a") == REPLY
        assert len(cache) == 1
        cache.drop(["a", "never there"])
        assert cache.get("a") is None


def test_a_later_reply_replaces_the_first(tmp_path: Path) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        cache.put("a", REPLY)
        cache.put("a", Reply("new", "tiny", Usage()))
        found = cache.get("a")
    assert found is not None and found.text == "new"


def test_threads_share_one_cache(tmp_path: Path) -> None:
    with Cache(tmp_path / "a.sqlite") as cache, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: cache.put(str(n), REPLY), range(200)))
        assert all(pool.map(lambda n: cache.get(str(n)) == REPLY, range(200)))


def test_processes_share_one_file_from_its_first_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    writers = [writer(path, name, 50) for name in "ab"]
    for process in writers:
        process.communicate(timeout=300)
        assert process.returncode == 0
    with Cache(path) as cache:
        assert len(cache) == 100


def test_a_kill_at_any_moment_loses_nothing_that_was_put(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    Cache(path).close()
    for kill, lines in enumerate((1, 40)):
        process = writer(path, str(kill), 1_000_000)
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
        process.wait()
        last = int([line for line in said if line.endswith("\n")][-1])
        with Cache(path) as cache:
            for n in range(last + 1):
                found = cache.get(f"{kill}-{n}")
                assert found is not None and found.text.startswith(f"{kill} says {n} ")
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, database = tmp_path / "a.txt", tmp_path / "b.sqlite"
    text.write_text("precious " * 1000)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE precious (x)")
    connection.close()
    codes = {text: "file_damaged", database: "file_format_unknown", tmp_path: "path_unreadable"}
    for path, code in codes.items():
        with raises(code, path) as caught:
            Cache(path)
        assert "\n" not in str(caught.value)
    assert text.read_text() == "precious " * 1000


def test_a_newer_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    Cache(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with raises("store_damaged", path, "version 99"):
        Cache(path)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_only_the_owner_may_read_the_answers(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with Cache(tmp_path / "made" / "here" / "answers.sqlite") as cache:
            cache.put("a", REPLY)
            modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "made").rglob("*")}
        assert modes.pop("here") == 0o700 == (tmp_path / "made").stat().st_mode & 0o777
        assert set(modes) == {"answers.sqlite", "answers.sqlite-wal", "answers.sqlite-shm"}
        assert set(modes.values()) == {0o600}
        (tmp_path / "made" / "here" / "answers.sqlite").chmod(0o644)  # as earlier versions made it
        Cache(tmp_path / "made" / "here" / "answers.sqlite").close()
        assert (tmp_path / "made" / "here" / "answers.sqlite").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)
