"""Stories: a page of panels that show one character, generated from one reference and a text for each panel.

    panels = [read_panel("a cat on the beach | Day one."), "a cat on the moon", …]     # 4 to 10
    page = story(Student.load("pocket"), "cat.png", panels, title="Far from home", seed=7)
    page.save("story.png"); page.save("story.pdf")

Each panel has its own seed, so you can regenerate one with another seed and keep the rest. A panel's text is what it
shows; after a bar comes the caption, by default the text itself. `write_panels` lets a language model write the panels
from an idea.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack, get_args

from pydantic import AfterValidator, BaseModel, Field, create_model

from diptych.errors import UsageError, UserError, nearest
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

MIN_PANELS, MAX_PANELS = 4, 10
Captions = Literal["below", "inside", "none"]
CAPTIONS: tuple[str, ...] = get_args(Captions)
# Panels in each row of the page: rows of two have larger ones than rows of three.
ROWS = {4: (2, 2), 5: (2, 3), 6: (3, 3), 7: (2, 3, 2), 8: (3, 2, 3), 9: (3, 3, 3), 10: (3, 2, 3, 2)}
WIDTH = 1240  # pixels of a page: A4 at 150 dpi
DPI = 150
MARGIN, GUTTER = 40, 24
FRAME = 3
INK, PAPER = (24, 24, 28), (255, 255, 255)
SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc")


@dataclass(frozen=True)
class Panel:
    """What a panel shows, and its caption."""

    prompt: str
    caption: str = ""


@dataclass
class Page:
    """A finished story. `images` are the student's images in order; `page` is the laid-out page."""

    page: Image
    images: list[Image]
    panels: list[Panel]
    seeds: list[int]
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes the page as PDF, PNG, WebP or JPEG, by the file's suffix, with its provenance inside."""
        from diptych.data.images import save_image
        from diptych.utils.io import make_folder, write_atomic

        path = Path(path)
        if path.suffix.lower() != ".pdf":
            return save_image(self.page, path, self.provenance)
        make_folder(path.parent)
        write_atomic(path, self.pdf())
        return path

    def pdf(self) -> bytes:
        """Returns one page at 150 dpi with the provenance as JSON in its subject. Equal pages give equal bytes."""
        out = io.BytesIO()
        fields: dict[str, Any] = {"creationDate": None, "modDate": None, "creator": "diptych"}
        fields["title"] = str(self.provenance.get("title") or "a story")
        fields["subject"] = json.dumps(self.provenance, sort_keys=True)
        self.page.save(out, "PDF", resolution=DPI, quality=95, subsampling=0, **fields)
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
    """Generates the panels of a story and lays them out on a page.

    Args:
        reference: image of the character; None generates each panel from its text alone.
        panels: 4 to 10 panels; a plain text is parsed by `read_panel`.
        seed: seed of the first panel, which counts up; or one for each panel.
        title: title above the first row.
        captions: place of the captions: `below` the panels, `inside` them, or `none`.
        font: a TrueType or OpenType file, for letters that Pillow's font lacks.
        on_panel: called as `on_panel(done, panels)` before the first panel and after each.
        options: of `Student.generate`: steps, guidance, size, fit, …

    Raises UsageError for arguments that do not fit, UserError for a reference or font that cannot be read.
    """
    parsed = [panel if isinstance(panel, Panel) else read_panel(panel) for panel in panels]
    seeds = check(parsed, seed, captions)
    font = font_for((title, *(panel.caption for panel in parsed)), font)
    opened = student.opened(reference, options.get("background") or "white") if reference is not None else None
    images: list[Image] = []
    for number, (panel, panel_seed) in enumerate(zip(parsed, seeds, strict=True)):
        if on_panel is not None:
            on_panel(number, len(parsed))
        images.append(student.generate(opened, panel.prompt, seed=panel_seed, **options))
    if on_panel is not None:
        on_panel(len(parsed), len(parsed))
    return bind(images, parsed, seeds, images[0].info, title=title, captions=captions, font=font)


