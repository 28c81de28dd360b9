"""What somebody asks for, checked: one model for each kind of job, the same for the HTTP API and for the web app.

Names and meanings are OpenAI's where OpenAI has them, else those of `diptych generate`. An unknown name is refused with
the nearest known one, and so is an OpenAI option whose value this model cannot honour: nothing is ignored in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from diptych.errors import UsageError
from diptych.serve.config import Limits
from diptych.student.sampling import SCALES, SEED, Fit, check_options, check_prompt, field

if TYPE_CHECKING:
    from diptych.apps.story import Panel

WORDS = "x-words"  # in a field's schema: what it may hold, where its pattern says that to machines alone
JOB_ID = r"^[A-Za-z0-9_-]{8,64}$"
JOB_WORDS = "8 to 64 letters, digits, dashes or underscores"
# OpenAI's options that say how its own models draw; taken where they ask for what happens anyway.
NEUTRAL = {
    "quality": ("auto", "standard", "low", "medium", "high"),
    "moderation": ("auto", "low"),
    "style": ("natural",),
    "output_compression": ("100",),
}
STEPS = {"low": 0.5, "high": 2.0}  # of the model's own, by quality
ANSWER = {"wait", "stream", "partial_images", "response_format"}  # how to answer, not what to draw
OPTIONS = (*SCALES, "negative_prompt", "fit")


class JobRequest(BaseModel):
    """What every request may say: OpenAI's fields, and diptych's own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)  # `title` below: the name in the API's schema
    kind: ClassVar[str] = "images"  # of the job: images, relight, story

    model: str | None = Field(None, max_length=200, description="Any name: the server has one model.")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[0-9]{1,5}(x[0-9]{1,5})?)$",
        description="`WIDTHxHEIGHT`, one number, or auto.",
        json_schema_extra={WORDS: "WIDTHxHEIGHT in pixels, one number, or auto", "examples": ["64x64"]},
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json, the default, or url.")
    output_format: Literal["png", "webp", "jpeg"] = Field("png", description="webp is lossless.")
    user: str | None = Field(None, max_length=200, description="Kept with the job, and read by nobody.")
    safety_identifier: str | None = Field(None, max_length=200, description="Kept like `user`.")
    stream: bool = Field(False, description="Answer with server-sent events, as OpenAI does.")
    partial_images: int = Field(0, ge=0, le=3, description="Previews in the stream.")
    background: str | None = Field(
        None,
        max_length=30,
        description="Colour under a transparent reference; auto and opaque are white. Images are always opaque: with "
        "transparent, the answer says `background: opaque` and has a warning.",
        examples=["#ffffff"],
    )
    quality: str | None = Field(
        None,
        max_length=20,
        description="auto, standard and medium take the model's own number of steps, low half of it, high twice as "
        "many. `steps` goes before it.",
        json_schema_extra={WORDS: "auto, low, medium, high or standard", "examples": ["high"]},
    )
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="The subject always comes from the reference, as high asks; `image_guidance` is its strength."
    )
    style: str | None = Field(None, max_length=20, description="Only natural.", json_schema_extra={WORDS: "natural"})
    moderation: str | None = Field(
        None,
        max_length=20,
        description="Nothing is moderated here.",
        json_schema_extra={WORDS: "auto or low"},
    )
    output_compression: int | None = Field(None, ge=0, le=100, description="Only 100.")

    seed: int | None = Field(None, ge=0, lt=2**63 - 100, description=SEED, examples=[7])
    steps: int | None = field("steps", examples=[20])
    guidance: float | None = field("guidance", le=1000)
    image_guidance: float | None = field("image_guidance", le=1000)
    text_guidance: float | None = field("text_guidance", le=1000)
    negative_prompt: str | None = field(
        "negative_prompt", max_length=32_000, description="Needs image or text guidance above 1."
    )
    fit: Fit | None = field("fit")
    speed: Literal["plain", "exact", "fast", "fastest"] | None = Field(None, description="See docs/speed.md.")
    job: str | None = Field(
        None,
        pattern=JOB_ID,
        description="Your own name for the job; sent again, the same request finds the same job.",
        json_schema_extra={WORDS: JOB_WORDS, "examples": ["my-first-job"]},
    )
    wait: bool = Field(True, description="False: answer at once, 202, with the job to ask for later.")

    def texts(self) -> list[str]:
        """What each picture shows, in order: a job has as many pictures as texts."""
        raise NotImplementedError

    def seeds(self, first: int) -> list[int]:
        """The pictures' seeds."""
        return [first + place for place in range(len(self.texts()))]

    def about(self) -> str:
        """The job in a line."""
        return self.texts()[0]

    def words(self) -> list[str]:
        """The texts of it that are not prompts."""
        return []

    def more(self) -> dict[str, Any]:
        """What a job of this kind remembers beside."""
        return {}

    def colour(self) -> str:
        """What lies under a transparent reference."""
        return "white" if self.background in (None, "auto", "opaque", "transparent") else self.background  # pyright: ignore

    def pixels(self) -> tuple[int, int] | None:
        """(width, height) in pixels, None for the model's own."""
        if self.size in (None, "auto"):
            return None
        sides = [int(side) for side in str(self.size).split("x")]
        return sides[0], sides[-1]

    def options(self) -> dict[str, Any]:
        """The arguments of `Student.generate` that were given."""
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        return given | ({"size": self.pixels()} if self.pixels() else {})

    def resolved(self, sampling: Mapping[str, float], limits: Limits) -> Self:
        """With the steps that `quality` asks of a model with these settings."""
        if self.steps is not None or self.quality not in STEPS:
            return self
        steps = max(1, round(sampling["steps"] * STEPS[self.quality]))
        return self.model_copy(update={"steps": min(steps, limits.steps)})

    def cost(self, sampling: Mapping[str, float], side: int) -> float:
        """The work of one picture, 1 for one of a model's own size and steps."""
        width, height = self.pixels() or (side, side)
        return round((self.steps or sampling["steps"]) / sampling["steps"] * width * height / side**2, 4)

    def remarks(self) -> list[str]:
        """What of the request does nothing."""
        found = []
        if self.quality in STEPS and self.steps is not None:
            found.append(f"quality '{self.quality}' does nothing, because steps is given")
        if self.background == "transparent":
            found.append("background 'transparent' does nothing: the model makes opaque images")
        if self.input_fidelity == "low":
            found.append("input_fidelity 'low' does nothing; image_guidance is the strength of the reference")
        return found

    def drawing(self) -> str:
        """All that is asked to be drawn, in one text: equal for requests that differ in how they are answered."""
        return f"{self.kind}{self.model_dump_json(exclude=ANSWER)}"

    def settings(self, with_reference: bool) -> str:
        """What must be equal for pictures to be drawn together."""
        return json.dumps(
            [self.kind == RelightRequest.kind, self.options(), self.speed, with_reference], sort_keys=True
        )


