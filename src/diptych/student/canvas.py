"""The diptych canvas: the two panels in pixels and in tokens, and fitting a reference to a panel.

The student denoises one 1×2 canvas [reference | target] (the release's 512×1024 canvas is two 512² panels).
The VAE downsamples it by its factor, and FLUX packs 2×2 latents into one token, row by row. So the tokens of a panel
are *columns* of the canvas, not one contiguous half of the sequence. Shapes: B batch, C latent channels, H×W canvas
pixels, R×K token rows and columns.

A student of `channel` conditioning has a canvas with only the target panel. Its reference is in the target's condition
channels, aligned pixel by pixel, as in stock FLUX-Control. A student of `tokens` conditioning has only the target panel
too; its references are clean tokens beside the canvas (`references`). The left panel then has no tokens and no pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diptych.data.images import to_rgb
from diptych.errors import UsageError
from diptych.student.families.base import Size
from diptych.student.sampling import check_fit

if TYPE_CHECKING:
    from PIL import Image

BLACK = -1.0  # the right half of the condition canvas, in the VAE's range [-1, 1]


@dataclass(frozen=True)
class Canvas:
    """A 1×2 canvas of two panels, or of one panel. Sizes are in pixels; `factor` is the VAE's downsampling."""

    panel_height: int
    panel_width: int
    factor: int
    panels: int = 2

    def __post_init__(self) -> None:
        check_panel_size(self.panel_height, self.panel_width, self.factor)

    @property
    def height(self) -> int:
        return self.panel_height

    @property
    def width(self) -> int:
        return self.panels * self.panel_width

    @property
    def rows(self) -> int:
        """Token rows of the canvas, and of either panel."""
        return self.panel_height // (2 * self.factor)

    @property
    def panel_columns(self) -> int:
        """Token columns of one panel."""
        return self.panel_width // (2 * self.factor)

    @property
    def columns(self) -> int:
        """Token columns of the whole canvas."""
        return self.panels * self.panel_columns

    @property
    def size(self) -> Size:
        """Rows and columns of the whole canvas in tokens."""
        return Size(self.rows, self.columns)

    @property
    def tokens(self) -> int:
        """Tokens of the whole canvas, on which FLUX's schedule shift depends."""
        return self.rows * self.columns


def check_panel_size(height: int, width: int, factor: int) -> None:
    """UsageError unless both sides are positive multiples of 2 × the VAE factor, because latents are packed 2×2."""
    unit = 2 * factor
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % unit:
            raise UsageError(
                "size_invalid",
                f"The panel {name} must be a multiple of {unit} pixels for this model, not {value!r}. Try "
                f"{_near(value, unit)}.",
            )


def _near(value: object, unit: int) -> str:
    """The multiples of `unit` below and above a number, as text."""
    if not isinstance(value, (int, float)) or not unit < value < float("inf"):
        return str(unit)
    below = int(value // unit) * unit
    return str(below) if value == below else f"{below} or {below + unit}"


def split_tokens(tokens: torch.Tensor, canvas: Canvas) -> tuple[torch.Tensor, torch.Tensor]:
    """Canvas tokens (B, R·2K, D) to the tokens of the left and of the right panel, (B, R·K, D) each."""
    b, n, d = tokens.shape
    assert n == canvas.tokens, (n, canvas)
    grid = tokens.reshape(b, canvas.rows, canvas.panels, canvas.panel_columns, d)
    return grid[:, :, :-1].reshape(b, -1, d), grid[:, :, -1].reshape(b, -1, d)


def join_tokens(left: torch.Tensor, right: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Two panels' tokens (B, R·K, D) to canvas tokens (B, R·2K, D); the inverse of `split_tokens`."""
    sides = [side.unflatten(1, (canvas.rows, side.shape[1] // canvas.rows)) for side in (left, right)]
    return torch.cat(sides, dim=2).flatten(1, 2)


def right_tokens(canvas: Canvas) -> torch.Tensor:
    """Boolean mask (R·2K,) over the canvas tokens that is true on the right panel: its columns."""
    column = torch.arange(canvas.tokens) % canvas.columns
    return column >= canvas.columns - canvas.panel_columns


def split_panels(canvas: torch.Tensor, panels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right panel of pixels or latents (B, C, H, W), split along the width."""
    width = canvas.shape[-1] // panels
    return canvas[..., :-width], canvas[..., -width:]


def join_panels(left: torch.Tensor, right: torch.Tensor, panels: int = 2) -> torch.Tensor:
    """Two panels (B, C, H, w) side by side: (B, C, H, 2w). On a canvas of one panel, only the right one."""
    return torch.cat([left, right], dim=-1) if panels == 2 else right


def condition_canvas(reference: torch.Tensor, panels: int = 2) -> torch.Tensor:
    """Pixels (B, 3, H, w) in [-1, 1] to the condition canvas [reference | black], (B, 3, H, 2w). On a canvas of one
    panel, only the reference."""
    return join_panels(reference, torch.full_like(reference, BLACK)) if panels == 2 else reference


def fit_image(image: Image.Image, height: int, width: int, fit: str = "crop") -> Image.Image:
    """`image` as an RGB panel of height × width pixels, with its aspect ratio.

    - `crop`: scaled to cover the panel, and cropped evenly on both sides (the default).
    - `pad`: scaled to fit inside, and padded with white.
    - `contain`: scaled to fit inside, and padded with the image's edge pixels, so that the reference has no hard bars.
    """
    from PIL import Image, ImageOps

    check_fit(fit)
    if fit == "keep":
        raise UsageError(
            "option_unsuited", "fit keep is for students that take their reference as tokens; use crop, pad or contain"
        )
    image = to_rgb(image)
    if image.size == (width, height):
        return image
    if fit == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    scale = min(width / image.width, height / image.height)
    size = [max(1, round(side * scale)) for side in image.size]  # ImageOps.contain rounds a thin strip away to nothing
    inside = image.resize((min(width, size[0]), min(height, size[1])), Image.Resampling.LANCZOS)
    if fit == "pad":
        panel = Image.new("RGB", (width, height), (255, 255, 255))
        panel.paste(inside, ((width - inside.width) // 2, (height - inside.height) // 2))
        return panel
    import numpy as np

    rows, columns = height - inside.height, width - inside.width
    around = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    return Image.fromarray(np.pad(np.asarray(inside), around, mode="edge"))


def kept_size(image: Image.Image, canvas: Canvas) -> tuple[int, int]:
    """Height and width of a reference at its own aspect ratio: multiples of 2 × the VAE factor, and no more pixels than
    a panel has."""
    unit = 2 * canvas.factor
    area = canvas.rows * canvas.panel_columns
    height = min(area, max(1, round((area * image.height / image.width) ** 0.5)))
    width = min(area // height, max(1, round(height * image.width / image.height)))
    return height * unit, width * unit


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as pixels (3, H, W), float32 in [-1, 1], the VAE's range."""
    import numpy as np

    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
    return (2.0 * pixels - 1.0).permute(2, 0, 1).contiguous()
