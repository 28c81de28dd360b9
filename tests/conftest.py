"""What every test shares: no hub, small real images and rows, and a server that answers like a language model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from llm.chat_server import Act, Call, ChatServer, Serve

# Wall-clock limits fail on a busy machine; in CI the examples are the same every time.
settings.register_profile("diptych", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("diptych")

# Before any library reads it: a test that would need the hub must fail here as it fails offline.
os.environ["HF_HUB_OFFLINE"] = "1"


# Files that take long: processes that import torch, clusters, browsers, whole runs. They begin first, so that of two
# workers none is left with one of them at the end.
LONG = (
    "docs/test_code_blocks.py",
    "data/test_ray_engine.py",
    "test_gpu_benchmark.py",
    "serve/test_app_browser.py",
    "serve/test_stored_script.py",
    "serve/test_callers.py",
    "stages/test_lost_replies.py",
    "student/test_settings.py",
    "train/test_distill.py",
    "train/test_processes.py",
    "llm/test_vllm_ray.py",
    "stages/test_paint_presets.py",
    "docs/test_site.py",
    "./test_examples.py",
    "evaluate/test_ablate.py",
    "evaluate/test_whole_run.py",
    "serve/test_schema.py",
    "serve/test_app_writer.py",
    "serve/test_command.py",
    "integrations/test_space.py",
    "student/test_convert.py",
    "evaluate/test_suite_evaluation.py",
    "recipe/test_third_task.py",
    "provenance/test_sign.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    turns = {here / name: turn for turn, name in enumerate(LONG)}
    items.sort(key=lambda item: turns.get(item.path, len(LONG)))


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIPTYCH_DEBUG", raising=False)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server that does with each call what a function says."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[ChatServer] = []

    def start(act: Callable[[Call], Act]) -> ChatServer:
        servers.append(ChatServer(act))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def pair_rows() -> list[dict[str, Any]]:
    """Three complete rows of `candidates`, with real PNGs: kept, a near copy, and not the same."""
    from PIL import Image

    from diptych.data.images import image_cell

    rows = []
    for i, (distance, similarity, kept, reason) in enumerate(
        [(0.3, 0.9, True, "kept"), (0.001, 0.99, False, "near_copy"), (0.3, 0.2, False, "same")]
    ):
        rows.append(
            {
                "conditioning": image_cell(Image.new("RGB", (8, 8), (200, i, 0))),
                "image": image_cell(Image.new("RGB", (8, 8), (0, i, 200))),
                "caption": f"a cat number {i} — «ñ»",
                "instruction": "show the same cat",
                "id": f"c-{i:06d}-01",
                "grid_id": f"g-{i:06d}",
                "reference_caption": "a cat",
                "task": "subject",
                "subject": "cat",
                "reference_panel": 0,
                "target_panel": 1,
                "seed": 2**62 + i,
                "similarity": similarity,
                "copy_distance": distance,
                "seam": 1.0,
                "kept": kept,
                "reason": reason,
                "judge": "ab" * 32,
                "evidence": "{}",
            }
        )
    return rows
