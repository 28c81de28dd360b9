"""The card of a data set: the source of its pairs, losses by stage, models, thresholds and licenses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from diptych.data import funnel, records
from diptych.data.interop.rows import Format
from diptych.data.scan import open_run
from diptych.data.sources import Pairs, license_of
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.utils import licenses
from diptych.utils.machine import VERSION

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_PARTS = "part-*.parquet"
_UNKNOWN = "Unknown. Check the license of the source before you publish."


def of_import(data: Dataset) -> str:
    """README.md of an imported data set."""
    manifest = data.manifest
    assert manifest is not None
    source = manifest["imported"]
    lost = source["rows"] - manifest["rows"]
    facts = {
        "pairs": f"{manifest['rows']:,}",
        "imported from": f"{source['name']} ({source['format']}, {source['rows']:,} rows)",
        "rejected rows": f"{lost:,}; the reasons are in failed/import" if lost else "none",
        "curation": "none by diptych; similarity, copy_distance and seam are empty",
    }
    known = license_of(data)
    terms = known or _UNKNOWN
    front = _front(manifest["rows"], {"license": known or "other"}, _PARTS)
    return _page(front, source["name"], facts, [], terms, f'load_dataset("parquet", data_files="{_PARTS}")')


def of_export(source: str, data: Pairs, kind: Format, rows: int) -> str:
    """README.md of an export: of a run's pairs, of an import, or of other parquet."""
    facts: dict[str, Any] = {"pairs": f"{rows:,}", "format": kind.about}
    tables: list[tuple[str, dict[str, Any]]] = []
    terms_tag, terms = {"license": "other"}, _UNKNOWN
    run = Path(data.url).parent
    manifest = data.manifest if isinstance(data, Dataset) else None
    if (run / "recipe.yaml").is_file():
        terms_tag, terms = _of_run(run, facts, tables)
    elif manifest and "imported" in manifest:
        facts["imported from"] = f"{manifest['imported']['name']} ({manifest['imported']['format']})"
        if known := license_of(data):
            terms_tag, terms = {"license": known}, known
    else:
        facts["from"] = Path(source.rstrip("/")).name
    files = {"parquet": "train-*.parquet", "edit-parquet": "train-*.parquet", "webdataset": "train-*.tar"}
    front = _front(rows, terms_tag, files.get(kind.name))
    # The page names no folder, so that it does not depend on where the export is.
    name = facts.get("recipe") or (manifest["imported"]["name"] if manifest and "imported" in manifest else "")
    title = f"{name or facts.get('from', 'pairs')}, pairs as {kind.name}"
    return _page(front, title, facts, tables, terms, kind.loads.format(folder="."))


def of_rows(data: Dataset) -> str:
    """README.md of a data set in a run's folder: `pairs`, `candidates` or `grids`."""
    manifest = data.manifest
    assert manifest is not None
    run = Path(data.url).resolve().parent
    facts: dict[str, Any] = {"rows": f"{manifest['rows']:,}"}
    tables: list[tuple[str, dict[str, Any]]] = []
    terms_tag, terms = {"license": "other"}, _UNKNOWN
    if (run / "recipe.yaml").is_file():
        terms_tag, terms = _of_run(run, facts, tables)
    front = _front(manifest["rows"], terms_tag, _PARTS)
    title = f"{run.name}, {Path(data.url).name}"
    return _page(front, title, facts, tables, terms, f'load_dataset("parquet", data_files="{_PARTS}")')


def _of_run(run: Path, facts: dict[str, Any], tables: list[Any]) -> tuple[dict[str, str], str]:
    """Adds the facts of a run's pairs. Returns the license of the teacher."""
    _, recipe, task = open_run(run)
    writer = recipe.write.writer
    judge = recipe.curate.vlm.model if recipe.curate.vlm else recipe.curate.judge
    facts |= {"task": task.name, "recipe": recipe.name, "seed": recipe.seed}
    grids, candidates = (Dataset(run / name).manifest or {} for name in ("grids", "candidates"))
    tables.append(
        (
            "Models",
            {
                "writer": writer,
                "teacher": _with_hash(recipe.teacher, grids.get("teacher_sha256")),
                "judge": _with_hash(judge, candidates.get("judge_sha256")),
            },
        )
    )
    further = {name: value for name, value in recipe.curate.further().items() if value is not None}
    tables.append(("Thresholds", {**task.thresholds(recipe.curate.thresholds).model_dump(), **further}))
    try:
        measured = funnel.measure(run)
    except UserError:
        measured = None
    if measured is not None:
        steps = {
            step["name"]: f"{step['count']:,} of {step['of']:,} {step['unit']}{_lost(step['lost'])}"
            for step in measured["steps"]
        }
        tables.append(("Funnel", steps))
    local = Path(recipe.teacher)
    return licenses.inherited(recipe.teacher, local if local.is_dir() else None)


def _with_hash(name: str, digest: str | None) -> str:
    return f"{name} (sha256 {digest[:16]})" if digest else name


def _lost(why: dict[str, int]) -> str:
    named = ", ".join(f"{times:,} {reason}" for reason, times in list(why.items())[:4])
    return f"; lost: {named}" if named else ""


def _front(rows: int, terms_tag: dict[str, str], files: str | None) -> dict[str, Any]:
    """The hub's front matter."""
    front: dict[str, Any] = {
        **terms_tag,
        "task_categories": ["image-to-image", "text-to-image"],
        "tags": ["diptych", "diffusion-self-distillation"],
        "size_categories": [next((name for limit, name in SIZES if rows < limit), "n>1M")],
    }
    if files:
        front["configs"] = [{"config_name": "default", "data_files": files}]
    return front


def _page(front: dict[str, Any], title: str, facts: dict[str, Any], tables: list[Any], terms: str, loads: str) -> str:
    about = (
        "Pairs for models that take a reference image: `conditioning` is the reference, `image` the target, `caption` "
        f"describes the target. Written by diptych {VERSION}."
    )
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {title}", ""]
    lines += [about, "", *_table(facts), "", "```", loads, "```", ""]
    for name, rows in tables:
        lines += [f"## {name}", "", *_table(rows), ""]
    lines += ["## Columns", "", ", ".join(f"`{name}`" for name in records.PAIR), "", "## License", "", terms, ""]
    return "\n".join(lines)


def _table(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
