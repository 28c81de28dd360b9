"""The recipe's section `write`: stage 1, grid prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diptych.llm.endpoint import Endpoint
from diptych.llm.vllm import Vllm
from diptych.recipe.schema.base import Section


class Write(Section):
    """Stage 1: grid prompts."""

    writer: Literal["grammar", "llm"] = "grammar"
    """What writes them: `grammar` draws from the task's templates and a vocabulary, and needs no language model; `llm`
    asks the one at `endpoint`, in `local` or in `vllm`, by the task's brief."""
    grammar: str = Field(default="auto", min_length=1)
    """Whose words the grammar uses: `pocket` those of the pocket world's teacher, `photo` a vocabulary for teachers
    that know English, or a vocabulary file. `auto` asks the teacher: `pocket` if it reads less text than CLIP does."""
    layout: str | None = Field(default=None, pattern=r"^[1-4]x[1-4]$")
    """Which of the task's grids, rows x columns, for instance 2x2; null is the task's first."""
    count: int = Field(default=4000, ge=1, le=100_000_000)
    """Grids to ask for."""
    shard_size: int = Field(default=100, ge=1)
    """Rows of a shard: what is published whole, and at most what a kill costs. With `llm` also what is asked together,
    and what near duplicates are looked for in."""
    endpoint: Endpoint | None = None
    """An OpenAI-compatible server; its keys are in `llm/endpoint.py` and docs/endpoints.md."""
    local: str | None = Field(default=None, min_length=1)
    """Or a transformers language model on this machine, with or without vision: a folder, or a hub name."""
    vllm: Vllm | None = None
    """Or a language model that vLLM runs inside the stage; its keys are in `llm/vllm.py` and docs/endpoints.md."""
    cache: str | None = Field(default=None, min_length=1)
    """SQLite file of its answers, which runs may share; null is answers.sqlite in the run's folder."""
    captions: str | None = Field(default=None, min_length=1)
    """Seed captions that `llm` is inspired by: a .txt, .jsonl or .parquet file, a folder of them, or an address such as
    hf://datasets/OWNER/NAME. Each is used once before any is used again. Without them a model repeats itself."""
    caption_column: str = Field(default="caption", min_length=1)
    """Where JSONL and parquet hold the caption."""
    category_column: str | None = Field(default=None, min_length=1)
    """Where they hold its category, if `quotas` go by it; null lets the model find a subject of the row's category."""
    clear_subject: bool = False
    """Ask first whether a caption names one clear subject, one more call a row; rows whose caption does not, fail."""
    quotas: dict[str, Annotated[int, Field(ge=1)]] = Field(default={})
    """Grids per category in each round: {person: 3, animal: 3, object: 4} makes rounds of ten grids."""
    panel_words: int = Field(default=25, ge=4, le=100)
    """Most words of what `llm` says of one panel; it gets one chance to shorten."""
    near_duplicate: float = Field(default=0.5, gt=0, le=1)
    """Most that two drafts of `llm` in a shard may share (Jaccard, word pairs); the later fails. 1 lets all pass."""
    subject_share: float = Field(default=0.2, gt=0, le=1)
    """Most of a shard's grids (but always three) that may show one subject; later ones fail. 1 lets all pass."""

    @property
    def model(self) -> str:
        """The language model that writes, by name; "" if none does."""
        asked = self.endpoint or self.vllm
        return self.local or (asked.model if asked else "")

    @model_validator(mode="after")
    def _asks_somebody(self) -> Write:
        named = [one for one in (self.endpoint, self.local, self.vllm) if one is not None]
        if self.writer == "llm" and not named:
            raise ValueError(
                "the writer llm needs an endpoint: {base_url: http://localhost:8000/v1, model: NAME}, or a model on "
                "this machine in local or vllm"
            )
        if len(named) > 1:
            raise ValueError("name one model: either endpoint or vllm or local")
        if self.local is not None and self.captions is None:
            raise ValueError("local samples nothing, so without captions it would write the same grid each time")
        if self.category_column and not (self.captions and self.quotas):
            raise ValueError("category_column needs captions, and quotas that go by it")
        if self.clear_subject and not self.captions:
            raise ValueError("clear_subject looks at captions, and there are none")
        return self
