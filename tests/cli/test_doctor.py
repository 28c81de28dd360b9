"""`diptych doctor` reports what this machine can do, and fails if something prevents diptych from working."""

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
    report = doctor.examine()
    assert set(report["versions"]) >= {"diptych", "torch", "diffusers"}
    assert report["memory"]["total"] > 0.5 and report["cpu"]["threads"] >= 1
    assert report["devices"][-1]["device"] == "cpu"
    assert set(report["pocket"]) == set(models.SHIPPED) and all(report["pocket"].values())
    assert report["fits"]["pocket, everything"]
    assert not report["problems"]
    json.dumps(report)
    text = "\n".join(doctor.format_report(report))
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


def test_a_memory_preset_fits_or_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"device": "cuda:0", "name": "a card", "memory": 15.7, "free": 15.0}
    absent = replace(quantize.QUANTIZATIONS["nf4"], package="no_such_module_at_all")
    monkeypatch.setitem(quantize.QUANTIZATIONS, "nf4", absent)
    report = doctor._flux([card])
    assert report["12"] == "" and report["24"] == "cuda:0 has 15.7 GiB"
    assert report["8"] == ""  # its second row needs no bitsandbytes
    monkeypatch.setitem(memory.PRESETS, "8", memory.PRESETS["8"][:1])
    assert doctor._flux([card])["8"] == "nf4 needs no_such_module_at_all: pip install no_such_module_at_all"
    assert all("no CUDA GPU" in reason for reason in doctor._flux([{"device": "cpu"}]).values())
    text = "\n".join(
        doctor.format_report({**doctor.examine(), "flux": {"12": "", "24": "too small", "48": "too small"}})
    )
    assert "--memory 12: yes" in text and "--memory 24, 48: no: too small" in text


def test_a_missing_extra_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"here": ("json",), "absent": ("no_such_module_at_all",)})
    assert doctor.examine()["extras"] == {"here": True, "absent": False}


def test_it_reports_whether_vllm_can_run_and_if_not_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    report = doctor.examine()
    assert report["vllm"] == "vLLM is not installed; pip install 'diptych[vllm]'" and not report["extras"]["vllm"]
    assert not report["problems"]  # it is optional
    assert "(curate.vlm.vllm): no: vLLM is not installed" in "\n".join(doctor.format_report(report))
    assert "(curate.vlm.vllm): yes" in "\n".join(doctor.format_report({**report, "vllm": ""}))
