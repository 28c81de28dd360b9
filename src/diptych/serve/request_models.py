"""Models of requests, one for each kind of job, shared by the HTTP API and the web app.

Names and meanings are OpenAI's where OpenAI has them, else those of `diptych generate`. Nothing is ignored silently: an
unknown name is rejected with the nearest known one, and so is a value of an OpenAI option that has no meaning here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from diptych.errors import UsageError
from diptych.serve.config import Limits
from diptych.student.sampling import CORRECTIONS, SCALES, SEED, Fit, check_options, check_prompt, field

if TYPE_CHECKING:
    from diptych.apps.story import Panel

WORDS = "x-words"  # in a field's schema: the allowed values in words, where there is only a pattern
JOB_ID = r"^[A-Za-z0-9_-]{8,64}$"
JOB_WORDS = "8 to 64 letters, digits, dashes or underscores"
# Options for OpenAI's models, accepted with the values that describe what happens anyway.
NEUTRAL = {
    "quality": ("auto", "standard", "low", "medium", "high"),
    "moderation": ("auto", "low"),
    "style": ("natural",),
    "output_compression": ("100",),
}
STEPS = {"low": 0.5, "high": 2.0}  # multiple of the model's default steps, by quality
ANSWER = {"wait", "stream", "partial_images", "response_format"}  # how to respond, not what to generate
OPTIONS = (*SCALES, *CORRECTIONS, "negative_prompt", "fit")


class JobRequest(BaseModel):
    """Fields of every request: OpenAI's, and those of diptych."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)  # `title` below: the name in the API's schema
    kind: ClassVar[str] = "images"  # of the job: images, relight, story

    model: str | None = Field(None, max_length=200, description="Any name; the server has one model.")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[0-9]{1,5}(x[0-9]{1,5})?)$",
        description="Image size: `WIDTHxHEIGHT`, one number for a square, or auto for the model's size.",
        json_schema_extra={WORDS: "WIDTHxHEIGHT in pixels, one number, or auto", "examples": ["64x64"]},
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="Return images as base64 (b64_json, the default) or as signed addresses (url)."
    )
    output_format: Literal["png", "webp", "jpeg"] = Field("png", description="File format; webp is lossless.")
    user: str | None = Field(None, max_length=200, description="Your user's name. Stored with the job, never used.")
    safety_identifier: str | None = Field(None, max_length=200, description="Stored like `user`.")
    stream: bool = Field(False, description="Respond with server-sent events in OpenAI's format.")
    partial_images: int = Field(0, ge=0, le=3, description="Number of previews in the stream.")
    background: str | None = Field(
        None,
        max_length=30,
        description="Color under a transparent reference; auto and opaque are white. Images are always opaque: for "
        "transparent, the response has `background: opaque` and a warning.",
        examples=["#ffffff"],
    )
    quality: str | None = Field(
        None,
        max_length=20,
        description="Number of steps: the model's default for auto, standard and medium, half of it for low, twice "
        "for high. `steps` takes precedence.",
        json_schema_extra={WORDS: "auto, low, medium, high or standard", "examples": ["high"]},
    )
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="No effect: the reference always has high fidelity. `image_guidance` sets its strength."
    )
    style: str | None = Field(
        None, max_length=20, description="Only natural is accepted.", json_schema_extra={WORDS: "natural"}
    )
    moderation: str | None = Field(
        None,
        max_length=20,
        description="No effect: the server does not moderate.",
        json_schema_extra={WORDS: "auto or low"},
    )
    output_compression: int | None = Field(None, ge=0, le=100, description="Only 100 is accepted.")

    seed: int | None = Field(None, ge=0, lt=2**63 - 100, description=SEED, examples=[7])
    steps: int | None = field("steps", examples=[20])
    guidance: float | None = field("guidance", le=1000)
    image_guidance: float | None = field("image_guidance", le=1000)
    text_guidance: float | None = field("text_guidance", le=1000)
    guidance_rescale: float | None = field("guidance_rescale")
    guidance_parallel: float | None = field("guidance_parallel")
    guidance_norm: float | None = field("guidance_norm", le=1000)
    negative_prompt: str | None = field(
        "negative_prompt", max_length=32_000, description="Needs image or text guidance above 1."
    )
    fit: Fit | None = field("fit")
    speed: Literal["plain", "exact", "fast", "fastest"] | None = Field(
        None, description="Speed preset; the default is the server's. See docs/speed.md."
    )
    job: str | None = Field(
        None,
        pattern=JOB_ID,
        description="Your name for the job. A repeated request with the same name returns the same job.",
        json_schema_extra={WORDS: JOB_WORDS, "examples": ["my-first-job"]},
    )
    wait: bool = Field(True, description="Wait for the images. False: respond at once with status 202 and the job.")

    def texts(self) -> list[str]:
        """Returns the prompt, light or panel of each image, in order."""
        raise NotImplementedError

    def seeds(self, first: int) -> list[int]:
        """Returns the images' seeds."""
        return [first + place for place in range(len(self.texts()))]

    def about(self) -> str:
        """Returns the job in one line."""
        return self.texts()[0]

    def words(self) -> list[str]:
        """Returns the texts that are not prompts."""
        return []

    def more(self) -> dict[str, Any]:
        """Returns what a job of this kind stores in addition."""
        return {}

    def matte(self) -> str:
        """Returns the color under a transparent reference."""
        return "white" if self.background in (None, "auto", "opaque", "transparent") else self.background  # pyright: ignore

    def pixels(self) -> tuple[int, int] | None:
        """Returns (width, height) in pixels, None for the model's size."""
        if self.size in (None, "auto"):
            return None
        sides = [int(side) for side in str(self.size).split("x")]
        return sides[0], sides[-1]

    def options(self) -> dict[str, Any]:
        """Returns the given arguments of `Student.generate`."""
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        return given | ({"size": self.pixels()} if self.pixels() else {})

    def resolved(self, sampling: Mapping[str, float], limits: Limits) -> Self:
        """Returns the request with the steps of its `quality`, for a model with these settings."""
        if self.steps is not None or self.quality not in STEPS:
            return self
        steps = max(1, round(sampling["steps"] * STEPS[self.quality]))
        return self.model_copy(update={"steps": min(steps, limits.steps)})

    def cost(self, sampling: Mapping[str, float], side: int) -> float:
        """Returns the work of one image; 1 for one of the model's size and default steps."""
        width, height = self.pixels() or (side, side)
        return round((self.steps or sampling["steps"]) / sampling["steps"] * width * height / side**2, 4)

    def remarks(self) -> list[str]:
        """Returns warnings about options that have no effect."""
        remarks = []
        if self.quality in STEPS and self.steps is not None:
            remarks.append(f"quality '{self.quality}' has no effect, because steps is given")
        if self.background == "transparent":
            remarks.append("background 'transparent' has no effect: the model generates opaque images")
        if self.input_fidelity == "low":
            remarks.append("input_fidelity 'low' has no effect; image_guidance is the strength of the reference")
        return remarks

    def identity(self) -> str:
        """Returns the content of the request as text, equal for requests that differ only in how to respond."""
        return f"{self.kind}{self.model_dump_json(exclude=ANSWER)}"

    def settings(self, with_reference: bool) -> str:
        """Returns the settings that images of one batch must share."""
        return json.dumps(
            [self.kind == RelightRequest.kind, self.options(), self.speed, with_reference], sort_keys=True
        )