class ImageRequest(JobRequest, title="Asked"):
    """A request for pictures of a prompt."""

    prompt: str = Field(
        min_length=1,
        max_length=32_000,
        description="What the new picture shows, the whole of it.",
        examples=["a cat on a beach at night"],
    )
    n: int = Field(1, ge=1, le=100, description="Pictures; the seeds count up.")

    def texts(self) -> list[str]:
        return [self.prompt] * self.n


class GenerationRequest(ImageRequest, title="Generation"):
    """`POST /v1/images/generations`: JSON."""

    reference: str | None = Field(
        None,
        max_length=40_000_000,
        description="The picture of your subject, base64 or a `data:` URL with base64. Without it the prompt alone "
        "says what is drawn: a teacher's way, without any identity to keep.",
    )


class EditRequest(ImageRequest, title="Edit"):
    """`POST /v1/images/edits` as JSON: the picture as base64 or a `data:` URL, in `image` or, as OpenAI has it,
    in `images`."""

    image: str | list[str] | None = Field(None, description="The picture of your subject, or a list of one.")
    images: list[dict[str, str]] | None = Field(
        None,
        max_length=16,
        description="A list of one object with `image_url`.",
        examples=[[{"image_url": "data:image/png;base64,iVBORw0KGgo="}]],
    )

    def source(self) -> str:
        """The one picture. UsageError if there is none, or more than one, or if it is to be fetched from OpenAI."""
        given = [self.image] if isinstance(self.image, str) else list(self.image or ())
        for each in self.images or ():
            if set(each) != {"image_url"}:
                raise UsageError("images: each is an object with image_url alone; this server keeps no files")
            given.append(each["image_url"])
        if len(given) != 1:
            raise UsageError(f"image: send one picture, not {len(given)}")
        return given[0]

    def asked(self) -> ImageRequest:
        """The request without its picture."""
        return ImageRequest(**self.model_dump(exclude={"image", "images"}))


