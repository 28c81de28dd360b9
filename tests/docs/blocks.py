"""The code blocks of a Markdown page, and why some are not run.

A comment before a block says so, invisible to readers: `<!-- not run: REASON -->`. Even then its `diptych` commands
must be ones that the command line takes.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"bash", "python", "yaml", "json", "text"}
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n+)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """`reason` is why it is not run, empty if it is."""

    page: Path
    line: int
    language: str
    text: str
    reason: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """A bash block's commands in words, comments and environment left out."""
        joined = self.text.replace("\\\n", " ")
        found = [shlex.split(line, comments=True) for line in joined.splitlines()]
        return [words for words in found if words]


def read(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            "\n".join(line.removeprefix(found["indent"]) for line in found["text"].splitlines()),
            found["reason"] or "",
        )
        for found in _FENCE.finditer(text)
    ]
