"""What is trained and how its weights move: full or LoRA, AdamW, learning rate, moving average.

LoRA mode trains adapters on the named linears and the whole input layer, if it is widened (`export` saves them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diptych.data.records import seed_of
from diptych.errors import UsageError, nearest
from diptych.recipe.schema.distill import LORA_TARGETS
from diptych.student.weights.lora_file import lora_file, read_deltas
from diptych.train import processes
from diptych.utils import models

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill

ADAPTER = "default"
INPUT_LAYER = "x_embedder"


@dataclass(frozen=True)
class Trained:
    """The parameters that learn, by name, in a fixed order."""

    names: list[str]
    parameters: list[torch.nn.Parameter]
    start: dict[str, torch.Tensor]  # LoRA mode: a widened input layer's weight and bias before training
    adapters: bool = False  # LoRA mode

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def own(self) -> list[torch.Tensor]:
        """This process's part of each, in the same memory: what a moving average averages."""
        return [processes.own(p.detach()).requires_grad_() for p in self.parameters]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Whole, in the first process where they are spread over several; all must call this."""
        return {n: processes.collected(p.detach()) for n, p in zip(self.names, self.parameters, strict=True)}

    def averages(self, ema: Any) -> dict[str, torch.Tensor]:
        """The moving averages of `own` in the way of `tensors`."""
        shadows = zip(ema.shadow_params, self.parameters, strict=True)
        whole = [processes.collected(processes.spread_as(shadow, p)) for shadow, p in shadows]
        return dict(zip(self.names, whole, strict=True))

    @torch.no_grad()
    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Overwrites the parameters in place with whole tensors; every name must be there."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            parameter.copy_(processes.like(tensors[name], parameter))


def select(
    transformer: Any,
    options: Distill,
    precision: str,
    device: torch.device,
    shard: bool = False,
    columns: torch.Tensor | None = None,
) -> Trained:
    """Moves the transformer to `device`, adds adapters in LoRA mode, and says what is trained, in float32.

    `columns` (D, C) is where the input layer's columns for the condition begin; None leaves them. With `shard` the
    weights are then spread over all processes.
    """
    start: dict[str, torch.Tensor] = {}
    if options.mode == "full":
        transformer.to(device).requires_grad_(True)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.float()
    else:
        # A frozen base may stay in bfloat16 where autocast computes in it anyway; what is trained never does.
        frozen = torch.bfloat16 if precision == "bfloat16" and device.type != "cpu" else torch.float32
        if options.offload == "none":
            transformer.to(device)
        for parameter in transformer.parameters():
            if parameter.is_floating_point():  # quantized ones are not, and stay what they are
                parameter.data = parameter.data.to(frozen)
        linears = {name: m for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
        _add_adapter(transformer, options)
        layer = transformer.get_submodule(INPUT_LAYER)
        if options.conditioning != "tokens":
            layer.requires_grad_(True)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        start = {name: p.detach().clone() for name, p in layer.named_parameters() if p.requires_grad}
        if options.init:
            _go_on(transformer, options.init, {n: (m.out_features, m.in_features) for n, m in linears.items()})
        if options.offload == "blocks":
            Offload(transformer, device)
    if columns is not None:
        weight = transformer.get_submodule(INPUT_LAYER).weight.data
        weight[:, -columns.shape[1] :] = columns.to(weight)
    transformer.train()
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if shard:
        processes.shard(transformer, device)
    named = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    return Trained([name for name, _ in named], [p for _, p in named], start, options.mode == "lora")


def _add_adapter(transformer: Any, options: Distill) -> None:
    from peft import LoraConfig

    targets = lora_targets(transformer, options.lora_targets)
    if INPUT_LAYER in targets:
        raise UsageError("recipe_conflict", f"distill.lora_targets: {INPUT_LAYER} takes no adapter; leave it out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(options.seed or 0, "adapters", "start"))
        transformer.add_adapter(
            LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets), adapter_name=ADAPTER
        )


def lora_targets(transformer: Any, asked: list[str] | str, key: str = "distill.lora_targets") -> list[str]:
    """The linears that get adapters, of a named set or as they are listed; UsageError for what the model has not."""
    if isinstance(asked, str):
        if asked not in LORA_TARGETS:
            raise UsageError(f"{key}: no set '{asked}'; sets: {', '.join(LORA_TARGETS)}{nearest(asked, LORA_TARGETS)}")
        asked = LORA_TARGETS[asked]
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in asked:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = {name.split(".", 2)[-1] for name in names}
            raise UsageError(f"{key}: no linear layer is called '{target}'{nearest(target, known)}")
    return list(asked)


@torch.no_grad()
def _go_on(transformer: Any, init: str, linears: dict[str, tuple[int, int]]) -> None:
    """Puts the LoRA that `distill.init` names into the adapters and the input layer. `linears` are (out, in) by name.

    UsageError if it adapts other layers, or has other ranks, than the recipe trains.
    """
    path = lora_file(models.resolve(init, "student"))
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    deltas = read_deltas(path, shapes | {f"{name}.bias": shape[:1] for name, shape in linears.items()})
    if dora := next((name for name, delta in deltas.items() if delta.magnitude is not None), None):
        raise UsageError(
            f"distill.init: {path} is a DoRA (on {dora} and perhaps others), and adapters are trained on only as plain "
            "LoRA; fuse it into the weights (diptych convert --fuse) and use mode: full"
        )
    widened = transformer.get_submodule(INPUT_LAYER).weight.requires_grad
    whole = deltas.pop(INPUT_LAYER, None) if widened else None
    adapted = {name for name in linears if hasattr(transformer.get_submodule(name), "lora_A")}
    if deltas.keys() != adapted:
        odd = sorted(deltas.keys() ^ adapted)[0]
        owner = "the LoRA" if odd in deltas else "the recipe"
        raise UsageError(
            f"distill.init: {path} adapts {len(deltas)} layers and distill.lora_targets {len(adapted)}; only {owner} "
            f"adapts {odd}. Set lora_targets as it was trained"
        )
    for name, delta in deltas.items():
        layer: Any = transformer.get_submodule(name)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if delta.a.shape != a.shape:
            raise UsageError(
                f"distill.init: {path} has rank {len(delta.a)} on {name}, and distill.rank is {len(a)}; set rank as it "
                "was trained"
            )
        if delta.bias is not None and delta.bias.any():
            raise UsageError(
                f"distill.init: {path} changes the bias of {name}, which is not trained on; use mode: full"
            )
        a.copy_(delta.a)
        b.copy_(delta.b)
    if whole is not None:
        layer = transformer.get_submodule(INPUT_LAYER)
        layer.weight += whole.weight().to(layer.weight.device)
        if whole.bias is not None:
            layer.bias += whole.bias.to(layer.bias.device)


def optimizer(trained: Trained, options: Distill) -> torch.optim.Optimizer:
    """The recipe's optimizer; AdamW is fused where torch has it for the device. UsageError if it is not installed.

    In LoRA mode the base's input layer does not decay: that would wear the teacher's own weights away.
    """
    groups: list[dict[str, Any]] = []
    for name, parameter in zip(trained.names, trained.parameters, strict=True):
        decay = 0.0 if trained.start and name.startswith(f"{INPUT_LAYER}.") else options.weight_decay
        if not groups or groups[-1]["weight_decay"] != decay:  # so that their order stays that of `trained`
            groups.append({"params": [], "weight_decay": decay})
        groups[-1]["params"].append(parameter)
    common: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": options.betas,
        "weight_decay": options.weight_decay,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common, fused=trained.parameters[0].device.type in ("cpu", "cuda"))
    try:
        if options.optimizer == "prodigy":
            from prodigyopt import Prodigy

            with redirect_stdout(None):  # it speaks, and stdout is for results
                return Prodigy(groups, **common, use_bias_correction=True, safeguard_warmup=True)
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(groups, **common)
    except ImportError as error:
        raise UsageError(
            f"distill.optimizer: {options.optimizer} is not installed; pip install 'diptych[train]', or take adamw"
        ) from error


def learning_rate(step: int, options: Distill) -> float:
    """The rate of step `step` (the first is 1): linear warm-up, then constant, or a cosine down to 0.

    `diffusers.optimization.get_scheduler` rounds otherwise: a quarter of a cosine's rates differ in the last bit.
    """
    rate = options.learning_rate
    if step <= options.warmup:
        return rate * step / options.warmup
    if options.schedule == "constant":
        return rate
    return rate * (1 + math.cos(math.pi * (step - options.warmup) / max(1, options.steps - options.warmup))) / 2


def moving_average(trained: Trained, options: Distill) -> Any | None:
    """diffusers' EMAModel over exactly the trained parameters; None when the recipe switches it off."""
    from diffusers.training_utils import EMAModel

    return EMAModel(trained.own, decay=options.ema, foreach=True) if options.ema else None  # pyright: ignore


