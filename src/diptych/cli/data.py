"""`diptych data`: the evidence of a run, other thresholds for it, and the import and export of pairs."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from diptych.cli import complete
from diptych.cli.options import Json, command, print_result, register, require_text, typer_app
from diptych.errors import UsageError, UserError, nearest

app = typer_app(
    "data",
    help="Inspect a run's pairs (stats, audit, judge-check), change its thresholds (recurate), and exchange pairs with "
    "other tools (import, export).",
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run folder.", autocompletion=complete.runs)]


@command("diptych data stats runs/first", Input="run")
def stats(run: Run, as_json: Json = False) -> None:
    """Count a run's rows from stage to stage.

    The report covers prompts, grids, panels, screened, judged, and accepted pairs, the reasons for losses, and the
    distributions. It works on an unfinished run and reads no images.
    """
    from diptych.data import funnel

    print_result(funnel.measure(run), funnel.format_report, as_json)


@command("diptych data recurate runs/first --set same=0.7 --out runs/stricter", Input="run sets", Output="out")
def recurate(
    run: Run,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=X",
            help="same, near_copy, seam, screens.NAME, copies.hash, duplicates.hash, or their .embedding.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="New run with these thresholds and people's decisions.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Apply other thresholds to a judged run.

    No judge runs and no image is decoded. Without --out, the command only reports which pairs would be added or
    removed. RUN itself never changes. The new run also applies the decisions on single pairs that people made in the
    web app (diptych serve); for those alone, leave --set out.
    """
    from diptych.run import recurate as again
    from diptych.utils.console import Display

    require_text(out=out)
    print_result(again.recurate(run, sets or (), out, Display(quiet=as_json)), again.format_result, as_json)


@command(
    "diptych data audit runs/first --sample 200 --serve",
    "diptych data audit runs/first --sample 200 --csv sheet.csv",
    Input="run size seed labels wanted",
    Labeling="serve port sheet labeller",
)
def audit(
    run: Run,
    size: Annotated[int, typer.Option("--sample", min=1, max=100_000, help="Number of pairs to label.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed selects the same pairs.")] = 0,
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", metavar="FILE", help="Labels file [default: RUN/audit/labels.jsonl]. Repeatable."),
    ] = None,
    wanted: Annotated[float, typer.Option("--precision", min=0, max=1, help="Precision to reach.")] = 0.95,
    serve: Annotated[bool, typer.Option("--serve", help="Label in the browser, on this machine only.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port for --serve; 0 selects one.")] = 0,
    sheet: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write a sheet to fill in, or read it if it exists.")
    ] = None,
    labeller: Annotated[str, typer.Option("--labeller", metavar="NAME", help="Name of the labeler.")] = "me",
    as_json: Json = False,
) -> None:
    """Measure a judge's precision and recall on labels by people.

    The command samples judged pairs and collects labels. It also reports the threshold that reaches --precision, what
    that threshold costs, and how well two labelers agree.
    """
    from diptych.apps import audit as audits
    from diptych.apps import precision
    from diptych.data import labels as files
    from diptych.utils.console import Display

    if serve and sheet is not None:
        raise UsageError("option_conflict", "--serve and --csv are two ways to label. Choose one.")
    require_text(labeller=labeller)
    paths = [Path(path) for path in labels or [str(Path(run) / "audit" / "labels.jsonl")]]
    if (serve or sheet is not None) and len(paths) > 1:
        raise UsageError(
            "option_conflict", f"{len(paths)} --labels with --serve or --csv: new labels go into one file. Pass one."
        )
    display = Display(quiet=as_json)
    sample = audits.draw(run, size, seed)
    if sheet is not None and not _use_sheet(sample, Path(sheet), paths[0], labeller, as_json):
        return
    if serve:
        _serve(sample, paths[0], labeller, port)
    if not labels and not paths[0].is_file():
        raise UserError(
            "labels_invalid",
            f"{run} has no labels yet. First run: diptych data audit {run} --serve (or --csv sheet.csv)",
        )
    result = precision.report(sample, [files.read(path) for path in paths], wanted)
    if sample.pairs and not result["labels"]["used"]:
        display.say("no label of this sample is same or different yet; was it another --sample or --seed?")
    print_result(result, precision.format_report, as_json)


