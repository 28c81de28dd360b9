"""The trained parameters and their updates: full or LoRA, optimizer, learning rate, moving average.

LoRA mode trains adapters on the named linear layers and, if it is widened, the complete input layer (`export` saves
them).
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
from diptych.student.families import family_of
from diptych.student.weights.lora_file import lora_file, read_deltas
from diptych.train import processes
from diptych.utils import models

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill

ADAPTER = "default"


@dataclass(frozen=True)
class Trained:
    """The trained parameters by name, in a fixed order."""

    names: list[str]
    parameters: list[torch.nn.Parameter]
    start: dict[str, torch.Tensor]  # LoRA mode: a widened input layer's weight and bias before training
    adapters: bool = False  # LoRA mode
    input_layer: str = "x_embedder"

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def local(self) -> list[torch.Tensor]:
        """This process's part of each parameter, in the same memory. The moving average averages these."""
        return [processes.local(p.detach()).requires_grad_() for p in self.parameters]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The complete parameters; in the first process only, if they are sharded. All processes must call this."""
        return {n: processes.collected(p.detach()) for n, p in zip(self.names, self.parameters, strict=True)}

    def averages(self, ema: Any) -> dict[str, torch.Tensor]:
        """The complete moving averages; in the first process only, if they are sharded. All processes must call
        this."""
        shadows = zip(ema.shadow_params, self.parameters, strict=True)
        complete = [processes.collected(processes.spread_as(shadow, p)) for shadow, p in shadows]
        return dict(zip(self.names, complete, strict=True))

    @torch.no_grad()
    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Overwrites the parameters in place with complete tensors. Every name must be there."""
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
    """Moves the transformer to `device`, adds adapters in LoRA mode, and returns what is trained, in float32.

    `columns` (D, C) are the initial columns of the input layer for the condition; None leaves them unchanged. With
    `shard`, the weights are then sharded over all processes.
    """
    input_layer = family_of(type(transformer).__name__).input_layer
    start: dict[str, torch.Tensor] = {}
    if options.mode == "full":
        transformer.to(device).requires_grad_(True)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.float()
    else:
        # A frozen base may stay in bfloat16 where autocast computes in it. Trained parameters are always float32.
        frozen = torch.bfloat16 if precision == "bfloat16" and device.type != "cpu" else torch.float32
        if options.offload == "none":
            transformer.to(device)
        for parameter in transformer.parameters():
            if parameter.is_floating_point():  # quantized ones are not, and stay unchanged
                parameter.data = parameter.data.to(frozen)
        linears = _linears(transformer)
        _add_adapter(transformer, options)
        layer = transformer.get_submodule(input_layer)
        if options.conditioning != "tokens":
            layer.requires_grad_(True)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        start = {name: p.detach().clone() for name, p in layer.named_parameters() if p.requires_grad}
        if options.init:
            _load_init(transformer, options.init, {n: (m.out_features, m.in_features) for n, m in linears.items()})
        if options.offload == "blocks":
            Offload(transformer, device)
    if columns is not None:
        weight = transformer.get_submodule(input_layer).weight.data.flatten(1)  # a convolution's too
        weight[:, -columns.shape[1] :] = columns.to(weight)
    transformer.train()
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if shard:
        processes.shard(transformer, device)
    named = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    return Trained([name for name, _ in named], [p for _, p in named], start, options.mode == "lora", input_layer)


def _add_adapter(transformer: Any, options: Distill) -> None:
    from peft import LoraConfig

    ends = lora_targets(transformer, options.lora_targets)
    input_layer = family_of(type(transformer).__name__).input_layer
    if input_layer in ends:
        raise UsageError("recipe_conflict", f"distill.lora_targets: {input_layer} has no adapter. Leave it out.")
    # Complete names, because in FLUX.2 the end of a linear layer's name is also that of a list of layers.
    targets = [name for name in _linears(transformer) if any(name == end or name.endswith(f".{end}") for end in ends)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(options.seed or 0, "adapters", "start"))
        transformer.add_adapter(
            LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets), adapter_name=ADAPTER
        )


def _linears(transformer: Any) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}


def lora_targets(transformer: Any, targets: list[str] | str, key: str = "distill.lora_targets") -> list[str]:
    """The names of linear layers that get adapters, from a list or a named set. UsageError for a name that the model
    does not have. `key` names the recipe key in errors."""
    if isinstance(targets, str):
        sets = family_of(type(transformer).__name__).lora_targets
        if targets not in sets:
            hint = nearest(targets, sets)
            raise UsageError("name_unknown", f"{key}: unknown set '{targets}'. Use one of {', '.join(sets)}{hint}")
        targets = list(sets[targets])
    names = list(_linears(transformer))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = {name.split(".", depth)[-1] for name in names for depth in (2, 3)}
            raise UsageError("layer_unknown", f"{key}: no linear layer has the name '{target}'{nearest(target, known)}")
    return list(targets)


