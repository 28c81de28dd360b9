"""Licenses of teachers: the table `licenses.yaml`, notes for people, and the license of what is made from a model.

Students, cards and pairs inherit the license of their teacher. A restrictive license is recognized by the model's name
or by its configs, because models made from it keep them. A permissive one is recognized by the complete name only, and
the model's README comes first.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from diptych.utils.documents import facts, parse_json, parse_yaml, read_text
from diptych.utils.paths import refuse_special

_noted: set[str] = set()


@dataclass(frozen=True)
class License:
    """A row of the table.

    Attributes:
        key: name of the row.
        title: name of the license, for people.
        models: regular expression, searched for in a model's name and path, regardless of case.
        whole: whether `models` must match the last part of the name completely.
        config: allowed values by key of the transformer's config. A model that has them all is of this row.
        card: front matter of a card on the hub.
        note: conditions, which are logged when such a model is opened, and stated in cards. Empty if there are none.
        pairs: the clause that restricts which models may be trained on its images. Empty if there is none.
    """

    key: str
    title: str
    models: str
    card: Mapping[str, str]
    whole: bool = False
    config: Mapping[str, list[Any]] = field(default_factory=dict)
    note: str = ""
    pairs: str = ""

    def covers(self, name: str, folder: Path | None) -> bool:
        """Whether a model, by its name or its folder, is under this license."""
        if self.whole:
            return re.fullmatch(self.models, _title(name), re.IGNORECASE) is not None
        if re.search(self.models, f"{name} {folder or ''}", re.IGNORECASE):
            return True
        return bool(self.config) and folder is not None and any(map(self._fits, _configs(folder)))

    def _fits(self, config: Mapping[str, Any]) -> bool:
        return all(config.get(key) in allowed for key, allowed in self.config.items())


@cache
def table() -> Mapping[str, License]:
    """The table `licenses.yaml`, by the name of the row."""
    return {key: License(key=key, **row) for key, row in facts(__file__).items()}


def find(name: str, folder: Path | None) -> License | None:
    """The license of a model, from the table. None if it is not there.

    Args:
        name: name or path of the model.
        folder: the model on this machine, whose configs are read. None if there is none.
    """
    return next((row for row in table().values() if row.covers(name, folder)), None)


def note(name: str, folder: Path | None) -> str | None:
    """The conditions of a model's license, which are logged once per process. None if there are none."""
    row = find(name, folder)
    if row is None or not row.note:
        return None
    if row.key not in _noted:
        _noted.add(row.key)
        logging.getLogger("diptych").warning(row.note)
    return row.note


def inherited(name: str, folder: Path | None) -> tuple[dict[str, str], str]:
    """The license of what is made from a model, as fields of a card and as a sentence.

    A license with conditions comes from the table, others from the README in `folder`, then from the table.
    """
    row = find(name, folder)
    if row is not None and row.note:
        return dict(row.card), row.note
    stated = card_fields(folder) if folder is not None else {}
    if stated:
        return stated, f"As its base, {name}: {stated.get('license_name') or stated['license']}."
    if row is not None:
        return dict(row.card), f"As its base, {name}: {row.title}."
    return {"license": "other"}, f"As its base, {name}, which states none here: look it up before you publish."


def card_fields(folder: Path) -> dict[str, str]:
    """The license in the front matter of a folder's README.md. Empty if there is none."""
    try:
        return front_fields(read_text(refuse_special(folder / "README.md")))
    except ValueError:
        return {}


def front_fields(text: str) -> dict[str, str]:
    """The license in the front matter of a card's text. Empty if there is none."""
    try:
        front = parse_yaml(text.split("---")[1], "README.md") if text.startswith("---") else None
    except (ValueError, IndexError):
        return {}
    if not isinstance(front, dict) or not front.get("license"):
        return {}
    return {key: str(front[key]) for key in ("license", "license_name", "license_link") if key in front}


def stated(fields: Mapping[str, str]) -> str | None:
    """The name of a license in the fields of a card: `apache-2.0`, `flux-non-commercial-license`. None if unknown."""
    name = fields.get("license")
    return fields.get("license_name") if name == "other" else name


def named(license: str) -> License | None:
    """The row of a license, by the name in a card (`stated`). None if it is not in the table."""
    return next((row for row in table().values() if stated(row.card) == license), None)


def _title(name: str) -> str:
    """The last part of a hub name or path, without a revision. In the hub's cache, that is the model's name."""
    path = Path(name.partition("@")[0])
    part = path.parent.parent.name if path.parent.name == "snapshots" else path.name
    return part.rpartition("--")[2] if part.startswith("models--") else part


def _configs(folder: Path) -> list[dict[str, Any]]:
    """The configs of a model's transformer."""
    found = []
    for path in (folder / "transformer" / "config.json", folder / "config.json"):
        try:
            values = parse_json(refuse_special(path).read_text("utf8"))
        except (OSError, ValueError):
            continue
        found += [values] if isinstance(values, dict) else []
    return found
