"""How each diffusers text-to-image pipeline takes guidance: a table by class, read from the pipelines' sources.

diptych has one convention, that of classifier-free guidance: v = u + w·(c − u), where c and u are the predictions with
the prompt and with the empty one. `paint.true_guidance` is w, and 1 is off. Pipelines differ in four ways:

- The scale s of most means u + s·(c − u); Z-Image and Krea 2 compute c + s·(c − u), so s = w − 1 there.
- Guidance runs for s > 1 or for s > 0, in some pipelines always, and in some never.
- Both predictions are rows of one forward pass, or two passes.
- Some let a language model rewrite the prompt unless they are called with a switch.

`of` looks a class up; `guess` reads the signature of one that is not in the table.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diptych.errors import UsageError

_REWRITES = re.compile(r"(^use_pe$|rewrite|upsampl|enhanc|expan)")


@dataclass(frozen=True)
class Call:
    """How one pipeline class takes guidance.

    Attributes:
        scale: the argument of classifier-free guidance; None where the pipeline has none.
        off: the scale that adds nothing to c. It is 1 for u + s·(c − u), 0 for c + s·(c − u).
        above: the pipeline computes u for scales above this.
        always: it computes u for every scale, so that turning guidance off saves nothing.
        together: c and u are rows of one forward pass; otherwise a guided step takes two passes.
        embedded: the argument of distilled guidance, an input of the transformer; None where there is none.
        unless_distilled: it ignores the scale where model_index.json has `is_distilled`.
        switches: arguments that keep the prompt and the size as given.
    """

    scale: str | None = "guidance_scale"
    off: float = 1.0
    above: float = 1.0
    always: bool = False
    together: bool = False
    embedded: str | None = None
    unless_distilled: bool = False
    switches: Mapping[str, Any] = field(default_factory=dict)
    known: bool = True

    def guides(self, true_guidance: float, index: Mapping[str, Any]) -> bool:
        """Whether u is computed for this `true_guidance`. `index` is the pipeline's model_index.json."""
        if self.scale is None or (self.unless_distilled and index.get("is_distilled")):
            return False
        return self.always or self.off + true_guidance - 1 > self.above

    def branches(self, true_guidance: float, index: Mapping[str, Any]) -> int:
        """Predictions a step and image, each as expensive as a forward pass of one row."""
        return 2 if self.guides(true_guidance, index) else 1

    def rows(self, true_guidance: float, index: Mapping[str, Any]) -> int:
        """Rows of one forward pass for each image."""
        return self.branches(true_guidance, index) if self.together else 1

    def arguments(self, true_guidance: float) -> dict[str, Any]:
        """The scale as this class takes it. UsageError for one that it cannot have."""
        if self.scale is None:
            return {}
        scale = self.off + true_guidance - 1
        if true_guidance > 1 and not self.always and scale <= self.above:
            least = self.above - self.off + 1
            raise UsageError(
                f"paint.true_guidance {true_guidance:g}: this pipeline guides only above {least:g}; "
                f"give 1, which turns guidance off, or a value above {least:g}"
            )
        return {self.scale: scale}


_SEPARATE = Call()
_TOGETHER = Call(together=True)
_BINNED = Call(together=True, switches={"use_resolution_binning": False})
_FLUX = Call("true_cfg_scale", embedded="guidance_scale")
_FROM_CONDITIONAL = Call(off=0.0, above=0.0)
_EMBEDDED = Call(None, embedded="guidance_scale")

