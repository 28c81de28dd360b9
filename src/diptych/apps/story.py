"""A story: a page of panels that show one character, drawn from one reference and a text for each panel.

    panels = [read_panel("a cat on the beach | Day one."), "a cat on the moon", …]     # 4 to 10
    page = story(Student.load("pocket"), "cat.png", panels, title="Far from home", seed=7)
    page.save("story.png"); page.save("story.pdf")

Every panel has a seed of its own, so one that went wrong is drawn again with another while the rest stays. A text is
what the panel shows; after a bar may stand what is written below it, else that is the text itself. `write_panels` has a
language model write the panels from one idea.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack, get_args

from pydantic import AfterValidator, BaseModel, Field, create_model

from diptych.errors import UsageError, UserError
from diptych.llm.client import Client
from diptych.llm.question import Question, clean, quoted, system, user
from diptych.stages.write import diversity
from diptych.student.sampling import GenerateOptions, check_prompt, check_seed
from diptych.utils.documents import read_lines

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.apps.student import Student
    from diptych.llm.cache import Cache
    from diptych.llm.endpoint import Endpoint

FEWEST, MOST = 4, 10
Captions = Literal["below", "inside", "none"]
CAPTIONS: tuple[str, ...] = get_args(Captions)
# Panels in each row of the page: rows of two have larger ones than rows of three.
ROWS = {4: (2, 2), 5: (2, 3), 6: (3, 3), 7: (2, 3, 2), 8: (3, 2, 3), 9: (3, 3, 3), 10: (3, 2, 3, 2)}
WIDTH = 1240  # pixels of a page: A4 at 150 dpi, which is what a PDF says
DPI = 150
MARGIN, GUTTER = 40, 24
FRAME = 3
INK, PAPER = (24, 24, 28), (255, 255, 255)
SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc")


@dataclass(frozen=True)
class Panel:
    """What a panel shows, and what is written with it."""

    prompt: str
    caption: str = ""


@dataclass
class Page:
    """A finished story. `drawn` are the student's own pictures, in order; `page` is the laid-out one."""

    page: Image
    drawn: list[Image]
    panels: list[Panel]
    seeds: list[int]
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes the page as PDF, PNG, WebP or JPEG, by how the name ends, its provenance inside."""
        from diptych.data.images import save_image
        from diptych.utils.io import write_atomic

        path = Path(path)
        if path.suffix.lower() != ".pdf":
            return save_image(self.page, path, self.provenance)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be made ({error.strerror or error})") from error
        write_atomic(path, self.pdf())
        return path

    def pdf(self) -> bytes:
        """One page at 150 dpi; the provenance is its subject, as JSON. The same bytes for the same page."""
        out = io.BytesIO()
        told = json.dumps(self.provenance, sort_keys=True)
        dates: dict[str, Any] = {"creationDate": None, "modDate": None}
        title = str(self.provenance.get("title") or "a story")
        self.page.save(
            out, "PDF", resolution=DPI, quality=95, subsampling=0, title=title, subject=told, creator="diptych", **dates
        )
        return out.getvalue()


def story(
    student: Student,
    reference: Image | str | Path | None,
    panels: Sequence[Panel | str],
    *,
    seed: int | Sequence[int] = 0,
    title: str = "",
    captions: Captions = "below",
    font: str | Path | None = None,
    on_panel: Callable[[int, int], object] | None = None,
    **options: Unpack[GenerateOptions],
) -> Page:
    """Draws the panels of a story and lays them out on a page.

    Args:
        reference: the character; None draws each panel from its text alone.
        panels: 4 to 10 of them; a plain text is read by `read_panel`.
        seed: of the first panel, counting up; or one for each panel.
        title: stands above the first row.
        captions: where the words stand: `below` the panels, `inside` them, or `none`.
        font: a TrueType or OpenType file, for letters that Pillow's own font does not have.
        on_panel: called as `on_panel(done, panels)` before the first panel and after each.
        options: of `Student.generate`: steps, guidance, size, fit, …

    Raises UsageError for what does not fit, UserError for a reference or font that cannot be read.
    """
    told = [panel if isinstance(panel, Panel) else read_panel(panel) for panel in panels]
    seeds = check(told, seed, captions)
    font = font_for((title, *(panel.caption for panel in told)), font)
    opened = student.opened(reference, options.get("background") or "white") if reference is not None else None
    drawn: list[Image] = []
    for number, (panel, own) in enumerate(zip(told, seeds, strict=True)):
        if on_panel is not None:
            on_panel(number, len(told))
        drawn.append(student.generate(opened, panel.prompt, seed=own, **options))
    if on_panel is not None:
        on_panel(len(told), len(told))
    return bind(drawn, told, seeds, drawn[0].info, title=title, captions=captions, font=font)


def bind(
    drawn: list[Image],
    panels: list[Panel],
    seeds: list[int],
    made_by: Mapping[Any, Any],
    *,
    title: str = "",
    captions: str = "below",
    font: str | Path | None = None,
) -> Page:
    """The story of panels that are drawn already; `made_by` is the provenance of the first."""
    font = font_for((title, *(panel.caption for panel in panels)), font)
    provenance: dict[str, Any] = {**made_by, "prompt": title or panels[0].prompt, "title": title, "seeds": seeds}
    provenance |= {"panels": [{"prompt": p.prompt, "caption": p.caption} for p in panels], "captions": captions}
    provenance.pop("seed", None)
    page = lay_out(drawn, [panel.caption for panel in panels], title=title, captions=captions, font=font)
    return Page(page, drawn, panels, seeds, provenance)


def read_panel(line: str) -> Panel:
    """`what it shows | what is written`; without a bar the text is both. UsageError if it shows nothing."""
    shows, bar, says = (part.strip() for part in line.partition("|"))
    if not shows:
        raise UsageError(f"a panel's text is empty: '{line}'; say what the panel shows")
    return Panel(shows, says if bar else shows)


def read_panels(path: str | Path) -> list[Panel]:
    """The panels of a text file, one a line; empty lines and those that begin with # are left out."""
    lines = [line for line in read_lines(Path(path)) if line.strip() and not line.lstrip().startswith("#")]
    return [read_panel(line) for line in lines]


