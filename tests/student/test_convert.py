"""Weights from each layout to each other, to the bit where the table says so; what would lose something is refused."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diptych import student
from diptych.cli import app
from diptych.errors import UsageError
from diptych.student.weights import directions, files
from diptych.student.weights.convert import convert
from diptych.student.weights.lora_delta import low_rank
from diptych.student.weights.original import from_original
from diptych.student.weights.sources import read_settings
from diptych.student.weights.tensors import held, open_safetensors, write_safetensors
from layouts import LORA, RELEASED, folded_state, make_base, original_keys, read_state, write_gguf
from raising import raises

CLOSE: Any = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("golden") / "base")


@pytest.fixture(scope="module")
def sources(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden student, LoRA and all, in every layout."""
    folder = tmp_path_factory.mktemp("sources")
    made = {"released": RELEASED, "gguf": folder / "student.gguf", "file": folder / "student.safetensors"}
    for layout in ("folded", "control-lora"):
        made[layout] = folder / layout
        convert(RELEASED, made[layout], layout, base=base)
    convert(RELEASED, made["file"], "file", fuse_lora=True)
    write_gguf(made["gguf"], {k: t.read() for k, t in open_safetensors(made["file"])[0].items()}, "F32")
    return made


def state(path: Path, base: Path) -> dict[str, torch.Tensor]:
    """The student as it runs, its LoRA fused by peft."""
    return dict(student.load(path, base, device="cpu", fuse=True).transformer.state_dict())


@pytest.fixture(scope="module")
def expected(base: Path) -> dict[str, torch.Tensor]:
    return state(RELEASED, base)


@pytest.mark.parametrize(
    "row",
    [row for row in directions.rows() if row.target != "exported"],  # no weights: test_exported.py
    ids=lambda row: f"{row.source}-{row.target}",
)
def test_every_row_of_the_table_does_what_it_says(row, sources, base, expected, tmp_path):
    out = tmp_path / f"out{directions.FILES.get(row.target, '')}"
    again = row.source == row.target and row.target != "file"
    # A whole transformer of float32 is rewritten in float32: no precision is lost.
    options: Any = {"dtype": "float32"} if again else {"fuse_lora": row.target in ("file", "original")}
    if row.equality == "refused":
        with raises("model_unsupported", row.source, row.target):
            convert(sources[row.source], out, row.target, base=base)
        assert not list(tmp_path.iterdir())
        return
    if row.base:
        with raises("option_missing", "base", kind=UsageError):
            convert(sources[row.source], out, row.target, **options)
    done = convert(sources[row.source], out, row.target, base=base, **options)
    assert (done["source"], done["target"]) == (row.source, row.target)
    fused = row.target in ("file", "original") and row.source in ("released", "folded")
    assert done["equality"] == ("cast" if again else "function" if fused else row.equality)
    got = state(out, base)
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], **CLOSE, msg=key)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("way", [("folded",), ("file",), ("folded", "file"), ("file", "folded")], ids="-".join)
def test_released_comes_back_bit_for_bit(way, dtype, tmp_path):
    place = RELEASED / "transformer"
    for i, to in enumerate(way):
        name = f"{i}.safetensors" if to == "file" else str(i)
        convert(place, tmp_path / name, to, dtype=dtype if i == 0 else None)
        place = tmp_path / name
    assert convert(place, tmp_path / "back", "released")["equality"] == "bits"
    before = read_state(RELEASED / "transformer", getattr(torch, dtype or "float32"))
    after = read_state(tmp_path / "back" / "transformer")
    assert after.keys() == {key for key in before if ".lora_" not in key}
    assert all(torch.equal(before[key], after[key]) for key in after)


def test_the_lora_is_copied_byte_for_byte_or_refused(tmp_path, sources):
    assert (sources["folded"] / LORA.name).read_bytes() == LORA.read_bytes()
    convert(sources["folded"], tmp_path / "back", "released")
    assert (tmp_path / "back" / LORA.name).read_bytes() == LORA.read_bytes()
    with raises("option_missing", "pytorch_lora_weights.safetensors", "--fuse"):
        convert(RELEASED, tmp_path / "one.safetensors", "file")
    assert [p.name for p in tmp_path.iterdir()] == ["back"]