CALLS: Mapping[str, Call] = {
    "AuraFlowPipeline": _TOGETHER,
    "BriaFibo2Pipeline": _SEPARATE,
    "BriaFiboPipeline": _TOGETHER,
    "BriaPipeline": _TOGETHER,
    "ChromaPipeline": _SEPARATE,
    "CogView3PlusPipeline": _TOGETHER,
    "CogView4Pipeline": _SEPARATE,
    "Cosmos2TextToImagePipeline": Call(off=0.0, above=1.0),
    "ErnieImagePipeline": Call(together=True, switches={"use_pe": False}),
    "Flux2KleinKVPipeline": Call(None),
    "Flux2KleinPipeline": Call(unless_distilled=True),
    "Flux2Pipeline": _EMBEDDED,
    "FluxPipeline": _FLUX,
    "HiDreamImagePipeline": _TOGETHER,
    "HunyuanDiTPipeline": _BINNED,
    "Ideogram4Pipeline": Call(always=True, switches={"guidance_schedule": None, "prompt_upsampling": False}),
    "Kandinsky5T2IPipeline": _SEPARATE,
    "KolorsPipeline": _TOGETHER,
    "Krea2Pipeline": _FROM_CONDITIONAL,
    "LatentConsistencyModelPipeline": _EMBEDDED,
    "LongCatImagePipeline": Call(switches={"enable_prompt_rewrite": False}),
    "Lumina2Pipeline": _SEPARATE,
    "LuminaPipeline": _TOGETHER,
    "NucleusMoEImagePipeline": _SEPARATE,
    "OmniGenPipeline": Call(always=True, together=True),
    "OvisImagePipeline": _SEPARATE,
    "PRXPipeline": _BINNED,
    "PRXPixelPipeline": _BINNED,
    "PixArtAlphaPipeline": _BINNED,
    "PixArtSigmaPipeline": _BINNED,
    "QwenImage21Pipeline": Call("true_cfg_scale"),
    "QwenImagePipeline": _FLUX,
    "SanaPipeline": _BINNED,
    "SanaSprintPipeline": Call(
        None, embedded="guidance_scale", switches={"use_resolution_binning": False, "intermediate_timesteps": None}
    ),
    "StableDiffusion3Pipeline": _TOGETHER,
    "StableDiffusionPipeline": _TOGETHER,
    "StableDiffusionXLPipeline": _TOGETHER,
    "ZImageOmniPipeline": Call(off=0.0, above=0.0, together=True),
    "ZImagePipeline": Call(off=0.0, above=0.0, together=True),
}
# Pipelines that take a prompt and a size, and cannot paint a batch of grids all the same.
_EDITS = "it edits an image, and chooses the size by it"
UNSUITED: Mapping[str, str] = {
    "DreamLiteMobilePipeline": "it draws one prompt a call",
    "DreamLitePipeline": "it draws one prompt a call",
    "FluxControlPipeline": _EDITS,
    "FluxFillPipeline": _EDITS,
    "FluxKontextPipeline": _EDITS,
    "GlmImagePipeline": "its language model samples from one generator for the whole batch",
    "QwenImageEditPipeline": _EDITS,
    "QwenImageEditPlusPipeline": _EDITS,
}


def of(name: str) -> Call:
    """The row of a pipeline class. A class that is not in the table counts as u + s·(c − u) in one forward pass, which
    takes the most memory."""
    return CALLS.get(name, Call(together=True, known=False))


def rewrites(argument: str) -> bool:
    """Whether an argument's name says that it has the prompt rewritten."""
    return _REWRITES.search(argument) is not None


def guess(pipe: Any) -> Call:
    """The row of a pipeline's class, or, for a class that is not in the table, what its signature suggests."""
    if found := CALLS.get(type(pipe).__name__):
        return found
    asks = inspect.signature(pipe.__call__).parameters
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    switches = {name: False for name, value in asks.items() if rewrites(name) and value.default is True}
    switches |= {"use_resolution_binning": False}
    if "true_cfg_scale" in asks:
        return Call("true_cfg_scale", embedded="guidance_scale", switches=switches, known=False)
    if config.get("guidance_embeds") and "guidance_scale" in asks:
        return Call(None, embedded="guidance_scale", switches=switches, known=False)
    scale = "guidance_scale" if "guidance_scale" in asks else None
    return Call(scale, together=True, switches=switches, known=False)


def doubt(name: str, true_guidance: float) -> str | None:
    """What to tell somebody who paints with a class whose guidance is unknown, or that has none; None otherwise.
    UsageError for a class that cannot paint."""
    if name in UNSUITED:
        raise UsageError(f"a {name} cannot paint: {UNSUITED[name]}; choose another teacher")
    call = of(name)
    if not call.known:
        return (
            f"the pipeline class {name} is not in diptych's table, so how it takes guidance is not known: "
            f"paint.true_guidance {true_guidance:g} is passed as most pipelines take it, u + s·(c − u) with 1 as off. "
            "Compare a few grids at 1 and at 2 before you paint all"
        )
    if call.scale is None and true_guidance > 1:
        return f"a {name} has no classifier-free guidance: paint.true_guidance {true_guidance:g} has no effect; set 1"
    call.arguments(true_guidance)
    return None
