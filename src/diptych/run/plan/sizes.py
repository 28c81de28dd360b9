"""The sizes of the teacher's parts, from its configs: in a folder, in the hub's cache or in teachers.yaml.

No weights are read and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diptych.errors import UsageError, UserError, nearest
from diptych.recipe.schema import Recipe
from diptych.student.families import teachers
from diptych.utils.documents import parse_yaml, read_text
from diptych.utils.opening import INDEX, folder_of, read, read_file

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
FAMILY, PIPELINE = "FluxTransformer2DModel", "FluxPipeline"
MAX_PANEL, MAX_TEXT_TOKENS = 512, 512  # as in stages/paint.py


@cache
def known() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the published configs of teachers by hub name and part."""
    path = Path(__file__).with_name("teachers.yaml")
    return parse_yaml(read_text(path), str(path))


@dataclass(frozen=True)
class TeacherSizes:
    """A FLUX teacher's configs, their source, and the maximum number of text tokens."""

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    source: str
    text_tokens: int
    index: Mapping[str, Any]
    """The contents of model_index.json."""

    @property
    def call(self) -> teachers.Traits:
        """The guidance arguments of its pipeline."""
        return teachers.of(str(self.index["_class_name"]))

    @property
    def distilled(self) -> teachers.Distilled | None:
        """The evidence that it is step-distilled; None without any."""
        return teachers.examine(self.name)

    @property
    def factor(self) -> int:
        """Pixels on a latent's side."""
        return 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)

    def panel(self, size: int | None) -> int:
        """Return a panel's side in pixels, as in painting. Raises UsageError if the teacher cannot generate it."""
        size = size or min(MAX_PANEL, int(self.configs["vae"].get("sample_size") or MAX_PANEL))
        if size % (2 * self.factor):
            why = f"paint.panel_size {size} is not a multiple of {2 * self.factor} pixels, as this teacher needs."
            raise UsageError("size_invalid", why)
        return size


@dataclass(frozen=True)
class Counts:
    """Parameters of a teacher's parts, and the shapes of its transformer's tensors."""

    shapes: Mapping[str, tuple[int, ...]]
    transformer: int
    text: int
    vae: int


def find(recipe: Recipe) -> TeacherSizes:
    """Return the sizes of the recipe's teacher. Raises UserError if they are unknown, or it is not a FLUX teacher."""
    name = recipe.teacher
    folder = folder_of(name)
    configs = {part: config for part in PARTS if (config := read(name, f"{part}/config.json"))}
    if folder is not None:
        lengths = [read_file(path) for path in folder.glob("tokenizer*/tokenizer_config.json")]
        source = "its config files"
    elif {"transformer", "vae"} <= configs.keys():
        lengths, source = [], "its config files in the hub's cache"
    elif published := {key.lower(): values for key, values in known().items()}.get(name.partition("@")[0].lower()):
        configs, lengths, source = published, [], "its published config"
    else:
        raise UserError(
            "model_not_found",
            f"The teacher '{name}' is not on this machine, and its sizes are not known (known: pocket, "
            f"{', '.join(known())}). Pass a local folder{nearest(name, ['pocket', *known()])}",
        )
    family = configs.get("transformer", {}).get("_class_name", "no diffusers pipeline")
    if family != FAMILY or "vae" not in configs:
        message = f"'{name}' ({family}) is not a FLUX.1 teacher, and only these can be planned and distilled."
        raise UserError("model_unsupported", message)
    index = {"_class_name": PIPELINE} | read(name, INDEX)
    longest = max((int(tokenizer.get("model_max_length") or 0) for tokenizer in lengths), default=0)
    return TeacherSizes(name, configs, source, min(MAX_TEXT_TOKENS, longest or MAX_TEXT_TOKENS), index)


def count(teacher: TeacherSizes) -> Counts:
    """Count the parameters of a teacher's parts."""
    shapes = memory_shapes(teacher)
    transformer = shapes.tensors("transformer")
    text = sum(shapes.tensors(part).count for part in shapes.texts())
    return Counts(transformer.shapes, transformer.count, text, shapes.tensors("vae").count)


def painting_memory(
    teacher: TeacherSizes,
    size: tuple[int, int],
    rows: int,
    cpu: bool,
    bytes_: int,
    name: str | None,
    room: float | None,
) -> tuple[int, str | None, str]:
    """Return the maximum bytes for generating `rows` images of `size` (height, width) at once.

    Args:
        name: `paint.memory`.
        room: the device's bytes, for `auto`. None stands for a CPU, whose memory is not limited here.

    Returns (bytes, the preset's name, its description). Raises UsageError for a preset that does not work here.
    """
    from diptych.student.runtime.memory import Preset, choose, pick
    from diptych.student.runtime.memory import plan as memory_plan

    half = (size[0], size[1] // 2)  # the images of that plan are two panels wide
    device = "cpu" if cpu else "cuda"
    options: dict[str, Any] = {"dtype_bytes": bytes_, "panel": half, "text_tokens": teacher.text_tokens}
    options |= {"rows": rows, "device": device, "reopened": False}
    shapes = memory_shapes(teacher)
    preset = Preset()
    if name == "auto" and room is not None:
        name, preset = choose(shapes, int(room), "the device", **options)
    elif name not in (None, "auto"):
        preset = pick(name, device, "paint.memory")
    return memory_plan(shapes, preset, **options).peak, name, str(preset)


def frozen_bytes(teacher: TeacherSizes, quantization: str, bytes_: int) -> int:
    """Return the bytes of the frozen transformer with quantized blocks and `bytes_` for each other number."""
    from diptych.student.runtime.memory import Preset
    from diptych.student.runtime.memory import plan as memory_plan

    plan = memory_plan(memory_shapes(teacher), Preset(transformer=quantization), dtype_bytes=bytes_)
    return plan.blocks + plan.modulation + plan.other


def memory_shapes(teacher: TeacherSizes) -> Any:
    """Return the configs in the form of `student.runtime.memory`."""
    from diptych.student.runtime.memory import Shapes

    parts: dict[str, Any] = {part: teacher.configs[part] for part in PARTS if part in teacher.configs}
    return Shapes(**parts)
