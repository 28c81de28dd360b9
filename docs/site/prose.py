"""Checks the language of the pages: words that the glossary replaces, and long sentences.

`make lint` runs `python docs/site/prose.py`.
"""

from __future__ import annotations

import re
import sys
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
WORD = re.compile(rf"\b({'|'.join(INSTEAD)})\b", re.IGNORECASE)
CODE = re.compile(r"```.*?```|<!--.*?-->|`[^`\n]*`|\]\([^)]*\)|^#+ [^\n]*$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"\n\s*\n|\n(?=[-|*] |\d+\. )|\|")


def faults(text: str) -> list[str]:
    """What is wrong with a Markdown text; code, addresses and headings are passed over."""
    plain = CODE.sub(lambda match: "\n" * match[0].count("\n") or " X ", text)
    found = [
        f"line {plain.count(chr(10), 0, match.start()) + 1}: '{match[0]}' (write: {INSTEAD[match[0].lower()]})"
        for match in WORD.finditer(plain)
    ]
    for block in BLOCK.split(plain):
        for sentence in re.split(r"(?<=[.!?:;])\s+", " ".join(block.split())):
            if len(sentence.split()) > LONGEST:
                found.append(f"{len(sentence.split())} words in a sentence: {sentence[:70]}…")
    return found


def main() -> int:
    """Prints the faults of all pages; 1 if there are any."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = [(page, page.relative_to(ROOT).as_posix()) for page in pages]
    found = [f"{name}: {each}" for page, name in names for each in faults(page.read_text("utf8"))]
    print("\n".join(found) or f"{len(pages)} pages are plain")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