class ImageRequest(JobRequest, title="Images"):
    """A request for images of a prompt."""

    prompt: str = Field(
        min_length=1,
        max_length=32_000,
        description="The whole content of the new image.",
        examples=["a cat on a beach at night"],
    )
    n: int = Field(1, ge=1, le=100, description="Number of images; their seeds count up.")

    def texts(self) -> list[str]:
        return [self.prompt] * self.n


class GenerationRequest(ImageRequest, title="Generation"):
    """`POST /v1/images/generations`: JSON."""

    reference: str | None = Field(
        None,
        max_length=40_000_000,
        description="Image of your subject, as base64 or a `data:` URL with base64. Without it, the images follow the "
        "prompt alone.",
    )


class EditRequest(ImageRequest, title="Edit"):
    """`POST /v1/images/edits` as JSON: the image as base64 or a `data:` URL, in `image` or in OpenAI's `images`."""

    image: str | list[str] | None = Field(None, description="Image of your subject, or a list of one.")
    images: list[dict[str, str]] | None = Field(
        None,
        max_length=16,
        description="List of one object with `image_url`.",
        examples=[[{"image_url": "data:image/png;base64,iVBORw0KGgo="}]],
    )

    def source(self) -> str:
        """Returns the one image. UsageError for none, for more than one, and for a file ID of OpenAI."""
        given = [self.image] if isinstance(self.image, str) else list(self.image or ())
        for item in self.images or ():
            if set(item) != {"image_url"}:
                raise UsageError("request_invalid", "images: each item must be an object with only image_url")
            given.append(item["image_url"])
        if len(given) != 1:
            raise UsageError("request_invalid", f"image: send one image, not {len(given)}")
        return given[0]

    def without_image(self) -> ImageRequest:
        """Returns the request without its image."""
        return ImageRequest(**self.model_dump(exclude={"image", "images"}))


