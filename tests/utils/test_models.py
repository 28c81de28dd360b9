"""A model's name becomes a folder, or one line that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diptych.errors import UsageError
from diptych.utils import models
from raising import raises


def folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".safetensors" if "weights" in name else ".json").write_text(text)
    return path


def test_a_local_folder_or_file_is_itself(tmp_path: Path) -> None:
    assert models.resolve(str(tmp_path), "student") == tmp_path
    (tmp_path / "one.safetensors").write_text("")
    assert models.resolve(str(tmp_path / "one.safetensors"), "student").is_file()


@pytest.mark.parametrize("name", ["pockt", "runs/no/such/student", "", "a b/c"])
def test_a_name_that_cannot_be_a_model_is_wrong_use(name: str) -> None:
    with raises("model_not_found", name, kind=UsageError) as caught:
        models.resolve(name, "student")
    assert ("did you mean 'pocket'" in str(caught.value)) == (name == "pockt")


@pytest.mark.parametrize(
    ("name", "role", "facts"),
    [
        ("dsd_model", "student", ("primecai/dsd_model", "24.6 GB", "hf download")),
        ("models/FLUX.1-dev", "teacher", ("huggingface.co/black-forest-labs/FLUX.1-dev", "33.7 GB", "hf auth login")),
    ],
)
def test_errors_say_where_to_get_the_models_of_the_documentation(name: str, role: str, facts: tuple[str, ...]) -> None:
    with raises("model_not_found" if role == "student" else "hub_unreachable", *facts) as caught:
        models.resolve(name, role)
    assert ("license" in str(caught.value)) == ("FLUX" in name)


def test_a_hub_name_that_cannot_be_downloaded_fails_in_one_line() -> None:
    with raises("hub_unreachable", "someone/something") as caught:
        models.resolve("someone/something@main", "teacher")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


class _Gated(BaseHTTPRequestHandler):
    """A hub that keeps every repository behind its license, as the real one answers who has no token."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model black-forest-labs/FLUX.1-dev is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_gated_model_without_a_token_says_where_to_accept_its_license(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    away = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    env = {key: value for key, value in os.environ.items() if key.upper() not in away}
    port = server.server_address[1]
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    code = "from diptych.utils import models; models.resolve('black-forest-labs/FLUX.1-dev', 'teacher')"
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    finally:
        server.shutdown()
    last = done.stderr.strip().splitlines()[-1]
    facts = ("UserError", "black-forest-labs/FLUX.1-dev", "33.7 GB", "https://huggingface.co/", "hf auth login")
    assert all(fact in last for fact in facts), last


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("d/a:-1", "d/a", -1.0),
        ("~/a:2", str(Path.home() / "a"), 2.0),
    ],
)
def test_a_lora_is_written_with_its_scale(text: str, path: str, scale: float) -> None:
    assert models.with_scale(text) == (Path(path), scale)


def test_a_colon_in_a_lora_file_that_exists_is_part_of_its_name(tmp_path: Path) -> None:
    odd = tmp_path / "a:2"
    odd.write_text("")
    assert models.with_scale(str(odd)) == (odd, 1.0)
    for scale in ("strong", "nan", "inf", ""):
        with raises("lora_not_found", f"a.safetensors:{scale}", "a.safetensors:0.8", kind=UsageError):
            models.with_scale(f"a.safetensors:{scale}")


def test_a_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    one = models.fingerprint(folder(tmp_path / "1", vae__weights="abc", vae__config="{}"))
    assert one == models.fingerprint(folder(tmp_path / "2", vae__weights="abc", vae__config="{}"))
    assert one != models.fingerprint(folder(tmp_path / "3", vae__weights="abd", vae__config="{}"))
    assert one != models.fingerprint(folder(tmp_path / "4", vea__weights="abc", vea__config="{}"))
    (tmp_path / "1" / "notes.txt").write_text("not part of it")
    assert one == models.fingerprint(tmp_path / "1")


def test_a_fingerprint_is_not_stale_after_a_change_in_the_same_process(tmp_path: Path) -> None:
    path = folder(tmp_path, weights="abc") / "weights.safetensors"
    before = models.fingerprint(tmp_path)
    path.write_text("abd")
    os.utime(path, ns=(1, 1))
    assert models.fingerprint(tmp_path) != before