FORMATS = (  # docs/interop.md
    "parquet, edit-parquet, webdataset, imagefolder, ai-toolkit, simpletuner, uno, musubi, diffsynth or onetrainer"
)
Format = Annotated[str, typer.Option("--format", metavar="NAME", help=f"{FORMATS}.", autocompletion=complete.formats)]
Folder = Annotated[str, typer.Option("--out", metavar="DIR", help="New folder, or one to resume.")]
Text = Annotated[
    str, typer.Option("--text", metavar="KIND", help="Text for formats with only one: caption or instruction.")
]


@command(
    "diptych data import edits/ --format imagefolder --out edits-pairs",
    Input="source format columns split text task license",
    Output="out skip",
)
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder or file; for parquet also an fsspec address.")
    ],
    format: Format,
    out: Folder,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="OURS=THEIRS", help="Column names, such as image=after. Repeatable."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="Split to read, or all [default: the training split]."),
    ] = None,
    text: Text = "caption",
    task: Annotated[
        str,
        typer.Option(
            "--task", metavar="TASK", help="Meaning of these pairs; see `diptych tasks`.", autocompletion=complete.tasks
        ),
    ] = "subject",
    license: Annotated[str, typer.Option("--license", metavar="NAME", help="License of the pairs, for the card.")] = "",
    skip: Annotated[
        bool, typer.Option("--skip", help="List rows that are not pairs in OUT/failed and continue.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Import pairs from other tools' formats, for training.

    The result is a folder for `distill.data`, with the original bytes of the images. Run an interrupted command again
    to resume it. A row that is not a pair stops the import with its number and the reason, or is listed with --skip.
    """
    from diptych.data.interop.importing import import_data
    from diptych.utils.console import Display

    options = _options(text, task, columns, split)
    display = Display(quiet=as_json)
    with display.stage("import", "rows") as report:
        done = import_data(source, out, format, options, skip=skip, license=license, report=report)
    failed = f"; {done['failed']} rows are not pairs, see {done['out']}/failed" if done["failed"] else ""
    print_result(done, lambda done: [f"{done['rows']} pairs{failed}", done["out"]], as_json)
    display.next(f"train on them: diptych distill RECIPE --set {quote(f'distill.data=[{{path: {out}}}]')}")


@command("diptych data export runs/first --format uno --out for-uno", Input="source", Output="format out text verify")
def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Run, import, or parquet of pairs.")],
    format: Format,
    out: Folder,
    text: Text = "caption",
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read every row again and compare it.")] = True,
    as_json: Json = False,
) -> None:
    """Export accepted pairs in other trainers' formats.

    A card records the counts of each stage, models, thresholds, and license. Run an interrupted command again to
    resume it.
    """
    from diptych.data import interop
    from diptych.data.interop.exporting import export_data
    from diptych.utils.console import Display

    options = _options(text, "subject", None)
    display = Display(quiet=as_json)
    with display.stage("export", "rows") as report:
        done = export_data(source, out, format, options, verify=verify, report=report)
    check = "verified" if done["verified"] else "not verified"
    print_result(done, lambda done: [f"{done['rows']} pairs, {check}", done["out"]], as_json)
    display.next(f"open it ({format}): {interop.find(format).loads.format(folder=out)}")


def _options(text: str, task: str, columns: list[str] | None, split: str | None = None) -> Any:
    from diptych.data.interop.rows import Options
    from diptych.data.pairs import NAMES
    from diptych.recipe import tasks

    if text not in ("caption", "instruction"):
        hint = nearest(text, ("caption", "instruction"))
        raise UsageError("option_invalid", f"--text {text} is not caption or instruction{hint}")
    tasks.load(task)
    mapped: dict[str, str] = {}
    for column in columns or ():
        ours, equals, theirs = column.partition("=")
        if not equals or not theirs or ours not in NAMES:
            raise UsageError(
                "option_invalid",
                f"--column {column} is not OURS=THEIRS, with OURS one of {', '.join(NAMES)}{nearest(ours, NAMES)}",
            )
        mapped[ours] = theirs
    return Options(mapped, text, task, split)


def _use_sheet(sample: Any, sheet: Path, path: Path, labeller: str, as_json: bool) -> bool:
    """Writes the sheet, or reads its labels if it exists. Returns whether there is something to report."""
    from diptych.apps.audit import write
    from diptych.data import labels as files

    if not sheet.exists():
        images = write(sample, sheet)
        made = {"sheet": str(sheet), "pictures": str(images), "pairs": len(sample.pairs)}
        lines = [
            f"{sheet}: {len(sample.pairs)} pairs, images in {images}",
            f"fill in the column label ({', '.join(files.LABELS)}), then run the same command again",
        ]
        print_result(made, lambda _: lines, as_json)
        return False
    given = files.read_sheet(sheet)
    if given and not given.keys() & {pair.id for pair in sample.pairs}:
        raise UsageError(
            "labels_invalid",
            f"{sheet} belongs to another sample. Use the --sample and --seed that it was written with.",
        )
    store = files.Labels(path)
    before = files.read(path).get(labeller, {}) if path.exists() else {}
    for id, label in given.items():
        if before.get(id) != label:
            store.add(id, label, labeller)
    if not given and not before:
        raise UserError(
            "labels_invalid", f"{sheet} has no labels yet. Fill in its column label: {', '.join(files.LABELS)}."
        )
    return True


def _serve(sample: Any, path: Path, labeller: str, port: int) -> None:
    from diptych.apps.audit import AuditServer, serve
    from diptych.data import labels as files
    from diptych.utils.console import Display

    store = files.Labels(path)
    labels = files.read(path).get(labeller, {}) if path.exists() else {}
    server = AuditServer(sample, store, labeller, labels, port)
    # Also with --json: without the address nobody could label.
    Display().say(f"open {server.url} · labels go to {path} · to end: Finish on the page, or Ctrl-C here")
    serve(server)


@command(
    "diptych data judge-check ratings.jsonl --scores evaluations/first --score cp",
    "diptych data judge-check runs/first/audit/labels.jsonl --run runs/first",
    "diptych data judge-check --oracle pocket",
    Input="ratings scores score run oracle",
)
def judge_check(
    ratings: Annotated[
        str | None,
        typer.Argument(metavar="RATINGS", help="Ratings by people: JSON lines with id, rater, value; or audit labels."),
    ] = None,
    scores: Annotated[
        str | None, typer.Option("--scores", metavar="DIR", help="Evaluation whose judge is checked.")
    ] = None,
    score: Annotated[
        str, typer.Option("--score", metavar="NAME", help="Score to check: cp, pf, cp_debiased, dino, …")
    ] = "cp",
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Run whose curating judge is checked.")
    ] = None,
    oracle: Annotated[
        str | None,
        typer.Option(
            "--oracle", metavar="JUDGE", help="Vision model to check on rendered images with known identities."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how far a judge agrees with people or with known truth.

    The measure is Krippendorff's alpha.
    """
    from diptych.evaluate.scoring import agreement

    if oracle is not None:
        if ratings or scores or run:
            raise UsageError("option_conflict", "--oracle has its own labels. Leave RATINGS, --scores, and --run out.")
        labels, judged = agreement.oracle(oracle)
        result = agreement.check(labels, judged, oracle)
    else:
        if ratings is None or (scores is None) == (run is None):
            raise UsageError("option_missing", "Pass RATINGS with either --scores DIR or --run RUN, or --oracle JUDGE.")
        if scores is not None:
            judged, name = agreement.read_scores(Path(scores), score), f"{score} of {scores}"
        else:
            judged, name = agreement.read_similarities(Path(str(run))), f"the curating judge of {run}"
        result = agreement.check(agreement.read_ratings(Path(ratings)), judged, name)
    print_result(result, agreement.format_check, as_json)


register(app, None, stats, recurate, audit, import_, export, judge_check)