Line = Annotated[str, Field(min_length=1, max_length=1000)]


class RelightRequest(JobRequest, title="Relit"):
    """`POST /v1/relights`: a picture under one or several lights, each with `n` seeds."""

    kind: ClassVar[str] = "relight"

    light: list[Line] = Field(
        min_length=1, max_length=10, description="How the scene is lit, in words; repeated for several lights."
    )
    n: int = Field(1, ge=1, le=100, description="Pictures of each light; the seeds count up.")
    scene: str = Field("", max_length=1000, description="What the picture shows, for a model that is surer when told.")
    detail: float = Field(
        1.0, ge=0, le=1, description="How much of the fine detail is the picture's own; 0 takes it as it is drawn."
    )

    def texts(self) -> list[str]:
        return [light for light in self.light for _ in range(self.n)]

    def seeds(self, first: int) -> list[int]:
        return [first + place for _ in self.light for place in range(self.n)]

    def about(self) -> str:
        return "; ".join(self.light)

    def words(self) -> list[str]:
        return [self.scene]

    def more(self) -> dict[str, Any]:
        return {"scene": self.scene, "detail": self.detail}


class StoryRequest(JobRequest, title="Story"):
    """`POST /v1/stories`: a page of 4 to 10 panels of one character; `diptych.apps.story` says which."""

    kind: ClassVar[str] = "story"

    panel: list[Line] = Field(
        min_length=1, max_length=20, description="What a panel shows `| what is written with it`; repeated, 4 to 10."
    )
    title: str = Field("", max_length=200, description="Stands above the first row.")
    captions: Literal["below", "inside", "none"] = Field("below", description="Where the words stand.")
    panel_seed: list[Annotated[int, Field(ge=0, lt=2**63)]] | None = Field(
        None, max_length=20, description="A seed for each panel, repeated; without them they count up from `seed`."
    )

    def panels(self) -> list[Panel]:
        """The panels, read."""
        from diptych.apps.story import read_panel

        return [read_panel(line) for line in self.panel]

    def texts(self) -> list[str]:
        return [panel.prompt for panel in self.panels()]

    def seeds(self, first: int) -> list[int]:
        from diptych.apps.story import check

        return check(self.panels(), self.panel_seed or first, self.captions)

    def about(self) -> str:
        return self.title or self.texts()[0]

    def words(self) -> list[str]:
        return [self.title, *(panel.caption for panel in self.panels())]

    def more(self) -> dict[str, Any]:
        return {"panels": self.panel, "title": self.title, "captions": self.captions}


def check(asked: JobRequest, limits: Limits, default_side: int) -> None:
    """UsageError, which names the field, for what a server with these limits and this model does not do."""
    shown, said = asked.texts(), asked.words()
    for text in shown:
        check_prompt(text)
    for text in (*shown, *said, asked.negative_prompt or "", asked.user or ""):
        if len(text) > limits.prompt_letters:
            most = f"{limits.prompt_letters:,}"
            raise UsageError(f"prompt: at most {most} characters are allowed, not {len(text):,}")
        if re.search(r"[\x00\ud800-\udfff]", text):
            raise UsageError("prompt: it has characters that are no text (null, or half of a surrogate pair)")
    if len(shown) > limits.pictures:
        raise UsageError(f"n: at most {limits.pictures} pictures are allowed at once, not {len(shown)}")
    if isinstance(asked, StoryRequest):
        from diptych.apps.story import font_for

        asked.seeds(0)
        font_for(said)
    if (asked.steps or 0) > limits.steps:
        raise UsageError(f"steps: at most {limits.steps} are allowed, not {asked.steps}")
    for name, taken in NEUTRAL.items():
        value = getattr(asked, name)
        if value is not None and str(value) not in taken:
            raise UsageError(f"{name}: '{value}' is nothing this model can do; leave it out, or {' or '.join(taken)}")
    check_options({**asked.options(), "background": asked.colour()})
    if (size := asked.pixels()) is not None:
        most = limits.enlarged * default_side**2
        if size[0] * size[1] > most:
            side = int(most**0.5)
            raise UsageError(
                f"size: {size[0]}x{size[1]} is too large; this model draws {default_side}x{default_side}, and at most "
                f"as many pixels as {side}x{side} has are allowed"
            )
