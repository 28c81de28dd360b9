"""Near duplicates that a language model writes in different shards of a run, and styles in captions."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import plain_stages
from diptych.data import records
from diptych.data.store import Dataset
from diptych.recipe import load, tasks
from diptych.run.runner import run
from diptych.stages.write import diversity, stage  # before `plain_stages` takes the package's place
from diptych.stages.write import grammar as wordings
from diptych.utils.console import Display
from llm.chat_server import Call, Serve, say

WORDS = [f"w{n}" for n in range(400)]


def answer(seed: int, changed: int = 0) -> dict[str, Any]:
    """A draft of its own, with some words of the description changed."""
    rng = random.Random(seed)
    looks = rng.sample(WORDS, 14)
    looks[:changed] = [f"other{n}" for n in range(changed)]
    panels = [" ".join(rng.sample(WORDS, 6)) for _ in range(2)]
    return {"subject": f"k{seed}", "description": " ".join(["a", *looks]), "style": "a drawing", "panels": panels}


def test_near_duplicates_across_shards_are_taken_out_once_and_for_all(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [f"caption {n}" for n in range(24)]
    (tmp_path / "c.txt").write_text("\n".join(captions))

    def act(call: Call) -> Any:
        number = int(re.findall(r"caption (\d+)\n", call.text(1))[0])
        return say(answer(number % 20, changed=3 if number >= 20 else 0))  # the last four repeat the first four

    server = serve(act)
    endpoint = {"base_url": server.url, "model": "tiny", "concurrency": 2}
    section = {"writer": "llm", "endpoint": endpoint, "count": 24, "shard_size": 3, "captions": f"{tmp_path}/c.txt"}
    path = tmp_path / "r.yaml"
    values = {"name": "r", "device": "cpu", "threads": 1, "write": section, "paint": {"dtype": "float32"}}
    path.write_text(json.dumps({**values, "distill": {"precision": "float32"}}))
    plain_stages.use(monkeypatch)
    monkeypatch.setitem(__import__("sys").modules, "diptych.stages.write.stage", stage)
    monkeypatch.setitem(__import__("sys").modules, "diptych.stages.write.diversity", diversity)

    run(load(path), tmp_path / "a", stages=("write",), display=Display(quiet=True))
    kept = list(Dataset(tmp_path / "a" / "prompts"))
    failed = list(Dataset(tmp_path / "a" / "failed" / "write"))
    assert len(kept) == 20 and len(failed) == 4 and len({row["subject"] for row in kept}) == 20
    assert all("near duplicate of p-" in row["reason"] for row in failed)
    assert all(row["reason"].split()[3] < row["id"] for row in failed)  # the earlier one stays
    manifest = Dataset(tmp_path / "a" / "prompts").manifest
    assert manifest is not None and (manifest["rows"], manifest["failed"]) == (20, 4)

    # As after a kill before the manifest: the same files, whatever was moved already.
    before = plain_stages.data(tmp_path / "a")
    (tmp_path / "a" / "prompts" / "manifest.json").unlink()
    run(load(path), tmp_path / "a", stages=("write",), display=Display(quiet=True))
    after = plain_stages.data(tmp_path / "a")
    assert {name: data for name, data in after.items() if "sqlite" not in name} == {
        name: data for name, data in before.items() if "sqlite" not in name
    }


def test_the_wording_that_all_prompts_share_makes_no_two_of_them_alike(tmp_path: Path) -> None:
    task = tasks.load("subject")
    prompts = Dataset(tmp_path / "prompts", records.schema(records.PROMPT))
    layout = task.layout("1x2")
    for shard in range(3):
        texts = [f"a cat{shard}{n} in place{n}" for n in range(4)]
        rows = [
            {
                "id": records.prompt_id(4 * shard + n),
                "prompt": layout.templates[0].format(
                    subject="cat", description=text, left=f"l{shard}{n}", right=f"r{shard}{n}", style="a photograph"
                ),
                "panels": ["a", "b"],
                "subject": "cat",
                "task": "subject",
                "seed": 1,
            }
            for n, text in enumerate(texts)
        ]
        prompts.write_shard(shard, rows)
    failed = Dataset(tmp_path / "failed", records.schema(records.FAILED))
    assert diversity.remove_repeats(prompts, failed, task, layout, 0.5, "f") == 0 and len(prompts) == 12


@pytest.mark.parametrize("name", [name for name in tasks.names() if name != "relight"])
def test_a_caption_names_its_style_and_the_instruction_does_not(name: str) -> None:
    task = tasks.load(name)
    fields = {"subject": "fox", "scene": "on a bridge", "change": "in heavy snow"}
    plain = wordings.fill(task.panel_template, **fields)
    styled = wordings.styled(plain, "an oil painting of quality")
    assert styled == f"an oil painting of quality of {plain}" and wordings.styled(plain, "") == plain
    rng = np.random.default_rng
    assert wordings.parts(task.panel_template, styled, "fox") == wordings.parts(task.panel_template, plain, "fox")
    assert wordings.instruction(task, "fox", styled, rng(1)) == wordings.instruction(task, "fox", plain, rng(1))
