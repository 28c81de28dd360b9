"""Where the files that ship with diptych lie: in a wheel, or in a source checkout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def packaged(name: str) -> Path:
    """A folder that ships with diptych, such as `pocket/weights`, `recipes` or `examples/references`.

    `examples` and `recipes` live at the repository's root, where people look for them, and are put inside the package
    when a wheel is built; an editable install finds them at the root.
    """
    inside = Path(str(files("diptych"))) / name
    checkout = Path(__file__).resolve().parents[2] / name
    return checkout if not inside.exists() and checkout.exists() else inside
