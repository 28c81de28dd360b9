"""The check of the language finds what it should, and the pages and docstrings pass it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .blocks import ROOT

_spec = importlib.util.spec_from_file_location("prose", ROOT / "docs/site/prose.py")
assert _spec is not None and _spec.loader is not None
prose = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prose)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("# A heading\n\nThe model draws an image.", "line 3: 'draws'"),
        ("| a | b |\n|---|---|\n| Grey | x |", "line 3: 'Grey'"),
        (" ".join(["word"] * 36) + ".", "36 words"),
        ("One.\n\n- " + " ".join(["word"] * 40) + ".", "words in a sentence"),
    ],
)
def test_faults_are_found(text: str, fault: str) -> None:
    (found,) = prose.faults(text)
    assert fault in found


@pytest.mark.parametrize(
    "text",
    [
        "```python\npicture = draw()\n```\n",
        "See `draw` and [the script](docs/pictures/make.py).",
        " ".join(["word"] * 20) + ". " + " ".join(["word"] * 20) + ".",
        "<!-- picture: grids -->",
    ],
)
def test_code_addresses_and_short_sentences_pass(text: str) -> None:
    assert prose.faults(text) == []


def test_docstrings_are_read_also_below_fields_and_without_their_examples(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    lines = ['"""First.', "", "    draw(told)", "", 'Last."""', "class A:", "    field = 1", '    """It is told."""']
    path.write_text("\n".join([*lines, "    def f(self):", '        "Anew."']))
    texts = dict(prose.docstrings(path))
    assert sorted(texts) == [1, 8, 10] and "draw" not in texts[1]
    assert [bool(prose.faults(text, prose.IN_CODE)) for _, text in sorted(texts.items())] == [False, True, True]


def test_the_pages_and_the_docstrings_pass() -> None:
    assert prose.main() == 0
