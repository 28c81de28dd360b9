"""Hashes of rows, weights and images from every stage, to show that a refactoring changed no byte.

    python benchmarks/guard.py --out before.json          # about four minutes on one thread
    python benchmarks/guard.py --against before.json      # after the change

The script runs a tiny `diptych run pocket` and then the other commands, each in its own process. It uses only the
command line, so it still works when modules are moved or renamed. `--against` prints every name that differs, is
missing or is new, and exits with code 1. If nothing differs, it prints "equal: N hashes".

Compare hashes only on the same machine with the same versions of torch and the other packages. A different processor
or a different torch rounds differently, and then almost every hash changes.

Every name starts with its kind:

- `rows`: one hash for each column of each dataset, over all its parts, and its column types.
- `weights`: names, types, shapes and bytes of the tensors in one safetensors file.
- `images`: pixels of one image, or the streams of one PDF.
- `records`: JSON files, what a command prints with `--json`, and metadata in images and safetensors files.
- `texts`: Markdown and HTML files.

A change of wording alters `texts`, and perhaps `records`. Pass `--kind rows --kind weights --kind images` to compare
only the rest.

Left out, because it differs between two runs of the same code:

- Times: `time`, `seconds` and `seconds_per_image` in records, and times, table columns and bars of times in texts.
- Memory: `peak_bytes`.
- Hashes of files that contain a time. These are `state.json` in the manifest of a checkpoint, and the model card and
  the total hash in `student/training/summary.json`. The card and the tensors have their own hashes.

Left out, because it does not say what the code computes:

- Versions, the machine and the path of the folder.
- The seal of an image, which covers the versions. `diptych trace` checks one seal, and its result is hashed.
- Lock files, styles and fonts of the report, the order of keys in a JSON object, and how image files are compressed.

Not run: `serve`, `push`, `sign`, `ablate`, `data audit`, `data judge-check`, `data recurate`, Ray, language models,
devices other than the CPU, and teachers other than the pocket model.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("rows", "weights", "images", "records", "texts")

# Keys of JSON objects that hold times, memory, versions or the machine.
UNSTABLE = {"time", "seconds", "seconds_per_image", "peak_bytes", "versions", "machine", "torch", "seal"}
IMAGES = {".png", ".webp", ".jpg", ".jpeg"}

# Patterns of a table, its rows and their cells, in HTML and in Markdown.
TABLES = (
    (r"(?s)<table.*?</table>", r"(?s)<tr.*?</tr>", r"(?s)<t[hd].*?</t[hd]>"),
    (r"(?m)(?:^\|.*\n)+", r".+", r"(?<=\|)[^|]+(?=\|)"),
)


def settings(**values: object) -> list[str]:
    """Arguments that override keys of a recipe; `__` stands for a dot."""
    return [argument for key, value in values.items() for argument in ("--set", f"{key.replace('__', '.')}={value}")]


TRAINING = {
    "distill__warmup": 1,
    "distill__batch_size": 4,
    "distill__validation_pairs": 2,
}
POCKET = settings(
    write__count=60,
    write__shard_size=30,
    paint__steps=6,
    paint__batch_size=30,
    distill__steps=6,
    distill__checkpoint_every=3,
    distill__validate_every=3,
    evaluate__samples=3,
    evaluate__prompts=2,
    evaluate__steps=4,
    evaluate__bootstrap=50,
    evaluate__batch_size=6,
    **TRAINING,
)
RELIGHT = settings(
    write__count=20,
    write__shard_size=10,
    paint__steps=4,
    paint__batch_size=10,
    distill__steps=3,
    distill__checkpoint_every=3,
    distill__validate_every=3,
    evaluate__relight=3,
    evaluate__steps=3,
    evaluate__bootstrap=20,
    **TRAINING,
)
CHANNEL = settings(
    distill__mode="full",
    distill__conditioning="channel",
    distill__precision="float32",
    distill__instructions=0.5,
    distill__timestep_density="uniform",
    distill__steps=3,
    distill__checkpoint_every=3,
    distill__validate_every=3,
    evaluate__suite="none",
)
CAT = ("--reference", "cat.png")
MOON = (*CAT, "--prompt", "a cat on the moon", "--steps", "4")
LIGHTS = ("--light", "soft golden light from the left", "--light", "dim blue light from above")
PANELS = (
    *("--panel", "a cat on the beach"),
    *("--panel", "a cat in a forest | Lost."),
    *("--panel", "a cat in a cave"),
    *("--panel", "a cat in the kitchen | Home."),
)
FORMATS = ("parquet", "edit-parquet", "webdataset", "imagefolder", "ai-toolkit", "simpletuner", "uno")

# What is run, in this order: a name, and the arguments of `diptych`.
STEPS: dict[str, list[str]] = {
    "run": ["run", "pocket", "--out", "run", *POCKET],
    "run-relight": ["run", "pocket-relight", "--out", "run-relight", *RELIGHT],
    "run-channel": ["run", "pocket", "--from", "run", "--out", "run-channel", *POCKET, *CHANNEL],
    "generate-exact": ["generate", *MOON, "--seed", "1", "--seed", "2", "--speed", "exact", "--out", "exact"],
    "generate-fastest": ["generate", *MOON, "--seed", "1", "--seed", "2", "--speed", "fastest", "--out", "fastest"],
    "generate-run": ["generate", *MOON, "--seed", "1", "--model", "run", "--out", "generated.png"],
    "relight": ["relight", *CAT, *LIGHTS, "--steps", "4", "--out", "relit.png"],
    "story": ["story", *CAT, *PANELS, "--steps", "3", "--out", "story.png", "--out", "story.pdf"],
    "convert-folded": ["convert", "run", "folded", "--to", "folded", "--dtype", "float32"],
    "convert-released": ["convert", "folded", "released", "--to", "released"],
    "convert-back": ["convert", "released", "folded-again", "--to", "folded"],
    "convert-kohya": ["convert", "run", "kohya.safetensors", "--to", "lora-kohya"],
    **{f"export-{name}": ["data", "export", "run", "--format", name, "--out", f"for-{name}"] for name in FORMATS},
    **{
        f"import-{name}": ["data", "import", f"for-{name}", "--format", name, "--out", f"from-{name}"]
        for name in ("imagefolder", "webdataset")
    },
    "stats": ["data", "stats", "run"],
    "trace": ["trace", "generated.png", "--in", "run"],
    "plan": ["plan", "pocket", *POCKET],
    "plan-flux": ["plan", "flux-subject"],
}


def make(folder: Path) -> None:
    """Runs every step in `folder`; what a step prints goes to NAME.json there."""
    shutil.copy(ROOT / "examples/references/cat.png", folder)
    search = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIPTYCH_")}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(search)
    for name, arguments in STEPS.items():
        began = time.monotonic()
        command = [sys.executable, "-W", "ignore", "-m", "diptych", *arguments, "--json"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nexit code {done.returncode}\n{(done.stderr or done.stdout).decode()}")
        (folder / f"{name}.json").write_bytes(done.stdout)
        print(f"{name:<20}{time.monotonic() - began:6.1f} s", flush=True)


def sha256(*values: bytes | str) -> str:
    """The hash of several values, each with its length before it."""
    total = hashlib.sha256()
    for value in values:
        data = value.encode() if isinstance(value, str) else value
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def stable(value: Any) -> Any:
    """A JSON value without what differs between runs; JSON inside a string is read, too."""
    if isinstance(value, dict):
        return {key: stable(item) for key, item in value.items() if key not in UNSTABLE}
    if isinstance(value, list):
        return [stable(item) for item in value]
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return stable(json.loads(value))
        except json.JSONDecodeError:
            return value
    return value


def record(value: Any) -> str:
    """The hash of a JSON value."""
    return sha256(json.dumps(stable(value), sort_keys=True))


def json_hash(name: str, data: bytes) -> str:
    """The hash of a JSON file, or of one with an object on each line."""
    if name.endswith(".jsonl"):
        return record([json.loads(line) for line in data.splitlines()])
    value = json.loads(data)
    if fnmatch(name, "*/training/step-*/manifest.json"):
        value["sha256"].pop("state.json", None)
    if name.endswith("/training/summary.json"):
        value.pop("sha256", None)
        value["files"].pop("README.md", None)
    return record(value)


def text_hash(text: str) -> str:
    """The hash of a Markdown or HTML file without times, versions and styles; its images count by their pixels."""
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"data:image/[a-z+]+;base64,([\w+/=]+)", lambda found: pixels(b64decode(found[1])), text)
    text = re.sub(r"^\| [^|]*(second|time)[^|]*\|.*\n", "", text, flags=re.MULTILINE | re.IGNORECASE)
    for table, row, cell in TABLES:
        text = re.sub(table, lambda found, row=row, cell=cell: without_times(found[0], row, cell), text)
    text = re.sub(r"width:[\d.]+%|\b[\d.,]+ (ms|s|min|h)\b", "TIME", text)
    text = text.replace(platform.platform(), "MACHINE")
    return sha256(re.sub(r"\b\d+\.\d+\.\d+\b", "VERSION", text))


def without_times(table: str, row: str, cell: str) -> str:
    """A table without its columns of seconds; `row` and `cell` are patterns."""
    heads = [re.sub("<.*?>", "", found).strip().lower() for found in re.findall(cell, re.findall(row, table)[0])]
    timed = {number for number, head in enumerate(heads) if head.startswith(("s/", "s /", "second"))}

    def strip(line: re.Match[str]) -> str:
        numbers = itertools.count()
        return re.sub(cell, lambda found: "" if next(numbers) in timed else found[0], line[0])

    return re.sub(row, strip, table)


def pixels(data: bytes) -> str:
    """The hash of an image's mode, size and pixels."""
    with Image.open(io.BytesIO(data)) as image:
        return sha256(image.mode, str(image.size), image.tobytes())