@torch.no_grad()
def _load_init(transformer: Any, init: str, linears: dict[str, tuple[int, int]]) -> None:
    """Loads the LoRA that `distill.init` names into the adapters and the input layer. `linears` are (out, in) by name.

    UsageError if it adapts other layers, or has other ranks, than the recipe trains.
    """
    path = lora_file(models.resolve(init, "student"))
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    deltas = read_deltas(path, shapes | {f"{name}.bias": shape[:1] for name, shape in linears.items()})
    if dora := next((name for name, delta in deltas.items() if delta.magnitude is not None), None):
        raise UsageError(
            "lora_unsupported",
            f"distill.init: {path} is a DoRA on {dora}, and training resumes only from a plain LoRA. Fuse it into the "
            "weights (diptych convert --fuse) and use mode: full.",
        )
    input_layer = family_of(type(transformer).__name__).input_layer
    widened = transformer.get_submodule(input_layer).weight.requires_grad
    of_input = deltas.pop(input_layer, None) if widened else None
    adapted = {name for name in linears if hasattr(transformer.get_submodule(name), "lora_A")}
    if deltas.keys() != adapted:
        layer_name = sorted(deltas.keys() ^ adapted)[0]
        owner = "the LoRA" if layer_name in deltas else "the recipe"
        raise UsageError(
            "lora_mismatch",
            f"distill.init: {path} adapts {len(deltas)} layers and distill.lora_targets {len(adapted)}; only {owner} "
            f"adapts {layer_name}. Set lora_targets as in its training.",
        )
    for name, delta in deltas.items():
        layer: Any = transformer.get_submodule(name)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if delta.a.shape != a.shape:
            raise UsageError(
                "lora_mismatch",
                f"distill.init: {path} has rank {len(delta.a)} on {name}, and distill.rank is {len(a)}. Set rank as in "
                "its training.",
            )
        if delta.bias is not None and delta.bias.any():
            raise UsageError(
                "lora_unsupported",
                f"distill.init: {path} changes the bias of {name}, and LoRA mode does not train biases. Use "
                "mode: full.",
            )
        a.copy_(delta.a)
        b.copy_(delta.b)
    if of_input is not None:
        layer = transformer.get_submodule(input_layer)
        layer.weight += of_input.weight().to(layer.weight.device)
        if of_input.bias is not None:
            layer.bias += of_input.bias.to(layer.bias.device)


def optimizer(trained: Trained, options: Distill) -> torch.optim.Optimizer:
    """The recipe's optimizer. AdamW is fused if torch supports that on the device. UsageError if it is not installed.

    In LoRA mode the input layer does not decay, because decay would shrink the teacher's weights.
    """
    groups: list[dict[str, Any]] = []
    for name, parameter in zip(trained.names, trained.parameters, strict=True):
        decay = 0.0 if trained.start and name.startswith(f"{trained.input_layer}.") else options.weight_decay
        if not groups or groups[-1]["weight_decay"] != decay:  # consecutive groups preserve the order of `trained`
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

            with redirect_stdout(None):  # it prints, and stdout is for results
                return Prodigy(groups, **common, use_bias_correction=True, safeguard_warmup=True)
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(groups, **common)
    except ImportError as error:
        raise UsageError(
            "dependency_missing",
            f"distill.optimizer: {options.optimizer} is not installed. Run pip install 'diptych[train]', or use adamw.",
        ) from error


def learning_rate(step: int, options: Distill) -> float:
    """The rate of step `step` (the first is 1): linear warm-up, then constant, or a cosine down to 0.

    Not `diffusers.optimization.get_scheduler`, which rounds differently: a quarter of a cosine's rates would differ in
    the last bit.
    """
    rate = options.learning_rate
    if step <= options.warmup:
        return rate * step / options.warmup
    if options.schedule == "constant":
        return rate
    return rate * (1 + math.cos(math.pi * (step - options.warmup) / max(1, options.steps - options.warmup))) / 2


def moving_average(trained: Trained, options: Distill) -> Any | None:
    """diffusers' EMAModel over the trained parameters. None if the recipe disables it."""
    from diffusers.training_utils import EMAModel

    return EMAModel(trained.local, decay=options.ema, foreach=True) if options.ema else None  # pyright: ignore