def test_without_a_split_the_whole_bias_goes_to_x_embedder(tmp_path, sources):
    done = convert(sources["gguf"], tmp_path / "out", "released", base=sources["folded"])
    out = read_state(tmp_path / "out" / "transformer")
    assert done["equality"] == "function" and not out["c_embedder.bias"].any()


def test_original_keys_are_read_as_diffusers_reads_them():
    """Against diffusers' own converter, at the one width it knows; one column a matrix, as it only moves rows."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as reference

    width, shapes = 3072, {"qkv": 3, "modulation": 3, "linear1": 7, "adaLN_modulation": 2}
    narrow = original_keys(folded_state()[0])
    checkpoint = {}
    for i, key in enumerate(narrow):
        rows = next((n for part, n in shapes.items() if part in key.split(".")[-2] or f".{part}." in key), 1)
        rows = 6 if "_mod.lin" in key else rows
        start = torch.arange(rows * width, dtype=torch.float32) + 1e5 * i
        checkpoint[key] = start[:, None] if narrow[key].ndim == 2 else start
    want = reference(dict(checkpoint))
    got = from_original({key: held(tensor) for key, tensor in checkpoint.items()})
    assert got.keys() == want.keys() == folded_state()[0].keys()
    assert all(torch.equal(got[key].read(), want[key]) and got[key].shape == want[key].shape for key in want)


def test_stock_diffusers_opens_the_control_lora(student_folder, teacher, tmp_path):
    convert(student_folder, tmp_path / "lora", "control-lora", base=teacher)
    with safe_open(tmp_path / "lora" / LORA.name, "pt") as file:
        assert sorted(file.keys()) == [f"transformer.x_embedder.lora_{k}" for k in ("A.weight", "B.bias", "B.weight")]
        assert file.get_slice("transformer.x_embedder.lora_A.weight").get_shape() == [32, 32]  # rank 2C
    stock: Any = FluxControlPipeline.from_pretrained(teacher)
    stock.load_lora_weights(tmp_path / "lora")
    assert read_settings(tmp_path / "lora", None).words
    ours = student.load(student_folder, teacher, device="cpu")
    inputs = {
        "hidden_states": torch.randn(1, 8, 32),
        "timestep": torch.tensor([0.5]),
        "pooled_projections": torch.randn(1, 20),
        "encoder_hidden_states": torch.randn(1, 12, 24),
        "txt_ids": torch.zeros(12, 3),
        "img_ids": ours._prepare_latent_image_ids(1, 2, 4, torch.device("cpu"), torch.float32),
    }
    with torch.no_grad():
        got, want = stock.transformer(**inputs).sample, ours.transformer(**inputs).sample
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_folded_folder_with_a_base_is_complete(student_folder, teacher, tmp_path):
    done = convert(student_folder, tmp_path / "out", "folded", base=teacher)
    assert done["complete"] and done["equality"] == "bits"
    stock = FluxControlPipeline.from_pretrained(tmp_path / "out")
    assert type(stock) is FluxControlPipeline
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "FluxControlPipeline"
    mine = read_state(student_folder / "transformer")
    assert all(torch.equal(tensor, mine[key]) for key, tensor in stock.transformer.state_dict().items())
    assert student.load(tmp_path / "out", device="cpu").text_length == 12
    assert not convert(student_folder, tmp_path / "bare", "folded", dtype="float16")["complete"]
    with raises("option_missing", "--dtype", "--fuse", kind=UsageError):
        convert(student_folder, tmp_path / "again", "folded")


def test_a_fused_lora_is_found_again_at_its_rank(base, sources, expected, tmp_path):
    convert(sources["control-lora"], tmp_path / "fused", "folded", base=base)
    convert(tmp_path / "fused", tmp_path / "lora", "control-lora", base=base)
    lora = load_file(tmp_path / "lora" / LORA.name)
    ranks = {key: tensor.shape[0] for key, tensor in lora.items() if key.endswith("to_q.lora_A.weight")}
    assert set(ranks.values()) == {4} and len(ranks) == 5
    got = state(tmp_path / "lora", base)
    assert all(torch.allclose(got[key], expected[key], **CLOSE) for key in expected)


def test_a_lora_is_not_rounded_into_half_precision_unasked(base, sources, expected, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(base, half)
    weights = half / "transformer" / files.WEIGHTS_FILE
    stored = {key: held(tensor.half()) for key, tensor in load_file(weights).items()}
    write_safetensors(weights, stored)
    with raises("option_missing", "float16", "--dtype float32"):
        convert(sources["control-lora"], tmp_path / "out", "folded", base=half)
    convert(sources["control-lora"], tmp_path / "whole", "folded", base=half, dtype="float32")
    convert(sources["control-lora"], tmp_path / "rounded", "folded", base=half, dtype="float16")
    want = state(sources["control-lora"], half)
    errors = []
    for name in ("whole", "rounded"):
        got = state(tmp_path / name, half)
        errors.append(max((got[key] - want[key]).abs().max() for key in want))
    assert errors[0] < 1e-6 < 1e-5 < errors[1]
    convert(tmp_path / "whole", tmp_path / "back", "control-lora", base=half)
    got = state(tmp_path / "back", half)
    assert all(torch.allclose(got[key], want[key], **CLOSE) for key in want)


def test_layers_trained_whole_do_not_become_a_control_lora(student_folder, teacher, tmp_path):
    mine = read_state(student_folder / "transformer")
    layer = "transformer_blocks.0.ff.net.2.weight"
    mine[layer] = mine[layer] + 0.1 * torch.randn_like(mine[layer])
    norm = "single_transformer_blocks.0.attn.norm_q.weight"
    mine[norm] = mine[norm] + 0.1
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text((student_folder / "transformer" / "config.json").read_text())
    save_file(mine, changed / files.WEIGHTS_FILE)
    with raises("model_mismatch", "2 layers", layer, norm):
        convert(changed, tmp_path / "lora", "control-lora", base=teacher)
    assert [p.name for p in tmp_path.iterdir()] == ["changed"]


def test_low_rank_is_exact_or_nothing():
    a, b, weight = torch.randn(3, 40), torch.randn(50, 3), torch.randn(50, 40)
    got_a, got_b = low_rank((weight + b @ a) - weight, weight) or pytest.fail("no low rank found")
    assert got_a.shape == (3, 40)
    torch.testing.assert_close(got_b @ got_a, b @ a, rtol=1e-5, atol=1e-5)
    assert low_rank(torch.randn(50, 40), weight) is None


@pytest.mark.parametrize(
    ("change", "code", "facts"),
    [
        ({"to": "foldet"}, "name_unknown", ["foldet", "'folded'"]),
        ({"to": "gguf"}, "name_unknown", ["GGUF"]),
        ({"dtype": "float8"}, "name_unknown", ["float32, float16, bfloat16"]),
        ({"to": "file"}, "option_invalid", [".safetensors"]),
        ({"out": "x.safetensors"}, "option_invalid", ["x.safetensors"]),
        ({"out": "taken"}, "output_exists", ["taken", "--overwrite"]),
        ({"model": "nosuch"}, "model_not_found", ["nosuch"]),
        ({"to": "control-lora", "base": "teacher"}, "model_mismatch", ["teacher"]),
    ],
)
def test_wrong_requests_say_what_to_do_and_leave_nothing(change, code, facts, teacher, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    wanted: dict[str, Any] = {"model": RELEASED, "to": "folded", "out": "out", **change}
    if "base" in wanted:
        wanted["base"] = teacher
    with raises(code, *facts):
        convert(out=tmp_path / wanted.pop("out"), **wanted)
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "mine.txt"]


def test_overwriting_replaces_and_never_what_is_read(tmp_path):
    convert(RELEASED, tmp_path / "out", "folded")
    convert(tmp_path / "out" / "transformer", tmp_path / "out2", "released")
    convert(RELEASED, tmp_path / "out2", "folded", overwrite=True)
    assert (tmp_path / "out2" / "transformer" / files.SPLIT_FILE).is_file()
    with raises("output_collision", "out", kind=UsageError):
        convert(tmp_path / "out" / "transformer", tmp_path / "out", "released", overwrite=True)
    assert (tmp_path / "out" / "transformer" / files.WEIGHTS_FILE).is_file()


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(RELEASED, tmp_path / "out", "folded", report=interrupt)
    assert not list(tmp_path.iterdir())


def test_written_files_are_the_librarys_own_and_repeatable(tmp_path):
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.arange(7), "c": torch.tensor(2.5), "d": torch.zeros(0, 4)}
    for name in ("one", "two"):
        write_safetensors(tmp_path / name, {k: held(v) for k, v in tensors.items()}, {"z": "1", "a": "2"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read = load_file(tmp_path / "one")
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], v) for k, v in tensors.items())
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == {"format": "pt", "z": "1", "a": "2"}


def anonymous() -> float:
    """MiB of this process's memory that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def peak_of(work: Callable[[], Any]) -> float:
    """MiB by which `work` raises anonymous memory, at most, looked at every 5 ms."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier tests freed would be used again, unseen
    before, seen, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    assert len(seen) > 10
    return max(seen)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, float]:
    """A released student of zeros with a LoRA: (folder, MiB of its weights, MiB of the largest)."""
    from diptych.student.weights.fold import shapes_of

    config = {**files.read_config(RELEASED / "transformer"), "num_attention_heads": 48}
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    shapes = {**shapes_of(plain), "c_embedder.weight": (768, 64), "c_embedder.bias": (768,)}
    tensors = {key: held(torch.zeros(1).expand(shape)) for key, shape in shapes.items()}
    folder = tmp_path_factory.mktemp("large")
    files.write_transformer(folder / "transformer", tensors, config)
    layer = "transformer.transformer_blocks.0.norm1.linear"
    save_file({f"{layer}.lora_A.weight": torch.zeros(2, 768), f"{layer}.lora_B.weight": torch.zeros(6 * 768, 2)},
              folder / LORA.name)  # fmt: skip
    sizes = [tensor.nbytes / 2**20 for tensor in tensors.values()]
    return folder, sum(sizes), max(sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon from Linux's /proc")
@pytest.mark.parametrize("to", ["folded", "file"])
def test_a_large_student_passes_through_little_memory(to, large, tmp_path):
    """Copied, or fused on the way: anonymous memory grows by a few of the largest tensors, not with the file."""
    folder, size, largest = large
    out = tmp_path / ("out.safetensors" if to == "file" else "out")
    peak = peak_of(lambda: convert(folder, out, to, fuse_lora=to == "file"))
    assert size > 250 and largest < 15
    assert peak < 8 * largest, (peak, largest, size)


def test_the_command_converts_tells_and_prints_the_table(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert app.call(["convert", str(RELEASED), out, "--to", "folded", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["equality"], done["lora"], done["split"], done["out"]) == ("bits", "kept", True, out)
    assert app.call(["convert", str(RELEASED), out, "--to", "folded"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert app.call(["convert", str(RELEASED), out, "--to", "folded", "--overwrite"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == out and "bit for bit; the LoRA is beside the weights; open it with --base" in said.err
    assert app.call(["convert", "--table"]) == 0
    assert capsys.readouterr().out.strip() == directions.table().strip()


def test_the_page_shows_the_table():
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text("utf8")
    for row in directions.rows():
        assert f"| {row.source} | {row.target} | {row.equality} | {'yes' if row.base else ''} |" in page, row
