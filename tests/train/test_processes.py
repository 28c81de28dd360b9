"""Training in two processes on one CPU (gloo): the losses, checkpoints and students of one process."""

from __future__ import annotations

import json
import math
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

import kills
import pytest
import tiny_run
import torch

from diptych.errors import UsageError, UserError
from diptych.train import checkpoint
from diptych.train.distill import distill
from diptych.train.metrics import read
from diptych.train.processes import Processes, join
from raising import raises

SCRIPT = Path(__file__).parent / "tiny_run.py"


class Member(NamedTuple):
    """One of the processes of a training, and where what it says goes."""

    process: Any
    told: str


def together(world: Any, out: Path, *sets: str, count: int = 2, script: Path = SCRIPT) -> list[Member]:
    """`tiny_run`, or another script, in `count` processes that know of each other, as `torchrun` starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    members = []
    for rank in range(count):
        own, told = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, f"{out}.{rank}"
        args = (str(script), [str(world.folder), str(out), *sets], own, told)
        members.append(Member(kills.context().Process(target=kills.script, args=args), told))
        members[-1].process.start()
    return members


def finished(running: list[Member]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    for process, _ in running:
        process.join(300)
    return [(p.exitcode, Path(f"{told}.out").read_text(), Path(f"{told}.err").read_text()) for p, told in running]


@pytest.mark.parametrize(
    "sets",
    [(), ("sharding=full",), ("sharding=full", "mode=lora", "rank=4", "micro_batch=1", "gradient_checkpointing=true")],
    ids=["ddp", "fsdp2", "fsdp2 lora"],
)
def test_two_processes_train_as_one_with_the_same_batch(world: Any, tmp_path: Path, sets: tuple[str, ...]) -> None:
    alone = {"mode": "lora", "rank": 4} if "mode=lora" in sets else {}
    distill(tiny_run.make_recipe(world.teacher, **alone), world.pairs, tmp_path / "one")
    codes = finished(together(world, tmp_path / "two", *sets))
    assert [code for code, _, _ in codes] == [0, 0], codes
    assert "12 " in codes[0][1] and codes[1][1] == ""  # only the first one speaks
    one, two = (read(tmp_path / name / "training" / "metrics.jsonl") for name in ("one", "two"))
    for name in ("left", "right", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4), name
    losses = [[line["validation"]["loss"] for line in lines if "validation" in line] for lines in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    mine, theirs = (checkpoint.load(tmp_path / name / "training") for name in ("one", "two"))
    assert mine is not None and theirs is not None
    for group in ("weights", "ema"):
        for name, tensor in mine.tensors[group].items():
            torch.testing.assert_close(theirs.tensors[group][name], tensor, rtol=1e-3, atol=2e-5)
    files = [sorted(p.name for p in (tmp_path / name).rglob("*.safetensors")) for name in ("one", "two")]
    assert files[0] == files[1]


def test_two_processes_train_on_reference_tokens_as_one(world: Any, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"conditioning": "tokens", "reference_attention": "self", "steps": 6, "warmup": 0}
    # Passes without a reference, which one of the processes alone would skip.
    keys |= {"reference_dropout": 0.4, "both_dropout": 0.2, "micro_batch": 1}
    distill(tiny_run.make_recipe(world.teacher, **keys), world.pairs, tmp_path / "one")
    sets = [f"{key}={value}" for key, value in keys.items()]
    codes = finished(together(world, tmp_path / "two", *sets))
    assert [code for code, _, _ in codes] == [0, 0], codes
    one, two = (read(tmp_path / name / "training" / "metrics.jsonl") for name in ("one", "two"))
    for name in ("right", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-3), name


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_prefer_as_one(world: Any, straight: Any, tmp_path: Path, sharding: str) -> None:
    keys = {"init": str(straight.out), "steps": 4, "warmup": 0, "sample_steps": 2}
    wish = {"pairs": 12, "beta": 2000.0, "shrink": 0.25}
    distill(tiny_run.make_recipe(world.teacher, **keys, preference=wish), world.pairs, tmp_path / "one")
    sets = [f"{key}={value}" for key, value in keys.items()]
    codes = finished(together(world, tmp_path / "two", *sets, f"preference={json.dumps(wish)}", f"sharding={sharding}"))
    assert [code for code, _, _ in codes] == [0, 0], codes
    one, two = (read(tmp_path / name / "training" / "metrics.jsonl") for name in ("one", "two"))
    assert abs(one[-1]["preference"] - math.log(2)) > 0.01  # what it started from is another model by now
    for name in ("preference", "right", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-3), name


def test_a_training_goes_on_with_another_number_of_processes(world: Any, straight: Any, tmp_path: Path) -> None:
    out = tmp_path / "student"
    codes = finished(together(world, out, "steps=8", "sharding=full"))
    assert [code for code, _, _ in codes] == [0, 0], codes
    distill(tiny_run.make_recipe(world.teacher), world.pairs, out)
    (lines, _), (wanted, _) = kills.result(out), kills.result(straight.out)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted], rel=1e-4)


def test_spread_weights_are_dtensors_in_every_process(world: Any, tmp_path: Path) -> None:
    """Read from inside: a process says what its parameters are, and how much of them it holds."""
    script = tmp_path / "look.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(SCRIPT.parent)!r}]\n"
        "from pathlib import Path\n"
        "import tiny_run, torch\n"
        "from torch.distributed.tensor import DTensor\n"
        "from diptych.data.store import Dataset\n"
        "from diptych.train.loop import Trainer\n"
        "from diptych.train.processes import join\n"
        f"work = Path({str(world.folder)!r})\n"
        "processes, device = join(torch.device('cpu'))\n"
        "recipe = tiny_run.make_recipe(work / 'teacher', sharding='full')\n"
        f"out = Path({str(tmp_path / 'out')!r})\n"
        "job = tiny_run.prepare(recipe, Dataset(work / 'pairs'), out, None, processes, device)\n"
        "trainer = Trainer(job)\n"
        "trainer.train_step(trainer.next_batch(1))\n"
        "spread = [isinstance(p, DTensor) for p in trainer.trained.parameters]\n"
        "own = sum(p.to_local().numel() for p in trainer.trained.parameters)\n"
        "print(all(spread), own, trainer.trained.count)\n"
    )
    codes = finished(together(world, tmp_path / "out", script=script))
    assert [code for code, _, _ in codes] == [0, 0], codes
    for _, text, _ in codes:
        spread, own, count = text.split()
        assert spread == "True" and 0.4 * int(count) < int(own) < 0.6 * int(count)


def test_ctrl_c_in_one_process_stops_both_after_the_same_step(world: Any, tmp_path: Path) -> None:
    running = together(world, tmp_path / "out", "steps=4000")
    while kills.steps_logged(tmp_path / "out") < 6:
        assert all(process.is_alive() for process, _ in running), finished(running)
        time.sleep(0.01)
    running[1].process.terminate()
    codes = finished(running)
    assert [code for code, _, _ in codes] == [143, 143], codes
    last = checkpoint.load(tmp_path / "out" / "training")
    assert last is not None and 6 <= last.step < 4000


def test_what_fails_in_one_process_is_known_to_all(world: Any, tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "import torch\n"
        "from diptych.errors import UserError\n"
        "from diptych.train.processes import join\n"
        "processes, _ = join(torch.device('cpu'))\n"
        "try:\n"
        "    with processes.together():\n"
        "        if not processes.first:\n"
        "            raise UserError('path_unwritable', 'the disk of the second one is full')\n"
        "except UserError as error:\n"
        "    print(error, error.shared)\n"
    )
    codes = finished(together(world, tmp_path / "out", script=script))
    assert [text for _, text, _ in codes] == ["the disk of the second one is full True\n"] * 2, codes


def test_a_batch_that_does_not_divide_is_refused() -> None:
    assert Processes(1, 2).share([1, 2, 3, 4]) == [2, 4]
    with raises("option_invalid", "multiple of 3", kind=UsageError):
        Processes(0, 3).share([1, 2, 3, 4])


def test_a_block_that_fails_alone_fails() -> None:
    with raises("path_unwritable", "disk full"), Processes().together():
        raise UserError("path_unwritable", "disk full")


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_an_engine_of_accelerates_that_would_do_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with raises("option_conflict", engine, "distill.sharding=full", kind=UsageError):
        join(torch.device("cpu"))
