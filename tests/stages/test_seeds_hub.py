"""Seed captions of a data set on the hub: the hub's own library against a server that speaks its protocol."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import OWNER, TOKEN, Hub

READ = """
import json, sys
from diptych.errors import UserError
from diptych.stages.write import seeds

for source in sys.argv[1:]:
    try:
        found = seeds.read(source, "text", "kind")
        print(json.dumps([found.texts, found.categories]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def parquet(*rows: tuple[str, str]) -> bytes:
    out = io.BytesIO()
    texts, kinds = zip(*rows, strict=True)
    pq.write_table(pa.table({"text": list(texts), "kind": list(kinds), "other": [0] * len(rows)}), out)
    return out.getvalue()


def test_captions_are_read_from_a_data_set_on_the_hub_a_file_or_a_folder_of_it(hub: Hub) -> None:
    files = {
        "data/train-0.parquet": parquet(("a fox", "animal"), ("два кота", "animal")),
        "data/train-1.parquet": parquet(("a tin robot", "thing")),
        "README.md": b"captions",
    }
    held = {path: (data, path.endswith(".parquet")) for path, data in files.items()}
    hub.repos["dataset", f"{OWNER}/captions"] = {"files": held, "private": False, "commits": []}
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    root = f"hf://datasets/{OWNER}/captions"
    sources = [f"{root}/data/train-0.parquet", f"{root}/data", root, f"hf://datasets/{OWNER}/none"]
    done = subprocess.run([sys.executable, "-c", READ, *sources], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, folder, whole, none = map(json.loads, done.stdout.splitlines())
    assert one == [["a fox", "два кота"], ["animal", "animal"]]
    assert folder == whole == [["a fox", "два кота", "a tin robot"], ["animal", "animal", "thing"]]
    assert sources[-1] in none and "\n" not in none
