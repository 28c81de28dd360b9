"""What a student is: the provenance of its images, and its description in a notebook or a terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diptych.utils.machine import VERSION
from diptych.utils.models import quick_fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.apps.student import Student


def provenance(student: Student, image: Image) -> dict[str, Any]:
    """The model, the machine and the versions that made an image."""
    import diffusers
    import torch

    pipeline = student.pipeline
    loras = [{"file": p.name, "scale": scale, "fingerprint": quick_fingerprint(p)} for p, scale in pipeline.loras]
    memory = {} if pipeline.runtime.memory is None else {"memory": asdict(pipeline.runtime.memory.preset)}
    return {
        "model": student.name,
        "fingerprints": [quick_fingerprint(folder) for folder in pipeline.loaded_from],
        **({"loras": loras} if loras else {}),
        **memory,
        "width": image.width,
        "height": image.height,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "speed": pipeline.runtime.speed.changed(),
        "versions": {"diptych": VERSION, "diffusers": diffusers.__version__, "torch": torch.__version__},
    }


def facts(student: Student) -> dict[str, str]:
    """A student's properties as text: model, conditioning, image size, sampling defaults, vocabulary, device."""
    pipeline, canvas = student.pipeline, student.pipeline.canvas(None, None)
    parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    found = {
        "model": student.name or type(pipeline).__name__,
        "transformer": f"{type(pipeline.transformer).__name__}, {parameters / 1e6:,.1f} M parameters",
        "conditioning": pipeline.settings.conditioning,
        "image size": f"{canvas.panel_width} × {canvas.panel_height} pixels",
        "sampling": ", ".join(f"{name} {value:g}" for name, value in student.sampling.items()),
        "vocabulary": f"{len(student.words)} words" if student.words else "",
        "LoRAs": ", ".join(f"{path.name} ({scale:g})" for path, scale in pipeline.loras),
        "device": f"{pipeline.device.type}, {str(pipeline.transformer.dtype).removeprefix('torch.')}",
    }
    return {name: text for name, text in found.items() if text}


def html(student: Student) -> str:
    """The facts as an HTML table."""
    from markupsafe import Markup

    rows = (
        Markup('<tr><th scope="row" style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>').format(
            *row
        )
        for row in facts(student).items()
    )
    return str(Markup("<table>{}</table>").format(Markup("").join(rows)))
