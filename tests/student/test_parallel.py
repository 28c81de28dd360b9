"""Context parallelism, over two real processes and gloo: the same picture, written once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych import Student
from diptych.errors import UsageError, UserError
from diptych.student.canvas import Canvas
from diptych.student.runtime import parallel
from raising import raises


def together(number: int, *args: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each of `number` processes that run one command together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(number):
        told = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        command = [sys.executable, str(Path(__file__).with_name("draw_together.py")), *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **told}, **pipes))
    ended = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, out, err) for process, (out, err) in zip(started, ended, strict=True)]


def test_two_processes_draw_the_picture_of_one_and_the_first_writes_it(student_folder, teacher, pictures, tmp_path):
    pictures[0].save(tmp_path / "reference.png")
    alone = Student.load(student_folder, base=teacher, device="cpu", progress_bar=False)
    out = tmp_path / "drawn.png"
    model = ["--model", str(student_folder), "--base", str(teacher), "--device", "cpu"]
    asked = ["--reference", str(tmp_path / "reference.png"), "--prompt", "a red cat", "--seed", "3", "--steps", "3"]
    guided = ["--image-guidance", "2", "--text-guidance", "2"]
    first, second = together(2, "generate", *model, *asked, *guided, "--out", str(out), "--json")
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert json.loads(first[1])["out"] == str(out) and second[1] == ""
    wanted = alone.generate(pictures[0], "a red cat", seed=3, steps=3, image_guidance=2.0, text_guidance=2.0)
    difference = np.abs(np.asarray(Image.open(out)).astype(int) - np.asarray(wanted).astype(int))
    assert difference.max() <= 1


def test_too_few_devices_heads_and_tokens_are_refused(pipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert parallel.processes() == 3
    with raises("device_unavailable", "100 processes", kind=UsageError):
        parallel.join()
    with raises("option_invalid", "3 processes", "2 attention heads", "1, 2", kind=UsageError):
        parallel.split(pipe)
    parallel.check(pipe, Canvas(16, 24, 4))  # not split: any size
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    shared = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=4))
    monkeypatch.setattr(pipe.transformer, "_parallel_config", shared)
    parallel.check(pipe, Canvas(16, 24, 4))
    with raises("size_invalid", "32 pixels", kind=UsageError):
        parallel.check(pipe, Canvas(24, 24, 4))


def test_an_error_that_all_processes_have_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch.distributed as dist

    own, shared = UserError("path_unwritable", "disk full"), UserError("training_diverged", "nan")
    wrong = UsageError("recipe_invalid", "no such key")
    shared.shared = True
    assert parallel.reports(own) and parallel.reports(shared)
    monkeypatch.setenv("RANK", "1")
    assert not parallel.reports(own)  # nobody has met: all do the same
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        assert parallel.reports(own) and not parallel.reports(shared) and not parallel.reports(wrong)
    finally:
        dist.destroy_process_group()
