"""Curation in which a stand-in is vLLM, as a stage that Ray workers import."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from diptych.data.engine import Row, Work
from diptych.stages.curate.stage import CurateStage


def given() -> tuple[str | None, str | None]:
    """A worker's GPUs, and whether vLLM's engine is a process of its own there."""
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")


class StandInCurate(CurateStage):
    """Opens the engine on the GPUs that its worker was given. Each call leaves a line in `diary`: process, GPUs,
    whether the engine is a process of its own, and the batches it was put. While there is no file `breaks`, the engine
    does."""

    def __init__(self, recipe: object, diary: Path, breaks: Path | None = None) -> None:
        super().__init__(recipe)  # pyright: ignore[reportArgumentType]
        self.diary, self.breaks = diary, breaks

    def load(self) -> Work:
        import torch

        from llm.stand_in_vllm import LLM, modules

        sys.modules.update(modules())
        gpus, own = given()
        torch.cuda.device_count = lambda: len((gpus or "").split(","))
        LLM.made.clear()
        work = super().load()
        (engine,) = LLM.made

        def told(rows: list[Row]) -> object:
            before = len(engine.calls)
            if self.breaks is not None and not self.breaks.exists():
                self.breaks.touch()
                engine.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
            found = work(rows)
            with self.diary.open("a") as stream:
                stream.write(f"{os.getpid()} {gpus} {own} {engine.calls[before:]}\n")
            return found

        return told  # pyright: ignore[reportReturnType]
