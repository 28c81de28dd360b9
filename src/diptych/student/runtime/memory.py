"""Memory presets in use: the plan of what a preset needs, the choice of one, and its application to a pipeline.

    student = Student.load(model, base, memory="12")      # or auto
    diptych generate … --memory auto

`presets` has the rows and counts their bytes. `plan` adds these up for each stage, and `Memory.apply` applies a preset
to a pipeline. `auto` uses the first row, from the largest card down, that this machine can run and whose plan fits, and
logs it. No torch is imported before use.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, UserError
from diptych.student.runtime import presets, quantize
from diptych.student.runtime.presets import HEADROOM, PRESETS, Preset, Shapes, pick, problems
from diptych.utils.machine import alone

if TYPE_CHECKING:
    import torch
    from diffusers import FluxControlPipeline

    from diptych.student.runtime.modulation import Modulation

log = logging.getLogger("diptych.student")
GIB = 2**30
TEXT_PARTS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a pipeline's parts. `stages` has the device's peak while encoding text, denoising and decoding, `host`
    what waits in main memory."""

    blocks: int
    modulation: int
    other: int
    text: int
    vae: int
    table: int
    activations: int
    stages: Mapping[str, int]
    host: int

    @property
    def peak(self) -> int:
        return max(self.stages.values())


def plan(
    shapes: Shapes,
    preset: Preset,
    *,
    device: str = "cuda",
    dtype_bytes: int = 2,
    panel: tuple[int, int] = (512, 512),
    steps: int = 28,
    rows: int = 1,
    text_tokens: int = 512,
    reopened: bool = True,
) -> MemoryPlan:
    """What `preset` needs, from configs alone.

    Weights and the modulation table are counted; activations are estimated (`presets.activations`). On a CPU, waiting
    weights share the memory with those in use, so they count in every stage.

    Args:
        rows: images generated together, times the branches of batched guidance.
        reopened: whether staged text encoders are read from their files for each prompt. Otherwise they wait in main
            memory.
    """
    transformer = shapes.tensors("transformer")
    tabled = presets.adaln(transformer) if shapes.is_flux else []
    if shapes.quantized:
        blocks, modulation, other = presets.as_in_file(transformer, shapes.quantized, dtype_bytes)
    else:
        blocks, rest = presets.quantized_split(transformer, preset.transformer, dtype_bytes)
        waits = (*(f"{layer}." for layer in tabled), "time_text_embed.") if tabled else ()
        adaln = sum(math.prod(shape) for name, shape in transformer.shapes.items() if name.startswith(waits))
        modulation = adaln * dtype_bytes
        other = rest - modulation
    text = 0
    for part in shapes.texts():
        kind = "none" if presets.is_small(shapes.class_of(part)) else preset.text
        text += sum(presets.quantized_split(shapes.tensors(part), kind, dtype_bytes))
    vae = shapes.tensors("vae").count * dtype_bytes

    columns = sum(transformer.shapes[f"{layer}.weight"][0] for layer in tabled)
    table = steps * (rows + 1) * columns * dtype_bytes if preset.modulation else 0  # one more text: the negative
    activations = presets.activations(shapes, panel, rows, text_tokens, dtype_bytes)
    blocked = [linear for linear in transformer.linears if quantize.takes(linear)]
    widest = max((math.prod(transformer.shapes[f"{linear}.weight"]) for linear in blocked), default=0)
    scratch = 0 if preset.transformer == "none" else widest * dtype_bytes
    decode = presets.decoding(shapes.vae, panel, preset.tile, dtype_bytes) * rows

    shared = device == "cpu"
    waiting_modulation = modulation if preset.modulation else 0
    grouped = blocks if preset.offload == "group" else 0
    resident = blocks + modulation + other - grouped - waiting_modulation
    on_device = (waiting_modulation + grouped) if shared else 0
    if grouped and not shared:
        scratch += 2 * blocks // max(1, len(blocked) // 8)  # a group and the next one
    text_weights = 0 if preset.staged and (reopened or not shared) else text
    # The transformer leaves the device while text is encoded.
    aside = resident if preset.staged and not shared and not grouped else 0
    encode = presets.text_activations(shapes, text_tokens, dtype_bytes) * rows
    stages = {
        "text": text + vae + resident + on_device - aside + encode,
        "denoise": resident + on_device + text_weights + vae + table + activations + scratch,
        "decode": resident + on_device + text_weights + vae + decode,
    }
    host = 0 if shared else waiting_modulation + grouped + aside + (text if preset.staged and not reopened else 0)
    return MemoryPlan(blocks, modulation, other, text, vae, table, activations, stages, host)


