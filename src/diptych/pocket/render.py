"""Renders a subject in a scene: lights the place (`places`) and the subject (`draw`) and composes them.

    from diptych.pocket import render, world
    pixels = render.render(world.sample_identity(rng), world.sample_scene(rng))   # uint8, 64×64×3

Lighting has four parts: shading from a soft height field of the subject, a cast shadow, a rim when the light is behind,
and the light's fall-off in the place. A light only changes factors, so the same scene under another light has exactly
the same geometry: a true relit pair.
"""

import math

import numpy as np
from PIL import Image, ImageFilter

from . import draw, places
from .world import INTENSITIES, LIGHT_COLOURS, PANEL, Identity, Light, Scene


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, dtype=np.float32) / 255.0


def _normals(alpha: np.ndarray) -> np.ndarray:
    """Normals of the silhouette as a soft relief: `[H, W, 3]`, x right, y down, z to the viewer."""
    size = alpha.shape[0]
    height = (_blur(alpha, size / 16) + _blur(alpha, size / 32)) * (size / 7)
    dy, dx = np.gradient(height)
    normal = np.stack([-dx, -dy, np.ones_like(dx)], -1)
    return normal / np.linalg.norm(normal, axis=-1, keepdims=True)


def _vector(light: Light) -> np.ndarray:
    """The direction to the light, `[3]`."""
    azimuth, elevation = math.radians(light.azimuth), math.radians(light.elevation)
    if light.direction == "behind":
        return np.array([math.cos(azimuth) * 0.4, -0.5, -0.77], dtype=np.float32)
    x = math.cos(azimuth) * math.cos(elevation)
    return np.array([x, -math.sin(elevation), 0.55 * math.cos(elevation) + 0.12], dtype=np.float32)


def _falloff(light: Light, size: int) -> np.ndarray:
    """The share of the light at each point of the place, brighter near its source. `[H, W, 1]`."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1)
    source = {"left": (0.0, 0.3), "right": (1.0, 0.3), "above": (0.5, 0.0), "behind": (0.5, 0.42)}[light.direction]
    distance = np.sqrt((x - source[0]) ** 2 + (y - source[1]) ** 2)
    low, high, reach = {
        "left": (0.6, 1.25, 1.1),
        "right": (0.6, 1.25, 1.1),
        "above": (0.78, 1.18, 1.1),
        "behind": (0.6, 1.4, 0.6),
    }[light.direction]
    return (high - (high - low) * np.clip(distance / reach, 0, 1))[..., None]


def _shadow(alpha: np.ndarray, ground: tuple[float, float, float], light: Light) -> np.ndarray:
    """The shadow of the silhouette on the ground, away from the light. `[H, W]` in 0..1."""
    size = alpha.shape[0]
    feet = ground[1] * size
    lean = {"left": 0.85, "right": -0.85, "above": 0.0, "behind": 0.0}[light.direction]
    flat = {"left": 0.28, "right": 0.28, "above": 0.12, "behind": -0.3}[light.direction]
    lean += 0.25 * math.cos(math.radians(light.azimuth)) * -1 if light.direction in ("above", "behind") else 0.0
    # Output (x, y) shows input (x', y'): the height above the feet, y' − feet, is scaled by `flat` and sheared by
    # `lean`.
    k = 1.0 / flat
    image = Image.fromarray((alpha * 255).astype(np.uint8))
    coefficients = (1.0, lean * k, -lean * k * feet, 0.0, k, feet - k * feet)
    laid = image.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(laid.filter(ImageFilter.GaussianBlur(size / 70)), dtype=np.float32) / 255.0


def compose(
    background: np.ndarray, horizon: float, subject: Image.Image, ground: tuple[float, float, float], scene: Scene
) -> np.ndarray:
    """Lights the place and the subject and composes them.

    `background` float `[H, W, 3]` in 0..1; `subject` RGBA with premultiplied colors; returns uint8 `[H, W, 3]`.
    """
    light = scene.light
    size = background.shape[0]
    pixels = np.asarray(subject, dtype=np.float32) / 255.0
    colors, alpha = pixels[..., :3], pixels[..., 3]
    tint = np.array(LIGHT_COLOURS[light.colour], dtype=np.float32)
    gain = INTENSITIES[light.intensity]
    hard = 0.45 if light.intensity == "soft" else 0.9

    shadow = _shadow(alpha, ground, light)
    shadow *= np.clip((np.arange(size)[:, None] / size - horizon) * 12, 0, 1)
    place = background * _falloff(light, size) * (1 - (0.3 + 0.28 * hard) * shadow)[..., None]

    facing = _normals(alpha) @ _vector(light)
    shade = 0.62 + hard * 0.62 * np.clip(facing, -0.35, 1)
    lit = colors * shade[..., None]
    if light.direction == "behind":
        rim = np.clip(alpha - _blur(alpha, size / 40), 0, 1) * alpha
        lit = lit * 0.78 + (rim * 1.3 * hard)[..., None]
    composed = (lit + place * (1 - alpha)[..., None]) * tint * gain
    return (np.clip(composed, 0, 1) * 255 + 0.5).astype(np.uint8)


def render(identity: Identity, scene: Scene, size: int = PANEL) -> np.ndarray:
    """Renders `identity` in `scene`. Returns uint8 `[size, size, 3]`. Equal arguments give equal bytes."""
    background, horizon = places.paint(scene, size)
    subject, ground = draw.paint(identity, scene, size)
    return np.asarray(places.weather(compose(background, horizon, subject, ground, scene), scene))