def bind(
    images: list[Image],
    panels: list[Panel],
    seeds: list[int],
    made_by: Mapping[Any, Any],
    *,
    title: str = "",
    captions: str = "below",
    font: str | Path | None = None,
) -> Page:
    """Returns the page of generated panels; `made_by` is the provenance of the first."""
    font = font_for((title, *(panel.caption for panel in panels)), font)
    provenance: dict[str, Any] = {**made_by, "prompt": title or panels[0].prompt, "title": title, "seeds": seeds}
    provenance |= {"panels": [{"prompt": p.prompt, "caption": p.caption} for p in panels], "captions": captions}
    provenance.pop("seed", None)
    page = lay_out(images, [panel.caption for panel in panels], title=title, captions=captions, font=font)
    return Page(page, images, panels, seeds, provenance)


def read_panel(line: str) -> Panel:
    """Parses `prompt | caption`; without a bar the text is both. UsageError for an empty prompt."""
    shows, bar, says = (part.strip() for part in line.partition("|"))
    if not shows:
        raise UsageError("text_empty", f"A panel has no prompt: '{line}'. Describe what it shows, before any bar.")
    return Panel(shows, says if bar else shows)


def read_panels(path: str | Path) -> list[Panel]:
    """Reads the panels of a text file, one per line. Empty lines and lines that begin with # are skipped."""
    lines = [line for line in read_lines(Path(path)) if line.strip() and not line.lstrip().startswith("#")]
    return [read_panel(line) for line in lines]


def check(panels: Sequence[Panel], seed: int | Sequence[int], captions: str) -> list[int]:
    """Returns the panels' seeds. UsageError for a wrong number of panels or seeds, and for invalid values."""
    if not MIN_PANELS <= len(panels) <= MAX_PANELS:
        raise UsageError("option_invalid", f"A story needs {MIN_PANELS} to {MAX_PANELS} panels, not {len(panels)}.")
    if captions not in CAPTIONS:
        hint = nearest(captions, CAPTIONS)
        raise UsageError("option_invalid", f"captions must be one of {', '.join(CAPTIONS)}, not '{captions}'{hint}")
    for panel in panels:
        check_prompt(panel.prompt)
    given = [seed] if isinstance(seed, int) else list(seed)
    seeds = [given[0] + number for number in range(len(panels))] if len(given) == 1 else given
    if len(seeds) != len(panels):
        wrong = f"{len(seeds)} seeds for {len(panels)} panels. Pass one, which counts up, or one for each panel."
        raise UsageError("count_mismatch", wrong)
    for number in seeds:
        check_seed(number)
    return seeds


# ---- the page


def lay_out(
    images: Sequence[Image],
    texts: Sequence[str],
    *,
    title: str = "",
    captions: str = "below",
    font: str | Path | None = None,
    width: int = WIDTH,
) -> Image:
    """Lays panels out in rows of two and three, each row as wide as the page. Returns RGB, `width` pixels wide."""
    from PIL import Image as pillow
    from PIL import ImageDraw

    rows = ROWS[len(images)]
    heading = _font(font, 52)
    body = _font(font, 24)
    inner = width - 2 * MARGIN
    blocks: list[tuple[int, int, list[list[str]], int, int]] = []  # first panel, panels, words, cell width, height
    top = MARGIN + (_title_height(heading, title, inner) if title else 0)
    height, first = top, 0
    for count in rows:
        cell = (inner - GUTTER * (count - 1)) // count
        tall = round(cell * max(image.height / image.width for image in images[first : first + count]))
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
            panel = enlarge(images[first + place], cell)
            page.paste(panel, (left, top))
            pen.rectangle((left, top, left + cell - 1, top + panel.height - 1), outline=INK, width=FRAME)
            _write(pen, words[place], body, captions, left, top, panel.height)
        lines = max(map(len, words))
        top += tall + (lines * _line(body) + 14 if captions == "below" and lines else 0) + GUTTER
    return page


def _write(pen: Any, words: Sequence[str], font: Any, captions: str, left: int, top: int, tall: int) -> None:
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


