"""What a run's language models cost, from the replies on file: every sitting, each reply once, at its prices."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

import judged_run
from diptych import recipe as recipes
from diptych.cli import app
from diptych.data import bill, funnel, places
from diptych.llm.cache import Cache
from diptych.llm.question import Reply, Usage
from diptych.recipe.schema import Recipe
from llm.chat_server import Act, Call, Serve, say

PRICES = {"input_price": 2.0, "output_price": 10.0}


def asking(writer: str | None = None, judge: str | None = None, **caches: str | None) -> Recipe:
    """A recipe whose writer and judge are these models, the first one free of charge."""
    at = {"base_url": "http://localhost:1/v1"}
    values: dict[str, Any] = {"name": "t", "device": "cpu", "threads": 1}
    if writer:
        values["write"] = {"writer": "llm", "endpoint": {**at, "model": writer}, "cache": caches.get("write")}
    if judge:
        values["curate"] = {"vlm": {"endpoint": {**at, "model": judge, **PRICES}, "cache": caches.get("curate")}}
    return recipes.check(values, "test")


def put(path: Path, *replies: tuple[str, str, Usage]) -> None:
    with Cache(path) as cache:
        for key, model, usage in replies:
            cache.put(key, Reply("{}", model, usage))


def test_each_model_has_its_calls_tokens_and_money_whenever_they_were_paid_for(tmp_path: Path) -> None:
    put(tmp_path / "answers.sqlite", ("a", "big-2026-01-01", Usage(1, 1000, 100)), ("b", "small", Usage(1, 7, 3)))
    put(tmp_path / "answers.sqlite", ("c", "big-2026-01-01", Usage(1, 500, 50)))  # another sitting
    found = bill.bill(tmp_path, asking("small", "big"))
    assert found == [
        {
            "model": "big-2026-01-01",
            "where": "endpoint",
            "calls": 2,
            "tokens": {"in": 1500, "out": 150},
            "money": pytest.approx(1500 * 2e-6 + 150 * 1e-5),
        },
        {"model": "small", "where": "endpoint", "calls": 1, "tokens": {"in": 7, "out": 3}, "money": None},
    ]
    assert bill.format_bill(found) == [
        "big-2026-01-01: 2 calls, 1,500 tokens in, 150 out, 0.0045 spent",
        "small: 1 calls, 7 tokens in, 3 out",
    ]


def test_a_name_that_no_endpoint_knows_has_the_price_of_the_only_one_there_is(tmp_path: Path) -> None:
    put(tmp_path / "answers.sqlite", ("a", "some-alias", Usage(1, 1000, 0)))
    (only,) = bill.bill(tmp_path, asking(None, "big"))
    assert only["money"] == pytest.approx(0.002)
    (unknown,) = bill.bill(tmp_path, asking("small", "big"))  # it may be either's
    assert unknown["money"] is None


def test_models_of_this_machine_never_have_an_endpoints_price(tmp_path: Path) -> None:
    mine, big = ("a", "tiny", Usage(1, 1000, 0)), ("b", "big", Usage(1, 1000, 0))
    for key, model in (("local", "models/tiny"), ("vllm", {"model": "owner/tiny"})):
        put(tmp_path / key / "answers.sqlite", mine, big)
        values = asking("big").values()
        values["write"]["endpoint"] |= PRICES
        values["curate"]["vlm"] = {key: model}
        priced, free = bill.bill(tmp_path / key, recipes.check(values, "test"))
        assert (priced["model"], priced["where"]) == ("big", "endpoint")
        assert priced["money"] == pytest.approx(0.002)
        assert (free["model"], free["where"], free["money"]) == ("tiny", key, None)
        assert bill.format_bill([free]) == [f"tiny: 1 calls, 1,000 tokens in, 0 out ({key}, no price per token)"]
        # One name for both: which of them replied is not stored, so there is no price.
        values["write"]["endpoint"]["model"] = "tiny"
        _, unclear = bill.bill(tmp_path / key, recipes.check(values, "test"))
        assert unclear["where"] is None and unclear["money"] is None


def test_files_that_a_recipe_names_are_read_and_a_run_without_language_models_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "shared.sqlite", ("a", "big", Usage(1, 10, 1)))
    put(tmp_path / "run" / "answers.sqlite", ("a", "small", Usage(1, 20, 2)))
    both = bill.bill(tmp_path / "run", asking("small", "big", curate="~/shared.sqlite"))
    assert [(one["model"], one["tokens"]["in"]) for one in both] == [("big", 10), ("small", 20)]
    same = bill.bill(tmp_path / "run", asking("big", "big", write="~/shared.sqlite", curate="~/shared.sqlite"))
    assert [one["tokens"]["in"] for one in same] == [10]  # once, though both name it
    assert bill.bill(tmp_path / "run", recipes.load("pocket")) == []
    assert bill.bill(tmp_path / "elsewhere", asking("small", "big")) == []
    assert not (tmp_path / "elsewhere").exists()


def varied(call: Call) -> Act:
    """A writer with ideas: those of its number."""
    words = random.Random(call.number).sample([f"{first}{second}" for first in "bcdfg" for second in "aeiou"], 12)
    panels = [f"{' '.join(words[:4])} by day", f"{' '.join(words[4:8])} by night"]
    return say({"subject": words[8], "description": f"a {' '.join(words[8:])}", "style": "a photo", "panels": panels})


def test_a_run_reports_its_bill_and_stats_also_report_the_variety_of_prompts(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(varied)
    settings = {"base_url": server.url, "model": "tiny", **PRICES}
    sections = {"write": {"writer": "llm", "endpoint": settings, "count": 6}, "paint": {"dtype": "float32"}}
    values = {"name": "asked", "device": "cpu", "threads": 1, "distill": {"precision": "float32"}, **sections}
    (tmp_path / "asked.yaml").write_text(json.dumps(values))
    run, line = str(tmp_path / "run"), "tiny-1: 6 calls, 600 tokens in, 60 out, 0.0018 spent"
    for _ in range(2):  # the second time there are no requests, and the bill is the same
        assert app.call(["write", str(tmp_path / "asked.yaml"), "--out", run]) == 0
        assert f"write: {line}, so far" in capsys.readouterr().err
    assert len(server.calls) == 6
    assert app.call(["data", "stats", run]) == 0
    text = capsys.readouterr().out
    assert f"language model {line}" in text
    assert re.search(r"prompts: \d\d % of their word pairs are distinct, mean distance 0\.[3-9]\d", text)
    assert app.call(["data", "stats", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    logged = [event["result"] for event in places.read(run) if event["event"] == "stage"]
    assert found["spread"] == logged[-1]["spread"] and found["spread"]["texts"] == 6
    assert found["asked"] == logged[-1]["asked"] and found["asked"][0]["tokens"] == {"in": 600, "out": 60}


def test_a_grammar_has_no_bill_and_no_variety(tmp_path: Path) -> None:
    judged_run.make(tmp_path / "run", [(0.9, True)] * 4)
    found = funnel.measure(tmp_path / "run")
    assert found["asked"] == [] and found["spread"] is None
    assert not any(line.startswith(("language model", "prompts:")) for line in funnel.format_report(found))
