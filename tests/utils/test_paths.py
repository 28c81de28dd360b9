"""Paths from other people's files and from requests stay inside their folder, and nothing blocks on them."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diptych.cli.app import call
from diptych.data import records
from diptych.data.images import open_image
from diptych.data.interop.importing import import_data
from diptych.data.interop.rows import Options
from diptych.data.places import desk, link_all, share
from diptych.data.sources import open_pairs
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.provenance.publishable import material
from diptych.provenance.push import push
from diptych.provenance.trace import links, trace
from diptych.student.weights import files
from diptych.train import checkpoint
from diptych.utils import licenses, models
from diptych.utils.io import write_atomic
from diptych.utils.models import check_folder
from diptych.utils.paths import inside, private_file
from raising import raises

SECRET = b"a file of this machine"
OUT = (
    "../secret",
    "/etc/hostname",
    "a/../../secret",
    "..",
    "..\\secret",
    "C:\\secret",
    "C:secret",
    "",
    "a\0b",
    "\x1b[2J",
)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    path.chmod(0o644)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A small published data set that verifies."""
    folder = tmp_path / "run" / "pairs"
    data = Dataset(folder, records.schema(records.PROMPT))
    data.write_shard(0, [])
    data.publish({"license": "mit"})
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    return folder


def special(path: Path) -> Path:
    """What blocks for ever when it is opened."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def linked(path: Path, to: Path) -> Path:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
    return path


# The helper ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUT)
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path, secret: Path) -> None:
    with raises("path_unsafe"):
        inside(tmp_path / "folder", name)


@pytest.mark.parametrize("name", [None, 7, ["a"], {"a": 1}])
def test_a_name_must_be_text(name: object, tmp_path: Path) -> None:
    with raises("path_unsafe"):
        inside(tmp_path, name)


def test_links_may_stay_inside_and_may_not_leave(tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text("here")
    linked(folder / "near", folder / "deep" / "file")
    assert inside(folder, "near").read_text() == "here"
    for name, to in (("far", secret), ("dangling", tmp_path / "not-there-yet"), ("up", tmp_path)):
        linked(folder / name, to)
        with raises("path_unsafe", "link", folder / name):
            inside(folder, name)
    with raises("path_unsafe", "link"):
        inside(folder, "up/secret")
    assert inside(folder, "not/there/yet") == folder / "not/there/yet"
    # The folder itself is the choice of whoever names it.
    linked(tmp_path / "mine", folder)
    assert inside(tmp_path / "mine", "deep/file").read_text() == "here"
    with raises("path_unsafe", "link"):
        inside(tmp_path / "mine", "far")


def test_the_hubs_cache_keeps_its_links(tmp_path: Path) -> None:
    blob = tmp_path / "hub" / "models--owner--name" / "blobs" / ("a1" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    link = linked(blob.parents[1] / "snapshots" / "abc" / "config.json", blob)
    assert inside(link.parent, "config.json").read_text() == "{}"
    assert inside(linked(tmp_path / "local" / "config.json", blob).parent, "config.json").read_text() == "{}"


# Writing -------------------------------------------------------------------------------------------------------------


def test_chmod_and_writing_do_not_follow_a_link(tmp_path: Path, secret: Path) -> None:
    with raises("path_unsafe", "link"):
        private_file(linked(tmp_path / "run" / "answers.sqlite", secret))
    assert secret.stat().st_mode & 0o777 == 0o644 and secret.read_bytes() == SECRET
    from diptych.data import labels
    from diptych.data import places as log
    from diptych.data.places import lock

    run = tmp_path / "run"
    linked(run / log.LOG, secret)
    linked(labels.path(run), secret)
    linked(run / ".lock", secret)
    for write in (
        lambda: log.append(run, "stage"),
        lambda: labels.add(run, "c-000000-01", "accept", "ana"),
        lambda: lock(run).__enter__(),
    ):
        with pytest.raises(UserError):
            write()
    assert secret.read_bytes() == SECRET


def test_push_writes_nowhere_but_into_its_target(pairs: Path, tmp_path: Path, secret: Path) -> None:
    manifest = json.loads((pairs / "manifest.json").read_text())
    for name in ("../../.bashrc", str(tmp_path / "home" / ".bashrc"), "sub/part-00000.parquet", "notes.txt", None):
        shutil.copy(pairs / "part-00000.parquet", tmp_path / ".bashrc")
        (pairs / "manifest.json").write_text(json.dumps(manifest | {"parts": [manifest["parts"][0] | {"name": name}]}))
        with pytest.raises(UserError):
            push(pairs, str(tmp_path / "there" / "deep" / "target"))
        assert not (tmp_path / "there").exists()
    (pairs / "manifest.json").write_text(json.dumps(manifest))
    target = tmp_path / "target"
    target.mkdir()
    linked(target / "part-00000.parquet", secret)
    with pytest.raises(UserError, match="link"):
        push(pairs, str(target))
    assert secret.read_bytes() == SECRET
    (target / "part-00000.parquet").unlink()
    assert push(pairs, str(target))["sent"]


def test_push_publishes_no_file_that_is_only_linked(pairs: Path, tmp_path: Path) -> None:
    part = pairs / "part-00000.parquet"
    shutil.move(part, tmp_path / "elsewhere")
    linked(part, tmp_path / "elsewhere")
    with pytest.raises(UserError):
        material(pairs)
    part.unlink()
    shutil.move(tmp_path / "elsewhere", part)
    (tmp_path / "card").write_text("---\nlicense: mit\n---\nPrivate words.\n")
    linked(pairs / "README.md", tmp_path / "card")
    with pytest.raises(UserError):
        material(pairs)


# Devices and FIFOs: nothing of this may hang --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [special, lambda path: linked(path, Path("/dev/zero"))], ids=["fifo", "device"])
def test_special_files_are_refused_at_once(make: Callable[[Path], Path], pairs: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    wrong = make(tmp_path / "x.safetensors")
    assert call(["trace", str(wrong)]) == 1
    for open_it in (models.fingerprint, models.weights, lambda path: models.resolve(str(path), "teacher")):
        with raises("path_unsafe", wrong):
            open_it(wrong)
    with pytest.raises(UserError):
        open_pairs(str(wrong))
    whole = (pairs / "manifest.json").read_text()
    for key, role in (("teacher", wrong), ("judge", wrong), ("teacher", Path("/")), ("judge", Path("/proc/kmsg"))):
        changed = json.loads(whole) | {key: str(role), f"{key}_sha256": "0" * 64}
        (pairs / "manifest.json").write_text(json.dumps(changed))
        assert {link["what"]: link["status"] for link in links(trace(pairs)["chain"])}[key] == "differs"
        with pytest.raises(UserError):
            push(pairs, str(tmp_path / "out"), dry_run=True)
    (pairs / "manifest.json").write_text(whole)
    for name in ("part-00000.parquet", "manifest.json"):
        kept = (pairs / name).read_bytes()
        make(pairs / name)
        with pytest.raises(UserError):
            push(pairs, str(tmp_path / "out"))
        with pytest.raises(UserError):
            Dataset(pairs).read_shard(0)
        (pairs / name).unlink()
        (pairs / name).write_bytes(kept)
    for name in ("config.json", "model.safetensors", "README.md"):
        make(model / name)
        models.fingerprint(model), models.weights(model), licenses.inherited("a/b", model)
    with pytest.raises(UserError):
        check_folder(model)


def test_a_student_with_special_files_is_traced_at_once(tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    (student / "training").mkdir(parents=True)
    special(student / "model.safetensors")
    special(student / "training" / "summary.json")
    special(student.parent / "recipe.yaml")
    assert not trace(student)["verified"]


def test_a_picture_that_a_row_names_is_a_regular_file(tmp_path: Path) -> None:
    fifo = special(tmp_path / "a.png")
    row = {"reference": str(fifo), "prompt": "a cat", "out": "x.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert call(["generate", "--batch", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 1
    with pytest.raises(UserError, match="limit"):
        open_image("/dev/zero", max_bytes=1000)


def test_a_write_does_not_follow_a_link_in_place_of_its_temporary_file(tmp_path: Path, secret: Path) -> None:
    linked(tmp_path / "run" / f".manifest.json.{os.getpid()}.tmp", secret)
    write_atomic(tmp_path / "run" / "manifest.json", b"{}")
    assert secret.read_bytes() == SECRET and (tmp_path / "run" / "manifest.json").read_bytes() == b"{}"


# Other people's folders ----------------------------------------------------------------------------------------------


def test_a_take_over_takes_no_links_out(pairs: Path, tmp_path: Path, secret: Path) -> None:
    source, target = tmp_path / "theirs", tmp_path / "mine"
    linked(source / "samples" / "step-1.png", secret)
    with pytest.raises(UserError, match="link"):
        link_all(source, target, "samples/*.png")
    assert not (target / "samples").exists()
    shutil.move(pairs / "part-00000.parquet", tmp_path / "elsewhere")
    linked(pairs / "part-00000.parquet", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link"):
        share(pairs, tmp_path / "mine" / "pairs")


def test_a_checkpoint_names_only_files_of_its_own(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    manifest = {"sha256": {"../secret": "0" * 64}}
    (tmp_path / "step-000001" / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside"):
        checkpoint.read(tmp_path / "step-000001")
    special(tmp_path / "latest")
    assert checkpoint.pointer(tmp_path, "latest") is None


def test_shards_of_an_index_lie_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = tmp_path / "model" / f"{files.WEIGHTS_FILE}.index.json"
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UserError, match="outside"):
            files.open_state(tmp_path / "model")


def test_a_teachers_parts_are_copied_without_what_they_link_to(tmp_path: Path, secret: Path) -> None:
    part = tmp_path / "teacher" / "vae"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{}")
    files.copy_plain(part, tmp_path / "copy", files.WEIGHTS_FILE)
    assert (tmp_path / "copy" / "config.json").read_text() == "{}"
    linked(part / "notes.txt", secret)
    with pytest.raises(UserError, match="link"):
        files.copy_plain(part, tmp_path / "student" / "vae", files.WEIGHTS_FILE)


def test_an_import_reads_nothing_outside_its_source(tmp_path: Path, secret: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, lines in (("uno", "[]"), ("imagefolder", "")):
        source = tmp_path / name
        file = "data.json" if name == "uno" else "metadata.jsonl"
        (tmp_path / file).write_text(lines)
        linked(source / file, tmp_path / file)
        with pytest.raises(UserError, match="link"):
            import_data(str(source), tmp_path / "out", name)
    source = tmp_path / "ai"
    (source / "control").mkdir(parents=True)
    linked(source / "target", pictures)
    with pytest.raises(UserError, match="link"):
        import_data(str(source), tmp_path / "out", "ai-toolkit", Options())
    (tmp_path / "tars").mkdir()
    special(tmp_path / "tars" / "a.tar")
    with pytest.raises(UserError):
        import_data(str(tmp_path / "tars"), tmp_path / "out", "webdataset")
    (tmp_path / "parquet").mkdir()
    linked(tmp_path / "parquet" / "a.parquet", secret)
    with pytest.raises(UserError, match="link"):
        open_pairs(str(tmp_path / "parquet"))


def test_links_in_a_tar_are_not_members(tmp_path: Path, secret: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for ending in ("conditioning.png", "image.png", "txt"):
            member = tarfile.TarInfo(f"x.{ending}")
            member.type, member.linkname = tarfile.SYMTYPE, str(secret)
            tar.addfile(member)
    with pytest.raises(UserError, match="no pairs"):
        import_data(str(tmp_path / "a.tar"), tmp_path / "out", "webdataset")


def test_an_address_puts_no_file_beside_the_desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.data import places

    monkeypatch.setenv("HOME", str(tmp_path))
    from upath import UPath

    run = "memory://bucket/run"
    (UPath(run) / "student").mkdir(parents=True)
    (UPath(run) / "student" / "ok.json").write_bytes(b"{}")
    UPath(run).fs.store["/bucket/run/student/../../../.bashrc"] = UPath(run).fs.store["/bucket/run/student/ok.json"]
    with pytest.raises(UserError):
        places.bring(run, "student")
    assert desk(run).is_relative_to(tmp_path) and not [*tmp_path.rglob(".bashrc")]
