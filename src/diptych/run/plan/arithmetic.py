"""Operations and memory of a FLUX transformer, from the shapes of its matrices and without torch.

A product of T tokens with a matrix (out, in) is 2·T·in·out operations. Attention over N tokens of width W is 4·N²·W
operations a block, for the scores and the values. A layer's name determines which tokens it processes (`tokens_of`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]
TEXT_LAYERS = (".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj", ".attn.to_add_out", ".ff_context.")
TRAINED_BYTES = 4  # trained weights are float32
# Bytes of an optimizer's state for each trained number: two moments, in float32 or 8 bits. Prodigy has two more.
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}


@dataclass(frozen=True)
class TokenCounts:
    """Tokens that a transformer processes at once.

    `apart` of the image tokens attend only to themselves, in a separate pass. `keys` are tokens that provide only keys
    and values for the others.
    """

    image: int
    text: int
    apart: int = 0
    keys: int = 0

    @property
    def all(self) -> int:
        """Image and text tokens."""
        return self.image + self.text

    @property
    def pairs(self) -> int:
        """Pairs of tokens that attention compares."""
        return (self.all - self.apart) * (self.all + self.keys) + self.apart**2


def image_tokens(height: int, width: int, factor: int) -> int:
    """Return the tokens of an image in pixels: the VAE shrinks it by `factor`, and FLUX packs 2×2 latents into one."""
    return (height // (2 * factor)) * (width // (2 * factor))


def tokens_of(layer: str, canvas: TokenCounts) -> int:
    """Return the number of tokens of a layer, for each row of a batch. Modulation processes one vector a pass."""
    if "norm" in layer or layer.startswith("time_text_embed"):
        return 2 if canvas.apart else 1
    if layer.startswith("single_transformer_blocks"):
        return canvas.all
    if layer.startswith("context_embedder") or any(name in f"{layer}." for name in TEXT_LAYERS):
        return canvas.text
    return canvas.image


def linears(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Return the matrices of a state dict by layer: (out, in)."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def blocks(shapes: Shapes) -> int:
    """Return the number of transformer blocks of both kinds."""
    return len({".".join(name.split(".")[:2]) for name in shapes if "transformer_blocks." in name})


def block_matrices(shapes: Shapes) -> dict[str, int]:
    """Return the parameters in the matrices of each block."""
    sizes: dict[str, int] = {}
    for name, (out, into) in linears(shapes).items():
        if "transformer_blocks." in name:
            block = ".".join(name.split(".")[:2])
            sizes[block] = sizes.get(block, 0) + out * into
    return sizes


def width(shapes: Shapes) -> int:
    """Return the width of a token inside the blocks."""
    return shapes["x_embedder.weight"][0]


def forward(shapes: Shapes, canvas: TokenCounts) -> float:
    """Return the operations of one forward pass of one row."""
    products = sum(2 * tokens_of(name, canvas) * a * b for name, (a, b) in linears(shapes).items())
    return products + blocks(shapes) * 4 * canvas.pairs * width(shapes)


@dataclass(frozen=True)
class TrainedSize:
    """Trained parameters, the operations that adapters add to a forward pass, and their layers (out, in)."""

    numbers: int
    adapter: float
    whole: bool
    rank: int = 0
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def widened(shapes: Shapes) -> Shapes:
    """Return a student's shapes from its teacher's: the input layer also has the condition's channels."""
    out, into = shapes["x_embedder.weight"]
    return {**shapes, "x_embedder.weight": (out, 2 * into)}


def adapted(
    shapes: Shapes, targets: Sequence[str], rank: int, canvas: TokenCounts, input_layer: bool = True
) -> TrainedSize:
    """Return adapters of `rank` on the student's layers whose names end with `targets`, and the whole input layer if it
    is trained."""
    layers = {
        name: sizes
        for name, sizes in linears(shapes).items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }
    out, into = shapes["x_embedder.weight"]
    numbers = sum(rank * (a + b) for a, b in layers.values()) + (out * into + out if input_layer else 0)
    flops = sum(2.0 * tokens_of(name, canvas) * rank * (a + b) for name, (a, b) in layers.items())
    return TrainedSize(numbers, flops, whole=False, rank=rank, layers=layers)


def training(forward_flops: float, trained: TrainedSize, checkpointing: bool) -> float:
    """Return the operations of one sample: forward, again if it is recomputed, and backward.

    The backward pass costs one forward for the gradients of the activations, down to the input layer, and another one
    for the gradients of the trained weights.
    """
    passes = 2 + checkpointing
    return forward_flops * (passes + trained.whole) + trained.adapter * (passes + 1)