Line = Annotated[str, Field(min_length=1, max_length=1000)]


class RelightRequest(JobRequest, title="Relight"):
    """`POST /v1/relights`: an image under one or several lights, each with `n` seeds."""

    kind: ClassVar[str] = "relight"

    light: list[Line] = Field(
        min_length=1, max_length=10, description="Description of the light. Repeat the field for several lights."
    )
    n: int = Field(1, ge=1, le=100, description="Number of images for each light; their seeds count up.")
    scene: str = Field("", max_length=1000, description="What the image shows, in words. It helps the model.")
    detail: float = Field(
        1.0, ge=0, le=1, description="Share of the fine detail that comes from your image; 0 keeps only the generated."
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
    """`POST /v1/stories`: a page of 4 to 10 panels of one character; see `diptych.apps.story`."""

    kind: ClassVar[str] = "story"

    panel: list[Line] = Field(
        min_length=1, max_length=20, description="Prompt of a panel, then `| caption`. Repeat the field 4 to 10 times."
    )
    title: str = Field("", max_length=200, description="Title above the first row.")
    captions: Literal["below", "inside", "none"] = Field("below", description="Place of the captions.")
    panel_seed: list[Annotated[int, Field(ge=0, lt=2**63)]] | None = Field(
        None,
        max_length=20,
        description="Seed of a panel. Repeat the field for each; by default they count up from `seed`.",
    )

    def panels(self) -> list[Panel]:
        """Returns the parsed panels."""
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


def check(request: JobRequest, limits: Limits, default_side: int) -> None:
    """Raises UsageError, which names the field, for a request beyond these limits or this model."""
    prompts, words = request.texts(), request.words()
    for text in prompts:
        check_prompt(text)
    for text in (*prompts, *words, request.negative_prompt or "", request.user or ""):
        if len(text) > limits.prompt_letters:
            sizes = f"{len(text):,} characters are over the limit of {limits.prompt_letters:,}"
            raise UsageError("text_invalid", f"prompt: {sizes}")
        if re.search(r"[\x00\ud800-\udfff]", text):
            raise UsageError("text_invalid", "prompt: contains characters that are not text (null or a lone surrogate)")
    if len(prompts) > limits.pictures:
        raise UsageError("request_invalid", f"n: at most {limits.pictures} images per request, not {len(prompts)}")
    if isinstance(request, StoryRequest):
        from diptych.apps.story import font_for

        request.seeds(0)
        font_for(words)
    if (request.steps or 0) > limits.steps:
        raise UsageError("request_invalid", f"steps: at most {limits.steps} are allowed, not {request.steps}")
    for name, accepted in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and str(value) not in accepted:
            raise UsageError("request_invalid", f"{name}: must be {' or '.join(accepted)} here, not '{value}'")
    check_options({**request.options(), "background": request.matte()})
    if (size := request.pixels()) is not None:
        limit = limits.enlarged * default_side**2
        if size[0] * size[1] > limit:
            side = int(limit**0.5)
            raise UsageError("size_invalid", f"size: {size[0]}x{size[1]} has more pixels than the limit, {side}x{side}")
