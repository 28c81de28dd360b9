"""Finds models: a name becomes a folder on this machine, and a folder gets a fingerprint.

A name is `pocket` (weights inside the package), an existing path, or `owner/name[@revision]` on the Hugging Face Hub.
No weights are loaded here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from diptych.errors import UsageError, UserError, describe, nearest
from diptych.utils import licenses
from diptych.utils.documents import parse_json
from diptych.utils.io import sha256_file
from diptych.utils.paths import packaged, refuse_special

ROLES = ("teacher", "student", "curator", "screen", "scorer", "reader", "vlm")
BUILT_IN = ("pocket",)
SHIPPED = ("teacher", "student", "curator", "scorer", "reader")
"""The roles that the built-in models have a folder for."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
# A pipeline repository often repeats its weights as single files at its root: 24 GB that are never read.
_HUB_FILES = {"teacher": ["*.json", "*/*"], "student": None}
_HUB_IGNORE = ["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ckpt", "*.gguf"]

HUB_SIZES = {"primecai/dsd_model": 24.6, "black-forest-labs/FLUX.1-dev": 33.7}
"""Download size in GB of the models in the documentation: the authors' weights and their base."""
GATED = ("black-forest-labs/FLUX.1-dev",)

_fingerprints: dict[tuple[tuple[str, int, int], ...], str] = {}


def resolve(name: str, role: str) -> Path:
    """The local folder (or single file) of a model. A hub name is downloaded first, and a run means its student.

    `role` is one of `ROLES`; it selects the folder of a built-in model and the files to download.
    UsageError for a name that cannot be a model, UserError if it cannot be downloaded.
    """
    assert role in ROLES, role
    if name in BUILT_IN:
        if role not in SHIPPED:
            raise UsageError(
                "model_not_found", f"{name} has no {role}. Pass a local folder or a hub name (owner/name)."
            )
        folder = packaged("pocket/weights") / role
        if not folder.is_dir():
            raise UserError("model_incomplete", f"The {name} {role} is missing ({folder}). Reinstall diptych.")
        return folder
    path = Path(name).expanduser()
    if name and path.exists():
        refuse_special(path)
        if role == "student" and run_of(path) == path:
            run, path = path, path / "student"
            if not holds_student(path):
                raise UserError(
                    "run_incomplete", f"{run} has no student yet. Run: diptych distill {run}/recipe.yaml --out {run}"
                )
        check_folder(path)
        licenses.note(name, path)
        return path
    if not _HUB_NAME.fullmatch(name):
        if hint := _where_to_get(name):
            raise UsageError("model_not_found", f"{role} model '{name}': no such folder here; {hint}")
        raise UsageError(
            "model_not_found",
            f"Unknown {role} model '{name}': not a built-in model ({', '.join(BUILT_IN)}), a local folder or file, or "
            f"a hub name (owner/name){nearest(name, BUILT_IN)}",
        )
    beside = Path(name).parent
    if beside.is_dir() and not _where_to_get(name):  # a mistyped path, not owner/name on the hub
        there = sorted(str(each) for each in beside.iterdir() if each.is_dir())
        hint = nearest(name, there) or f"; folders there: {', '.join(there[:8]) or 'none'}"
        raise UserError("model_not_found", f"{role} model '{name}': no such folder{hint}")
    path = _download(name, role)
    check_folder(path)
    licenses.note(name, path)
    return path


def _where_to_get(name: str) -> str:
    """How to get a documented model that is not on this machine; empty for other models."""
    known = {re.sub(r"\W", "", repo.split("/")[1]).lower(): repo for repo in HUB_SIZES}
    repo = known.get(re.sub(r"\W", "", Path(name).name).lower())
    if repo is None:
        return ""
    gated = (
        f"accept its license at https://huggingface.co/{repo} and run `hf auth login`, then " if repo in GATED else ""
    )
    return (
        f"it is {repo} on the Hugging Face Hub ({HUB_SIZES[repo]:.1f} GB): {gated}pass {repo} to download it, "
        f"or the path of a copy (`hf download {repo} --local-dir {repo.split('/')[1]}`)"
    )