@dataclass(frozen=True)
class Widths:
    """Memory of a FLUX block for each token, in token widths.

    `double` and `single` are kept for the backward pass of a double and a single block. `backward` is the maximum that
    this pass needs besides, and `forward` the memory of a forward pass without gradients.
    """

    double: float
    single: float
    backward: float
    forward: float


# By whether all weights are trained, and the bytes of a number. Counted on blocks of full size without data, with the
# casts of autocast on a GPU (tests/train/test_live_bytes.py counts them again).
WIDTHS = {
    (False, 2): Widths(16.1, 14.1, 12.4, 18.3),
    (False, 4): Widths(13.0, 12.0, 10.0, 15.2),
    (True, 2): Widths(34.1, 30.1, 5.0, 16.5),
    (True, 4): Widths(24.1, 21.1, 3.4, 15.2),
}
ENDS = 2  # token widths that are kept before and after the blocks
LARGEST = 9  # bytes for each parameter of the largest matrix while its gradient is computed and added


def step_bytes(
    shapes: Shapes, canvas: TokenCounts, rows: int, trained: TrainedSize, checkpointing: bool, number: int
) -> float:
    """Return the maximum bytes of activations in a training step. `number` is the bytes of a number in the computation.

    Weights, gradients and the optimizer's state are not included. With checkpointing, each block keeps only its input,
    and one block at a time keeps the rest. In bfloat16 each trained matrix has a copy in it, and the input of an
    adapter is cast twice.
    """
    widths, one = WIDTHS[trained.whole, number], rows * canvas.all * width(shapes) * number
    kept, outside = _kept(shapes, canvas, rows, trained, number)
    backward = widths.backward * one
    if trained.whole:
        backward += LARGEST * _largest(shapes)
    elif wide := max((out / width(shapes) for out, _ in trained.layers.values()), default=1.0) - 1:
        backward += 2 * wide * one
    # Keys and values of the tokens apart are kept for the other pass, and joined to its own there.
    ends = ENDS * one + outside + 2 * len(kept) * rows * canvas.apart * width(shapes) * number
    if not checkpointing:
        return sum(kept.values()) + backward + ends
    doubles = [size for block, size in kept.items() if block.startswith("transformer_blocks")]
    singles = [size for block, size in kept.items() if block.startswith("single")]
    # The backward pass begins with the single blocks, when the inputs of all blocks are still kept.
    peaks = [len(kept) * one + max(singles, default=0), len(doubles) * one + max(doubles, default=0)]
    return max(peaks) + backward + ends


def forward_bytes(shapes: Shapes, canvas: TokenCounts, rows: int, trained: TrainedSize, number: int) -> float:
    """Return the bytes of a forward pass without gradients, besides the weights."""
    cast = number * _largest(shapes) if trained.whole and number == 2 else 0
    return WIDTHS[trained.whole, number].forward * rows * canvas.all * width(shapes) * number + cast


def _kept(
    shapes: Shapes, canvas: TokenCounts, rows: int, trained: TrainedSize, number: int
) -> tuple[dict[str, float], float]:
    """Return the bytes that each block keeps for its backward pass, and those outside the blocks."""
    widths, one = WIDTHS[trained.whole, number], rows * canvas.all * width(shapes) * number
    kept: dict[str, float] = {}
    outside = 0.0
    for name, (out, into) in linears(shapes).items():
        block = ".".join(name.split(".")[:2])
        more = 0.0
        if trained.whole and number == 2:
            more = 2 * out * into
        elif name in trained.layers:
            more = rows * tokens_of(name, canvas) * trained.rank * number
            if number == 2:
                more += 2 * trained.rank * (out + into) + 2 * rows * tokens_of(name, canvas) * into
        if "transformer_blocks." in name:
            kept[block] = kept.get(block, one * (widths.single if name.startswith("single") else widths.double)) + more
        else:
            outside += more
    return kept, outside


def _largest(shapes: Shapes) -> int:
    return max(out * into for out, into in linears(shapes).values())


def hours(flops: float, tflops: float, share: float) -> float:
    """Return the device hours of operations."""
    return flops / (tflops * 1e12 * share) / 3600


def tokens(text: str, chars_per_token: float) -> int:
    """Return the number of tokens of a text."""
    return math.ceil(len(text) / chars_per_token)
