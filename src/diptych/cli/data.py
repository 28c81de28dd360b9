"""`diptych data`: what a run's evidence says, what other thresholds would make of it, and data in and out. Thin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.options import Json, add, command, tell
from diptych.errors import UsageError, UserError, nearest

app = typer.Typer(
    name="data",
    help="A run's evidence: count it (stats), check it by eye (audit), use other thresholds (recurate), hold a judge "
    "against people (judge-check); and other people's data: import, export.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")]


@command("diptych data stats runs/first")
def stats(run: Run, as_json: Json = False) -> None:
    """The funnel: prompted, painted, cut, pre-filtered, judged, kept; why the rest was lost; how the numbers lie.

    Works on an unfinished run, and reads no picture.
    """
    from diptych.data import funnel

    tell(funnel.measure(run), funnel.lines, as_json)


@command("diptych data recurate runs/first --set same=0.7 --out runs/stricter")
def recurate(
    run: Run,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="same, near_copy, seam, screens.NAME, copies.hash, duplicates.hash or either's .embedding.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR", help="Make the run with these thresholds, and people's decisions, here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Apply other thresholds to a judged run: no judge is asked, no picture decoded.

    Without --out it only says which pairs would come and go. RUN itself is never changed. The new run also follows
    what people decided of single pairs in the web app (diptych serve); for that alone, --set can be left out.
    """
    from diptych.run import recurate as again
    from diptych.utils.console import Display

    if out == "":
        raise UsageError("--out is empty; name a folder")
    tell(again.recurate(run, sets or (), out, Display(quiet=as_json)), again.lines, as_json)


@command("diptych data audit runs/first --sample 200 --serve · or with --csv sheet.csv")
def audit(
    run: Run,
    size: Annotated[int, typer.Option("--sample", min=1, max=100_000, help="Pairs to look at.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed draws the same pairs.")] = 0,
    serve: Annotated[bool, typer.Option("--serve", help="Label in the browser, on this machine only.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="For --serve; 0 takes a free one.")] = 0,
    sheet: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write a sheet to fill in; if it is there, read it.")
    ] = None,
    labeller: Annotated[str, typer.Option("--labeller", metavar="NAME", help="Who labels.")] = "me",
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", metavar="FILE", help="A labels file [default: RUN/audit/labels.jsonl]. Repeatable."),
    ] = None,
    wanted: Annotated[float, typer.Option("--precision", min=0, max=1, help="The precision you want.")] = 0.95,
    as_json: Json = False,
) -> None:
    """Draw a sample of judged pairs, collect people's labels, and report the judge's precision and recall.

    Also the threshold that meets --precision and what it costs, and how well two labellers agree.
    """
    from diptych.apps import audit as audits
    from diptych.apps import precision
    from diptych.data import labels as files
    from diptych.utils.console import Display

    if serve and sheet is not None:
        raise UsageError("--serve and --csv are two ways to label; choose one")
    if not labeller.strip():
        raise UsageError("--labeller is empty; give a name")
    paths = [Path(path) for path in labels or [str(Path(run) / "audit" / "labels.jsonl")]]
    if (serve or sheet is not None) and len(paths) > 1:
        raise UsageError("new labels go into one file; give one --labels with --serve or --csv")
    display = Display(quiet=as_json)
    sample = audits.draw(run, size, seed)
    if sheet is not None and not _sheet(sample, Path(sheet), paths[0], labeller, as_json):
        return
    if serve:
        _serve(sample, paths[0], labeller, port)
    if not labels and not paths[0].is_file():
        raise UserError(f"{run} has no labels yet; first: diptych data audit {run} --serve, or --csv sheet.csv")
    result = precision.report(sample, [files.read(path) for path in paths], wanted)
    if sample.pairs and not result["labels"]["used"]:
        display.say("no label of this sample says same or different yet (another --sample or --seed?)")
    tell(result, precision.lines, as_json)


FORMATS = "parquet, edit-parquet, webdataset, imagefolder, ai-toolkit, simpletuner or uno"  # docs/interop.md
Format = Annotated[str, typer.Option("--format", metavar="NAME", help=f"{FORMATS}.")]
Folder = Annotated[str, typer.Option("--out", metavar="DIR", help="A new folder, or one to continue.")]
Text = Annotated[str, typer.Option("--text", help="What a format's one text is: caption or instruction.")]


@command("diptych data import edits/ --format imagefolder --out edits-pairs")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder or file; parquet also by fsspec address.")],
    format: Format,
    out: Folder,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="OURS=THEIRS", help="For instance image=after. Repeatable."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="Split to read, or all [default: the files to train on]."),
    ] = None,
    text: Text = "caption",
    task: Annotated[str, typer.Option("--task", help="What these pairs mean; see diptych tasks.")] = "subject",
    licence: Annotated[str, typer.Option("--licence", metavar="NAME", help="For the card, if you know it.")] = "",
    skip: Annotated[bool, typer.Option("--skip", help="List rows that are no pair in OUT/failed, and go on.")] = False,
    as_json: Json = False,
) -> None:
    """Make pairs to train on of other people's data: a folder for distill.data, with the pictures' own bytes.

    Interrupted or killed, the same command continues. A row that is no pair is refused with its number and the reason.
    """
    from diptych.data.interop.importing import import_data
    from diptych.utils.console import Display

    options = _options(text, task, columns, split)
    with Display(quiet=as_json).stage("import", "rows") as report:
        done = import_data(source, out, format, options, skip=skip, licence=licence, report=report)
    failed = f"; {done['failed']} rows are no pair, see {done['out']}/failed" if done["failed"] else ""
    tell(done, lambda found: [f"{found['rows']} pairs{failed}", found["out"]], as_json)


