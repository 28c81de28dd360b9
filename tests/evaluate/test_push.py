"""What is pushed arrives byte for byte, once, and only what verifies and has a license is pushed at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_world as tiny

from diptych.cli.app import call
from diptych.data.interop.exporting import export_data
from diptych.data.interop.importing import import_data
from diptych.data.seal import text_hash
from diptych.errors import UsageError, UserError
from diptych.provenance.push import push
from diptych.provenance.trace import links, trace
from diptych.utils import models
from hub_server import OWNER, TOKEN, Hub
from raising import raises

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher states a license."""
    folder = tmp_path_factory.mktemp("push")
    shutil.copytree(teacher, folder / "teacher")
    (folder / "teacher" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nA teacher.\n")
    return tiny.make_run(folder / "teacher", folder, "full")


@pytest.fixture(scope="module")
def unlicensed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_run(teacher, tmp_path_factory.mktemp("unlicensed"), "lora")


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def diptych(hub: Hub, tmp_path: Path) -> Run:
    """The command line in a process of its own: the hub's library reads its settings when it is imported."""

    def start(*words: object, **changed: str) -> subprocess.CompletedProcess[str]:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
        env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        env |= own | {"HF_HUB_DISABLE_XET": "1"} | changed
        words = tuple(str(word) for word in words)
        return subprocess.run(
            [sys.executable, "-m", "diptych", *words], env=env, capture_output=True, text=True, timeout=300
        )

    return start


def download(hub: Hub, repo: str, kind: str, out: Path) -> Path:
    """What a stranger gets, through the hub's own library."""
    code = (
        "import sys; from huggingface_hub import snapshot_download as get; "
        "get(sys.argv[1], repo_type=sys.argv[2], local_dir=sys.argv[3])"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(out) + "-hf", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code, repo, kind, str(out)], env=env, check=True, timeout=300)
    return out