@contextmanager
def averaged(ema: Any | None, trained: Trained) -> Iterator[None]:
    """A context in which the model has its averaged weights, for validation, samples and the final save."""
    if ema is None:
        yield
        return
    ema.store(trained.local)
    try:
        ema.copy_to(trained.local)
        yield
    finally:
        ema.restore(trained.local)


def optimizer_tensors(opt: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state as flat, complete tensors: `12.exp_avg` belongs to parameter 12, `group.d` (Prodigy's rate)
    to all of them. In the first process only, if they are sharded. All processes must call this."""
    # The state in use: bitsandbytes' state_dict is nested, for accelerate's FSDP.
    flat = {f"{i}.{k}": v for i, p in enumerate(_parameters(opt)) for k, v in opt.state.get(p, {}).items()}
    apart = ("params", "lr", "weight_decay")
    shared = {k: v for k, v in opt.param_groups[0].items() if v != opt.defaults.get(k) and k not in apart}
    flat |= {f"group.{key}": value for key, value in shared.items()}
    return {key: _as_tensor(key, value) for key, value in flat.items()}


def _as_tensor(key: str, value: Any) -> torch.Tensor:
    if not torch.is_tensor(value):
        counts = isinstance(value, int) and not key.startswith("group.")
        return torch.tensor(value, dtype=torch.int64 if counts else torch.float64)
    # All of bitsandbytes' 8-bit tables are one tensor, and a file may have each tensor only once.
    return value.clone() if ".qmap" in key else processes.collected(value)


def _parameters(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in opt.param_groups for parameter in group["params"]]


def put_optimizer(opt: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Copies the tensors, because a mapped file's memory is aligned differently."""
    parameters = _parameters(opt)
    groups = opt.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        if index == "group":
            for group in groups:
                group[name] = type(group.get(name, 0.0))(tensor.item())
        elif tensor.ndim == 0 and tensor.dtype == torch.int64:  # bitsandbytes and Prodigy count steps as Python ints
            state.setdefault(int(index), {})[name] = int(tensor.item())
        else:
            state.setdefault(int(index), {})[name] = processes.like(tensor.clone(), parameters[int(index)])
    opt.load_state_dict({"state": state, "param_groups": groups})


class Offload:
    """Offload of frozen blocks to main memory; they move to the device one at a time. FLUX.1's LoRA trains on 16 GB.

    A block's frozen matrices move to the device before its forward pass and leave it afterwards. Gradient
    checkpointing, which is required, stores nothing of that pass. The backward pass runs the block's forward pass
    again, and frees the weights with the gradients. So the device has one block's matrices at a time, each is copied
    twice a step, and all results equal those without offload. Trained parameters and vectors stay on the device.
    `remove` removes the hooks and leaves the matrices in main memory.

    diffusers' group offload and accelerate's hooks also move trained parameters, so that gradients and parameters would
    be on different devices.
    """

    def __init__(self, transformer: Any, device: torch.device) -> None:
        """`transformer` is on the CPU with `requires_grad` set. Everything else of it moves to `device`."""
        self.device = device
        self.present: set[torch.nn.Parameter] = set()  # matrices on the device
        self._waiting: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._handles: list[Any] = []
        for block in family_of(type(transformer).__name__).block_lists(transformer):
            matrices = [p for p in block.parameters() if not p.requires_grad and p.ndim > 1]
            for matrix in matrices:
                self._waiting[matrix] = matrix.data.pin_memory() if device.type == "cuda" else matrix.data
                matrix.data = self._waiting[matrix]
            self._handles += [
                block.register_forward_pre_hook(lambda *_, of_block=matrices: self._load(of_block)),
                # Checkpointing ends the second forward pass with an exception once it has what it needs.
                block.register_forward_hook(lambda *_, of_block=matrices: self._unload(of_block), always_call=True),
            ]
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            if tensor not in self._waiting:
                tensor.data = tensor.data.to(device)

    def _load(self, matrices: list[torch.nn.Parameter]) -> None:
        for matrix in matrices:
            # A copy even from CPU to CPU, so that the backward pass never keeps the waiting matrix.
            matrix.data = self._waiting[matrix].to(self.device, non_blocking=True, copy=True)
            self.present.add(matrix)

    def _unload(self, matrices: list[torch.nn.Parameter]) -> None:
        for matrix in matrices:
            matrix.data = self._waiting[matrix]
            self.present.discard(matrix)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
