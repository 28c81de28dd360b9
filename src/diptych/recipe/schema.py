"""A recipe's keys: a section for each stage, every key typed, bounded and documented where it stands.

Defaults are the pocket world's. A key that is not known is refused (`recipe.load` names the nearest one that is).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from diptych.llm.endpoint import Endpoint
from diptych.llm.vllm import Vllm


class Section(BaseModel):
    """A part of a recipe: immutable, nothing unknown in it, no bool where a number is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes`, `no`, `on` and `off` as booleans, and pydantic would take them as 1 and 0.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a yes/no value makes no sense here")
        return value


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
    quotas: dict[str, Annotated[int, Field(ge=1)]] = {}
    """How many grids of each category in every so many: {person: 3, animal: 3, object: 4} is even in each ten."""
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


class Paint(Section):
    """Stage 2: the teacher draws grids."""

    steps: int = Field(default=20, ge=1, le=1000)
    """Sampling steps."""
    guidance: float = Field(default=3.5, ge=0)
    """Distilled guidance, an input of guidance-distilled teachers (FLUX.1-dev); the pocket teacher has none."""
    true_guidance: float = Field(default=2.0, ge=1)
    """Classifier-free guidance against the empty prompt; 1 is off, anything else doubles the cost."""
    images: int = Field(default=1, ge=1, le=1000)
    """Grids drawn of each prompt, each from its own noise."""
    batch_size: int = Field(default=16, ge=1)
    """Grids drawn at once. Part of the recipe: the last bits of a float sum depend on it."""
    format: Literal["png", "webp", "jpeg"] = "png"
    """What grids are kept as: `png` and `webp` lose nothing, `jpeg` (quality 95) is the quickest."""
    panel_size: int | None = Field(default=None, ge=16, le=4096)
    """Pixels of a panel's side; null is the teacher's own size, at most 512."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the teacher computes in. `auto` takes bfloat16 where it is faster, and is settled, like `device`, when a run
    is frozen."""
    memory: Literal["auto", "8", "12", "16", "24", "48", "80"] | None = None
    """Holds the teacher for a card of so many GiB, as `generate --memory` holds a student: below 24 its weights are
    quantized, so grids change. `auto` takes the largest that fits, and is settled, like `device`, when a run is frozen;
    null leaves every part as loaded, on the device."""
    speed: Literal["exact", "fast", "fastest"] | None = None
    """`generate --speed` for a teacher: `exact` compiles, fuses and precomputes, to float rounding; `fast` and
    `fastest` also skip every second step, or all but every fourth. null is the stock pipeline."""

    @field_validator("memory", mode="before")
    @classmethod
    def _named(cls, memory: Any) -> Any:
        """`memory: 24` is a number in YAML, and a name here."""
        return str(memory) if isinstance(memory, int) and not isinstance(memory, bool) else memory


class Thresholds(Section):
    """What keeps a pair. Changing one costs no new judge call: candidates keep their numbers."""

    same: float = 0.5
    """Least similarity of the two subjects, by the judge."""
    near_copy: float = Field(default=0.045, ge=0)
    """Least distance of the panels in pixels after alignment: below it the target is a copy."""
    seam: float = Field(default=0.0, ge=-1, le=1)
    """Least strength of the seam between the panels, -1 to 1: below it the image is no grid; -1 takes everything."""


class Vlm(Section):
    """A vision-language model that decides in stage 3, by the task's questions. `thresholds.same` is then on its scale:
    above 0.5 most votes say same, 1 is all of them and certain."""

    endpoint: Endpoint | None = None
    """An OpenAI-compatible server; its keys are in `llm/endpoint.py` and docs/endpoints.md."""
    local: str | None = Field(default=None, min_length=1)
    """Or a transformers model on this machine: a folder, or a hub name."""
    vllm: Vllm | None = None
    """Or a model that vLLM runs inside the stage; its keys are in `llm/vllm.py` and docs/endpoints.md."""
    votes: int = Field(default=1, ge=1, le=99)
    """Times each pair is asked about; the majority of valid answers decides. Several need a temperature above 0."""
    prefilter: float = Field(default=-1.0, ge=-1, le=1)
    """Least similarity, by the embedding model `judge`, of pairs it is asked about at all; -1 asks about every pair."""
    captions: bool = False
    """It also writes the captions and instructions of the pairs that are kept."""
    cache: str | None = Field(default=None, min_length=1)
    """SQLite file of its answers, which runs may share; null is answers.sqlite in the run's folder."""

    @property
    def model(self) -> str:
        """Who decides, by name."""
        asked = self.endpoint or self.vllm
        return self.local or (asked.model if asked else "")

    @model_validator(mode="after")
    def _one_that_can_vote(self) -> Vlm:
        named = {key: getattr(self, key) for key in ("endpoint", "local", "vllm") if getattr(self, key) is not None}
        if len(named) != 1:
            raise ValueError("name one model: either endpoint (base_url and model) or local or vllm (model)")
        (key,) = named
        if self.votes > 1 and getattr(named[key], "temperature", 0) == 0:
            fix = "a local model samples nothing" if key == "local" else f"set {key}.temperature, for instance to 0.7"
            raise ValueError(f"{self.votes} votes at temperature 0 are one and the same; {fix}, or ask for one vote")
        return self


class Classifier(Section):
    """An image classifier that looks at every panel: for writing in it, for what is not safe for work, …"""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Of the screen; a pair that it refuses has the reason `screen: NAME`."""
    model: str = Field(min_length=1)
    """A transformers image-classification model: a folder, or a hub name."""
    label: str = Field(min_length=1)
    """Which of the model's labels is meant."""
    most: float = Field(default=0.5, ge=0, le=1)
    """Largest probability of it that a panel may have."""


class Screens(Section):
    """Tests of single panels, before two are compared. A test that is null refuses nothing; its number is kept."""

    dark: float | None = Field(default=None, ge=0, le=1)
    """Least brightness, 0 to 1, of a panel's brightest twentieth; a night with a lamp in it passes 0.1."""
    flat: float | None = Field(default=None, ge=0, le=1)
    """Least contrast: standard deviation of the pixels around the panel's mean colour, white being 1."""
    blur: float | None = Field(default=None, ge=0, le=1)
    """Least sharpness, at no more than 256 pixels a side: 0 is one soft gradient, 1 is white noise."""
    classifiers: list[Classifier] = []
    """Models that look as well, in this order."""

    def values(self) -> dict[str, float | None]:
        """Every screen's threshold by its name, in the order of the tests; null where it refuses nothing."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name != "classifiers"}
        return own | {classifier.name: classifier.most for classifier in self.classifiers}

    def limits(self) -> dict[str, dict[str, float]]:
        """What refuses: `{"dark": {"least": 0.1}, "nsfw": {"most": 0.5}}`, in the order of the tests."""
        looked = {classifier.name for classifier in self.classifiers}
        return {
            name: {"most" if name in looked else "least": value}
            for name, value in self.values().items()
            if value is not None
        }

    @model_validator(mode="after")
    def _one_of_each_name(self) -> Screens:
        taken = set(type(self).model_fields)
        for classifier in self.classifiers:
            if classifier.name in taken:
                raise ValueError(f"the name '{classifier.name}' is taken; give each classifier one of its own")
            taken.add(classifier.name)
        return self


class Copies(Section):
    """Panels of one pair that show one picture though their pixels differ: another brightness or tint, mirrored, drawn
    anew. Not for aligned tasks, whose panels are meant to be alike."""

    hash: int | None = Field(default=6, ge=0, le=20)
    """Bits, of the 64 of a perceptual hash, by which the target may differ from the reference, or from its mirror
    image, and still be a copy. null measures and refuses nothing."""
    embedding: float | None = Field(default=None, gt=0, le=1)
    """Cosine of the two panels' embeddings, by `judge`, from which the target is a copy. null refuses nothing."""

    def limits(self) -> dict[str, float]:
        """What refuses: `{"hash": 4, "embedding": 0.98}`."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Duplicates(Section):
    """Pairs that show again what an earlier pair of the run shows: the first stays, the others are refused."""

    hash: int | None = Field(default=4, ge=0, le=8)
    """Bits, of the 64 of a perceptual hash, by which each panel may differ from the earlier pair's and still repeat it.
    null keeps the hashes and refuses nothing."""
    embedding: float | None = Field(default=None, gt=0, le=1)
    """Cosine from which each panel repeats the earlier pair's, by the embeddings of `judge`: what shows the same though
    it is drawn anew. null keeps the embeddings and refuses nothing."""


class Curate(Section):
    """Stage 3: panels are cut, screened, compared and captioned."""

    judge: str = Field(default="pocket", min_length=1)
    """An embedding model: `pocket`, a folder, or a hub name."""
    batch_size: int = Field(default=32, ge=1)
    """Grids judged at once."""
    format: Literal["png", "webp", "jpeg"] = "png"
    """What panels are kept as: `png` and `webp` lose nothing, `jpeg` (quality 95) is the quickest."""
    screens: Screens | None = None
    """Tests of single panels; null: none, and nothing is measured."""
    copies: Copies | None = None
    """Tests of a pair's two panels beside `thresholds.near_copy`; null: none, and nothing is measured."""
    duplicates: Duplicates | None = None
    """Repeats among the run's pairs; null: none are looked for, and neither hashes nor embeddings kept."""
    thresholds: Thresholds = Thresholds()
    vlm: Vlm | None = None
    """A vision-language model that decides in the place of `judge`; null: `judge` decides."""

    def further(self) -> dict[str, float | None]:
        """The limits of the tests that are there only if asked for: `{"screens.dark": 0.1, "copies.hash": 6}`; None is
        off."""
        found: dict[str, float | None] = {}
        if self.screens is not None:
            found |= {f"screens.{name}": value for name, value in self.screens.values().items()}
        for name, tests in (("copies", self.copies), ("duplicates", self.duplicates)):
            if tests is not None:
                found |= {f"{name}.{key}": value for key, value in tests.model_dump().items()}
        return found


OWN = "own"


class Data(Section):
    """A data set of pairs to train on."""

    path: str = Field(min_length=1)
    """`own` for the run's own pairs; else a run's folder, a folder of parquet files, or an fsspec address such as
    hf://datasets/OWNER/NAME, which is streamed."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch has each of its pairs: 2 is twice, 0.5 is half of them and the other half in the next."""
    columns: dict[Literal["conditioning", "image", "caption", "instruction"], str] = {}
    """What it calls its reference, target, target's caption and edit instruction; the usual names are known."""
    split: str | None = Field(default=None, min_length=1)
    """Name of the split to read, as the names of the files have it, or `all`. By default the files to train on are
    read, and test and validation files are left out."""


class Preference(Section):
    """The target, rather than what a degraded reference gives: subject fidelity optimization (arXiv 2506.03621), for a
    student that is trained already (`distill.init`)."""

    beta: float = Field(default=500.0, gt=0)
    """How soon a sample counts as preferred: its margin of squared errors, times this, goes through a sigmoid."""
    weight: float = Field(default=1.0, gt=0)
    """Of the preference loss beside that of the two panels."""
    pairs: int = Field(default=5000, ge=1)
    """Train on this many pairs at most: each needs a negative, drawn before the first step."""
    shrink: float = Field(default=0.125, gt=0, lt=1)
    """A negative's reference is shrunk to this share of its side and enlarged again."""
    drop_text: float = Field(default=0.5, ge=0, le=1)
    """Share of negatives drawn without text."""


class Distill(Section):
    """Stage 4: the teacher becomes a student, trained on the pairs."""

    data: list[Data] = []
    """What to train on; an empty list is the run's own pairs. Without `own` in it nothing is written, painted or
    curated."""

    conditioning: Literal["diptych", "channel"] = "diptych"
    """Where the reference is: the left panel of the canvas (the paper's), or the condition channels of the target panel
    itself, with no left panel (stock FLUX-Control's, which the paper compares with)."""
    condition_init: Literal["zeros", "teacher"] = "zeros"
    """Where the input layer's columns for the condition begin. `zeros`: the first step is the teacher's, as with
    FLUX-Control. `teacher`: they are the teacher's own columns for a picture, less what those make of the empty half,
    so that the reference is seen from the first step. A student that `init` names keeps its own."""
    buckets: list[tuple[int, int]] | Literal["auto"] = []
    """Panel sizes, [height, width] in pixels: each pair is trained at the one nearest to its target's shape. `auto` is
    diffusers' ladder of aspect ratios with the area of the square panel; an empty list is that square alone."""
    mode: Literal["full", "lora"] = "full"
    """Train every weight, or low-rank adapters and the widened input layer."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Precision of the frozen weights under `lora` (QLoRA). With `nf4`, rank 16, `micro_batch: 1` and checkpointing,
    FLUX.1 at 512 px is planned to fit a 24 GB card."""
    rank: int = Field(default=64, ge=1)
    """Of the adapters."""
    lora_targets: list[str] | str = "attention"
    """Which linears get adapters: a named set, or module name endings."""
    steps: int = Field(default=4000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs in a step, over all devices."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of training alone, so that runs on the same pairs can differ in nothing else; null is the recipe's."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Pairs in one forward pass of one process, in training and in validation; null is its whole share of the batch.
    Lower it until a step fits into memory: the step stays the same (gradient accumulation)."""
    sharding: Literal["none", "full"] = "none"
    """With several processes: the weights whole in each (DDP), or each with a part of them (FSDP2)."""
    offload: Literal["none", "blocks"] = "none"
    """Under `lora`: frozen blocks wait in main memory and come to the device one at a time. With rank 32 and
    `micro_batch: 1`, FLUX.1 at 512 px is planned to fit a 16 GB card. Needs `gradient_checkpointing`; the numbers stay
    the same."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    """`adamw8bit` is bitsandbytes'; `prodigy` finds its own rate: give it `learning_rate: 1`."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The optimizer's, after warm-up."""
    warmup: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """The optimizer's. Under `lora` it applies to the adapters, and not to the input layer, which is the teacher's."""
    betas: tuple[float, float] = (0.9, 0.99)
    """The optimizer's."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the forward pass computes in; weights being trained are float32. `auto` takes bfloat16 where it is faster,
    and is settled, like `device`, when a run is frozen."""
    reference_dropout: float = Field(default=0.05, ge=0, le=1)
    """Share of samples whose reference is replaced by the null reference (for image guidance)."""
    text_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose text is empty (for text guidance)."""
    both_dropout: float = Field(default=0.05, ge=0, le=1)
    """Share of samples without either."""
    instructions: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """Share of samples trained with the pair's instruction ("the same cat, in the snow") in place of the target's
    caption. `auto` is the task's own share: 1 for `instruction`, 0 for the other tasks that ship. It is resolved when a
    run is frozen."""
    left_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss on the left panel, which learns the identity mapping."""
    right_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss on the right panel, which learns the edit."""
    timestep_density: Literal["logit_normal", "uniform"] = "logit_normal"
    """How noise levels are drawn."""
    logit_mean: float = 0.0
    """Of the logit-normal density; above 0 is noisier."""
    logit_std: float = Field(default=1.0, gt=0)
    """Of the logit-normal density."""
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Timestep shift s·t / (1 + (s − 1)·t); 1 is none, `auto` is the one the base samples with at this resolution."""
    ema: float = Field(default=0.998, ge=0, lt=1)
    """Decay of the weights' moving average, which is what is saved; 0 is off."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints: at most what a kill costs. A checkpoint is also saved before each validation and each
    sample sheet."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    validate_every: int = Field(default=200, ge=1)
    """Steps between validations, at fixed noise levels."""
    validation_pairs: int = Field(default=32, ge=0)
    """Pairs held out of training for it."""
    export: Literal["last", "best"] = "last"
    """Whose weights become the student: the last step's, or those with the best validation loss. It may be changed when
    the training is finished."""
    sample_every: int = Field(default=1000, ge=0)
    """Steps between sample sheets; 0 is only the last."""
    init: str | None = None
    """A student to start from: under `full` any one, under `lora` a control-LoRA of the same rank and targets; null
    widens the teacher."""
    guidance: float = Field(default=1.0, ge=0)
    """What a guidance-distilled transformer (FLUX.1-dev) is told while it trains."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate after warm-up; with `constant`, `steps` can be raised later."""
    compile: bool = False
    """torch.compile the transformer: worth it on a GPU over thousands of steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, a third slower."""
    sample_pairs: int = Field(default=4, ge=1)
    """Rows of a sample sheet."""
    sample_steps: int = Field(default=20, ge=1, le=1000)
    """Sampling steps of a sample sheet."""
    sample_guidance: float = Field(default=3.5, ge=0)
    """Distilled guidance of a sample sheet, where the transformer takes one."""
    allow_distilled_teacher: bool = False
    """Train although the teacher is step-distilled (FLUX.1-schnell, a Turbo model). Otherwise it is refused:
    students that are trained from one draw gray or blocky images. Use the model that it was distilled from."""
    preference: Preference | None = None
    """A last stage, for a student named by `init`; null trains on the pairs alone."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where metrics go besides `metrics.jsonl`."""

    @model_validator(mode="after")
    def _shares(self) -> Distill:
        if self.reference_dropout + self.text_dropout + self.both_dropout > 1:
            raise ValueError("reference_dropout + text_dropout + both_dropout is over 1")
        if self.left_weight + self.right_weight == 0:
            raise ValueError("left_weight and right_weight are both 0: nothing would be learnt")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        if self.preference and not self.init:
            raise ValueError("preference: starts from a trained student; name it with init")
        if self.conditioning == "channel" and not self.right_weight:
            raise ValueError("conditioning: channel has no left panel, so right_weight must be above 0")
        if self.offload != "none" and (self.mode == "full" or self.quantize != "none" or self.sharding == "full"):
            raise ValueError("offload: blocks moves frozen weights: use mode: lora, quantize: none, sharding: none")
        if self.offload != "none" and self.preference:
            raise ValueError("offload: blocks does not go with preference, which swaps the weights that are trained")
        if self.offload != "none" and not self.gradient_checkpointing:
            raise ValueError(
                "offload: blocks needs gradient_checkpointing: true, else every block stays for its gradient"
            )
        if self.mode == "full" and self.quantize != "none":
            raise ValueError(f"quantize: {self.quantize} freezes the base, and mode: full trains it; use mode: lora")
        if self.sharding == "full" and self.optimizer != "adamw":
            raise ValueError(f"sharding: full takes optimizer: adamw, not {self.optimizer}")
        if self.sharding == "full" and self.quantize != "none":
            raise ValueError("sharding: full cannot split quantized weights; use quantize: none")
        return self


class Tuning(Section):
    """The baseline `tuned`: for each subject a LoRA of the teacher, trained on its reference alone (DreamBooth style).

    Every learning rate with every number of steps is a method of its own, `tuned-RATE-STEPS`."""

    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(default=[5e-4, 2e-3], min_length=1)
    """Constant ones, of AdamW."""
    steps: list[Annotated[int, Field(ge=1)]] = Field(default=[50, 100, 200], min_length=1)
    """A training of the most steps passes the others on its way, so only the last costs time."""
    rank: int = Field(default=16, ge=1)
    """Of the LoRA."""
    lora_targets: list[str] | str = "attention"
    """As `distill.lora_targets`."""
    batch_size: int = Field(default=8, ge=1)
    """Crops in a step."""
    crops: int = Field(default=16, ge=1)
    """Views of the reference: itself, its mirror image, then random crops of either."""
    prior: int = Field(default=0, ge=0)
    """Pictures of the kind that the teacher draws first and goes on learning from (prior preservation); 0 is off."""


class Adapter(Section):
    """The baseline `adapter`: the teacher with image tokens in its attention, trained on the run's pairs (IP-Adapter
    style). What is not said here is as in `distill`."""

    path: str | None = None
    """A folder with a trained `ip_adapter.safetensors`; null trains one on this run's pairs."""
    encoder: str = Field(default="pocket", min_length=1)
    """What sees the reference: a CLIP vision model's folder, or any embedding model's; `pocket` is the judge that
    curates. Never the one that scores."""
    steps: int | None = Field(default=None, ge=1)
    """Of training; null is `distill.steps`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Of training; null is `distill.learning_rate`."""
    scale: float = Field(default=1.0, ge=0)
    """Of the image tokens, in drawing."""


class StockPipeline(Section):
    """The baseline `pipeline`: any diffusers pipeline with a reference input (Kontext, FLUX.2, Qwen-Image-Edit, …)."""

    model: str | None = Field(default=None, min_length=1)
    """Its folder or hub name."""
    argument: str | None = Field(default=None, min_length=1)
    """What its call names the reference; null: found in its signature."""
    prompt: str = Field(default="{prompt}", pattern=r"\{prompt\}")
    """What it is told; a model that takes instructions may want more words around the prompt."""
    size: int | None = Field(default=None, ge=16)
    """Side in pixels of what it is given and asked for, before its pictures are brought to the suite's size; null is
    the suite's."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps; null is the pipeline's own number."""
    options: dict[str, Any] = {}
    """Further arguments of its call, for instance {guidance_scale: 2.5}."""


Method = Literal["student", "student_shipped", "text_only", "copy", "inpaint", "tuned", "adapter", "pipeline"]


class Relighting(Section):
    """How a student is guided when it relights; what is not said is as for everything else."""

    image_guidance: float | None = Field(default=None, ge=0)
    """Strength of the reference: less of it than for a subject, since the light is to go."""
    text_guidance: float | None = Field(default=None, ge=0)
    """Strength of the light that is asked for."""
    null_panel: Literal["shared", "own"] | None = None
    """The left panel that the null pass sees."""


class Evaluate(Section):
    """Stage 5: the student next to its baselines, on subjects nobody trained on."""

    suite: Literal["pocket", "none"] = "pocket"
    """References and prompts; `none` scores no subjects."""
    relight: int = Field(default=0, ge=0)
    """Held-out scenes that the student is asked to relight, three lights each, against the true answer; 0: none."""
    samples: int = Field(default=40, ge=2)
    """Held-out identities."""
    prompts: int = Field(default=5, ge=1)
    """Prompts for each of them."""
    methods: list[Method] = Field(default=["student", "student_shipped", "text_only", "copy", "inpaint"], min_length=1)
    """What is compared; `student_shipped` is the one in the package. See docs/baselines.md for the last three."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps. null, here and for the next three keys: the setting of the student's family; FLUX.1 students take
    28 steps with both guidance scales off, one forward a step, as the release. What is set is also what the trained
    student registers as its default, whatever `suite` is."""
    image_guidance: float | None = Field(default=None, ge=0)
    """Strength of the reference; 1 is off."""
    text_guidance: float | None = Field(default=None, ge=0)
    """Strength of the prompt; 1 is off."""
    null_panel: Literal["shared", "own"] | None = None
    """The left panel that the null pass of image guidance sees: `shared`, which shows the reference, as in the release,
    or `own`, a separate one (docs/student.md)."""
    relighting: Relighting = Relighting()
    """Where guidance differs for relighting."""
    true_guidance: float = Field(default=2.0, ge=1)
    """The teacher's classifier-free guidance, for the baselines that draw with it."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """One picture of each identity, prompt and seed."""
    batch_size: int = Field(default=16, ge=1)
    """Pictures drawn at once."""
    bootstrap: int = Field(default=1000, ge=10)
    """Resamplings for the 95 % intervals, over identities."""
    scorer: str = Field(default="pocket", min_length=1)
    """The judge that scores; never the one that curated."""
    reader: str = Field(default="pocket", min_length=1)
    """The model that reads what a picture shows."""
    yardsticks: bool = True
    """Also what the renderer draws in the methods' place, the judges' own errors, and how good curation was. They are
    the same for all runs of one study, and take about as long as scoring a method."""
    tuning: Tuning = Tuning()
    adapter: Adapter = Adapter()
    pipeline: StockPipeline = StockPipeline()


class Pool(Section):
    """The workers of one stage on a Ray cluster. Each is a process that holds the stage's models and works on one shard
    at a time."""

    workers: int | None = Field(default=None, ge=1, le=100_000)
    """How many at most. Those the cluster has no room for yet are what its autoscaler adds nodes for. null is as many
    as fit into it."""
    gpus: float | None = Field(default=None, ge=0, le=64)
    """Of a worker; 0.25 lets four share a GPU. null: as many as the stage's vLLM model is spread over; where it has
    none, one if `device` is a GPU and the stage computes on it, which `write` does not."""
    cpus: float = Field(default=1, ge=0, le=4096)
    """Of a worker. It is what Ray counts; what torch uses is `threads`."""
    memory: float | None = Field(default=None, gt=0)
    """GiB of a worker that Ray keeps free for it; null is not counted."""

    @field_validator("gpus")
    @classmethod
    def _whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("above one, a whole number of GPUs")
        return gpus


class Ray(Section):
    """What `--engine ray` asks of a cluster. No row depends on it, so a run may go on with other values."""

    write: Pool = Pool()
    paint: Pool = Pool()
    curate: Pool = Pool()
    evaluate: Pool = Pool()
    retries: int = Field(default=3, ge=0, le=100)
    """How often a shard is given to another worker when its own has died."""
    wait: float = Field(default=900, gt=0)
    """Seconds to wait for the first worker to start: nodes that are being added take minutes."""

    def pool(self, stage: str) -> Pool:
        """The pool of a stage; of `evaluate` for every method that is drawn, and for pictures that no recipe asks."""
        return getattr(self, stage) if stage in ("write", "paint", "curate") else self.evaluate


class Recipe(Section):
    """Everything that defines a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Of the run; its folder is runs/NAME unless told otherwise."""
    task: str = Field(default="subject", min_length=1)
    """A task's name, or a task file."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Every row's seed comes from this one and the row's id."""
    teacher: str = Field(default="pocket", min_length=1)
    """A text-to-image model: `pocket`, a folder, or a hub name."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")
    """`auto` takes the best that is there."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; null is torch's own choice. Bytes depend on it, so a run freezes it."""
    write: Write = Write()
    paint: Paint = Paint()
    curate: Curate = Curate()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    ray: Ray = Ray()

    @model_validator(mode="after")
    def _room_for_vllm(self) -> Recipe:
        for stage in ("write", "curate"):
            model, gpus = self.vllm(stage), self.ray.pool(stage).gpus
            if model is None or gpus is None:
                continue
            takes, most = model.tensor_parallel_size, model.gpu_memory_utilization
            shares = 0 < gpus < 1 and takes == 1
            if gpus >= takes or (shares and most <= gpus):
                continue
            fix = f"set gpu_memory_utilization to at most {gpus:g}" if shares else f"set it to {takes}, or null"
            raise ValueError(
                f"ray.{stage}.gpus: a worker gets {gpus:g}, and its vLLM model takes {most:g} of the memory of "
                f"{takes} GPU{'s' if takes > 1 else ''}; {fix}"
            )
        return self

    def vllm(self, stage: str) -> Vllm | None:
        """The model that vLLM runs in each worker of a stage, if any."""
        if stage == "write":
            return self.write.vllm if self.write.writer == "llm" else None
        return self.curate.vlm.vllm if stage == "curate" and self.curate.vlm else None

    @property
    def training_seed(self) -> int:
        """What training draws from."""
        return self.seed if self.distill.seed is None else self.distill.seed

    def draws_pairs(self) -> bool:
        """Whether it trains on pairs that it draws itself."""
        return not self.distill.data or any(data.path == OWN for data in self.distill.data)

    def values(self) -> dict[str, Any]:
        """All keys as plain values, in the order of this file."""
        return self.model_dump(mode="json")

    def dump(self) -> str:
        """All keys as YAML, defaults included: the same text for the same recipe."""
        import yaml

        return yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True, width=100)

    def flat(self) -> dict[str, Any]:
        """All keys with dots: `{"distill.steps": 4000, …}`."""
        return flat(self.values())

    def fingerprint(self, *keys: str) -> str:
        """sha256 over these keys and sections (`"write"`, `"seed"`, `"curate.judge"`); over everything if none."""
        values = self.values()
        for optional in ("vlm", "screens", "copies", "duplicates"):
            if values["curate"][optional] is None:
                # What was made before there were any is not made anew.
                del values["curate"][optional]
        for section in (values["write"], values["curate"].get("vlm")):
            if section and section["vllm"] is None:
                del section["vllm"]
        for section, key, default in (
            ("curate", "format", "png"),
            ("paint", "format", "png"),
            ("paint", "images", 1),
            ("paint", "memory", None),
            ("paint", "speed", None),
            ("write", "local", None),
            ("distill", "condition_init", "zeros"),
        ):
            if values[section][key] == default:
                del values[section][key]
        del values["ray"]  # where it is made is not what is made
        if keys:
            values = {key: _at(values, key) for key in keys}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def differences(self, other: Recipe) -> list[str]:
        """Keys with another value in `other`, with dots; those of `ray` decide no row and are left out."""
        mine, theirs = self.flat(), other.flat()
        # A key may be there in one alone: a section of the other that is null.
        differ = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        return [key for key in differ if not key.startswith("ray.")]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots: `{"distill": {"steps": 1}}` as `{"distill.steps": 1}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
