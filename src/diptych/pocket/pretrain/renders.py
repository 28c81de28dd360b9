"""The renders the pocket models learn from: pairs of panels with captions, drawn by all cores into memory-mapped
arrays.

A pair is one subject in two scenes (the identity kept in some, drifted in others, as a real teacher's grids are) or
one scene under two lights or seasons.
Row `n` depends on `n` alone, so a rendering that was interrupted continues where it was.
"""

import json
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from diptych.utils.io import write_atomic

from .. import captions, world
from ..render import render

CONSISTENT = 0.6
"""Share of subject pairs that keep the identity whole; the others drift, so that curation of what the teacher learns
has work to do."""
ALIGNED = 0.3
"""Share of pairs that show one scene under two lights or in two seasons."""
CHUNK = 500


def plan(index: int, seed: int = 0):
    """The subjects, the scenes and the row with the captions of pair `index`."""
    rng = np.random.default_rng([seed, index])
    identity = world.sample_identity(rng)
    left = world.sample_scene(rng)
    task, other = "subject", identity
    if rng.random() < ALIGNED:
        task = "relight"
        outdoor = left.place not in world.INDOOR
        right = world.reseason(rng, left) if outdoor and rng.random() < 0.3 else world.relight(rng, left)
        prompts = [captions.light_grid(identity.kind, left, right, rng)[0] for _ in range(4)]
    else:
        right = world.sample_scene(rng)
        if rng.random() > CONSISTENT:
            other = world.drift(rng, identity)
        prompts = [captions.grid(identity.kind, left, right, rng)[0] for _ in range(4)]
    prompts = [prompt for prompt in prompts if captions.count_words(prompt) <= captions.LONGEST][:2] or [""]
    singles = [[captions.caption(identity.kind, scene, rng) for _ in range(2)] for scene in (left, right)]
    row = {
        "task": task,
        "same": other is identity,
        "kind": identity.kind,
        "grid": prompts,
        "left": singles[0],
        "right": singles[1],
    }
    return (identity, other), (left, right), row


def pair(index: int, seed: int = 0):
    """Pair `index`: two panels uint8 `[2, H, W, 3]`, and the row with their captions."""
    subjects, scenes, row = plan(index, seed)
    return np.stack([render(subject, scene) for subject, scene in zip(subjects, scenes, strict=True)]), row


def spread(work: Callable[[Any], Any], items: Sequence[Any], processes: int) -> list[Any]:
    """`work` of every item, in order, on `processes` cores."""
    if processes == 1 or len(items) < 2:
        return [work(item) for item in items]
    with get_context("spawn").Pool(processes) as pool:
        return pool.map(work, items, chunksize=1)


def chunks(count: int) -> list[range]:
    """The rows 0 to `count` in parts that a process takes at once."""
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def _chunk(arguments):
    start, stop, seed = arguments
    panels, rows = zip(*(pair(index, seed) for index in range(start, stop)), strict=True)
    return start, np.stack(panels), list(rows)


def make(folder: Path, count: int, seed: int = 0, processes: int = 2, report=print) -> None:
    """Render `count` pairs into `folder/panels.npy` and `folder/rows/*.json`; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows").mkdir(exist_ok=True)
    path, shape = folder / "panels.npy", (count, 2, world.PANEL, world.PANEL, 3)
    if path.exists():
        panels = np.lib.format.open_memmap(path, mode="r+")
        if panels.shape != shape:
            raise ValueError(f"{path} holds {panels.shape[0]} pairs, not {count}: choose another work folder")
    else:
        panels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    todo = [
        (s, min(s + CHUNK, count), seed)
        for s in range(0, count, CHUNK)
        if not (folder / "rows" / f"{s:07d}.json").exists()
    ]
    with get_context("spawn").Pool(processes) as pool:
        for done, (start, block, rows) in enumerate(pool.imap(_chunk, todo), 1):
            panels[start : start + len(block)] = block
            write_atomic(folder / "rows" / f"{start:07d}.json", json.dumps(rows).encode())
            if done % 20 == 0 or done == len(todo):
                report(f"rendered {start + len(block)} of {count} pairs")


def load(folder: Path) -> tuple[np.ndarray, list[dict]]:
    """The finished part of a rendering: panels (memory-mapped) and rows, in order, up to the first missing chunk."""
    rows: list[dict] = []
    while (path := folder / "rows" / f"{len(rows):07d}.json").exists():
        rows += json.loads(path.read_text())
    return np.lib.format.open_memmap(folder / "panels.npy", mode="r")[: len(rows)], rows
