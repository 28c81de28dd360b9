"""doctor says what this machine can do, and fails when something keeps diptych from working."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.cli import app, doctor
from diptych.student.runtime import memory, quantize
from diptych.utils import models


def test_it_finds_versions_memory_and_a_device() -> None:
    found = doctor.examine()
    assert set(found["versions"]) >= {"diptych", "torch", "diffusers"}
    assert found["memory"]["total"] > 0.5 and found["cpu"]["threads"] >= 1
    assert found["devices"][-1]["device"] == "cpu"
    assert set(found["pocket"]) == set(models.SHIPPED) and all(found["pocket"].values())
    assert found["fits"]["pocket, everything"]
    assert not found["problems"]
    json.dumps(found)
    text = "\n".join(doctor.lines(found))
    for word in ("memory", "device", "extras", "pocket", "fits"):
        assert word in text


def test_missing_weights_are_a_problem_and_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def without(name: str) -> Path:
        return tmp_path / name

    monkeypatch.setattr(doctor, "packaged", without)
    assert app.call(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "teacher MISSING" in out and "this installation is incomplete" in out


def test_memory_presets_are_said_to_fit_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"device": "cuda:0", "name": "a card", "memory": 15.7, "free": 15.0}
    absent = replace(quantize.QUANTIZATIONS["nf4"], package="no_such_module_at_all")
    monkeypatch.setitem(quantize.QUANTIZATIONS, "nf4", absent)
    found = doctor._flux([card])
    assert found["12"] == "" and found["24"] == "cuda:0 has 15.7 GiB"
    assert found["8"] == ""  # its second row needs no bitsandbytes
    monkeypatch.setitem(memory.PRESETS, "8", memory.PRESETS["8"][:1])
    assert doctor._flux([card])["8"] == "nf4 needs no_such_module_at_all: pip install no_such_module_at_all"
    assert all("no CUDA card" in reason for reason in doctor._flux([{"device": "cpu"}]).values())
    text = "\n".join(doctor.lines({**doctor.examine(), "flux": {"12": "", "24": "too small", "48": "too small"}}))
    assert "--memory 12: yes" in text and "--memory 24, 48: no: too small" in text


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"here": ("json",), "absent": ("no_such_module_at_all",)})
    assert doctor.examine()["extras"] == {"here": True, "absent": False}


def test_it_says_whether_vllm_can_run_and_if_not_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    found = doctor.examine()
    assert found["vllm"] == "vLLM is not installed; pip install 'diptych[vllm]'" and not found["extras"]["vllm"]
    assert not found["problems"]  # nobody must have it
    assert "(curate.vlm.vllm): no: vLLM is not installed" in "\n".join(doctor.lines(found))
    assert "(curate.vlm.vllm): yes" in "\n".join(doctor.lines({**found, "vllm": ""}))
