"""Memory presets put to use: a plan of what a preset needs, the choice by it, and the parts of a pipeline held so.

    student = Student.load(model, base, memory="12")      # or auto
    diptych generate … --memory auto

`presets` has the rows, `footprint` counts their bytes; `plan` adds these up, stage by stage, and `Memory.apply` puts a
preset on a pipeline. `auto` takes the first row, from the largest card down, that this machine can run and whose plan
fits, and says so. No torch is imported before use.
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
class Plan:
    """Bytes. `stages`: what the device holds at most while encoding text, denoising, decoding; `host`: what waits."""

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
) -> Plan:
    """What `preset` needs, from configs alone.

    Weights and table are counted; activations are estimated (`footprint.activations`). `rows`: pictures drawn together,
    times the branches of batched guidance. `reopened`: staged text encoders are read from their files when a prompt
    comes; otherwise they wait in main memory. On a CPU what waits shares the memory with what runs, so it counts in
    every stage.
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
        scratch += 2 * blocks // max(1, len(blocked) // 8)  # a group, and the next one coming
    text_weights = 0 if preset.staged and (reopened or not shared) else text
    # The transformer steps aside while text is encoded.
    aside = resident if preset.staged and not shared and not grouped else 0
    encode = presets.text_activations(shapes, text_tokens, dtype_bytes) * rows
    stages = {
        "text": text + vae + resident + on_device - aside + encode,
        "denoise": resident + on_device + text_weights + vae + table + activations + scratch,
        "decode": resident + on_device + text_weights + vae + decode,
    }
    host = 0 if shared else waiting_modulation + grouped + aside + (text if preset.staged and not reopened else 0)
    return Plan(blocks, modulation, other, text, vae, table, activations, stages, host)


def free_bytes(device: str | torch.device) -> tuple[int, str]:
    """(bytes free on `device`, what it is called); a CPU's are the machine's available memory."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free, torch.cuda.get_device_name(device)
    import psutil

    return psutil.virtual_memory().available, "this machine"


class Memory:
    """A preset for one pipeline, and what it has to do there during a call: `pipe.runtime.memory`.

    In the order of loading: `prepare` makes one, `settle` once the configs are known, `check` once the LoRAs are,
    `apply` on the loaded pipeline; then the sampler calls `stage`.
    """

    def __init__(self, name: str, preset: Preset | None, device: torch.device, asked: str = "--memory") -> None:
        self.name = name
        self.asked = asked  # by what: an option, or a recipe's key
        self._preset = preset  # None: auto, until the configs are known
        self.device = device
        self.free, self.where = free_bytes(device)
        self.reason = ""
        self.modulation: Modulation | None = None
        self._pipe: Any = None
        self._places: dict[str, Path] = {}  # of the text encoders that are opened when a prompt comes
        self._in_file = False  # the transformer's file is quantized (GGUF): LoRAs stay beside it
        self._open = False

    @property
    def preset(self) -> Preset:
        assert self._preset is not None, "settle comes first"
        return self._preset

    def settle(self, shapes: Shapes, dtype: torch.dtype, places: Mapping[str, Path], **drawn: Any) -> list[str]:
        """Chooses for `auto`, and says what was chosen and planned in `reason`. Returns what this transformer cannot
        have of the preset, each with its reason.

        Args:
            places: the folders of the parts; staged text encoders are opened from there.
            drawn: what is drawn at once, as `plan` takes it; one square picture of the VAE's size if not said.

        Raises:
            UserError when `auto` finds no preset that fits.
        """
        self.dtype = dtype
        side = min(512, int(shapes.vae.get("sample_size") or 512))
        options: Any = {"device": self.device.type, "dtype_bytes": dtype.itemsize, "panel": (side, side)} | drawn
        if self._preset is None:
            self.name, self._preset = choose(shapes, self.free, self.where, **options)
        self._in_file = shapes.quantized > 0
        if self._in_file:
            self._preset = replace(self._preset, transformer="none")
        self._preset, left_out = suited(self._preset, shapes)
        needed = plan(shapes, self.preset, **options).peak
        self.reason = (
            f"{self.asked.lstrip('-')} {self.name}: {self.preset}; plan {needed / GIB:.1f} GiB, "
            f"{self.free / GIB:.1f} GiB free on {self.where}"
        )
        if needed > self.free:
            log.warning("%s: this may run out of memory", self.reason)
        if self.preset.staged:
            self._places = {part: places[part] for part in TEXT_PARTS if part in places}
        return left_out

    def check(self, loras: Sequence[Path], fuse: bool) -> None:
        """Refuses LoRAs that this preset cannot take, before anything is loaded."""
        if found := problems(self.preset, self.device.type, unfused_lora=bool(loras) and not fuse):
            raise UsageError(f"{self.asked} {self.name} does not work here: {'; '.join(found)}")
        if self._in_file and self.preset.modulation:
            from diptych.student.weights.lora_file import read_lora

            for path in loras:
                if any(quantize.is_modulation(layer) for layer in read_lora(path)):
                    raise UsageError(
                        f"{path} adapts the modulation, which {self.asked} {self.name} precomputes, and beside a GGUF "
                        f"file's weights it cannot be fused; convert the file to folded, or use {self.asked} 48"
                    )
        if self._places:
            from diptych.student.weights.lora_file import account
            from diptych.student.weights.tensors import open_safetensors

            for path in loras:
                layers = account(open_safetensors(path)[0], path)
                if any(layer.targets[0].startswith("text_encoder") for layer in layers):
                    raise UsageError(f"{path} adapts a text encoder, which --memory {self.name} opens anew for prompts")

    def apply(self, pipe: FluxControlPipeline) -> None:
        """Quantizes, places and offloads the parts of `pipe`, which are on the CPU, its LoRAs fused."""
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
        """Takes the modulation out and quantizes the rest."""
        # Modulation first: quantizers and offload then never see those weights.
        if self.preset.modulation:
            from diptych.student.runtime.modulation import Modulation

            self.modulation = Modulation(transformer).detach("cpu")
        quantize.quantize(transformer, self.preset.transformer, self.device, self.dtype)

    def shrink_text(self, encoder: Any) -> None:
        """Quantizes a text encoder, unless it is small anyway."""
        kind = "none" if presets.is_small(type(encoder).__name__) else self.preset.text
        quantize.quantize(encoder, kind, self.device, self.dtype)

    def tile(self, vae: Any) -> None:
        """Sets the size of the tiles that `vae` decodes, where the preset has any."""
        if self.preset.tile and hasattr(vae, "tile_latent_min_size"):
            factor = 2 ** (len(presets.channels(vae.config)) - 1)
            vae.tile_sample_min_size, vae.tile_latent_min_size = self.preset.tile, self.preset.tile // factor

    def offload(self, model: Any) -> None:
        """Brings the layers of `model` to the device one by one."""
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            model, onload_device=self.device, offload_type="leaf_level", use_stream=self.device.type == "cuda"
        )

    def stage(self, name: str) -> None:
        """Called by the sampler before `text`, `denoise` and `decode`: brings what that needs, frees the rest."""
        if name == "text":
            self._open_text()
        elif self._open:
            self._close_text()
        if name == "denoise" and self.preset.offload == "none":
            self._pipe.transformer.to(self.device)
        if self.preset.tile:
            self._pipe.vae.use_tiling = name == "decode"  # the reference is encoded whole

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within it the pipeline holds every weight under its name, as for saving; UserError if any was quantized."""
        if any(quantize.is_quantized(getattr(self._pipe, part)) for part in ("transformer", *TEXT_PARTS)):
            raise UserError("quantized weights are not saved; load the student without --memory to save or convert it")
        self._open_text()
        try:
            with self.modulation.attached() if self.modulation else nullcontext():
                yield
        finally:
            self._close_text()

    @property
    def moves(self) -> bool:
        """Whether the transformer leaves the device for every new prompt, and comes back."""
        return bool(self._places) and self.device.type != "cpu" and self.preset.offload == "none"

    @property
    def waiting(self) -> tuple[str, ...]:
        """The text encoders that are opened when a prompt comes."""
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


