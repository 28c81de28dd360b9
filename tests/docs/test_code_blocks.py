"""Every code block of the documentation is run, or says why not; the commands of those that are not are still read by
the real command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import authority
from diptych import recipe
from diptych.cli import app
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe

from .blocks import LANGUAGES, PAGES, ROOT, Block, read

BLOCKS = [block for page in PAGES for block in read(page)]
SMALL = """
write.count=12 write.shard_size=12 paint.steps=2 paint.batch_size=12 curate.thresholds.same=-1 evaluate.suite=none
distill.steps=2 distill.batch_size=2 distill.rank=2 distill.validation_pairs=2 distill.sample_steps=1
"""


def named(language: str, run: bool = True) -> list[Any]:
    found = [b for b in BLOCKS if b.language == language and (not run or not b.reason)]
    return [pytest.param(block, id=block.where) for block in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: a clone's recipes and references, the reader's own picture and certificate, two small
    runs."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("recipes", "examples"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "examples/references/cat.png", folder / "cat.png")
    authority.make(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sets = [word for item in SMALL.split() for word in ("--set", item)]
        assert app.call(["run", "recipes/pocket.yaml", "--out", "runs/first", "--json", *sets]) == 0
        shutil.copytree("runs/first", "runs/pocket")
    return folder


@pytest.fixture(autouse=True)
def _there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "folder" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("folder"))


def test_every_block_says_what_it_is() -> None:
    assert [b.where for b in BLOCKS if b.language not in LANGUAGES] == []
    assert len(BLOCKS) > 30


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_python_blocks_run_in_order(page: Path, folder: Path) -> None:
    space: dict[str, Any] = {}
    for block in read(page):
        if block.language == "python":
            code = compile(block.text, block.where, "exec")
            if not block.reason:
                exec(code, space)


@pytest.mark.parametrize("block", named("bash"))
def test_bash_blocks_run(block: Block, folder: Path) -> None:
    for words in block.commands():
        assert words[0] == "diptych", f"{block.where} runs {words[0]}: say why it is not run"
        assert app.call(words[1:]) == 0, " ".join(words)


@pytest.mark.parametrize("block", named("bash", run=False))
def test_bash_blocks_are_taken_by_the_command_line(block: Block) -> None:
    for words in block.commands():
        if words[0] == "diptych":
            understood(words[1:], block.where)
        elif "-m diptych " in f"{' '.join(words)} ":  # torchrun and accelerate launch
            understood(words[words.index("-m") + 2 :], block.where)


def understood(words: list[str], where: str) -> None:
    """Fails unless the command line has such a command with such options; nothing is carried out."""
    command: Any = typer.main.get_command(app.app)
    rest = [word for before, word in zip(["", *words], words, strict=False) if word != "…" or before.startswith("-")]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name, *rest = rest
        found = [command.commands.get(part) for part in name.split("|")]
        assert all(found), f"{where}: no command {name}"
        command = found[0]
    try:
        command.make_context("diptych", rest).close()
    except typer.Exit:  # an option that only prints something
        return
    except Exception as error:
        pytest.fail(f"{where}: {' '.join(words)}: {error}")


@pytest.mark.parametrize("block", named("yaml"))
def test_yaml_blocks_are_recipes_or_tasks(block: Block, tmp_path: Path) -> None:
    said = yaml.safe_load(block.text)
    if set(said) <= set(Recipe.model_fields):
        whole = yaml.safe_load((ROOT / "recipes/pocket.yaml").read_text())
        for section, keys in said.items():
            whole[section] = {**whole.get(section, {}), **keys} if isinstance(keys, dict) else keys
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
        recipe.load(tmp_path / "recipe.yaml")
    else:
        (tmp_path / f"{said['name']}.yaml").write_text(block.text)
        tasks.load(str(tmp_path / f"{said['name']}.yaml"))


@pytest.mark.parametrize("block", named("json"))
def test_json_blocks_are_jobs(block: Block, tmp_path: Path) -> None:
    from diptych.apps.batch import requests

    (tmp_path / "jobs.jsonl").write_text(block.text)
    for number, row in requests.read_rows(tmp_path / "jobs.jsonl"):
        requests.check_row(row, f"{block.where}, line {number}")