def metadata(data: bytes) -> dict[str, Any]:
    """The words in an image's metadata."""
    with Image.open(io.BytesIO(data)) as image:
        return {key: value for key, value in image.info.items() if isinstance(value, str)}


def tensors(data: bytes) -> tuple[str, dict[str, str]]:
    """The hash of the tensors in a safetensors file, and its metadata."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    about = header.pop("__metadata__", {})
    parts: list[bytes | str] = []
    for name, entry in sorted(header.items()):
        begin, end = entry["data_offsets"]
        parts += [name, entry["dtype"], str(entry["shape"]), data[start + begin : start + end]]
    return sha256(*parts), about


def file_hashes(name: str, data: bytes) -> Iterator[tuple[str, str]]:
    """The hashes of one file, each with its name."""
    ending = Path(name).suffix
    if ending == ".safetensors":
        value, about = tensors(data)
        yield f"weights/{name}", value
        if about:
            yield f"records/{name}#metadata", record(about)
    elif ending in IMAGES:
        yield f"images/{name}", pixels(data)
        if about := metadata(data):
            yield f"records/{name}#metadata", record(about)
    elif ending == ".pdf":
        yield f"images/{name}", sha256(*re.findall(rb"stream\r?\n(.*?)endstream", data, re.DOTALL))
    elif ending in (".json", ".jsonl"):
        yield f"records/{name}", json_hash(name, data)
    elif ending in (".md", ".html"):
        yield f"texts/{name}", text_hash(data.decode())
    elif ending == ".tar":
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                if (file := archive.extractfile(member)) is not None:
                    yield from file_hashes(f"{name}/{member.name}", file.read())
    else:
        yield f"records/{name}", sha256(data)


def rows(name: str, files: list[Path]) -> Iterator[tuple[str, str]]:
    """The hash of each column of a dataset, over all its parts."""
    table = parquet.read_table(files[0]) if len(files) == 1 else parquet.ParquetDataset(files).read()
    yield f"rows/{name}#types", sha256(*(f"{field.name}: {field.type}" for field in table.schema))
    for column in table.column_names:
        yield f"rows/{name}#{column}", sha256(*(repr(value) for value in table[column].to_pylist()))


def hashes(folder: Path) -> dict[str, str]:
    """The hashes of everything in a folder, by name."""
    found: dict[str, str] = {}
    datasets: dict[Path, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".parquet":
            datasets.setdefault(path.parent, []).append(path)
        else:
            data = path.read_bytes()
            if path.suffix in (".json", ".jsonl", ".md", ".html"):
                data = data.replace(str(folder.resolve()).encode(), b".")
            found.update(file_hashes(name, data))
    for parent, files in datasets.items():
        found.update(rows(parent.relative_to(folder).as_posix(), files))
    return dict(sorted(found.items()))


def compare(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """One line for each name whose hash differs, is missing or is new."""
    lines = []
    for name in sorted({*before, *after}):
        if name not in after:
            lines.append(f"missing: {name}")
        elif name not in before:
            lines.append(f"new: {name}")
        elif before[name] != after[name]:
            lines.append(f"differs: {name}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="File to save the hashes to.")
    parser.add_argument("--against", type=Path, help="File of hashes to compare with.")
    parser.add_argument("--kind", choices=KINDS, action="append", help="Compare only this kind. Repeatable.")
    parser.add_argument("--keep", type=Path, help="New folder for everything that is made, to inspect a difference.")
    given = parser.parse_args()
    before = json.loads(given.against.read_text("utf8")) if given.against else None
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            sys.exit(f"{folder} is not empty. Pass a new folder as --keep.")
        make(folder.resolve())
        found = hashes(folder)
    kinds = given.kind or KINDS
    counts = {kind: sum(name.startswith(f"{kind}/") for name in found) for kind in kinds}
    seconds = round(time.monotonic() - began)
    print(f"{sum(counts.values())} hashes in {seconds} s: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
    if given.out:
        save(found, seconds, given.out)
    if before is None:
        if not given.out:
            for name, value in found.items():
                print(value[:16], name)
        return
    chosen = [{n: h for n, h in side.items() if n.split("/")[0] in kinds} for side in (before["hashes"], found)]
    if lines := compare(*chosen):
        print(*lines, sep="\n")
        about = before["about"]
        print(f"differences: {len(lines)}. The file was made on {about['machine']} with {about['versions']}.")
        sys.exit(1)
    print(f"equal: {len(chosen[1])} hashes")


def save(found: dict[str, str], seconds: int, out: Path) -> None:
    """Writes the hashes with the machine and the versions."""
    import torch
    from measuring import about, write  # only here: it imports parts of diptych, and comparing works without them

    machine = about(torch.device("cpu")) | {"threads": 1}
    print(write("guard", {"about": machine, "seconds": seconds, "hashes": found}, out))


if __name__ == "__main__":
    main()
