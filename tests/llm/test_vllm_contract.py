"""vLLM itself, where it is installed and there is a GPU: a tiny model judges pairs, by the names that the rest of the
tests only have on record. With DIPTYCH_VLLM_MODEL, a folder or a hub name, that model is asked instead.

    pip install 'diptych[vllm]' && python -m pytest tests/llm/test_vllm_contract.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from diptych.judges.vlm import VlmJudge
from diptych.llm import vllm
from diptych.llm.cache import Cache
from diptych.llm.question import Outcome, Question, user
from diptych.llm.vllm import Vllm
from diptych.recipe import tasks
from llm.conftest import Verdict
from llm.stand_in_vllm import API
from llm.test_local import save_tiny_llava

pytestmark = pytest.mark.skipif(bool(vllm.problem()), reason=vllm.problem())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    if named := os.environ.get("DIPTYCH_VLLM_MODEL"):
        return named
    made = tmp_path_factory.mktemp("llava")
    save_tiny_llava(made, head=64, longest=8192)  # its attention kernels know no smaller heads
    return str(made)


def test_the_names_on_record_are_those_of_the_version_that_is_installed() -> None:
    import inspect

    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

    names = {*inspect.signature(LLM).parameters, *inspect.signature(EngineArgs).parameters}
    told = Vllm(model="m", tensor_parallel_size=2).arguments(Path("m"))
    assert told.keys() <= names
    for kind, made in (("LLM.chat", LLM.chat), ("SamplingParams", SamplingParams)):
        assert set(API[kind]) <= set(inspect.signature(made).parameters)
    assert "json" in inspect.signature(StructuredOutputsParams).parameters


def test_a_model_judges_pairs_and_its_answers_keep_to_the_schema(model: str, tmp_path: Path) -> None:
    settings = Vllm(model=model, gpu_memory_utilization=0.4, max_tokens=1500, extra={"enforce_eager": True})
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    with Cache(tmp_path / "answers.sqlite") as cache:
        asked = vllm.load(settings, cache=cache, keep_undecided=True)
        pairs = [(f"pair-{n}", red, blue if n % 2 else red) for n in range(6)]
        judged = VlmJudge(asked, tasks.load("subject")).decide(pairs)
        votes = [judgement.votes[0] for judgement in judged.values()]
        # A random model may talk in a string until it is cut off; it cannot leave the schema.
        said = ["".join(vote.get("text", "").split()) for vote in votes]
        assert all("answer" in vote or text.startswith('{"step_1":"') for vote, text in zip(votes, said, strict=True))
        assert all(vote["tokens"][0] > 0 and vote["tokens"][1] > 0 for vote in votes)

        found: list[Outcome] = []
        easy = [Question((user("Same?", red, blue),), Verdict, str(n), sample=n) for n in range(4)]
        too_long = Question((user("x " * 20_000, red),), Verdict, "long")
        asked.ask_many([*easy[:2], too_long, *easy[2:]], found.append)
        assert [outcome.status == "failed" for outcome in found] == [False, False, True, False, False]
        calls = asked.spent.usage.calls
        again: list[Outcome] = []
        asked.ask_many(easy, again.append)
        assert asked.spent.usage.calls == calls and all(outcome.cached for outcome in again)
