"""A model that vLLM runs: what it is told, how many questions are put to it at once, and what becomes of its answers.

vLLM itself is not here: its names are recorded from its sources (`vllm_api.json`), and a real, tiny model of
transformers answers in its place (`stand_in_vllm`). `test_vllm_contract.py` runs vLLM where it can.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from coloured import grid
from diptych import recipe as recipes
from diptych.cli.app import call
from diptych.data.images import image_cell
from diptych.errors import UsageError, UserError
from diptych.evaluate import evaluation
from diptych.evaluate.evaluation import Evaluation, Judge
from diptych.evaluate.scoring import judging
from diptych.evaluate.scoring.scorers import Rating
from diptych.judges.vlm import answer_type
from diptych.llm import schema, vllm
from diptych.llm.cache import Cache
from diptych.llm.client import NobodyAnswers, answers, open_model
from diptych.llm.local import LocalModel
from diptych.llm.question import Outcome, Question, system, user
from diptych.llm.vllm import Vllm
from diptych.recipe import tasks
from diptych.stages.curate.captioning import Words
from diptych.stages.curate.stage import CurateStage
from diptych.stages.write import llm_writer
from llm.stand_in_vllm import API, LLM, modules
from llm.test_local import save_tiny_llava
from raising import raises

# Every word that may stand in a schema: the backends of vLLM enforce these, or say plainly that they do not.
SCHEMA_WORDS = {
    *("type", "properties", "required", "additionalProperties", "items", "enum", "description"),
    *("minimum", "maximum", "minItems", "maxItems"),
}


class Long(BaseModel):
    """An answer that a model of three letters cannot give; only validation knows."""

    same: bool
    why: str = Field(min_length=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llava")
    save_tiny_llava(made)
    return made


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LLM]]:
    """As if vLLM were installed on a machine with two GPUs; gives the engines that were opened."""
    import torch

    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in vllm.ENVIRONMENT:
        monkeypatch.setenv(name, "as the user has it")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    LLM.made.clear()
    yield LLM.made
    LLM.made.clear()


Make = Callable[..., LocalModel]


@pytest.fixture
def load(installed: list[LLM], folder: Path) -> Make:
    def make(cache: Cache | None = None, **values: Any) -> LocalModel:
        return vllm.load(Vllm(model=str(folder), **values), cache=cache, keep_undecided=True)

    return make


def ask(model: LocalModel, asked: list[Question]) -> list[Outcome]:
    found: list[Outcome] = []
    model.ask_many(asked, found.append)
    return found


def questions(answer: type[BaseModel], *texts: str) -> list[Question]:
    red, blue = Image.new("RGB", (20, 12), "red"), Image.new("RGB", (12, 20), "blue")
    return [Question((system("You judge."), user(text, red, blue)), answer, tag=text) for text in texts]


# ---- what it is told


def test_an_engine_is_told_what_the_recipe_says_in_vllms_own_words() -> None:
    settings = Vllm(model="owner/name", gpu_memory_utilization=0.5, extra={"quantization": "fp8"})
    assert settings.arguments(Path("/models/x")) == {
        "model": "/models/x",
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 8192,
        "load_format": "safetensors",
        "quantization": "fp8",
    }
    wide = Vllm(model="owner/name", tensor_parallel_size=4, max_model_len=None, extra={"load_format": "auto"})
    told = wide.arguments(Path("x"))
    # Not Ray's processes: those of the worker, which has the GPUs.
    assert told["distributed_executor_backend"] == "mp" and told["load_format"] == "auto"
    assert "max_model_len" not in told
    assert (settings.arguments(Path("x")) | told).keys() <= set(API["LLM"])


def test_a_question_is_sampled_by_its_schema_and_each_vote_by_its_own_seed(verdict: type[BaseModel]) -> None:
    settings = Vllm(model="m", temperature=0.7, max_tokens=99)
    told = settings.parameters(Question((user("?"),), verdict, sample=3))
    form = told.pop("structured_outputs")
    assert told == {"temperature": 0.7, "max_tokens": 99, "seed": 3}
    assert form == {"json": schema.response_format(verdict, "json_schema")["response_format"]["json_schema"]["schema"]}
    assert told.keys() <= set(API["SamplingParams"]) and "structured_outputs" in API["SamplingParams"]
    assert form.keys() <= set(API["StructuredOutputsParams"])


def every_answer() -> dict[str, type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {"words": Words, "rating": Rating, "clear": llm_writer.Clear}
    for name in tasks.names():
        task = tasks.load(name)
        found[f"comparison {name}"] = answer_type(len(task.curation.questions))
        if task.writer is not None:
            found[f"grid {name}"] = llm_writer.answer_type(task, task.layout(None).panels, 25)
    return found


@pytest.mark.parametrize("name", every_answer())
def test_every_answer_is_a_schema_of_words_that_decoding_can_be_held_to(name: str) -> None:
    told = Vllm(model="m").parameters(Question((user("?"),), every_answer()[name]))["structured_outputs"]["json"]
    seen: set[str] = set()

    def look(node: Any) -> None:
        if isinstance(node, dict):
            seen.update(node)
            for key, below in node.items():
                for one in below.values() if key == "properties" else [below]:
                    look(one)

    look(json.loads(json.dumps(told)))
    assert seen <= SCHEMA_WORDS and told["required"] == list(told["properties"]) and not told["additionalProperties"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extra": {"max_model_len": 9}}, "max_model_len"),
        ({"extra": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"gpu_memory_utilization": 1.5}, "less than or equal to 1"),
        ({"tensor_parallel_size": 0}, "greater than or equal to 1"),
        ({"tensor_parallel": 2}, "Extra inputs are not permitted"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Vllm(model="m", **values)


# ---- where it cannot run


def test_without_vllm_it_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with raises("dependency_missing", "owner/name", "pip install 'diptych[vllm]'", kind=UsageError):
        open_model(None, vllm=Vllm(model="owner/name"), cache=None)


@pytest.mark.parametrize(
    ("there", "fact"),
    [(0, "2 GPUs"), (1, "lower tensor_parallel_size")],
)
def test_without_enough_gpus_it_says_so_before_anything_is_opened(
    installed: list[LLM], monkeypatch: pytest.MonkeyPatch, there: int, fact: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with raises("device_unavailable", "owner/name", fact, kind=UsageError):
        open_model(None, vllm=Vllm(model="owner/name", tensor_parallel_size=2), cache=None)
    assert not installed


def test_an_engine_that_does_not_start_is_one_line(load: Make) -> None:
    with raises("model_unsupported", "less than desired GPU memory", "gpu_memory_utilization") as found:
        load(gpu_memory_utilization=0.99)
    assert "\n" not in str(found.value) and type(found.value) is UserError


def test_its_log_and_reports_are_set_only_where_nobody_has(load: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("VLLM_LOGGING_STREAM")
    load()
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "as the user has it"


# ---- what becomes of questions


def test_questions_are_put_in_batches_and_answers_kept(
    load: Make, installed: list[LLM], verdict: type[BaseModel], tmp_path: Path
) -> None:
    asked = questions(verdict, "one", "two", "three", "four", "five")
    with Cache(tmp_path / "a.sqlite") as cache:
        first = ask(load(cache, batch_size=3), asked)
        again = ask(load(cache), asked)
        warmer = ask(load(cache, temperature=0.5), asked[:1])
    assert [outcome.tag for outcome in first] == ["one", "two", "three", "four", "five"]
    assert {outcome.status for outcome in first} == {"answered"}
    assert [outcome.answer for outcome in again] == [outcome.answer for outcome in first]
    assert all(outcome.cached for outcome in again) and not warmer[0].cached
    assert [engine.calls for engine in installed] == [[3, 2], [], [1]]
    usage = first[0].usage
    assert (usage.calls, usage.output_tokens) == (1, len(first[0].text))  # a token a byte
    assert usage.input_tokens > len(schema.in_words(verdict))


def test_pictures_reach_the_model(load: Make, installed: list[LLM], verdict: type[BaseModel]) -> None:
    model = load()
    seen: list[list[list[float]]] = []
    engine = installed[0]
    see = engine.model.forward
    engine.model.forward = lambda **values: (
        seen.append(values["pixel_values"].mean((2, 3)).tolist()) if "pixel_values" in values else None,
        see(**values),
    )[1]
    ask(model, questions(verdict, "one"))
    ((red, blue),) = seen
    assert red[0] > blue[0] and red[2] < blue[2]


def test_what_only_validation_finds_wrong_goes_back_once_for_all_of_a_batch(load: Make, installed: list[LLM]) -> None:
    found = ask(load(), questions(Long, "one", "two"))
    assert installed[0].calls == [2, 2]
    assert {outcome.status for outcome in found} == {"undecided"} and found[0].usage.calls == 2
    assert "why: String should have at least 10 characters" in found[0].reason


def test_an_answer_that_is_cut_off_is_undecided(load: Make, installed: list[LLM], verdict: type[BaseModel]) -> None:
    (found,) = ask(load(max_tokens=5), questions(verdict, "one"))
    assert (found.status, found.usage.output_tokens, installed[0].calls) == ("undecided", 5, [1])
    assert "longer than max_tokens" in found.reason


def test_a_question_that_is_refused_costs_the_others_nothing(
    load: Make, installed: list[LLM], verdict: type[BaseModel]
) -> None:
    found = ask(load(max_model_len=2000), questions(verdict, "one", "two", "x" * 3000, "three"))
    assert [outcome.status for outcome in found] == ["answered", "answered", "failed", "answered"]
    assert found[2].reason.startswith("vLLM refuses this question (The decoder prompt")
    assert installed[0].calls == [2, 1]  # nothing is asked twice


def test_an_engine_that_breaks_blames_no_question_and_is_no_error_of_the_users(
    load: Make, installed: list[LLM], verdict: type[BaseModel], tmp_path: Path
) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        model = load(cache)
        installed[0].broken = RuntimeError("CUDA error: an illegal memory access")
        # In a Ray worker that gives the shard to another; here it ends the command.
        with pytest.raises(RuntimeError, match="CUDA error"):
            answers(model, questions(verdict, "one", "two"))
        assert len(cache) == 0


def test_an_engine_that_refuses_everything_stops_the_run(load: Make, verdict: type[BaseModel]) -> None:
    with raises("rows_failed", "20 questions", "vLLM refuses", kind=NobodyAnswers):
        answers(load(max_model_len=10), questions(verdict, *map(str, range(30))))


# ---- in a stage


def recipe_for(folder: Path, *sets: str) -> recipes.Recipe:
    base = [f"curate.vlm.vllm.model={folder}", "curate.thresholds.seam=-1", "curate.thresholds.same=0"]
    return recipes.load("pocket", [*base, "device=cpu", "threads=1", *sets])


def test_a_stage_judges_and_captions_with_it_and_asks_nothing_twice(
    installed: list[LLM], folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(folder, "curate.vlm.captions=true", "curate.vlm.vllm.temperature=0.8", "curate.vlm.votes=3")
    rows = [grid(n, (0.8, 0.4)) for n in range(3)]

    def judge() -> list[Any]:
        return list(CurateStage(recipe, tmp_path / "answers.sqlite").load()(rows))

    found = judge()
    kept = sum(pairs[0]["kept"] for pairs in found)
    assert kept and installed[0].calls == [9, 2 * kept], [pairs[0]["reason"] for pairs in found]
    for pairs in found:
        evidence = json.loads(pairs[0]["evidence"])
        one, other, _ = evidence["vlm"]["votes"]
        assert (one["status"], one["model"], len(one["key"])) == ("answered", folder.name, 64)
        assert set(one["answer"]) == {"step_1", "step_2", "step_3", "same", "confidence", "reason"}
        assert one["key"] != other["key"]
        if pairs[0]["kept"]:
            assert pairs[0]["caption"] == evidence["captions"]["answer"]["description"]
    assert judge() == found and installed[1].calls == []


def test_a_writer_drafts_with_it(installed: list[LLM], folder: Path, tmp_path: Path) -> None:
    from diptych.run.runner import PromptShards
    from diptych.stages.write.stage import WriteStage

    recipe = recipes.load("pocket", ["write.writer=llm", f"write.vllm.model={folder}", "write.near_duplicate=1"])
    stage = WriteStage(recipe, tmp_path / "answers.sqlite")
    results = stage.load()(PromptShards(0, 3, 3)[0])
    assert installed[0].calls[0] == 3 and len(results) == 3


def test_a_judge_of_pictures_asks_it_too(installed: list[LLM], folder: Path, tmp_path: Path) -> None:
    judge = Judge(vllm=Vllm(model=str(folder), temperature=1.0, max_model_len=20_000), repeats=2)
    scorer = judging.vlm(Evaluation(suite="folder", data="d", judge=judge), tmp_path)
    assert scorer.identity()["model"] == str(folder) and scorer.identity()["sampling"]["temperature"] == 1.0
    cells = [image_cell(Image.new("RGB", (32, 32), colour)) for colour in ("red", "blue")]
    (found,) = scorer.score([{"image": cells[0], "reference": cells[1], "prompt": "a cat"}])
    assert found is not None and installed[0].calls == [6]
    assert {name: len(votes) for name, votes in found["votes"].items()} == {"cp": 2, "pf": 2, "cp_debiased": 2}
    assert all(0 <= found[name] <= 1 for name in found["votes"])


@pytest.mark.parametrize(
    ("sets", "fact"),
    [
        (["judge.vllm.model=m"], r"judge\.vllm\.temperature"),
        (["judge.vllm.modle=m"], "'model'"),
        (["judge.vllm={model: m, temperature: 1.0}", "judge.local=x"], "endpoint, local or vllm"),
    ],
)
def test_a_judge_of_images_is_checked(sets: list[str], fact: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=fact):
        evaluation.make({"suite": "folder", "data": "d"}, tmp_path, sets)


# ---- as a recipe


MODEL = "curate.vlm.vllm.model=owner/name"


@pytest.mark.parametrize(
    ("sets", "fact"),
    [
        ([MODEL, "curate.vlm.local=x"], "endpoint .*local"),
        ([MODEL, "curate.vlm.votes=3"], r"vllm\.temperature"),
        ([MODEL, "curate.vlm.vllm.tensor_paralel_size=2"], "'tensor_parallel_size'"),
        ([MODEL, "ray.curate.gpus=0.5"], "0.8 .* gpu_memory_utilization .* 0.5"),
        ([MODEL, "ray.curate.gpus=0"], r"ray\.curate\.gpus"),
        ([MODEL, "curate.vlm.vllm.tensor_parallel_size=4", "ray.curate.gpus=2"], r"ray\.curate\.gpus.* 4"),
        (["write.writer=llm", "write.vllm.model=m", "ray.write.gpus=0"], r"ray\.write\.gpus"),
        (["write.vllm.model=m", "write.endpoint={base_url: 'http://a', model: m}"], "only one"),
    ],
)
def test_a_recipe_is_checked_before_anything_runs(sets: list[str], fact: str) -> None:
    with pytest.raises(UsageError, match=fact) as caught:
        recipes.load("pocket", sets)
    assert ": :" not in str(caught.value)


def test_a_share_of_a_gpu_is_enough_for_a_share_of_its_memory() -> None:
    half = [MODEL, "ray.curate.gpus=0.5", "curate.vlm.vllm.gpu_memory_utilization=0.45"]
    assert recipes.load("pocket", half).vllm("curate") is not None
    assert recipes.load("pocket", [MODEL, "ray.curate.gpus=2"]).vllm("write") is None


def test_runs_that_were_made_before_there_was_vllm_are_not_made_anew() -> None:
    endpoint = "{base_url: 'http://localhost:8000/v1', model: m}"
    recipe = recipes.load(
        "pocket",
        [
            "write.writer=llm",
            "write.count=8000",
            f"write.endpoint={endpoint}",
            "curate.thresholds.same=0.75",
            f"curate.vlm.endpoint={endpoint}",
        ],
    )
    before = {
        "write": "db5e4d1a166eda32a601c949a3d2b6d3e946bcd732e4ad953b900a88be371c75",
        "curate": "4194fa4b33cb7b40afb3fe9688dd2c9610bb5b50cd575a0e12d3d4f60aa20b22",
    }
    assert {stage: recipe.fingerprint(stage) for stage in before} == before
    other = recipes.load("pocket", ["write.writer=llm", f"write.endpoint={endpoint}", MODEL])
    assert other.fingerprint("curate") != before["curate"]


def test_the_command_ends_with_code_two_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    sets = ["write.writer=llm", "write.vllm.model=owner/name", "write.count=2"]
    assert call(["write", "pocket", "--out", str(tmp_path), *(part for text in sets for part in ("--set", text))]) == 2
    assert "pip install 'diptych[vllm]'" in capsys.readouterr().err