def run_of(model: str | Path) -> Path | None:
    """The run that a model is the student of, given the run's folder or the `student/` in it; None for other models."""
    path = Path(model).expanduser()
    if (path / "recipe.yaml").is_file() and not holds_student(path):
        return path
    return path.parent if path.name == "student" and (path.parent / "recipe.yaml").is_file() else None


def holds_student(folder: Path) -> bool:
    """Whether a folder has a student's weights: a transformer, or a LoRA file."""
    return any((folder / name).exists() for name in ("transformer", "pytorch_lora_weights.safetensors"))


def with_scale(text: str) -> tuple[Path, float]:
    """Parses `PATH` or `PATH:SCALE` as (path, scale). UsageError for a scale that is not a number."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return Path(text).expanduser(), 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            "lora_not_found",
            f"--lora {text}: no such file, and '{scale}' after the last colon is not a scale. Example: {path}:0.8",
        )
    return Path(path).expanduser(), number


def _download(name: str, role: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    wanted = f"No local path '{name}', and"
    # A missing folder may look like a hub name: models/FLUX.1-dev.
    known = "" if repo in HUB_SIZES else _where_to_get(repo)
    instead = known or "pass the path of a local copy, or try again with a network"
    try:
        downloaded = snapshot_download(
            repo, revision=revision or None, allow_patterns=_HUB_FILES.get(role), ignore_patterns=_HUB_IGNORE
        )
    except GatedRepoError as error:
        raise UserError(
            "model_gated",
            f"'{repo}' is gated{_size_of(repo)}. Accept its license at https://huggingface.co/{repo}, then run "
            "`hf auth login`; or pass the path of a local copy.",
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            "model_not_found", f"{wanted} the hub has no public model '{repo}'; {known or 'check the spelling'}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError("model_not_found", f"{wanted} '{repo}' on the hub has no revision '{revision}'") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            "hub_unreachable",
            f"{wanted} the hub cannot be reached and its cache has no copy of '{repo}'{_size_of(repo)}; {instead}",
        ) from error
    except Exception as error:
        # A proxy, a full disk, a broken stream: the hub client passes on errors of its HTTP library, which has changed
        # before.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise UserError(
            "hub_unreachable", f"{wanted} the download from the hub failed ({describe(error)}); {instead}"
        ) from error
    return Path(downloaded)


def _size_of(repo: str) -> str:
    return f" ({HUB_SIZES[repo]:.1f} GB)" if repo in HUB_SIZES else ""


TRAINING = "training"
"""Folder inside a student with checkpoints, metrics, and the state that resumed training needs."""
HASHED_BYTES = 2 * 2**30  # larger models are not hashed: FLUX would take minutes before its first image


def fingerprint(path: str | Path, training: bool = False) -> str:
    """sha256 over the relative names, sizes and contents of a model's *.safetensors and *.json, in sorted order.

    A student's `training/` is left out, because it does not change the student; `training` includes it, as older images
    have it. Cached per process until a file's size or modification time changes. A single file is a list of one.
    """
    path = Path(path)
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json") and p.is_file())
        if not training:
            paths = [p for p in paths if p.relative_to(path).parts[0] != TRAINING]
    else:
        paths = [refuse_special(path)]
    stats = [p.stat() for p in paths]
    key = tuple((str(p.absolute()), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True))
    if key not in _fingerprints:
        entries = []
        for p, s in zip(paths, stats, strict=True):
            name = p.relative_to(path).as_posix() if path.is_dir() else p.name
            entries.append((name, s.st_size, sha256_file(p)))
        _fingerprints[key] = fingerprint_of(entries)
    return _fingerprints[key]


def quick_fingerprint(path: Path) -> str | None:
    """The fingerprint of a model of at most `HASHED_BYTES`, else None."""
    size = path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*.safetensors"))
    return fingerprint(path) if size <= HASHED_BYTES else None


def fingerprint_of(entries: Iterable[tuple[str, int, str]]) -> str:
    """The fingerprint of files by name, size and sha256, in the order of `fingerprint`."""
    total = hashlib.sha256()
    for name, size, content in entries:
        total.update(f"{name}\0{size}\0{content}\n".encode())
    return total.hexdigest()


def without_places(data: bytes) -> bytes:
    """A JSON file of a model without `_name_or_path`, where other libraries record the folder that it was loaded from.
    Returns the same bytes if it has none."""
    try:
        value = parse_json(data)
    except ValueError:
        return data
    cleaned = _without_paths(value)
    return data if cleaned == value else (json.dumps(cleaned, indent=2, sort_keys=True) + "\n").encode()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_paths(each) for key, each in value.items() if key not in ("_name_or_path", "name_or_path")
        }
    return [_without_paths(each) for each in value] if isinstance(value, list) else value


def files(folder: Path) -> dict[str, str]:
    """File name -> sha256, for every file of a student's folder except those in `training/`."""
    hashes: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if not name.startswith((f"{TRAINING}/", ".")):
            hashes[name] = sha256_file(path)
    return hashes


