"""The sums: what a FLUX transformer computes and holds, from the shapes of its matrices. No torch.

A product of T tokens with a matrix (out, in) is 2·T·in·out operations; attention over N tokens of width W is 4·N²·W a
block, for the scores and for the values. Which tokens a layer sees is told by its name (`tokens_of`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]
TEXT_LAYERS = (".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj", ".attn.to_add_out", ".ff_context.")
TRAINED_BYTES = 4  # what is trained is float32
# Of an optimizer's state for each trained number: two moments, in float32 or 8 bits; Prodigy keeps two more numbers.
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}


@dataclass(frozen=True)
class Canvas:
    """Tokens that a transformer sees at once."""

    image: int
    text: int

    @property
    def all(self) -> int:
        return self.image + self.text


def image_tokens(height: int, width: int, factor: int) -> int:
    """Tokens of a picture in pixels: the VAE shrinks it by `factor`, and FLUX packs 2×2 latents into one."""
    return (height // (2 * factor)) * (width // (2 * factor))


def tokens_of(layer: str, canvas: Canvas) -> int:
    """How many tokens go through a layer, for each row of a batch. Modulation sees one vector and no tokens."""
    if "norm" in layer or layer.startswith("time_text_embed"):
        return 1
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
    return products + blocks(shapes) * 4 * canvas.all**2 * width(shapes)


@dataclass(frozen=True)
class Trained:
    """What learns: numbers, and the operations that low-rank adapters add to a forward pass."""

    numbers: int
    adapter: float
    whole: bool


def widened(shapes: Shapes) -> Shapes:
    """A student's shapes from its teacher's: the input layer takes the condition's channels as well."""
    out, into = shapes["x_embedder.weight"]
    return {**shapes, "x_embedder.weight": (out, 2 * into)}


def adapted(shapes: Shapes, targets: Sequence[str], rank: int, canvas: Canvas) -> Trained:
    """Adapters of `rank` on the student's layers whose names end as `targets`, and the whole input layer."""
    layers = [
        (name, out, into)
        for name, (out, into) in linears(shapes).items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    out, into = shapes["x_embedder.weight"]
    numbers = sum(rank * (a + b) for _, a, b in layers) + out * into + out
    return Trained(numbers, sum(2.0 * tokens_of(name, canvas) * rank * (a + b) for name, a, b in layers), whole=False)


def training(forward_flops: float, trained: Trained, checkpointing: bool) -> float:
    """Operations of one sample: forward, again if it is recomputed, and backward.

    Backward costs a forward for the gradients of the activations, which go down to the input layer, and another for
    those of the weights: of all of them, or of the adapters alone.
    """
    passes = 2 + checkpointing
    return forward_flops * (passes + trained.whole) + trained.adapter * (passes + 1)


def activations(shapes: Shapes, canvas: Canvas, rows: int, checkpointing: bool, bytes_: int, widths: float) -> float:
    """Bytes that the backward pass waits for.

    A block keeps of each token, in widths: its input, the normed and the modulated one (3), queries, keys and values
    (3), the normed and the turned queries and keys (4), attention's output (1), the MLP before and after its activation
    (8), both halves joined (5) and what is gated at the end (1): `widths` is 25. With checkpointing it keeps its input
    alone, and one block at a time the rest.
    """
    one = rows * canvas.all * width(shapes) * bytes_
    return one * (blocks(shapes) + widths) if checkpointing else one * blocks(shapes) * widths


def hours(flops: float, tflops: float, share: float) -> float:
    """Device hours."""
    return flops / (tflops * 1e12 * share) / 3600


def tokens(text: str, chars_per_token: float) -> int:
    """Tokens of a text."""
    return math.ceil(len(text) / chars_per_token)
