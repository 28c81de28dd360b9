"""Rows of a JSONL file, whatever stands in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.apps import batch
from diptych.errors import UsageError
from raising import raises


def test_a_prompt_may_hold_whatever_unicode_calls_the_end_of_a_line(tmp_path: Path) -> None:
    prompts = ["a cat\u2028on the moon", "a cat\x85 again", "кот\u2029"]
    rows = [json.dumps({"reference": "cat.png", "prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "jobs.jsonl").write_text("\r\n".join(rows), "utf8")
    found = batch.plan({}, tmp_path / "jobs.jsonl", tmp_path / "out").requests
    assert [(request.row, request.prompt) for request in found] == list(enumerate(prompts, 1))
    assert all(request.out.parent == tmp_path / "out" for request in found)


def test_a_row_nested_beyond_reason_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text("\n" + "[" * 100_000)
    with raises("json_invalid", "jobs.jsonl:2", kind=UsageError):
        batch.plan({}, tmp_path / "jobs.jsonl", tmp_path / "out")


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "/etc/passwd", "a\0b", "..", "~/x", "{seed}"])
def test_a_prompt_leads_to_no_other_folder(tmp_path: Path, prompt: str) -> None:
    (request,) = batch.plan({"reference": "cat.png", "prompt": prompt}, None, tmp_path / "{prompt}.png").requests
    assert request.out.parent == tmp_path and "\0" not in request.out.name
