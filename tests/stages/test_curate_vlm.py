"""Curation with a vision-language judge on a real server: what is asked, what is kept of it, what it never costs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coloured import Colours, grid, opinion
from diptych import recipe as recipes
from diptych.data import funnel, records, verdicts
from diptych.data.engine import Failure
from diptych.data.images import open_image
from diptych.data.verdicts import judged_again
from diptych.errors import UsageError
from diptych.judges.vlm import VlmJudge
from diptych.llm.cache import Cache
from diptych.llm.client import NobodyAnswers, open_model
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe, Thresholds, Vlm
from diptych.stages.curate.stage import CurateStage
from llm.chat_server import Act, Call, ChatServer, Serve, refuse, say
from raising import raises


def recipe_for(server: ChatServer, same: float = 0.5, near_copy: float = 0.045, seam: float = -1, **vlm: Any) -> Recipe:
    sampling: dict[str, Any] = {"temperature": 0.7, "backoff": 0.01, "retries": 3, "concurrency": 4, "timeout": 20.0}
    endpoint = {"base_url": server.url, "model": "tiny"} | sampling | vlm.pop("endpoint", {})
    thresholds = {"same": same, "near_copy": near_copy, "seam": seam}
    curate = {"thresholds": thresholds, "vlm": {"endpoint": endpoint, **vlm}}
    return recipes.check({"name": "t", "device": "cpu", "threads": 1, "curate": curate}, "test")


def curate(recipe: Recipe, rows: list[dict[str, Any]], answers: Path | None = None) -> list[Any]:
    stage = CurateStage(recipe, answers)
    settings = recipe.curate.vlm
    assert settings is not None
    model = open_model(settings.endpoint, cache=settings.cache or answers)
    vlm = VlmJudge(model, stage.task, settings.votes)
    return list(stage.work(Colours(), vlm)(rows))  # pyright: ignore[reportArgumentType]


def reds(call: Call) -> list[float]:
    """What a judge sees: how red the two pictures of a call are."""
    parts = [
        p for m in call.body["messages"] if m["role"] == "user" and isinstance(m["content"], list) for p in m["content"]
    ]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(u.partition(",")[2])))) for u in urls]
    return [float(picture[..., 0].mean() / 255) for picture in pictures]


def look(call: Call) -> Act:
    """A judge with eyes: equally red is the same. What it cannot tell is not even JSON."""
    if "instruction:" in call.text(1):
        return say({"description": f"a cat,\n redness {reds(call)[1]:.1f}", "instruction": "make it night"})
    first, second = reds(call)
    return say("who knows") if min(first, second) < 0.2 else say(opinion(abs(first - second) < 0.1))


SAME, OTHER, DARK = (0.8, 0.8), (0.8, 0.4), (0.1, 0.1)


def test_two_panels_are_asked_about_once_and_both_orders_carry_the_whole_verdict(serve: Serve) -> None:
    server = serve(look)
    rows = [grid(0, SAME), grid(1, OTHER), grid(2, DARK)]
    found = curate(recipe_for(server), rows)
    assert len([call for call in server.calls if call.turns == 2]) == 3
    for pairs, verdict in zip(
        found, [(True, "kept"), (False, "different"), (False, "undecided: no valid answer")], strict=True
    ):
        assert [(pair["kept"], pair["reason"]) for pair in pairs] == [verdict, verdict]
        assert [pair["id"][-2:] for pair in pairs] == ["01", "10"] and list(pairs[0]) == list(records.PAIR)
        one, other = (json.loads(pair["evidence"]) for pair in pairs)
        assert one["vlm"] == other["vlm"] and len(one["vlm"]["votes"]) == 1
        assert one["prefilter"]["least"] == -1 and -1 <= one["prefilter"]["similarity"] <= 1.0001
    kept, refused, undecided = (pairs[0] for pairs in found)
    (vote,) = json.loads(kept["evidence"])["vlm"]["votes"]
    assert (vote["status"], vote["model"], len(vote["key"])) == ("answered", "tiny-1", 64)
    assert vote["answer"] == opinion(True)
    assert (kept["similarity"], refused["similarity"]) == (1.0, 0.0) and math.isnan(undecided["similarity"])
    (vote,) = json.loads(undecided["evidence"])["vlm"]["votes"]
    assert vote["text"] == "who knows" and "no JSON object" in vote["reason"]
    assert all(funnel.reached_judge(pairs[0]["reason"]) for pairs in found)


def test_the_first_picture_is_the_panel_of_the_lower_number(serve: Serve) -> None:
    server = serve(look)
    curate(recipe_for(server), [grid(0, (0.9, 0.5, 0.7, 0.3), rows=2)])
    shown = sorted(tuple(round(red, 1) for red in reds(call)) for call in server.calls)
    assert shown == sorted([(0.9, 0.5), (0.9, 0.7), (0.9, 0.3), (0.5, 0.7), (0.5, 0.3), (0.7, 0.3)])


def test_pairs_that_another_test_refuses_cost_no_call(serve: Serve) -> None:
    server = serve(look)
    rows = [grid(0, SAME, copied=True), grid(1, (0.9, 0.1)), grid(2, SAME)]
    found = curate(recipe_for(server, prefilter=0.5), rows)
    assert [pairs[0]["reason"] for pairs in found] == ["near_copy", "prefilter", "kept"]
    assert len(server.calls) == 1
    for pairs in found[:2]:
        evidence = json.loads(pairs[0]["evidence"])
        assert evidence["vlm"]["votes"] == [] and math.isnan(pairs[0]["similarity"])
        assert not funnel.reached_judge(pairs[0]["reason"])
    assert json.loads(found[1][0]["evidence"])["prefilter"]["similarity"] < 0.5
    found = curate(recipe_for(server, seam=1.0), rows)
    assert {pairs[0]["reason"] for pairs in found} == {"seam"} and len(server.calls) == 1


def test_a_misaligned_pair_is_refused_unasked(serve: Serve) -> None:
    server = serve(look)
    recipe = recipe_for(server).model_copy(update={"task": "relight"})
    (pairs,) = curate(recipe, [grid(0, SAME)])
    assert pairs[0]["reason"] == "alignment" and server.calls == []


def test_other_thresholds_ask_nobody(serve: Serve) -> None:
    by_pair: Counter[float] = Counter()

    def act(call: Call) -> Act:
        first = round(reds(call)[0], 1)
        by_pair[first] += 1
        return say("?") if first == 0.1 else say(opinion(first != 0.9 or by_pair[first] != 2))

    server = serve(act)
    recipe = recipe_for(server, votes=3, endpoint={"concurrency": 1})
    rows = [
        pair for pairs in curate(recipe, [grid(0, (0.7, 0.7)), grid(1, (0.9, 0.9)), grid(2, DARK)]) for pair in pairs
    ]
    calls = len(server.calls)
    assert [row["reason"] for row in rows[::2]] == ["kept", "kept", "undecided: no valid answer"]
    unanimous = Thresholds(same=1.0, seam=-1)
    assert [judged_again(row, unanimous)[1] for row in rows[::2]] == ["kept", "different", "undecided: no valid answer"]
    assert [row["id"] for row in verdicts.select(rows, unanimous)] == ["c-000000-01", "c-000000-10"]
    assert len(verdicts.select(rows, Thresholds(same=-1, near_copy=0, seam=-1))) == 4
    assert len(server.calls) == calls


def test_a_fifth_of_the_calls_gone_wrong_loses_no_pair_and_a_second_look_is_free(serve: Serve, tmp_path: Path) -> None:
    tried: Counter[int] = Counter()
    lock = threading.Lock()
    trouble: list[Callable[[Call], Act]] = [
        lambda call: say('{"same": tr'),
        lambda call: say({"same": "yes"}),
        lambda call: refuse(429, "slow down", {"Retry-After": "0.01"}),
        lambda call: refuse(500, "oops"),
        lambda call: Act(hang_up=True),
        lambda call: Act(look(call).body[:60], missing=40),
        lambda call: Act(b"<html>bad gateway"),
        lambda call: refuse(400, "cannot"),
    ]

    def act(call: Call) -> Act:
        with lock:
            tried[0] += 1
            number = tried[0]
        return trouble[number // 5 % len(trouble)](call) if number % 5 == 0 else look(call)

    server = serve(act)
    rows = [grid(i, (SAME, OTHER)[i % 2]) for i in range(40)]
    recipe = recipe_for(server, votes=3)
    found = curate(recipe, rows, tmp_path / "answers.sqlite")
    assert [len(pairs) for pairs in found] == [2] * 40
    for i, pairs in enumerate(found):
        assert {pair["reason"] for pair in pairs} <= {("kept", "different")[i % 2], "undecided: the votes are split"}
        assert len(json.loads(pairs[0]["evidence"])["vlm"]["votes"]) == 3
    votes = [vote for pairs in found for vote in json.loads(pairs[0]["evidence"])["vlm"]["votes"]]
    failed = [vote for vote in votes if vote["status"] == "failed"]
    assert 0 < len(failed) < 10 and all("400" in vote["reason"] for vote in failed)
    calls = len(server.calls)
    again = curate(recipe, rows, tmp_path / "answers.sqlite")
    assert len(server.calls) - calls <= 3 * len(failed)  # what no model looked at is tried again, and nothing else
    assert [pairs[0]["reason"] for pairs in again] == [pairs[0]["reason"] for pairs in found]


def test_an_endpoint_that_dies_stops_the_stage_and_what_it_said_is_not_asked_again(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(lambda call: look(call) if call.number < 6 else refuse(503, "gone"))
    rows = [grid(i, SAME) for i in range(10)]
    recipe = recipe_for(server, endpoint={"concurrency": 1, "retries": 1, "stop_after": 2})
    with raises("endpoint_unreachable", "2 questions", kind=NobodyAnswers) as caught:
        curate(recipe, rows, tmp_path / "answers.sqlite")
    assert "\n" not in str(caught.value)
    back = serve(look)
    found = curate(recipe_for(back), rows, tmp_path / "answers.sqlite")
    assert [pairs[0]["reason"] for pairs in found] == ["kept"] * 10
    assert len(back.calls) == 4


def test_kept_pairs_get_the_models_words_and_the_others_keep_the_grammars(serve: Serve) -> None:
    server = serve(look)
    found = curate(recipe_for(server, captions=True), [grid(0, (0.8, 0.75)), grid(1, OTHER)])
    there, back = found[0]
    assert (there["caption"], there["instruction"]) == ("a cat, redness 0.7", "make it night")
    assert back["caption"] == "a cat, redness 0.8" and there["reference_caption"] == "a cat on the moon 0"
    evidence = json.loads(there["evidence"])["captions"]
    assert (evidence["status"], evidence["asked_for"], evidence["model"]) == (
        "answered",
        "a cat on the moon 1",
        "tiny-1",
    )
    (_, call) = [call for call in server.calls if "instruction:" in call.text(1)]
    briefs = tasks.load("subject").captions
    assert briefs.description in call.text(1) and briefs.instruction in call.text(1)
    assert found[1][0]["caption"] == "a cat on the moon 1" and "captions" not in json.loads(found[1][0]["evidence"])


def test_a_pair_without_valid_words_keeps_the_grammars_and_says_so(serve: Serve) -> None:
    server = serve(lambda call: say("no words") if "instruction:" in call.text(1) else look(call))
    ((pair, _),) = curate(recipe_for(server, captions=True), [grid(0, SAME)])
    assert pair["kept"] and pair["caption"] == "a cat on the moon 1" and "on the moon 1" in pair["instruction"]
    assert json.loads(pair["evidence"])["captions"]["status"] == "undecided"


def test_the_stage_opens_both_judges_and_keeps_the_answers_in_the_run_or_where_the_recipe_says(
    serve: Serve, judge: Path, tmp_path: Path
) -> None:
    server = serve(look)
    answers, shared = tmp_path / "answers.sqlite", tmp_path / "shared.sqlite"
    for cache, calls in ((None, 1), (None, 1), (str(shared), 2)):
        recipe = recipe_for(server, cache=cache)
        recipe = recipe.model_copy(update={"curate": recipe.curate.model_copy(update={"judge": str(judge)})})
        (pairs,) = CurateStage(recipe, answers).load()([grid(0, SAME)])
        assert isinstance(pairs, list)
        pair = pairs[0]
        assert pair["kept"] and len(pair["judge"]) == 64
        assert open_image(pair["conditioning"]).size == (64, 64)
        assert len(server.calls) == calls and shared.is_file() == (calls == 2)
    assert answers.is_file()


def test_a_model_on_this_machine_judges_without_a_server(judge: Path, tmp_path: Path) -> None:
    """A random model that says nothing: every grid is a failure to be tried again, and nothing of it is cached."""
    from llm.test_local import save_tiny_llava

    save_tiny_llava(tmp_path / "llava", mute=True)
    curate = {"judge": str(judge), "thresholds": {"seam": -1}, "vlm": {"local": str(tmp_path / "llava")}}
    recipe = recipes.check({"name": "t", "device": "cpu", "threads": 1, "curate": curate}, "test")
    rows = [grid(0, SAME), grid(1, OTHER)]
    found: list[Any] = list(CurateStage(recipe, tmp_path / "answers.sqlite").load()(rows))
    assert all(isinstance(one, Failure) and one.lost and "empty" in one.reason for one in found) and len(found) == 2
    with Cache(tmp_path / "answers.sqlite") as cache:
        assert len(cache) == 0 and cache.usage()["llava"].calls == 4  # two turns of each


# ---- the recipe's section

URL, MODEL = "curate.vlm.endpoint.base_url=http://localhost:8000/v1", "curate.vlm.endpoint.model=m"


def test_a_recipe_without_one_means_what_it_meant() -> None:
    plain, asked = recipes.load("pocket"), recipes.load("pocket", [URL, MODEL])
    values = {k: v for k, v in plain.values()["curate"].items() if v is not None and (k, v) != ("format", "png")}
    assert plain.curate.vlm is None and list(values) == ["judge", "batch_size", "thresholds"]
    before = hashlib.sha256(json.dumps({"curate": values}, sort_keys=True).encode()).hexdigest()
    assert plain.fingerprint("curate") == before != asked.fingerprint("curate")
    assert "curate.vlm.endpoint.model" in plain.differences(asked)
    assert set(plain.differences(asked)) == set(asked.differences(plain))


@pytest.mark.parametrize(
    ("sets", "fact"),
    [
        (["curate.vlm.votes=1"], "(base_url and model), local"),
        ([URL, MODEL, "curate.vlm.local=x"], "(base_url and model), local"),
        ([URL, MODEL, "curate.vlm.votes=3"], "endpoint.temperature"),
        (["curate.vlm.local=x", "curate.vlm.votes=3"], "votes: 1"),
        ([URL, "curate.vlm.endpoint.modle=m"], "'model'"),
        ([URL, MODEL, "curate.vlm.vote=3"], "'votes'"),
        ([URL, MODEL, "curate.vlm.prefilter=2"], "curate.vlm.prefilter"),
        ([URL, MODEL, "curate.vlm.endpoint.timeout=yes"], "curate.vlm.endpoint.timeout"),
    ],
)
def test_what_is_wrong_with_it_is_named(sets: list[str], fact: str) -> None:
    with pytest.raises(UsageError, match=re.escape(fact)):
        recipes.load("pocket", sets)


def test_every_key_of_it_is_documented_and_survives_a_dump(tmp_path: Path) -> None:
    assert all(field.description for field in Vlm.model_fields.values())
    recipe = recipes.load("pocket", [URL, MODEL, "curate.vlm.votes=3", "curate.vlm.endpoint.temperature=0.7"])
    (tmp_path / "r.yaml").write_text(recipe.dump())
    assert recipes.load(tmp_path / "r.yaml") == recipe