def free_bytes(device: str | torch.device) -> tuple[int, str]:
    """(free bytes of `device`, its name). For a CPU, the machine's available memory."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free, torch.cuda.get_device_name(device)
    import psutil

    return psutil.virtual_memory().available, "this machine"


class Memory:
    """A preset on one pipeline (`pipe.runtime.memory`).

    While loading, call `prepare`, `resolve` once the configs are known, `check` once the LoRAs are known, and `apply`
    on the loaded pipeline. The sampler then calls `stage`.
    """

    def __init__(self, name: str, preset: Preset | None, device: torch.device, option: str = "--memory") -> None:
        self.name = name
        self.option = option  # the CLI option or recipe key, for messages
        self._preset = preset  # None: auto, until the configs are known
        self.device = device
        self.free, self.where = free_bytes(device)
        self.reason = ""
        self.modulation: Modulation | None = None
        self._pipe: Any = None
        self._places: dict[str, Path] = {}  # folders of text encoders that are loaded for each prompt
        self._in_file = False  # the transformer's file is quantized (GGUF), so LoRAs stay unfused
        self._open = False

    @property
    def preset(self) -> Preset:
        """The preset in use, once it is resolved."""
        assert self._preset is not None, "call resolve first"
        return self._preset

    def resolve(self, shapes: Shapes, dtype: torch.dtype, places: Mapping[str, Path], **load: Any) -> list[str]:
        """Chooses a preset for `auto` and sets `reason`, a line about the choice and its plan. Returns the features of
        the preset that this transformer cannot have, each with its reason.

        Args:
            places: the folders of the parts, from which staged text encoders are loaded.
            load: the `rows`, `panel` or `text_tokens` of `plan`. Defaults to one square image of the VAE's size.

        UserError if `auto` finds no preset that fits.
        """
        self.dtype = dtype
        side = min(512, int(shapes.vae.get("sample_size") or 512))
        options: Any = {"device": self.device.type, "dtype_bytes": dtype.itemsize, "panel": (side, side)} | load
        if self._preset is None:
            self.name, self._preset = choose(shapes, self.free, self.where, **options)
        self._in_file = shapes.quantized > 0
        if self._in_file:
            self._preset = replace(self._preset, transformer="none")
        self._preset, left_out = suited(self._preset, shapes)
        needed = plan(shapes, self.preset, **options).peak
        self.reason = (
            f"{self.option.lstrip('-')} {self.name}: {self.preset}; plan {needed / GIB:.1f} GiB, "
            f"{self.free / GIB:.1f} GiB free on {self.where}"
        )
        if needed > self.free:
            log.warning("%s. This may run out of memory.", self.reason)
        if self.preset.staged:
            self._places = {part: places[part] for part in TEXT_PARTS if part in places}
        return left_out

    def check(self, loras: Sequence[Path], fuse: bool) -> None:
        """UsageError for LoRAs that this preset does not support, before anything is loaded."""
        from diptych.student.weights.lora_file import read_lora

        if faults := problems(self.preset, self.device.type, unfused_lora=bool(loras) and not fuse):
            raise presets.unsupported(f"{self.option} {self.name}", faults)
        for path in loras if self._places or (self._in_file and self.preset.modulation) else ():
            layers = read_lora(path)
            if self._in_file and self.preset.modulation and any(map(quantize.is_modulation, layers)):
                raise UsageError(
                    "lora_unsupported",
                    f"{path} adapts the modulation, which {self.option} {self.name} precomputes, and a LoRA cannot be "
                    f"fused into a GGUF file's weights. Convert the file to folded, or use {self.option} 48.",
                )
            if self._places and any(layer.startswith("text_encoder") for layer in layers):
                raise UsageError(
                    "lora_unsupported",
                    f"{path} adapts a text encoder, which {self.option} {self.name} loads again for each prompt. Use "
                    "another preset.",
                )

    def apply(self, pipe: FluxControlPipeline) -> None:
        """Quantizes and places the parts of `pipe`, which are on the CPU and have no unfused LoRA."""
        self._pipe, transformer = pipe, pipe.transformer
        self.shrink(transformer)
        pipe.vae.to(self.device)
        self.tile(pipe.vae)
        for part in TEXT_PARTS:
            if (encoder := getattr(pipe, part)) is not None:
                setattr(pipe, part, self._placed(encoder))
        if self.preset.offload == "group":
            self.offload(transformer)
        elif not self._places:
            transformer.to(self.device)

    def shrink(self, transformer: Any) -> None:
        """Detaches the modulation and quantizes the rest of the transformer."""
        # Modulation first, so that quantizers and offloading do not touch its weights.
        if self.preset.modulation:
            from diptych.student.runtime.modulation import Modulation

            self.modulation = Modulation(transformer).detach("cpu")
        quantize.quantize(transformer, self.preset.transformer, self.device, self.dtype)

    def shrink_text(self, encoder: Any) -> None:
        """Quantizes a text encoder, unless it is small."""
        kind = "none" if presets.is_small(type(encoder).__name__) else self.preset.text
        quantize.quantize(encoder, kind, self.device, self.dtype)

    def tile(self, vae: Any) -> None:
        """Sets the size of the tiles that `vae` decodes, if the preset has one."""
        if self.preset.tile and hasattr(vae, "tile_latent_min_size"):
            factor = 2 ** (len(presets.channels(vae.config)) - 1)
            vae.tile_sample_min_size, vae.tile_latent_min_size = self.preset.tile, self.preset.tile // factor

    def offload(self, model: Any) -> None:
        """Makes the layers of `model` move to the device one by one."""
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            model, onload_device=self.device, offload_type="leaf_level", use_stream=self.device.type == "cuda"
        )

    def stage(self, name: str) -> None:
        """Moves the parts for `text`, `denoise` or `decode` to the device and frees the others. The sampler calls it
        before each of these stages."""
        if name == "text":
            self._open_text()
        elif self._open:
            self._close_text()
        if name == "denoise" and self.preset.offload == "none":
            self._pipe.transformer.to(self.device)
        if self.preset.tile:
            self._pipe.vae.use_tiling = name == "decode"  # the reference is encoded without tiles

    @contextmanager
    def undone(self) -> Iterator[None]:
        """A context in which the pipeline has every weight under its name, for saving. UserError if any is
        quantized."""
        if any(quantize.is_quantized(getattr(self._pipe, part)) for part in ("transformer", *TEXT_PARTS)):
            raise UserError(
                "model_quantized", "Quantized weights cannot be saved. Load the student without --memory to save it."
            )
        self._open_text()
        try:
            with self.modulation.attached() if self.modulation else nullcontext():
                yield
        finally:
            self._close_text()

    @property
    def moves(self) -> bool:
        """Whether the transformer leaves the device while a new prompt is encoded."""
        return bool(self._places) and self.device.type != "cpu" and self.preset.offload == "none"

    @property
    def waiting(self) -> tuple[str, ...]:
        """The text encoders that are loaded for each prompt."""
        return tuple(self._places)

    def _placed(self, encoder: Any) -> Any:
        self.shrink_text(encoder)
        return encoder.to(self.device)

    @alone
    def _open_text(self) -> None:
        from diptych.student.weights.sources import open_part
        from diptych.utils.console import quiet_bars

        if self._open or not self._places:
            return
        if self.moves:
            self._pipe.transformer.to("cpu")
        silent = getattr(self._pipe, "_progress_bar_config", {}).get("disable")
        with quiet_bars() if silent else nullcontext():
            for part, place in self._places.items():
                setattr(self._pipe, part, self._placed(open_part(part, place, self.dtype)))
        self._open = True

    def _close_text(self) -> None:
        import torch

        for part in self._places:
            setattr(self._pipe, part, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._open = False


def prepare(name: str | int | Preset, device: str | torch.device, option: str = "--memory") -> Memory:
    """A preset by name, or a custom one, checked before anything is loaded. `option` names the CLI option or recipe key
    in messages.

    UsageError with every reason why it does not work on this machine.
    """
    import torch

    device = torch.device(device)
    if isinstance(name, Preset):
        if faults := problems(name, device.type):
            raise presets.unsupported("This memory preset", faults)
        return Memory("custom", name, device, option)
    return Memory(str(name), None if str(name) == "auto" else pick(str(name), device.type, option), device, option)


def suited(preset: Preset, shapes: Shapes) -> tuple[Preset, list[str]]:
    """`preset` without the features that the transformer's class cannot have, and these, each with its reason."""
    if preset.modulation and not shapes.is_flux:
        reason = f"modulation: only FLUX.1's can be precomputed, not that of {shapes.class_of('transformer')}"
        return replace(preset, modulation=False), [reason]
    return preset, []


