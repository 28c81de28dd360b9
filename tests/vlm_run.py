"""Curates coloured grids by the vision-language model at a recipe's endpoint, as a process of its own that can be
killed: `python vlm_run.py RECIPE OUT`. Curation is the real one; only its embedding model is replaced."""

from __future__ import annotations

import sys
from typing import Any

import plain_stages as stages
from coloured import Colours, grid
from diptych.data import records
from diptych.stages.curate.stage import CurateStage as RealCurate


class PaintStage(stages.PaintStage):
    """Two panels of tiles over one red, or over two."""

    def one(self, row: dict[str, Any]) -> Any:
        number = int(row["id"][2:])
        made = grid(number, (0.8, 0.8) if number % 3 else (0.8, 0.4))
        shared = {key: row[key] for key in ("prompt", "panels", "subject", "task", "seed")}
        return [{**made, "id": records.grid_id(row["id"]), "prompt_id": row["id"], **shared}]


class CurateStage(RealCurate):
    """The real stage, which opens no embedding model."""

    def load(self) -> Any:
        return self.work(Colours(), self._vlm())  # pyright: ignore[reportArgumentType]


def main(recipe: str, out: str) -> int:
    """Writes, paints and curates; the command's exit code."""
    made = stages.install()
    vars(made["diptych.stages.paint"])["PaintStage"] = PaintStage
    vars(made["diptych.stages.curate.stage"])["CurateStage"] = CurateStage
    sys.modules.update(made)
    from diptych.cli import app

    for command in ("write", "paint", "curate"):
        if code := app.call([command, recipe, "--out", out, "--json"]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
