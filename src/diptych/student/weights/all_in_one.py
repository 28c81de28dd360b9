"""Single files of other programs: all-in-one checkpoints, which also hold the VAE and the text encoders, and weights in
scaled fp8.

    model.diffusion_model.double_blocks.0.img_attn.qkv.weight       the transformer
    vae.decoder.conv_in.weight                                      the VAE, in the keys of the latent diffusion code
    text_encoders.clip_l.transformer.text_model.…                   CLIP-L and T5, in the keys of transformers
    text_encoders.t5xxl.transformer.encoder.block.…

Every key has a place in a part, or the file is refused. The parts' configs are those of the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.weights import original
from diptych.student.weights.files import read_json
from diptych.student.weights.fold import some
from diptych.student.weights.tensors import Stored
from diptych.utils.documents import parse_json

_PREFIXES = {
    "transformer": original.PREFIXES,
    "vae": ("vae.", "first_stage_model."),
    "text_encoder": ("text_encoders.clip_l.",),
    "text_encoder_2": ("text_encoders.t5xxl.",),
}
# What the text encoders' part of a file holds beside what FLUX uses of them.
_UNUSED = re.compile(r"^(transformer\.)?(logit_scale|text_projection(\.weight)?|spiece_model)$|position_ids$")
_SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's older and newer name
_INPUT_SCALES = (".scale_input", ".input_scale")  # for computing in fp8, which is not done here
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_QUANTIZED = (
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|quant_state\..+)$")),
    ("nunchaku", re.compile(r"\.(qweight|wscales|wzeros)$")),
)


def split(tensors: Mapping[str, Stored], path: Path) -> dict[str, dict[str, Stored]]:
    """The tensors of each part of a file, without its prefix, scaled fp8 dequantized; of most files there is only a
    transformer. UserError for keys that belong to no part, or are quantized in another way."""
    for name, keys in _QUANTIZED:
        if found := [key for key in tensors if keys.search(key)]:
            raise UserError(
                f"the weights in {path} are quantized by {name} ({some(sorted(found), 3)}); give those they were made "
                "from (--memory quantizes them again), or a GGUF file"
            )
    parts: dict[str, dict[str, Stored]] = {}
    strays: list[str] = []
    whole = any(key.startswith(p) for key in tensors for part in list(_PREFIXES)[1:] for p in _PREFIXES[part])
    for key, tensor in tensors.items():
        place = _place(key)
        if not whole and place is None:
            place = "transformer", key
        if place is not None:
            parts.setdefault(place[0], {})[place[1]] = tensor
        elif not key.endswith("scaled_fp8"):
            strays.append(key)
    if strays:
        raise UserError(
            f"{path} holds several models ({', '.join(sorted(parts))}), and {len(strays)} keys that belong to none of "
            f"them: {some(sorted(strays))}. Nothing was loaded; save the transformer alone"
        )
    return {part: plain(state, path) for part, state in parts.items()}


def _place(key: str) -> tuple[str, str] | None:
    """(part, the key within it)."""
    for part, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            if key.startswith(prefix):
                return part, key.removeprefix(prefix)
    return None


def is_scaled(keys: Mapping[str, Any]) -> bool:
    """Whether these are weights in scaled fp8."""
    return any(key.endswith(_SCALES) for key in keys)


def plain(tensors: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """The same with weights in scaled fp8 multiplied by their scales, in float32."""
    out: dict[str, Stored] = {}
    scales = {key: next(end for end in _SCALES if key.endswith(end)) for key in tensors if key.endswith(_SCALES)}
    weights = {f"{key.removesuffix(end)}.weight": key for key, end in scales.items()}
    if lost := sorted(key for weight, key in weights.items() if weight not in tensors):
        raise UserError(f"{path} is damaged: there is no weight to {some(lost)}. Nothing was loaded; fetch it again")
    for key, tensor in tensors.items():
        if key.endswith(".comfy_quant"):
            _check_format(key, tensor, path)
        elif key in weights:
            out[key] = _scaled(key, tensor, tensors[weights[key]], path)
        elif key not in scales and not key.endswith(_INPUT_SCALES) and not key.endswith("scaled_fp8"):
            out[key] = tensor
    return out


def _scaled(key: str, weight: Stored, scale: Stored, path: Path) -> Stored:
    if scale.shape not in ((), (1,), (1, 1), (weight.shape[0],), (weight.shape[0], 1)):
        raise UserError(
            f"{path}: the scale of {key} is {scale.shape} for a weight of {weight.shape}: neither one number nor one "
            "for each row, which is not supported. Give a file in bfloat16, or in fp8 with one scale for each weight"
        )

    def read() -> torch.Tensor:
        factor = scale.read().float().reshape(-1, *[1] * (len(weight.shape) - 1))
        return weight.read().float() * factor

    return Stored(weight.shape, torch.float32, read)


def _check_format(key: str, stored: Stored, path: Path) -> None:
    try:
        said = parse_json(bytes(stored.read().tolist()))["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {key} does not say how its layer is quantized; fetch it again") from error
    if said not in _FORMATS:
        raise UserError(
            f"the weights in {path} are quantized as {said} ({key}); only {' and '.join(_FORMATS)} are read. Give a "
            "file in bfloat16 or fp8"
        )


def build_part(part: str, cls: Any, place: Path, state: Mapping[str, Stored], dtype: torch.dtype) -> Any:
    """A part with the file's weights and the config of the base's folder `place`; UserError unless they fit whole."""
    tensors = {key: tensor.to(dtype).read() for key, tensor in state.items()}
    if part == "vae":
        return _vae(cls, place, tensors).to(dtype).eval()
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items() if not _UNUSED.search(key)}
    model, info = cls.from_pretrained(
        None,
        config=cls.config_class.from_pretrained(str(place)),
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
    )
    faults = [*info.get("missing_keys", ()), *info.get("unexpected_keys", ())]
    _check_fit(part, place, [*faults, *(key for key, *_ in info.get("mismatched_keys", ()))])
    return model.eval()


def _vae(cls: Any, place: Path, tensors: dict[str, torch.Tensor]) -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = cls.from_config(read_json(place / "config.json"))
    expected = model.state_dict()
    if tensors.keys() != expected.keys():  # the latent diffusion code's keys
        try:
            renamed = convert_ldm_vae_checkpoint(dict(tensors), model.config)
        except (KeyError, AttributeError, RuntimeError, IndexError) as error:
            raise UserError(
                f"the file's VAE has keys that are not known ({error}); give the transformer alone"
            ) from error
        if len(renamed) != len(tensors):
            _check_fit("vae", place, [f"{len(tensors) - len(renamed)} keys that have no counterpart"])
        tensors = renamed
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    got = {key: tensor.shape for key, tensor in tensors.items()}
    _check_fit("vae", place, [key for key in shapes | got if shapes.get(key) != got.get(key)])
    model.load_state_dict(tensors)
    return model


def _check_fit(part: str, place: Path, odd: list[str]) -> None:
    if odd:
        raise UserError(
            f"the file's {part} does not fit {place / 'config.json'}: {some(sorted(odd))}. Nothing was loaded; give "
            "the base that this file was made from, or the transformer alone"
        )