def choose(shapes: Shapes, free: int, where: str, *, device: str, **options: Any) -> tuple[str, Preset]:
    """`auto`: (name, preset) of the first row, largest card first, that runs here and whose plan fits `free` bytes."""
    rejected: list[str] = []
    for name in reversed(PRESETS):
        for preset in PRESETS[name]:
            if faults := problems(preset, device):
                rejected.append(f"{name}: {faults[0]}")
                continue
            needed = plan(shapes, suited(preset, shapes)[0], device=device, **options).peak
            if needed <= HEADROOM * free:
                return f"auto → {name}", preset
            rejected.append(f"{name} needs {needed / GIB:.1f} GiB")
    raise UserError(
        "memory_insufficient",
        f"No memory preset fits {where} with {free / GIB:.1f} GiB free ({'; '.join(rejected)}). Close other programs "
        "that use this memory.",
    )


def shapes_in(config: Mapping[str, Any], places: Mapping[str, Path], quantized: int = 0) -> Shapes:
    """The shapes of a pipeline, from its transformer's config and the folders of the other parts."""
    from diptych.student.weights.files import read_json

    configs = {part: read_json(places[part] / "config.json") for part in ("vae", *TEXT_PARTS) if part in places}
    return Shapes(config, **configs, quantized=quantized)


def less_than(memory: object) -> str:
    """What to use instead of this memory preset (None: no preset) to need less memory."""
    return "--memory auto (in Python memory='auto')" if memory is None else "a smaller --memory"


@contextmanager
def explains_exhaustion(doing: str, instead: str) -> Iterator[None]:
    """Turns running out of memory into a UserError that names what was done and what to do instead."""
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(words in str(error) for words in ("can't allocate memory", "out of memory")):
            raise
        raise UserError("memory_insufficient", f"Out of memory while {doing}. {instead}.") from error
