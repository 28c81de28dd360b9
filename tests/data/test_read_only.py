"""Read-only folders: data is read from them, and writing is an error that names them."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from diptych.data.images import encode
from diptych.data.interop.exporting import export_data
from diptych.data.store import Dataset


def _as_others() -> None:
    """The superuser may write anywhere; without this capability it may not."""
    cap_dac_override, pr_capbset_drop = 1, 24
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, preexec_fn=_as_others
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_read_only_folders_are_read_and_not_written(tmp_path: Path) -> None:
    data, picture = tmp_path / "data", {"bytes": encode(Image.new("RGB", (8, 8)), "PNG"), "path": None}
    rows = [{"conditioning": picture, "image": picture, "caption": f"cat {n}", "id": str(n)} for n in range(3)]
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / "x.parquet")
    export_data(str(tmp_path / "parquet"), data, "imagefolder")
    before = sorted(data.rglob("*"))
    for folder in (data, data / "image", data / "conditioning"):
        folder.chmod(0o555)
    try:
        said = python(f"""
            from pathlib import Path
            from diptych.apps.batch import generate, plan
            from diptych.utils.console import Display
            from diptych.data.interop.importing import import_data
            from diptych.data.places import lock
            from diptych.errors import UserError

            data, out = Path({str(data)!r}), {str(tmp_path / "out")!r}
            print(import_data(str(data), out, "imagefolder")["rows"])

            def never():
                raise AssertionError("a model is loaded though its images could not be written")

            quiet = Display(quiet=True)
            references = {{"reference": str(data / "image"), "prompt": "a cat"}}
            for what in (
                lambda: import_data(out, data, "parquet"),
                lambda: import_data(str(data), data / "inside", "imagefolder"),
                lambda: lock(data / "image").__enter__(),
                lambda: generate(plan(references, None, f"{{data}}/"), {{"model": "pocket"}}, never, quiet),
                lambda: generate(plan(references, None, f"{{data}}/x/"), {{"model": "pocket"}}, never, quiet),
            ):
                try:
                    what()
                except UserError as error:
                    print(error)
        """)
    finally:
        for folder in (data, data / "image", data / "conditioning"):
            folder.chmod(0o755)
    first, *refused = said.splitlines()
    assert first == "3" and len(Dataset(tmp_path / "out")) == 3
    assert len(refused) == 5 and all(str(data) in line for line in refused)
    assert sorted(data.rglob("*")) == before
