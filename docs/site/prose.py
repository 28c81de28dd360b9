"""Checks the language of the pages and of the docstrings: words that the glossary replaces, and long sentences.

`make lint` runs `python docs/site/prose.py`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST = 35
"""Words of a sentence."""

INSTEAD = {
    "anew": "again",
    "asked": "requested, passed",
    "colour": "color",
    "draw": "generate",
    "drawn": "generated",
    "draws": "generates",
    "drew": "generated",
    "grey": "gray",
    "learnt": "learned",
    "licence": "license",
    "picture": "image",
    "pictures": "images",
    "told": "given, reported",
}
IN_CODE = {"draw", "draws", "drawn", "drew", "picture", "pictures"}
"""What a docstring may say: the pocket world and pages of a story are drawn, and some functions are named so."""

WORD = re.compile(rf"\b({'|'.join(INSTEAD)})\b", re.IGNORECASE)
CODE = re.compile(r"```.*?```|<!--.*?-->|`[^`\n]*`|\]\([^)]*\)|^#+ [^\n]*$", re.DOTALL | re.MULTILINE)
EXAMPLE = re.compile(r"\n\n(?: {4,}[^\n]*(?:\n|$))+")
BLOCK = re.compile(r"\n\s*\n|\n(?=[-|*] |\d+\. )|\|")


def faults(text: str, allowed: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """What is wrong with a Markdown text; code, addresses and headings are passed over."""
    plain = CODE.sub(lambda match: "\n" * match[0].count("\n") or " X ", text)
    found = [
        f"line {plain.count(chr(10), 0, match.start()) + 1}: '{match[0]}' (write: {INSTEAD[match[0].lower()]})"
        for match in WORD.finditer(plain)
        if match[0].lower() not in allowed
    ]
    for block in BLOCK.split(plain):
        for sentence in re.split(r"(?<=[.!?:;])\s+", " ".join(block.split())):
            if len(sentence.split()) > LONGEST:
                found.append(f"{len(sentence.split())} words in a sentence: {sentence[:70]}…")
    return found


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring of a module, and of each string below a field."""
    tree = ast.parse(path.read_text("utf8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", [])
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, EXAMPLE.sub("\n\n", inspect.cleandoc(value.value))


def main() -> int:
    """Prints the faults of all pages and docstrings; 1 if there are any."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [f"{page.relative_to(ROOT)}: {each}" for page in pages for each in faults(page.read_text("utf8"))]
    count = 0
    for path in sorted((ROOT / "src").rglob("*.py")):
        for line, text in docstrings(path):
            count += 1
            found += [f"{path.relative_to(ROOT)}:{line}: {each}" for each in faults(text, IN_CODE)]
    print("\n".join(found) or f"{len(pages)} pages and {count} docstrings are plain")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
