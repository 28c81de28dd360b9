"""The JSON files of a teacher, by the name that a recipe gives it. Nothing is downloaded and no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.utils import models
from diptych.utils.documents import parse_json
from diptych.utils.paths import packaged

INDEX = "model_index.json"


def folder_of(name: str) -> Path | None:
    """The folder of a teacher that is on this machine under its name: `pocket`, or a path. None for a hub name."""
    path = packaged("pocket/weights") / "teacher" if name in models.BUILT_IN else Path(name).expanduser()
    return path if path.is_dir() else None


def read(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a teacher, from its folder or the hub's cache; empty if it is not there or not a JSON object."""
    if (folder := folder_of(name)) is not None:
        return read_file(folder / file)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = name.partition("@")
    try:
        path = try_to_load_from_cache(repo, file, revision=revision or None)
    except HFValidationError:
        return {}
    return read_file(Path(path)) if isinstance(path, str) else {}


def read_file(path: Path) -> dict[str, Any]:
    """A JSON file; empty if it is not there or not a JSON object."""
    try:
        found = parse_json(path.read_text("utf8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def class_of(folder: Path) -> str:
    """The pipeline class that model_index.json in a folder names; empty if it names none."""
    name = read_file(folder / INDEX).get("_class_name")
    return name if isinstance(name, str) else ""