@contextmanager
def averaged(ema: Any | None, trained: Trained) -> Iterator[None]:
    """The model with its averaged weights, for validation, samples and the final save; the others come back after."""
    if ema is None:
        yield
        return
    ema.store(trained.own)
    try:
        ema.copy_to(trained.own)
        yield
    finally:
        ema.restore(trained.own)


def optimizer_tensors(opt: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state as flat whole tensors: `12.exp_avg` is parameter 12's, `group.d` what all of them share
    (Prodigy's own rate). In the first process where they are spread over several; all must call this."""
    # As it is in use: what bitsandbytes gives for saving is nested, against accelerate's FSDP.
    flat = {f"{i}.{k}": v for i, p in enumerate(_parameters(opt)) for k, v in opt.state.get(p, {}).items()}
    apart = ("params", "lr", "weight_decay")
    shared = {k: v for k, v in opt.param_groups[0].items() if v != opt.defaults.get(k) and k not in apart}
    flat |= {f"group.{key}": value for key, value in shared.items()}
    return {key: _as_tensor(key, value) for key, value in flat.items()}


def _as_tensor(key: str, value: Any) -> torch.Tensor:
    if not torch.is_tensor(value):
        counts = isinstance(value, int) and not key.startswith("group.")
        return torch.tensor(value, dtype=torch.int64 if counts else torch.float64)
    # bitsandbytes' tables of 8-bit numbers are one tensor for all, and a file has each tensor once.
    return value.clone() if ".qmap" in key else processes.collected(value)


def _parameters(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in opt.param_groups for parameter in group["params"]]


def put_optimizer(opt: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Tensors are copied: memory of a file read is not aligned as torch's own."""
    parameters = _parameters(opt)
    groups = opt.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        if index == "group":
            for group in groups:
                group[name] = type(group.get(name, 0.0))(tensor.item())
        elif tensor.ndim == 0 and tensor.dtype == torch.int64:  # bitsandbytes and Prodigy count their steps in Python
            state.setdefault(int(index), {})[name] = int(tensor.item())
        else:
            state.setdefault(int(index), {})[name] = processes.like(tensor.clone(), parameters[int(index)])
    opt.load_state_dict({"state": state, "param_groups": groups})


class Offload:
    """Frozen blocks that wait in main memory and visit the device one at a time: FLUX.1's LoRA training on 16 GB.

    A block's frozen matrices come before its forward pass and go after it. With gradient checkpointing, which the
    recipe must ask for, nothing of that pass is kept; the backward pass runs the block's forward once more, and what it
    keeps of the weights for the gradients is freed with them. So the device holds one block's matrices at a time, each
    is copied twice a step, and every number is the one computed without. What learns, and every vector, stays on the
    device. `remove` takes the hooks off and leaves the matrices where they wait.

    diffusers' group offload and accelerate's hooks swap out what learns as well, so gradients would land on another
    device than their parameters.
    """

    def __init__(self, transformer: Any, device: torch.device) -> None:
        """`transformer` is on the CPU and knows what it trains: the rest of it goes to `device` here."""
        self.device = device
        self.present: set[torch.nn.Parameter] = set()  # matrices that are on a visit
        self._waiting: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._handles: list[Any] = []
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            matrices = [p for p in block.parameters() if not p.requires_grad and p.ndim > 1]
            for matrix in matrices:
                self._waiting[matrix] = matrix.data.pin_memory() if device.type == "cuda" else matrix.data
                matrix.data = self._waiting[matrix]
            self._handles += [
                block.register_forward_pre_hook(lambda *_, own=matrices: self._bring(own)),
                # Checkpointing ends a second forward pass with an exception once it has what it needs.
                block.register_forward_hook(lambda *_, own=matrices: self._take(own), always_call=True),
            ]
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            if tensor not in self._waiting:
                tensor.data = tensor.data.to(device)

    def _bring(self, matrices: list[torch.nn.Parameter]) -> None:
        for matrix in matrices:
            # A copy, also where both are the CPU: what the backward pass keeps is then never what waits.
            matrix.data = self._waiting[matrix].to(self.device, non_blocking=True, copy=True)
            self.present.add(matrix)

    def _take(self, matrices: list[torch.nn.Parameter]) -> None:
        for matrix in matrices:
            matrix.data = self._waiting[matrix]
            self.present.discard(matrix)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
