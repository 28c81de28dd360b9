"""Train the pocket world's models, step by step, in one work folder.

    python -m diptych.pocket.pretrain pairs             # render what they learn from
    python -m diptych.pocket.pretrain vae --minutes 20
    python -m diptych.pocket.pretrain latents
    python -m diptych.pocket.pretrain teacher --minutes 60
    python -m diptych.pocket.pretrain judges --minutes 15
    python -m diptych.pocket.pretrain export            # float16, into the package

The student is not trained here: `diptych run recipes/pocket.yaml` distils it from the teacher's own grids, and
`export --student RUN` ships it.
Every step can be stopped and started again.
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
Work = Annotated[Path, typer.Option(help="Work folder: renders, states, models.")]
Device = Annotated[str, typer.Option(help="`auto` takes the GPU if there is one; cpu, cuda, cuda:1, …")]
Processes = Annotated[int, typer.Option(help="Processes that render and tokenize; 0: as many as cores.")]
WORK = Path("runs/pretrain")


def _say(line: str) -> None:
    print(line, flush=True)


@app.command()
def pairs(work: Work = WORK, count: int = 160000, processes: Processes = 0) -> None:
    """Render pairs of panels with their captions."""
    from . import renders
    from .loop import cores

    renders.make(work / "pairs", count, processes=processes or cores(), report=_say)


@app.command()
def vae(
    work: Work = WORK,
    minutes: float = 20,
    batch: int = 32,
    rate: float = 2e-3,
    start: Path | None = None,
    decoder_only: bool = False,
    device: Device = "auto",
) -> None:
    """Train the VAE. `--start` begins from a VAE's folder where the work folder holds no state; `--decoder-only` leaves
    its encoder, and with it the teacher's latents, as they are."""
    from . import vae as step

    step.train(work, minutes, batch, rate, start, decoder_only, device, report=_say)


@app.command()
def latents(work: Work = WORK, count: int = 160000, device: Device = "auto", processes: Processes = 0) -> None:
    """Encode all renders once, with their captions and what is known of their subjects."""
    from . import teacher as step
    from .loop import cores

    step.tables(work, count, processes or cores())
    step.encode(work, count, device, report=_say)


@app.command()
def teacher(
    work: Work = WORK,
    minutes: float = 60,
    batch: int = 64,
    rate: float = 1.2e-3,
    singles_until: float = 0.3,
    finish: bool = True,
    compile: bool = True,
    start: Path | None = None,
    drifted: float = 0.1,
    freeze_text: bool = False,
    device: Device = "auto",
) -> None:
    """Train the teacher and its text encoders. `--no-finish` keeps the rate up, for another sitting; `--start` begins
    from a teacher's folder (the package's, say) where the work folder holds no state; `--drifted` is the share of the
    inconsistent grids to learn from; `--freeze-text` trains the transformer alone."""
    from . import teacher as step

    step.train(
        work,
        minutes,
        batch,
        rate,
        singles_until,
        finish,
        compile,
        start,
        drifted,
        freeze_text,
        device,
        report=_say,
    )


@app.command()
def judges(
    work: Work = WORK,
    minutes: float = 15,
    roles: str = "curator scorer reader",
    count: int = 15000,
    rate: float = 2e-3,
    start: Path | None = None,
    average: Path | None = None,
    batch: int = 128,
    device: Device = "auto",
    processes: Processes = 0,
) -> None:
    """Train the curator, the scorer and the attribute reader, each on its own third of the renders. `--start`
    begins from the judges of that folder (the package's, say) where the work folder holds no state, `--average` saves
    the mean with that folder's."""
    from . import judges as step
    from .loop import cores

    options: dict = {"batch": batch, "rate": rate, "start": start, "average": average, "device": device}
    for role in roles.split():
        step.train(work, role, minutes, count, **options, processes=processes or cores(), report=_say)


@app.command()
def sheet(
    work: Work = WORK, out: Path = Path("teacher.png"), guidance: float = 2.5, steps: int = 20, seed: int = 0
) -> None:
    """Draw a sheet of the teacher's panels and grids, to look at."""
    from . import export as step

    step.sheet(work / "teacher", out, guidance, steps, seed)


@app.command()
def export(work: Work = WORK, student: Path | None = None) -> None:
    """Copy the trained models into the package as float16, with the log of how they came to be."""
    from . import export as step

    step.export(work, student, report=_say)


@app.command()
def references(out: Path = Path("examples/references")) -> None:
    """Draw the example references: one held-out subject of every kind."""
    from . import export as step

    step.references(out)


if __name__ == "__main__":
    app()
