"""Draws the README's picture with the shipped student: `python docs/pictures/make.py`.

One row for each reference: the reference, then what the student draws of it for each prompt, all with seed 0.
"""

from pathlib import Path

from PIL import Image

from diptych import Student
from diptych.utils.paths import packaged

REFERENCES = ("cat", "robot", "car", "mushroom")
PROMPTS = (
    "a {} on the beach, bright white light from above",
    "a {} jumping in a meadow, soft golden light from the left",
    "a {} in a library, bright white light from the right",
    "a {} sleeping on the moon, dim blue light from the left",
    "a {} in a forest in the snow",
)
SCALE, GAP = 2, 8


def main() -> None:
    student = Student.load("pocket")
    student.pipeline.set_progress_bar_config(disable=True)
    rows = []
    for kind in REFERENCES:
        path = packaged("examples/references") / f"{kind}.png"
        rows.append([Image.open(path), *student.generate(path, [prompt.format(kind) for prompt in PROMPTS], seed=0)])
    side = rows[0][0].width * SCALE
    step = side + GAP
    sheet = Image.new("RGB", (len(rows[0]) * step + GAP, len(rows) * step - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            # The reference stands a little apart.
            left = x * step + (2 * GAP if x else 0)
            sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, y * step))
    sheet.save(Path(__file__).with_name("readme.png"), optimize=True)


if __name__ == "__main__":
    main()