def prepare(name: str | int | Preset, device: str | torch.device, asked: str = "--memory") -> Memory:
    """A preset by name or made by hand, checked before anything is opened. `asked`: by what, for errors.

    Raises UsageError with every reason when it does not work on this machine.
    """
    import torch

    device = torch.device(device)
    if isinstance(name, Preset):
        if found := problems(name, device.type):
            raise UsageError(f"this memory preset does not work here: {'; '.join(found)}")
        return Memory("custom", name, device, asked)
    return Memory(str(name), None if str(name) == "auto" else pick(str(name), device.type, asked), device, asked)


def suited(preset: Preset, shapes: Shapes) -> tuple[Preset, list[str]]:
    """`preset` without what the transformer's class cannot have, and that, each with its reason."""
    if preset.modulation and not shapes.is_flux:
        reason = f"modulation: {shapes.class_of('transformer')}'s is not precomputed, only FLUX.1's"
        return replace(preset, modulation=False), [reason]
    return preset, []


def choose(shapes: Shapes, free: int, where: str, *, device: str, **options: Any) -> tuple[str, Preset]:
    """`auto`: (name, preset) of the first row, largest card first, that runs here and whose plan fits `free` bytes."""
    seen: list[str] = []
    for name in reversed(PRESETS):
        for preset in PRESETS[name]:
            if found := problems(preset, device):
                seen.append(f"{name}: {found[0]}")
                continue
            needed = plan(shapes, suited(preset, shapes)[0], device=device, **options).peak
            if needed <= HEADROOM * free:
                return f"auto → {name}", preset
            seen.append(f"{name} needs {needed / GIB:.1f} GiB")
    raise UserError(
        f"no memory preset fits {where} with {free / GIB:.1f} GiB free ({'; '.join(seen)}); close what else uses it"
    )


def shapes_in(config: Mapping[str, Any], places: Mapping[str, Path], quantized: int = 0) -> Shapes:
    """The configs of a pipeline's parts: its transformer's, and those in the folders of the others."""
    from diptych.student.weights.files import read_json

    found = {part: read_json(places[part] / "config.json") for part in ("vae", *TEXT_PARTS) if part in places}
    return Shapes(config, **found, quantized=quantized)


def less_than(memory: object) -> str:
    """What needs less memory than a student with this preset."""
    return "--memory auto (in Python memory='auto')" if memory is None else "a smaller --memory"


@contextmanager
def explains_exhaustion(doing: str, instead: str) -> Iterator[None]:
    """Turns running out of memory into a UserError that says what was being done, and what to do instead."""
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(words in str(error) for words in ("can't allocate memory", "out of memory")):
            raise
        raise UserError(f"memory ran out {doing}; {instead}") from error
