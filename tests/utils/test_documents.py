"""Documents that would hang the process or fill its memory are rejected at once, in one line, by every reader."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diptych import recipe as recipes
from diptych.apps import batch
from diptych.apps.batch import requests as batch_names
from diptych.cli import app
from diptych.data.interop.importing import import_data
from diptych.data.labels import Labels
from diptych.errors import UsageError, UserError
from diptych.evaluate import ablations, evaluation, suites
from diptych.evaluate.suites import images
from diptych.recipe import tasks
from diptych.stages.write import seeds, vocabulary
from diptych.utils import models
from diptych.utils.documents import parse_json, parse_yaml
from raising import raises

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{p: *{before}, q: *{before}, r: *{before}, s: *{before}}}\n"
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
HOSTILE = {
    "aliases": BOMB,
    "merged": MERGED,
    "itself": "a: &a [*a]\n",
    "flow": "a: " + "[" * 100_000,
    "closed": "a: " + "[" * 3000 + "]" * 3000,
    "block": "- " * 50_000 + "x",
    "number": f"seed: {'9' * 100_000}",
    "date": "seed: 2026-99-99",
    "key": "? [1, 2]\n: x\n",
    "twice": "name: a\nname: b\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_document_is_refused_at_once_in_one_line(text: str) -> None:
    before = time.monotonic()
    with raises("yaml_invalid", kind=UsageError) as caught:
        parse_yaml(text, "x.yaml")
    assert time.monotonic() - before < 2
    message = str(caught.value)
    assert message.startswith("x.yaml: ") and "\n" not in message and len(message) < 400


def test_plain_documents_and_small_aliases_are_read() -> None:
    text = "base: &b {steps: 2, list: [1, 2]}\none: {<<: *b, steps: 3}\ntwo: [*b, *b]\nthree: 1e-3\nfour: null\n"
    base = {"steps": 2, "list": [1, 2]}
    found = parse_yaml(text, "x")
    assert found == {"base": base, "one": base | {"steps": 3}, "two": [base, base], "three": "1e-3", "four": None}
    assert parse_yaml("", "x") is None and parse_yaml("[]", "x") == []
    long = "\n".join(f"- {n}" for n in range(20_000))
    assert len(parse_yaml(long, "x")) == 20_000


READERS: dict[str, Callable[[Path], Any]] = {
    "recipe": recipes.load,
    "task": lambda path: tasks.load(str(path)),
    "vocabulary": lambda path: vocabulary.load(str(path)),
    "suite": lambda path: suites.read(str(path)),
    "ablation": lambda path: ablations.load(str(path)),
    "evaluation": lambda path: evaluation.read(path.parent),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", ["aliases", "flow", "number"])
def test_every_reader_of_yaml_refuses_it(reader: Callable[[Path], Any], kind: str, tmp_path: Path) -> None:
    path = tmp_path / evaluation.FILE
    path.write_text(HOSTILE[kind])
    with raises("yaml_invalid", path, kind=UsageError) as caught:
        reader(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["aliases", "flow", "block"])
def test_the_command_line_refuses_it_with_code_2(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(HOSTILE[kind])
    assert app.call(["plan", str(tmp_path / "r.yaml")]) == 2
    assert app.call(["plan", "pocket", "--set", f"seed={'[' * 2000}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and not any("Traceback" in line for line in lines)


DEEP = "[" * 100_000
NESTED = '{"a":' * 100_000


def test_json_that_is_nested_too_deeply_is_broken_json(tmp_path: Path) -> None:
    for text in (DEEP, NESTED):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    for name, text in (("c.jsonl", f'{{"caption": "a fox"}}\n{NESTED}\n'), ("j.jsonl", NESTED)):
        (tmp_path / name).write_text(text)
    assert seeds.read(str(tmp_path / "c.jsonl")).left_out == {"not text": 1}
    with pytest.raises(UserError) as caught:
        batch.plan({}, tmp_path / "j.jsonl", tmp_path / "out")
    assert "\n" not in str(caught.value)
    (tmp_path / "labels.jsonl").write_text(NESTED + "\n")
    with contextlib.suppress(UserError):  # a broken last line may be one that was cut short
        Labels(tmp_path / "labels.jsonl")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "metadata.jsonl").write_text(NESTED + "\n")
    with pytest.raises(UserError):
        import_data(str(tmp_path / "images"), tmp_path / "out", "imagefolder")


# ---- templates

FILES = {name: Path(tasks.__file__).parent / f"{name}.yaml" for name in tasks.names()}


@pytest.mark.parametrize(
    "field", ["subject:>2000000000", "subject!r", "subject.__class__", "subject[0]", "subject:{x}"]
)
@pytest.mark.parametrize("place", ["grids", "panel_template", "instruction", "scene", "brief"])
def test_a_field_of_a_task_is_a_name_and_nothing_else(field: str, place: str, tmp_path: Path) -> None:
    values = parse_yaml(FILES["subject"].read_text("utf8"), "subject")
    wrong = f"a {{{field}}} "
    if place == "grids":
        values["grids"][0]["templates"][0] = wrong + values["grids"][0]["templates"][0]
    elif place == "instruction":
        values["captions"]["instruction_templates"][0] = wrong
    elif place == "scene":
        values["grammar"]["scene"] = wrong
    elif place == "brief":
        values["writer"]["brief"] = wrong
    else:
        values[place] = wrong + "{scene}"
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps(values))
    before = time.monotonic()
    with pytest.raises(UsageError) as caught:
        tasks.load(str(path))
    assert time.monotonic() - before < 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["{prompt:>2000000000}", "{prompt!r}", "{prompt.x}"])
def test_a_suite_s_grid_and_a_file_s_pattern_are_as_plain(field: str) -> None:
    spec = {"name": "x", "version": 1, "layout": "folder", "size": 64, "fit": "pad", "copy_distance": 0.1}
    with pytest.raises(UsageError):
        suites.check(images.Spec, spec | {"grid": f"{{subject}} {field}"}, "x.yaml")
    assert suites.check(images.Spec, spec | {"grid": "{subject}: {prompt}"}, "x.yaml").grid
    if "!" not in field:
        with pytest.raises(UsageError):
            batch_names._check_pattern(f"out/{field}.png")


# ---- models


def big(folder: Path, **changed: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changed))
    return folder


@pytest.mark.parametrize("changed", [{"num_layers": 10_000_000}, {"num_hidden_layers": [3, 10**9]}, {"depth": 10**6}])
def test_a_model_with_more_layers_than_its_files_have_is_rejected_unbuilt(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file({"layer.weight": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert models.resolve(str(tmp_path), "curator") == tmp_path
    before = time.monotonic()
    with raises("file_damaged", "1 tensors", tmp_path / "config.json"):
        models.resolve(str(big(tmp_path, **changed)), "curator")
    assert time.monotonic() - before < 1
