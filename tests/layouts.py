"""Other people's files of the golden student, for tests: Black Forest Labs' keys, GGUF, and a teacher to go with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diptych.student.weights import files, fold

GOLDEN = Path(__file__).parent / "fixtures" / "release_golden"
RELEASED = GOLDEN / "dsd_model"
LORA = RELEASED / "pytorch_lora_weights.safetensors"


def read_state(folder: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a transformer folder, cast to `dtype` if given."""
    return {key: tensor.to(dtype).read() for key, tensor in files.open_state(folder).items()}


def read_student(folder: Path) -> fold.Folded:
    """A student's weights from a transformer folder of either layout, folded and read."""
    folded = files.fold_stored(
        files.open_state(folder), files.read_config(folder), files.read_split(folder), str(folder)
    )
    return replace(folded, state_dict={key: tensor.read() for key, tensor in folded.state_dict.items()})


def folded_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, config) of the golden student, folded, without its LoRA."""
    folded = fold.fold(read_state(RELEASED / "transformer"), files.read_config(RELEASED / "transformer"))
    return folded.state_dict, folded.config


def make_base(folder: Path) -> Path:
    """The golden base with the teacher's transformer that the golden student was not trained from but might have been:
    the released weights without `c_embedder`."""
    shutil.copytree(GOLDEN / "base", folder)
    state = read_state(RELEASED / "transformer")
    config = {**files.read_config(RELEASED / "transformer"), "_class_name": "FluxTransformer2DModel"}
    kept = {k: v.contiguous() for k, v in state.items() if not k.startswith("c_embedder.") and ".lora_" not in k}
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    save_file(kept, folder / "transformer" / files.WEIGHTS_FILE)
    return folder


def original_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' keys as Black Forest Labs write them: the inverse of what is tested, by hand."""
    out: dict[str, torch.Tensor] = {}
    take = dict(state)

    def put(name: str, *layers: str, scale: bool = False) -> None:
        for part in ("weight", "bias"):
            if f"{layers[0]}.{part}" in take:
                out[f"{name}.{'scale' if scale else part}"] = torch.cat([take.pop(f"{la}.{part}") for la in layers])

    top = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for name, layer in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        for i, side in ((1, "in"), (2, "out")):
            top[f"{name}_in.{side}_layer"] = f"time_text_embed.{layer}_embedder.linear_{i}"
    for name, layer in top.items():
        put(name, layer)
    for part in ("weight", "bias"):
        scale, shift = take.pop(f"norm_out.linear.{part}").chunk(2)
        out[f"final_layer.adaLN_modulation.1.{part}"] = torch.cat([shift, scale])
    for i in range(2):
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for side, added, q in (("img", "", "to_{}"), ("txt", "_context", "add_{}_proj")):
            put(f"{new}.{side}_mod.lin", f"{old}.norm1{added}.linear")
            put(f"{new}.{side}_attn.qkv", *(f"{old}.attn.{q.format(letter)}" for letter in "qkv"))
            put(f"{new}.{side}_attn.proj", f"{old}.attn.{'to_out.0' if side == 'img' else 'to_add_out'}")
            for kind in ("query", "key"):
                norm = f"{old}.attn.norm_{'added_' if side == 'txt' else ''}{kind[0]}"
                put(f"{new}.{side}_attn.norm.{kind}_norm", norm, scale=True)
            put(f"{new}.{side}_mlp.0", f"{old}.ff{added}.net.0.proj")
            put(f"{new}.{side}_mlp.2", f"{old}.ff{added}.net.2")
    for i in range(3):
        old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        put(f"{new}.modulation.lin", f"{old}.norm.linear")
        put(f"{new}.linear1", *(f"{old}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        put(f"{new}.linear2", f"{old}.proj_out")
        for kind in ("query", "key"):
            put(f"{new}.norm.{kind}_norm", f"{old}.attn.norm_{kind[0]}", scale=True)
    assert not take, list(take)
    return out


def write_gguf(path: Path, state: dict[str, torch.Tensor], kind: str) -> Path:
    """A GGUF file whose matrices are of type `kind` where their rows divide into its blocks; the rest float32."""
    import gguf

    quant = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[quant][0]
    writer = gguf.GGUFWriter(path, "flux")
    for key, tensor in state.items():
        data = tensor.float().contiguous().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % block == 0:
            writer.add_tensor(key, gguf.quantize(data, quant), raw_dtype=quant)
        else:
            writer.add_tensor(key, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dora(weight: torch.Tensor, added: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """DoRA by its definition (Liu et al. 2024, equation 5): `magnitude` is (out, 1) for rows or (1, in) for columns."""
    new = (weight + added).double()
    norm = new.square().sum(1 if magnitude.shape[1] == 1 else 0, keepdim=True).sqrt()
    return (magnitude * new / norm).float()


def latent_diffusion_keys(vae: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' keys of a VAE with three levels, one attention and no quant convolutions, as its first authors write
    them."""
    names = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.attentions.0": "mid.attn_1"}
    names |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    names |= {f"mid_block.resnets.{i}": f"mid.block_{i + 1}" for i in range(2)}
    for i in range(3):
        names |= {f"down_blocks.{i}.downsamplers.0.conv": f"down.{i}.downsample.conv"}
        names |= {f"up_blocks.{i}.upsamplers.0.conv": f"up.{2 - i}.upsample.conv"}
        names |= {f"down_blocks.{i}.resnets": f"down.{i}.block", f"up_blocks.{i}.resnets": f"up.{2 - i}.block"}
    out = {}
    for key, value in vae.items():
        attention = ".attentions." in key and value.ndim == 2
        for ours, theirs in names.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        out[key] = value[:, :, None, None] if attention else value
    return out