@command("diptych data export runs/first --format uno --out for-uno")
def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run, an import, or parquet of pairs.")],
    format: Format,
    out: Folder,
    text: Text = "caption",
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read every row back and compare.")] = True,
    as_json: Json = False,
) -> None:
    """Write pairs as other trainers read them, with a card: funnel, models, thresholds, licence.

    Interrupted or killed, the same command continues. Pairs that curation did not keep are left out.
    """
    from diptych.data.interop.exporting import export_data
    from diptych.utils.console import Display

    options = _options(text, "subject", None)
    with Display(quiet=as_json).stage("export", "rows") as report:
        done = export_data(source, out, format, options, verify=verify, report=report)
    said = "read back and equal" if done["verified"] else "not read back"
    tell(done, lambda found: [f"{found['rows']} pairs, {said}", found["out"]], as_json)


def _options(text: str, task: str, columns: list[str] | None, split: str | None = None) -> Any:
    from diptych.data.interop.rows import Options
    from diptych.data.pairs import NAMES
    from diptych.recipe import tasks

    if text not in ("caption", "instruction"):
        raise UsageError(f"--text {text}: it is caption or instruction{nearest(text, ('caption', 'instruction'))}")
    tasks.load(task)
    mapped: dict[str, str] = {}
    for given in columns or ():
        ours, equals, theirs = given.partition("=")
        if not equals or not theirs or ours not in NAMES:
            raise UsageError(f"--column {given}: say OURS=THEIRS, ours being {', '.join(NAMES)}{nearest(ours, NAMES)}")
        mapped[ours] = theirs
    return Options(mapped, text, task, split)


def _sheet(sample: Any, sheet: Path, path: Path, labeller: str, as_json: bool) -> bool:
    """Writes the sheet, or takes its labels over; True if there is something to report."""
    from diptych.apps.audit import write
    from diptych.data import labels as files

    if not sheet.exists():
        pictures = write(sample, sheet)
        made = {"sheet": str(sheet), "pictures": str(pictures), "pairs": len(sample.pairs)}
        tell(
            made,
            lambda found: [
                f"{found['sheet']}: {found['pairs']} pairs, pictures in {found['pictures']}",
                f"fill in the column label ({', '.join(files.LABELS)}), then run the same command again",
            ],
            as_json,
        )
        return False
    given = files.read_sheet(sheet)
    if given and not given.keys() & {pair.id for pair in sample.pairs}:
        raise UsageError(f"{sheet} is of another sample; give the --sample and --seed it was written with")
    kept = files.Labels(path)
    before = files.read(path).get(labeller, {}) if path.exists() else {}
    for id, label in given.items():
        if before.get(id) != label:
            kept.add(id, label, labeller)
    if not given and not before:
        raise UserError(f"{sheet} has no labels yet; fill in its column label: {', '.join(files.LABELS)}")
    return True


def _serve(sample: Any, path: Path, labeller: str, port: int) -> None:
    from diptych.apps.audit import AuditServer, serve
    from diptych.data import labels as files
    from diptych.utils.console import Display

    kept = files.Labels(path)
    said = files.read(path).get(labeller, {}) if path.exists() else {}
    server = AuditServer(sample, kept, labeller, said, port)
    # Also with --json: without the address nobody could label.
    Display().say(f"open {server.url} · labels go to {path} · Finish on the page or Ctrl-C here ends it")
    serve(server)


@command(
    "diptych data judge-check ratings.jsonl --scores evaluations/first --score cp · diptych data "
    "judge-check runs/first/audit/labels.jsonl --run runs/first · diptych data judge-check --oracle pocket"
)
def judge_check(
    ratings: Annotated[
        str | None,
        typer.Argument(metavar="RATINGS", help="People's ratings: JSON lines with id, rater, value; or audit labels."),
    ] = None,
    scores: Annotated[
        str | None, typer.Option("--scores", metavar="FOLDER", help="An evaluation, whose judge is checked.")
    ] = None,
    score: Annotated[str, typer.Option("--score", help="Which of its scores: cp, pf, cp_debiased, dino, …")] = "cp",
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="A run, whose curating judge is checked.")
    ] = None,
    oracle: Annotated[
        str | None,
        typer.Option("--oracle", metavar="JUDGE", help="A vision model, checked on renders whose truth is known."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how far a judge agrees with people, or with the truth of renders: Krippendorff's alpha."""
    from diptych.evaluate.scoring import agreement

    if oracle is not None:
        if ratings or scores or run:
            raise UsageError("--oracle brings its own labels; leave RATINGS, --scores and --run out")
        labels, judged = agreement.oracle(oracle)
        found = agreement.check(labels, judged, oracle)
    else:
        if ratings is None or (scores is None) == (run is None):
            raise UsageError("give RATINGS and either --scores EVALUATION or --run RUN; or --oracle JUDGE")
        if scores is not None:
            judged, name = agreement.read_scores(Path(scores), score), f"{score} of {scores}"
        else:
            judged, name = agreement.read_similarities(Path(str(run))), f"the curating judge of {run}"
        found = agreement.check(agreement.read_ratings(Path(ratings)), judged, name)
    tell(found, agreement.lines, as_json)


add(app, (stats, recurate, audit, import_, export, judge_check))
