"""The documentation site builds without a warning, with the pages and pictures that the build makes itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from diptych.errors import codes
from diptych.recipe.schema import Distill

from .blocks import ROOT


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr[-3000:]

    site = tmp_path / "site"
    reference = (site / "reference/recipes/index.html").read_text()
    assert all(f"<code>{name}</code>" in reference for name in Distill.model_fields)
    commands = (site / "reference/cli/index.html").read_text()
    assert all(
        f"diptych {name}</h3>" in re.sub(r"<a .*?</a>", "", commands) for name in ("run", "generate", "data audit")
    )
    assert "<code>--image-guidance X</code>" in commands
    listed = (site / "reference/errors/index.html").read_text()
    assert all(f"<td><code>{code}</code></td>" in listed for code in codes())
    pictures = list((site / "pictures").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert Image.open(picture).width > 300
    assert 'src="../pictures/grids.png"' in (site / "method/index.html").read_text()
    assert (site / "repository/benchmarks/README.md.txt").exists()


def test_files_that_pages_name_are_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    folders = "|".join(path.name for path in (ROOT / "src/diptych").iterdir() if path.is_dir())
    named = re.compile(rf"(?<![\w/.])((?:src/diptych|tests|benchmarks)/[\w/]+\.\w+|(?:{folders})/[\w/]+\.(?:py|yaml))")
    missing = []
    for page in pages:
        for name in named.findall(page.read_text("utf8")):
            if not (ROOT / name).exists() and not (ROOT / "src/diptych" / name).exists():
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert not missing