def enlarge(image: Image, width: int) -> Image:
    """Returns the image at the page's scale. A tiny image keeps its sharp pixels, which is the pocket world's look."""
    from PIL import Image as pillow

    tall = round(image.height * width / image.width)
    if image.width * 4 <= width:
        whole = width // image.width + 1
        image = image.resize((image.width * whole, image.height * whole), pillow.Resampling.NEAREST)
    return image.resize((width, tall), pillow.Resampling.LANCZOS)


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Returns the text in lines of at most `width` pixels; longer words are broken."""
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
    """Returns a font that has all letters of the texts: `font` if given, else Pillow's (None), else a system font.

    Pillow's font has little beyond English. UsageError if no font has them: they would be rendered as boxes.
    """
    letters = "".join(texts)
    for candidate in [font] if font is not None else [None, *SYSTEM_FONTS]:
        try:
            absent = lacking(letters, candidate)
        except UserError:
            if font is not None:
                raise
            continue  # not installed here
        if not absent:
            return candidate
    which = "The installed fonts lack" if font is None else f"{font} lacks"
    absent = " ".join(lacking(letters, font)[:8])
    raise UsageError("option_invalid", f"{which} {absent}. Pass a font file that has these letters with --font.")


def lacking(letters: str, font: str | Path | None) -> list[str]:
    """Returns the letters that a font lacks. UserError for a font that cannot be read."""
    opened = _font(font, 24)
    missing = bytes(opened.getmask("\U0010ffff"))
    return [c for c in dict.fromkeys(letters) if not c.isspace() and bytes(opened.getmask(c)) == missing]


def _font(font: str | Path | None, size: int) -> Any:
    """Pillow's font (Aileron) or a file's. UserError if it cannot be read."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size) if font is None else ImageFont.truetype(str(font), size)
    except (OSError, ImportError, ValueError) as error:
        raise UserError("path_unreadable", f"{font or 'Pillow'}: not a font that can be read ({error})") from error


def _line(font: Any) -> int:
    """Line height in pixels."""
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

# Dashes, which models write and Pillow's font lacks; and the bar, which separates prompt and caption.
PLAIN = str.maketrans("–—|", "--/")
REPEATS = 0.7  # similarity from which a panel counts as a repetition of an earlier one


class WrittenPanel(BaseModel):
    """A panel, as the model writes it."""

    shows: str = Field(
        min_length=1, max_length=300, description="What the panel shows: character, action, place, light."
    )
    says: str = Field(min_length=1, max_length=160, description="The sentence below it.")


def _different(panels: list[WrittenPanel]) -> list[WrittenPanel]:
    """Checks that no two panels show nearly the same, and that no caption repeats."""
    accepted = diversity.NearDuplicates(REPEATS)
    for number, panel in enumerate(panels, 1):
        if (near := accepted.add(str(number), panel.shows)) is not None:
            raise ValueError(f"panel {number} shows what panel {near[0]} shows")
    if diversity.repeated([panel.shows for panel in panels]) or diversity.repeated([panel.says for panel in panels]):
        raise ValueError("two panels say the same")
    return panels


def write_panels(idea: str, count: int, endpoint: Endpoint, cache: Cache | None = None) -> list[Panel]:
    """Returns `count` panels written from the idea. UserError if the endpoint gives no valid answer."""
    several = Field(min_length=count, max_length=count)
    shape = create_model("Story", panels=(Annotated[list[WrittenPanel], several, AfterValidator(_different)], ...))
    question = Question((system(BRIEF.format(count=count)), user(quoted(idea, "idea"))), shape)
    with Client(endpoint, cache) as client:
        outcome = client.ask(question)
    if outcome.answer is None:
        raise UserError("reply_invalid", f"The language model wrote no valid story: {outcome.reason}")
    lines = [
        {key: " ".join(clean(text).translate(PLAIN).split()) for key, text in panel.items()}
        for panel in outcome.answer["panels"]
    ]
    return [Panel(line["shows"], line["says"]) for line in lines]