def check(panels: Sequence[Panel], seed: int | Sequence[int], captions: str) -> list[int]:
    """The panels' seeds. UsageError if there are too few or too many of anything. Needs no model."""
    if not FEWEST <= len(panels) <= MOST:
        raise UsageError(f"a story has {FEWEST} to {MOST} panels, not {len(panels)}")
    if captions not in CAPTIONS:
        raise UsageError(f"captions '{captions}': one of {', '.join(CAPTIONS)}")
    for panel in panels:
        check_prompt(panel.prompt)
    given = [seed] if isinstance(seed, int) else list(seed)
    seeds = [given[0] + number for number in range(len(panels))] if len(given) == 1 else given
    if len(seeds) != len(panels):
        raise UsageError(f"{len(seeds)} seeds for {len(panels)} panels: give one, which counts up, or one for each")
    for number in seeds:
        check_seed(number)
    return seeds


# ---- the page


def lay_out(
    pictures: Sequence[Image],
    texts: Sequence[str],
    *,
    title: str = "",
    captions: str = "below",
    font: str | Path | None = None,
    width: int = WIDTH,
) -> Image:
    """A page of panels in rows of two and three, each row as wide as the page. Returns RGB, `width` pixels wide."""
    from PIL import Image as pillow
    from PIL import ImageDraw

    rows = ROWS[len(pictures)]
    heading = _font(font, 52)
    body = _font(font, 24)
    inner = width - 2 * MARGIN
    blocks: list[tuple[int, int, list[list[str]], int, int]] = []  # first panel, panels, words, cell width, height
    top = MARGIN + (_title_height(heading, title, inner) if title else 0)
    height, first = top, 0
    for count in rows:
        cell = (inner - GUTTER * (count - 1)) // count
        tall = round(cell * max(p.height / p.width for p in pictures[first : first + count]))
        room = cell - 16 if captions == "below" else cell - 2 * (FRAME + 8) - 20
        words = [wrap(text, body, room) if captions != "none" else [] for text in texts[first : first + count]]
        lines = max(map(len, words))
        below = lines * _line(body) + 14 if captions == "below" and lines else 0
        blocks.append((first, count, words, cell, tall))
        height += tall + below + GUTTER
        first += count
    page = pillow.new("RGB", (width, height - GUTTER + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        for number, line in enumerate(wrap(title, heading, inner)):
            pen.text((width // 2, MARGIN + number * _line(heading)), line, INK, heading, anchor="ma")
    for first, count, words, cell, tall in blocks:
        for place in range(count):
            left = MARGIN + place * (cell + GUTTER)
            picture = enlarge(pictures[first + place], cell)
            page.paste(picture, (left, top))
            pen.rectangle((left, top, left + cell - 1, top + picture.height - 1), outline=INK, width=FRAME)
            _write(pen, words[place], body, captions, left, top, cell, picture.height)
        lines = max(map(len, words))
        top += tall + (lines * _line(body) + 14 if captions == "below" and lines else 0) + GUTTER
    return page


def _write(pen: Any, words: Sequence[str], font: Any, captions: str, left: int, top: int, cell: int, tall: int) -> None:
    if not words:
        return
    if captions == "below":
        y = top + tall + 8
        for number, line in enumerate(words):
            pen.text((left + 4, y + number * _line(font)), line, INK, font)
        return
    high = len(words) * _line(font) + 14
    wide = max(int(font.getlength(line)) for line in words) + 20
    box = (left + FRAME + 8, top + tall - high - FRAME - 8)
    pen.rectangle((*box, box[0] + wide, box[1] + high), fill=PAPER, outline=INK, width=2)
    for number, line in enumerate(words):
        pen.text((box[0] + 10, box[1] + 6 + number * _line(font)), line, INK, font)


def enlarge(picture: Image, width: int) -> Image:
    """The picture at a page's scale; a tiny one keeps its pixels, which is how the pocket world is meant to look."""
    from PIL import Image as pillow

    tall = round(picture.height * width / picture.width)
    if picture.width * 4 <= width:
        whole = width // picture.width + 1
        picture = picture.resize((picture.width * whole, picture.height * whole), pillow.Resampling.NEAREST)
    return picture.resize((width, tall), pillow.Resampling.LANCZOS)


def wrap(text: str, font: Any, width: int) -> list[str]:
    """The text in lines of at most `width` pixels; a word that is longer is broken."""
    lines: list[str] = []
    for word in text.split():
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def font_for(texts: Sequence[str], font: str | Path | None = None) -> str | Path | None:
    """A font with all letters of the texts: the one that is named; else Pillow's own (None), which has little beside
    English; else one of this machine's. UsageError if none has them: they would be drawn as boxes."""
    letters = "".join(texts)
    for place in [font] if font is not None else [None, *SYSTEM_FONTS]:
        try:
            absent = lacking(letters, place)
        except UserError:
            if font is not None:
                raise
            continue  # this machine has no such font
        if not absent:
            return place
    which = "the fonts here have" if font is None else f"{font} has"
    raise UsageError(f"{which} no {' '.join(lacking(letters, font)[:8])}; name a font file that does (--font)")


def lacking(letters: str, font: str | Path | None) -> list[str]:
    """The letters that a font does not have. UserError for a font that cannot be read."""
    own = _font(font, 24)
    missing = bytes(own.getmask("\U0010ffff"))
    return [c for c in dict.fromkeys(letters) if not c.isspace() and bytes(own.getmask(c)) == missing]


def _font(font: str | Path | None, size: int) -> Any:
    """Pillow's own font (Aileron), or a file's. UserError if Pillow or the file has none."""
    from PIL import ImageFont

    try:
        found = ImageFont.load_default(size) if font is None else ImageFont.truetype(str(font), size)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{font or 'Pillow'}: no font that can be read ({error})") from error
    return found


def _line(font: Any) -> int:
    """Pixels from one line to the next."""
    return round(font.size * 1.3)


def _title_height(font: Any, title: str, width: int) -> int:
    return len(wrap(title, font, width)) * _line(font) + 20


# ---- panel texts from one idea, by a language model


BRIEF = (
    "You write a comic of {count} panels about one character, from somebody's idea. A text-to-image model draws each "
    "panel on its own, from what you say it shows and a reference picture of the character. So name the character in "
    "every panel in the same one to three words, with an article ('a cat'), and never say what it looks like. Give "
    "every panel what the character does, where it is, and the light, in at most 20 words; each panel another place or "
    "moment, so that together they tell the idea from beginning to end. No writing inside the pictures. Then give the "
    "words that stand below the panel: one short sentence of at most 12 words that carries the story on."
)

# What models like to write, and Pillow's own font does not have; and the bar, which parts a panel's two texts.
PLAIN = str.maketrans("–—|", "--/")
REPEATS = 0.7  # resemblance from which on a panel shows what an earlier one shows


class Told(BaseModel):
    """A panel, as the model writes it."""

    shows: str = Field(
        min_length=1, max_length=300, description="What the panel shows: character, action, place, light."
    )
    says: str = Field(min_length=1, max_length=160, description="The sentence below it.")


def _different(panels: list[Told]) -> list[Told]:
    """No two panels that show the same, or nearly, and no sentence twice."""
    accepted = diversity.NearDuplicates(REPEATS)
    for number, panel in enumerate(panels, 1):
        if (near := accepted.add(str(number), panel.shows)) is not None:
            raise ValueError(f"panel {number} shows what panel {near[0]} shows")
    if diversity.repeated([panel.shows for panel in panels]) or diversity.repeated([panel.says for panel in panels]):
        raise ValueError("two panels say the same")
    return panels


def write_panels(idea: str, count: int, endpoint: Endpoint, cache: Cache | None = None) -> list[Panel]:
    """`count` panels that tell the idea. UserError if the endpoint does not answer, or not in the expected form."""
    several = Field(min_length=count, max_length=count)
    shape = create_model("Story", panels=(Annotated[list[Told], several, AfterValidator(_different)], ...))
    question = Question((system(BRIEF.format(count=count)), user(quoted(idea, "idea"))), shape)
    with Client(endpoint, cache) as client:
        outcome = client.ask(question)
    if outcome.answer is None:
        raise UserError(f"the language model wrote no story: {outcome.reason}")
    lines = [
        {key: " ".join(clean(text).translate(PLAIN).split()) for key, text in panel.items()}
        for panel in outcome.answer["panels"]
    ]
    return [Panel(line["shows"], line["says"]) for line in lines]