def contents(folder: Path) -> dict[str, str]:
    """sha256 of each file that is not hidden."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if not name.startswith(".")
    }


def test_a_student_comes_back_from_the_hub_byte_for_byte(run: Path, hub: Hub, diptych: Run, tmp_path: Path) -> None:
    (run / "student" / "notes.txt").write_text("mine alone")
    try:
        pushed = diptych("push", run, f"{OWNER}/tiny", "--private")
    finally:
        (run / "student" / "notes.txt").unlink()
    assert pushed.returncode == 0, pushed.stderr
    assert hub.repos["model", f"{OWNER}/tiny"]["private"]
    back = contents(download(hub, f"{OWNER}/tiny", "model", tmp_path / "back"))
    here = {name: sha for name, sha in contents(run / "student").items() if not name.startswith("training/")}
    assert back.pop("training/summary.json") == contents(run / "student")["training/summary.json"]
    assert back == here and "notes.txt" not in back
    assert len([name for name in back if name.endswith(".safetensors")]) > 0
    assert TOKEN not in pushed.stdout + pushed.stderr


def test_what_was_downloaded_still_leads_back_to_the_grids(run: Path, hub: Hub, diptych: Run, tmp_path: Path) -> None:
    assert diptych("push", run / "student", f"{OWNER}/tiny").returncode == 0
    found = trace(download(hub, f"{OWNER}/tiny", "model", tmp_path / "back"), [run])
    seen = {link["what"]: link["status"] for link in links(found["chain"])}
    assert found["verified"] and seen["student"] == seen["grids"] == "ok"


def test_pairs_come_back_with_a_card_of_their_numbers(run: Path, hub: Hub, diptych: Run, tmp_path: Path) -> None:
    from datasets import load_dataset

    pushed = diptych("push", run / "pairs", f"hf://datasets/{OWNER}/tiny-pairs")
    assert pushed.returncode == 0, pushed.stderr
    back = download(hub, f"{OWNER}/tiny-pairs", "dataset", tmp_path / "back")
    card = (back / "README.md").read_text()
    assert {k: v for k, v in contents(back).items() if k != "README.md"} == contents(run / "pairs")
    rows = json.loads((run / "pairs" / "manifest.json").read_text())["rows"]
    assert f"| rows | {rows:,} |" in card and "license: cc-by-4.0" in card and "| judge |" in card
    loaded: Any = load_dataset("parquet", data_files=str(back / "part-*.parquet"), cache_dir=str(tmp_path / "cache"))
    assert len(loaded["train"]) == rows


def test_a_second_push_sends_nothing(run: Path, hub: Hub, diptych: Run) -> None:
    for source, name in ((run, "tiny"), (run / "pairs", "tiny-pairs")):
        assert diptych("push", source, f"{OWNER}/{name}").returncode == 0
        hub.calls.clear()
        again = diptych("push", source, f"{OWNER}/{name}", "--json")
        assert again.returncode == 0 and json.loads(again.stdout)["sent"] == []
        assert not [call for call in hub.calls if call.startswith("PUT") or "/commit/" in call]


def test_a_push_that_broke_off_sends_only_what_is_missing(run: Path, hub: Hub, diptych: Run, tmp_path: Path) -> None:
    hub.break_commit = 100
    broken = diptych("push", run / "pairs", f"{OWNER}/p")
    assert broken.returncode == 1 and "Run the same command again" in broken.stderr
    assert len(broken.stderr.strip().splitlines()) <= 2
    hub.break_commit = 0
    arrived = [call for call in hub.calls if call.startswith("PUT")]
    hub.calls.clear()
    assert arrived and diptych("push", run / "pairs", f"{OWNER}/p").returncode == 0
    assert not [call for call in hub.calls if call.startswith("PUT")]
    assert "part-00000.parquet" in contents(download(hub, f"{OWNER}/p", "dataset", tmp_path / "back"))


def test_only_the_changed_card_is_sent(run: Path, hub: Hub, diptych: Run, tmp_path: Path) -> None:
    given = tmp_path / "given"
    export_data(str(run), given, "imagefolder")
    first = json.loads(diptych("push", given, f"{OWNER}/e", "--json").stdout)
    assert sorted(first["sent"]) == sorted(contents(given))
    (given / "README.md").write_text((given / "README.md").read_text() + "\nAnd a word of mine.\n")
    assert json.loads(diptych("push", given, f"{OWNER}/e", "--json").stdout)["sent"] == ["README.md"]
    assert contents(download(hub, f"{OWNER}/e", "dataset", tmp_path / "back")) == contents(given)


def test_a_dry_run_lists_files_and_sizes_and_asks_no_network(run: Path, hub: Hub, diptych: Run) -> None:
    told = diptych("push", run, f"{OWNER}/tiny", "--dry-run", HF_TOKEN="")
    assert told.returncode == 0 and hub.calls == []
    size = (run / "student" / "README.md").stat().st_size
    assert [f"{size:,}", "README.md"] in [line.split() for line in told.stdout.splitlines()]


@pytest.mark.parametrize(
    ("target", "changed", "says"),
    [
        (f"{OWNER}/x", {"HF_TOKEN": ""}, "hf auth login"),
        (f"{OWNER}/x", {"HF_TOKEN": "hf_another"}, "error[model_gated]"),
        ("somebody/x", {}, "somebody/x"),
        (f"{OWNER}/x", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "error[hub_unreachable]"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(
    target: str, changed: dict[str, str], says: str, run: Path, diptych: Run
) -> None:
    refused = diptych("push", run / "pairs", target, **changed)
    assert refused.returncode == 1 and refused.stdout == ""
    last = refused.stderr.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("error[") and says in last[0]
    assert "hf_" not in refused.stderr


def test_private_is_not_asked_of_what_is_public(run: Path, hub: Hub, diptych: Run) -> None:
    assert diptych("push", run / "pairs", f"{OWNER}/open").returncode == 0
    hub.calls.clear()
    refused = diptych("push", run / "pairs", f"{OWNER}/open", "--private")
    assert refused.returncode == 1 and "error[publish_refused]" in refused.stderr
    assert not [call for call in hub.calls if call.startswith("PUT") or "/commit/" in call]


def test_no_folder_of_this_machine_is_published(run: Path, tmp_path: Path) -> None:
    """Neither by a student of today nor by one of before, whose configs name the folder that each part came from."""
    configs = [p for p in (run / "student").rglob("*.json") if "training" not in p.relative_to(run).parts]
    assert len(configs) > 3 and not any("_name_or_path" in p.read_text() for p in configs)

    old = tmp_path / "old"
    shutil.copytree(run, old)
    config = old / "student" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "/home/ana/teacher/vae"}))
    summary = old / "student" / "training" / "summary.json"
    stored = json.loads(summary.read_text())
    stored |= {"files": models.files(old / "student"), "fingerprint": models.fingerprint(old / "student")}
    stored["sha256"] = text_hash({key: value for key, value in stored.items() if key != "sha256"})
    summary.write_text(json.dumps(stored, indent=2) + "\n")
    push(old, str(tmp_path / "there"))
    assert not [p for p in (tmp_path / "there").rglob("*") if p.is_file() and b"/home/ana" in p.read_bytes()]
    sent = json.loads((tmp_path / "there" / "training" / "summary.json").read_text())
    assert sent["files"] == models.files(tmp_path / "there")
    assert sent["fingerprint"] == models.fingerprint(tmp_path / "there")
    assert all(link["status"] != "differs" for link in links(trace(tmp_path / "there")["chain"]))


def test_a_flipped_byte_is_not_published(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "tiny"
    shutil.copytree(run, copy)
    weights = next(iter(sorted((copy / "student").rglob("*.safetensors"))))
    part = copy / "pairs" / "part-00000.parquet"
    grids = copy / "grids" / "part-00000.parquet"
    for file, source in ((weights, copy), (part, copy / "pairs"), (grids, copy / "pairs"), (grids, copy)):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        whole = file.read_bytes()
        file.write_bytes(bytes(data))
        with raises("publish_refused", source, file.name if file != weights else file.relative_to(copy / "student")):
            push(source, "./out", dry_run=True)
        file.write_bytes(whole)
    assert push(copy, "./out", dry_run=True)["files"]


def test_an_export_whose_picture_changed_is_not_published(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "given"
    export_data(str(run), out, "parquet")
    assert push(out, "./out", dry_run=True)["kind"] == "dataset"
    rows = json.loads((out / "diptych.json").read_text())
    (out / "diptych.json").write_text(json.dumps(rows | {"verified": "0" * 64}))
    with pytest.raises(UserError, match="differ from the exported"):
        push(out, "./out", dry_run=True)
    export_data(str(run), tmp_path / "quick", "parquet", verify=False)
    with pytest.raises(UserError, match="--no-verify"):
        push(tmp_path / "quick", "./out", dry_run=True)


def test_a_student_without_a_license_needs_one_named(unlicensed: Path, tmp_path: Path) -> None:
    with raises("publish_refused", "--license"):
        push(unlicensed, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with raises("option_invalid", "My own!", "apache-2.0", kind=UsageError):
        push(unlicensed, str(tmp_path / "out"), license="My own!")
    push(unlicensed, str(tmp_path / "out"), license="apache-2.0")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "look it up" not in card
    found = trace(tmp_path / "out", [unlicensed])
    assert found["verified"] and found["chain"]["status"] == "ok"


def test_a_card_that_somebody_rewrote_goes_out_and_is_recorded(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "tiny"
    shutil.copytree(run, copy)
    card = copy / "student" / "README.md"
    card.write_text(card.read_text() + "\nDrawn best at dusk.\n")
    push(copy, str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == card.read_text()
    assert trace(tmp_path / "out", [copy])["chain"]["status"] == "ok"
    (copy / "student" / "origin.json").write_text("{}")
    with raises("publish_refused", "README.md, origin.json"):
        push(copy, str(tmp_path / "out"))


def test_weights_that_no_training_left_are_not_published(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "student", tmp_path / "student")
    shutil.rmtree(tmp_path / "student" / "training")
    with raises("publish_refused", tmp_path / "student", "training/summary.json"):
        push(tmp_path / "student", "./out", dry_run=True)


def test_a_license_that_is_inherited_is_not_replaced(run: Path) -> None:
    with raises("license_conflict", "mit", "cc-by-4.0"):
        push(run, "./out", license="mit", dry_run=True)


def test_an_import_goes_out_under_the_license_it_came_with(run: Path, tmp_path: Path) -> None:
    export_data(str(run), tmp_path / "given", "imagefolder")
    import_data(str(tmp_path / "given"), tmp_path / "in", "imagefolder")
    with raises("publish_refused", "--license"):
        push(tmp_path / "in", str(tmp_path / "out"))
    assert push(tmp_path / "in", str(tmp_path / "out"), license="cc0-1.0")["sent"][-1] == "README.md"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc0-1.0" in card and card.split("\n## License\n\n")[1].startswith("cc0-1.0")


def test_a_folder_gets_what_it_lacks_and_nothing_twice(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = push(run / "pairs", str(out))
    assert sorted(first["sent"]) == sorted(first["files"]) == sorted(contents(out))
    assert push(run / "pairs", str(out))["sent"] == []
    (out / "part-00000.parquet").write_bytes(b"half")
    assert push(run / "pairs", str(out))["sent"] == ["part-00000.parquet"]
    (out / "part-00009.parquet").write_bytes(b"of another data set")
    with raises("publish_refused", "part-00009"):
        push(run / "pairs", str(out))


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("absent", "./out", "error[path_not_found]: absent "),
        ("empty", "./out", "error[path_wrong_kind]: empty "),
        ("run", "s3://bucket/x", "OWNER/NAME"),
        ("run", "hf://datasets/me/x", "me/x"),
        ("run", "a/b", "./a/b"),
    ],
)
def test_a_wrong_request_says_what_to_do(
    source: str,
    target: str,
    says: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    assert call(["push", str(run) if source == "run" else source, target]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and len(captured.err.strip().splitlines()) == 1
