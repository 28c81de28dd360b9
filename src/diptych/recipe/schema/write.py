"""Section `write` of a recipe: stage 1, grid prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diptych.llm.endpoint import Endpoint
from diptych.llm.vllm import Vllm
from diptych.recipe.schema.base import Section


class Write(Section):
    """Stage 1: write the prompts of the grids."""

    writer: Literal["grammar", "llm"] = "grammar"
    """What writes the prompts. `grammar` fills the task's templates from a vocabulary and needs no language model.
    `llm` uses the language model in `endpoint`, `local` or `vllm`, with the task's brief."""
    grammar: str = Field(default="auto", min_length=1)
    """Vocabulary of the grammar: `pocket` for the pocket teacher, `photo` for teachers that understand English, or a
    vocabulary file. `auto` is `pocket` if the teacher reads less text than CLIP, otherwise `photo`."""
    layout: str | None = Field(default=None, pattern=r"^[1-4]x[1-4]$")
    """Layout of the grids, rows x columns, for instance 2x2. It must be one of the task's layouts. null is the task's
    first."""
    count: int = Field(default=4000, ge=1, le=100_000_000)
    """Number of prompts to write."""
    shard_size: int = Field(default=100, ge=1)
    """Rows in a shard. A shard is published whole, so an interrupted run loses at most one. With `llm`, the prompts of
    one shard are requested together and compared for near duplicates."""
    endpoint: Endpoint | None = None
    """OpenAI-compatible server with the language model that writes. `docs/endpoints.md` explains its keys."""
    local: str | None = Field(default=None, min_length=1)
    """Transformers language model on this machine that writes, with or without vision: a folder, or a hub name."""
    vllm: Vllm | None = None
    """Language model that writes and that vLLM runs inside the stage. `docs/endpoints.md` explains its keys."""
    cache: str | None = Field(default=None, min_length=1)
    """SQLite file for the language model's replies. Several runs may share it. null is `answers.sqlite` in the run's
    folder."""
    captions: str | None = Field(default=None, min_length=1)
    """Seed captions that inspire the `llm` writer: a .txt, .jsonl or .parquet file, a folder of such files, or an
    address such as hf://datasets/OWNER/NAME. Each caption is used once before any is used again. Without captions a
    model repeats itself."""
    caption_column: str = Field(default="caption", min_length=1)
    """Column of `captions` (JSONL and parquet) that holds the caption."""
    category_column: str | None = Field(default=None, min_length=1)
    """Column of `captions` (JSONL and parquet) that holds the category which `quotas` count. null lets the model find a
    subject of the row's category in the caption."""
    clear_subject: bool = False
    """First check with the model that a caption names one clear subject. This costs one more call for each row; rows
    without a clear subject fail."""
    quotas: dict[str, Annotated[int, Field(ge=1)]] = Field(default={})
    """Grids per category in each round of the `llm` writer. {person: 3, animal: 3, object: 4} makes rounds of ten
    grids."""
    panel_words: int = Field(default=25, ge=4, le=100)
    """Maximum number of words that the `llm` writer may use for one panel. A longer text is sent back once to be
    shortened."""
    near_duplicate: float = Field(default=0.5, gt=0, le=1)
    """Maximum overlap of two drafts of the `llm` writer in a shard (Jaccard index of their word pairs). The later of
    two drafts above it fails. 1 accepts all."""
    subject_share: float = Field(default=0.2, gt=0, le=1)
    """Maximum share of a shard's grids that may show one subject, for the `llm` writer. Three are always allowed; later
    ones fail. 1 accepts all."""

    @property
    def model(self) -> str:
        """The language model that writes, by name; "" if none does."""
        served = self.endpoint or self.vllm
        return self.local or (served.model if served else "")

    @model_validator(mode="after")
    def _one_model(self) -> Write:
        named = [one for one in (self.endpoint, self.local, self.vllm) if one is not None]
        if self.writer == "llm" and not named:
            raise ValueError(
                "the writer llm needs a language model: set endpoint: {base_url: http://localhost:8000/v1, "
                "model: NAME}, local, or vllm"
            )
        if len(named) > 1:
            raise ValueError("endpoint, local and vllm each name a model; set only one of them")
        if self.local is not None and self.captions is None:
            raise ValueError("a local model does not sample, so every grid would be the same; set captions")
        if self.category_column and not (self.captions and self.quotas):
            raise ValueError("category_column needs captions and quotas; set both, or remove it")
        if self.clear_subject and not self.captions:
            raise ValueError("clear_subject checks captions; set captions, or remove it")
        return self