def weights(path: Path) -> frozenset[str]:
    """sha256 of each weights file of a model, or its fingerprint if it has none. Two models that share a file are the
    same model, whatever their names and paths."""
    inner = path.rglob("*") if path.is_dir() else [refuse_special(path)]
    files = sorted(p for p in inner if p.is_file() and (p == path or p.suffix in (".safetensors", ".bin")))
    return frozenset(map(sha256_file, files)) or frozenset({fingerprint(path)})


# Rejects configs with more layers than their files have tensors, before a model is built. A config of a few lines can
# request ten million layers, which fill the memory even on the meta device. Only the headers of weight files are read.

MOST = 1000  # layers that are allowed without a look at the weights; no model has more
LONGEST_HEAD = 100 * 2**20  # bytes of a header, the limit of safetensors
_COUNTS = frozenset({"depth", "depths", "num_blocks", "n_blocks"})


def check_folder(folder: Path) -> None:
    """UserError if a config in a model's folder, or in a folder inside it, has more layers than there are tensors."""
    for path in (folder / "config.json", *sorted(folder.glob("*/config.json"))):
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            continue
        _check_file(path, stamp)


def check(config: Any, where: str, tensors: int = 0) -> None:
    """UserError for a config that has more layers than `tensors`, and more than any model."""
    for key, value in _counts(config):
        if value > max(tensors, MOST):
            has = f"and the weights beside it have {tensors} tensors" if tensors else "which no model has"
            raise UserError("file_damaged", f"{where}: {key} is {value}, {has}. The config is damaged; fetch it again.")


@lru_cache(maxsize=64)
def _check_file(path: Path, stamp: int) -> None:
    refuse_special(path)
    try:
        config = parse_json(path.read_text("utf8"))
    except (OSError, ValueError):
        return  # the code that opens it reports the error
    if any(value > MOST for _, value in _counts(config)):
        check(config, str(path), _tensors(path.parent))


def _counts(config: Any) -> Iterator[tuple[str, int]]:
    """Numbers of layers in the config and in nested configs."""
    todo = [config]
    while todo:
        part = todo.pop()
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if isinstance(value, Mapping):
                todo.append(value)
            elif "layer" in str(key) or key in _COUNTS:
                numbers = value if isinstance(value, list | tuple) else [value]
                yield from ((str(key), n) for n in numbers if isinstance(n, int) and not isinstance(n, bool))


def _tensors(folder: Path) -> int:
    """The number of tensors in a folder's weights, from their headers."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        try:
            with refuse_special(path).open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                if size <= LONGEST_HEAD:
                    names |= json.loads(stream.read(size)).keys()
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return len(names)
