"""The sums: what a FLUX transformer computes and holds, from the shapes of its matrices. No torch.

A product of T tokens with a matrix (out, in) is 2·T·in·out operations; attention over N tokens of width W is 4·N²·W a
block, for the scores and for the values. Which tokens a layer sees is told by its name (`tokens_of`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]
TEXT_LAYERS = (".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj", ".attn.to_add_out", ".ff_context.")
TRAINED_BYTES = 4  # what is trained is float32
# Of an optimizer's state for each trained number: two moments, in float32 or 8 bits; Prodigy keeps two more numbers.
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}


@dataclass(frozen=True)
class Canvas:
    """Tokens that a transformer sees at once. `apart` of the image tokens attend to themselves alone, in a separate
    pass; `keys` are tokens of which only keys and values are there, for the others to attend to."""

    image: int
    text: int
    apart: int = 0
    keys: int = 0

    @property
    def all(self) -> int:
        return self.image + self.text

    @property
    def pairs(self) -> int:
        """Pairs of tokens that attention compares."""
        return (self.all - self.apart) * (self.all + self.keys) + self.apart**2


def image_tokens(height: int, width: int, factor: int) -> int:
    """Tokens of a picture in pixels: the VAE shrinks it by `factor`, and FLUX packs 2×2 latents into one."""
    return (height // (2 * factor)) * (width // (2 * factor))


def tokens_of(layer: str, canvas: Canvas) -> int:
    """How many tokens go through a layer, for each row of a batch. Modulation sees one vector a pass and no tokens."""
    if "norm" in layer or layer.startswith("time_text_embed"):
        return 2 if canvas.apart else 1
    if layer.startswith("single_transformer_blocks"):
        return canvas.all
    if layer.startswith("context_embedder") or any(name in f"{layer}." for name in TEXT_LAYERS):
        return canvas.text
    return canvas.image


def linears(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The matrices of a state dict by layer: (out, in)."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def blocks(shapes: Shapes) -> int:
    """Transformer blocks of both kinds."""
    return len({".".join(name.split(".")[:2]) for name in shapes if "transformer_blocks." in name})


def block_matrices(shapes: Shapes) -> dict[str, int]:
    """Numbers in the matrices of each block."""
    found: dict[str, int] = {}
    for name, (out, into) in linears(shapes).items():
        if "transformer_blocks." in name:
            block = ".".join(name.split(".")[:2])
            found[block] = found.get(block, 0) + out * into
    return found


def width(shapes: Shapes) -> int:
    """Numbers of a token inside the blocks."""
    return shapes["x_embedder.weight"][0]


def forward(shapes: Shapes, canvas: Canvas) -> float:
    """Operations of one forward pass of one row."""
    products = sum(2 * tokens_of(name, canvas) * a * b for name, (a, b) in linears(shapes).items())
    return products + blocks(shapes) * 4 * canvas.pairs * width(shapes)


@dataclass(frozen=True)
class Trained:
    """What learns: numbers, the operations that low-rank adapters add to a forward pass, and their layers (out, in)."""

    numbers: int
    adapter: float
    whole: bool
    rank: int = 0
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def widened(shapes: Shapes) -> Shapes:
    """A student's shapes from its teacher's: the input layer takes the condition's channels as well."""
    out, into = shapes["x_embedder.weight"]
    return {**shapes, "x_embedder.weight": (out, 2 * into)}


def adapted(shapes: Shapes, targets: Sequence[str], rank: int, canvas: Canvas, input_layer: bool = True) -> Trained:
    """Adapters of `rank` on the student's layers whose names end as `targets`, and the whole input layer, if that is
    trained."""
    layers = {
        name: sizes
        for name, sizes in linears(shapes).items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }
    out, into = shapes["x_embedder.weight"]
    numbers = sum(rank * (a + b) for a, b in layers.values()) + (out * into + out if input_layer else 0)
    flops = sum(2.0 * tokens_of(name, canvas) * rank * (a + b) for name, (a, b) in layers.items())
    return Trained(numbers, flops, whole=False, rank=rank, layers=layers)


def training(forward_flops: float, trained: Trained, checkpointing: bool) -> float:
    """Operations of one sample: forward, again if it is recomputed, and backward.

    Backward costs a forward for the gradients of the activations, which go down to the input layer, and another for
    those of the weights: of all of them, or of the adapters alone.
    """
    passes = 2 + checkpointing
    return forward_flops * (passes + trained.whole) + trained.adapter * (passes + 1)


@dataclass(frozen=True)
class Widths:
    """What a FLUX block holds of each token, in widths: what its backward pass waits for in a double and in a single
    block, what is there besides at most while that runs, and what a forward pass without gradients holds."""

    double: float
    single: float
    backward: float
    forward: float


# By whether all weights are trained, and bytes of a number. Counted on blocks of full size that hold no data, with the
# casts of autocast on a GPU (tests/train/test_live_bytes.py counts them again).
WIDTHS = {
    (False, 2): Widths(16.1, 14.1, 12.4, 18.3),
    (False, 4): Widths(13.0, 12.0, 10.0, 15.2),
    (True, 2): Widths(34.1, 30.1, 5.0, 16.5),
    (True, 4): Widths(24.1, 21.1, 3.4, 15.2),
}
ENDS = 2  # widths of a token that wait before and after the blocks
LARGEST = 9  # bytes for each number of the largest matrix while its gradient is made and added


def step_bytes(shapes: Shapes, canvas: Canvas, rows: int, trained: Trained, checkpointing: bool, number: int) -> float:
    """Bytes of a training step besides weights, their gradients and the optimizer's state: what the backward pass waits
    for, at its most. `number`: bytes of what it computes in.

    With checkpointing a block keeps its input alone, and one block at a time the rest. In bfloat16 each matrix that
    learns has a copy in it, and so has what an adapter sees, which is cast twice.
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
    # The single blocks go backward first, when the inputs of all blocks still wait.
    peaks = [len(kept) * one + max(singles, default=0), len(doubles) * one + max(doubles, default=0)]
    return max(peaks) + backward + ends


def forward_bytes(shapes: Shapes, canvas: Canvas, rows: int, trained: Trained, number: int) -> float:
    """Bytes of a forward pass without gradients, besides the weights."""
    cast = number * _largest(shapes) if trained.whole and number == 2 else 0
    return WIDTHS[trained.whole, number].forward * rows * canvas.all * width(shapes) * number + cast


def _kept(shapes: Shapes, canvas: Canvas, rows: int, trained: Trained, number: int) -> tuple[dict[str, float], float]:
    """Bytes that each block's backward pass waits for, and those of what is outside the blocks."""
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
    """Device hours."""
    return flops / (tflops * 1e12 * share) / 3600


def tokens(text: str, chars_per_token: float) -> int:
    """Tokens of a text."""
    return math.ceil(len(text) / chars_per_token)
