"""The Space starts as a program and generates an image when its API is called."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych import Student
from diptych.utils.paths import packaged

pytest.importorskip("gradio")
APP = Path(__file__).parents[2] / "integrations/space/app.py"
CAT = str(packaged("examples") / "references/cat.png")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The app running on loopback, as a Space starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    log = tmp_path / "log"
    with log.open("wb") as said:
        app = subprocess.Popen(
            [sys.executable, str(APP)], env={**os.environ, **own}, cwd=tmp_path, stdout=said, stderr=said
        )
        try:
            for _ in range(600):
                assert app.poll() is None, log.read_text()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            app.terminate()
            app.wait(30)


def test_the_space_draws_what_the_student_draws(address: str) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    found = client.predict(handle_file(CAT), "a cat on the beach", 5, api_name="/draw")
    expected = Student.load("pocket", progress_bar=False).generate(CAT, "a cat on the beach", seed=5)
    assert np.array_equal(np.asarray(Image.open(found).convert("RGB")), np.asarray(expected))
