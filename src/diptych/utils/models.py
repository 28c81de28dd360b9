"""Where models come from: a name becomes a folder on this machine, and a folder becomes a fingerprint.

A name is `pocket` (weights inside the package), a path that exists, or `owner/name[@revision]` on the Hugging Face Hub.
Nothing here loads a weight; what opens the folder decides what it holds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from diptych.errors import UsageError, UserError, describe, nearest
from diptych.utils.documents import parse_json, parse_yaml, read_text
from diptych.utils.io import sha256_file
from diptych.utils.paths import packaged, refuse_special

ROLES = ("teacher", "student", "curator", "screen", "scorer", "reader", "vlm")
BUILT_IN = ("pocket",)
SHIPPED = ("teacher", "student", "curator", "scorer", "reader")
"""The roles that a built-in model has a folder for; the others are only ever somebody else's model."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
# A pipeline repository often repeats its weights as single files at its root: 24 GB nobody here reads.
_HUB_FILES = {"teacher": ["*.json", "*/*"], "student": None}
_HUB_IGNORE = ["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ckpt", "*.gguf"]

HUB_SIZES = {"primecai/dsd_model": 24.6, "black-forest-labs/FLUX.1-dev": 33.7}
"""GB that are downloaded of the models that the documentation names: the authors' weights and their base."""
GATED = ("black-forest-labs/FLUX.1-dev",)

FLUX_DEV_NOTE = (
    "FLUX.1-dev and everything trained from it are under the FLUX.1-dev Non-Commercial License: "
    "research and personal use only, unless you have a licence from Black Forest Labs."
)
FLUX_DEV = ("other", "flux-1-dev-non-commercial-license", "https://huggingface.co/black-forest-labs/FLUX.1-dev")
_noted: set[str] = set()
_fingerprints: dict[tuple[tuple[str, int, int], ...], str] = {}


def resolve(name: str, role: str) -> Path:
    """The local folder (or single file) behind a model name, downloaded first if it is a hub name. A run's folder
    stands for its student.

    `role` is one of `ROLES`; it picks the folder of a built-in model and the files worth downloading.
    Raises UsageError for a name that can mean nothing, UserError when the hub does not give it.
    """
    assert role in ROLES, role
    if name in BUILT_IN:
        if role not in SHIPPED:
            raise UsageError(f"there is no {name} {role}: name a local folder or a hub name (owner/name)")
        folder = packaged("pocket/weights") / role
        if not folder.is_dir():
            raise UserError(f"the {name} {role} is not in this installation ({folder}); reinstall diptych")
        return folder
    path = Path(name).expanduser()
    if name and path.exists():
        refuse_special(path)
        if role == "student" and run_of(path) == path:
            run, path = path, path / "student"
            if not holds_student(path):
                raise UserError(f"{run} holds no student yet; first: diptych distill {run}/recipe.yaml --out {run}")
        check_folder(path)
        note_licence(name, path)
        return path
    if not _HUB_NAME.fullmatch(name):
        if hint := _where_to_get(name):
            raise UsageError(f"{role} model '{name}': no such folder here; {hint}")
        raise UsageError(
            f"unknown {role} model '{name}': not a built-in model ({', '.join(BUILT_IN)}), not a local folder or file, "
            f"and not a hub name (owner/name){nearest(name, BUILT_IN)}"
        )
    path = _download(name, role)
    check_folder(path)
    note_licence(name, path)
    return path


def _where_to_get(name: str) -> str:
    """How to get a well-known model that is not on this machine; empty for any other."""
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
    """The run whose student is named, by the run's folder or by the `student/` in it; None for any other model."""
    path = Path(model).expanduser()
    if (path / "recipe.yaml").is_file() and not holds_student(path):
        return path
    return path.parent if path.name == "student" and (path.parent / "recipe.yaml").is_file() else None


def holds_student(folder: Path) -> bool:
    """Whether a folder has a student's weights: a transformer, or a LoRA file."""
    return any((folder / name).exists() for name in ("transformer", "pytorch_lora_weights.safetensors"))


def with_scale(text: str) -> tuple[Path, float]:
    """A LoRA as one writes it, `PATH` or `PATH:SCALE`, as (path, scale); UsageError for a scale that is no number."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return Path(text).expanduser(), 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"--lora {text}: there is no such file, and after the last colon comes a scale, for instance {path}:0.8"
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
    wanted = f"no local path '{name}', and"
    # A folder that is not there may look like a hub name: models/FLUX.1-dev.
    known = "" if repo in HUB_SIZES else _where_to_get(repo)
    instead = known or "give the path of a local copy, or try again with a network"
    try:
        found = snapshot_download(
            repo, revision=revision or None, allow_patterns=_HUB_FILES.get(role), ignore_patterns=_HUB_IGNORE
        )
    except GatedRepoError as error:
        raise UserError(
            f"'{repo}' is gated{_size_of(repo)}: accept its license at https://huggingface.co/{repo}, then run "
            "`hf auth login`; or give the path of a local copy"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{wanted} the hub has no public model '{repo}'; {known or 'check the spelling'}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{wanted} the hub's '{repo}' has no revision '{revision}'") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{wanted} the hub cannot be reached and no copy of '{repo}'{_size_of(repo)} is in its cache; {instead}"
        ) from error
    except Exception as error:
        # A proxy in the way, a full disk, a broken stream: the hub client lets its HTTP library's own errors through,
        # and has changed that library before.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise UserError(f"{wanted} it cannot be downloaded from the hub ({describe(error)}); {instead}") from error
    return Path(found)


def _size_of(repo: str) -> str:
    return f" ({HUB_SIZES[repo]:.1f} GB)" if repo in HUB_SIZES else ""


def note_licence(name: str, path: Path) -> str | None:
    """Logs FLUX.1-dev's licence note once a process when `path` looks like that base or something made from it."""
    if not _is_flux_dev(name, path):
        return None
    if FLUX_DEV_NOTE not in _noted:
        _noted.add(FLUX_DEV_NOTE)
        logging.getLogger("diptych").warning(FLUX_DEV_NOTE)
    return FLUX_DEV_NOTE


def licence_of(name: str, folder: Path | None) -> tuple[dict[str, str], str]:
    """A base's licence, which what is made from it inherits: card fields, and a sentence.

    `folder` is the model on this machine, if it is there: its README is read for the licence it states.
    """
    if name in BUILT_IN:
        return {"license": "apache-2.0"}, "Apache-2.0, as its base."
    if _is_flux_dev(name, folder or Path(name)):
        kind, licence, link = FLUX_DEV
        return {"license": kind, "license_name": licence, "license_link": link}, FLUX_DEV_NOTE
    front = None
    if folder is not None:
        try:
            text = read_text(refuse_special(folder / "README.md"))
            front = parse_yaml(text.split("---")[1], "README.md") if text.startswith("---") else None
        except (ValueError, IndexError):
            front = None
    if isinstance(front, dict) and front.get("license"):
        fields = {key: front[key] for key in ("license", "license_name", "license_link") if key in front}
        return fields, f"As its base, {name}: {front.get('license_name') or front['license']}."
    return {"license": "other"}, f"As its base, {name}, which states none here: look it up before you publish."


def _is_flux_dev(name: str, path: Path) -> bool:
    if re.search(r"flux\.?1-dev", f"{name} {path}", re.IGNORECASE):
        return True
    for config in (path / "transformer" / "config.json", path / "config.json"):
        try:
            values = parse_json(refuse_special(config).read_text("utf8"))
        except (OSError, ValueError):
            continue
        # What sets dev apart from schnell (Apache-2.0) is the guidance embedding; 24 heads, from small test models.
        if values.get("guidance_embeds") and values.get("num_attention_heads") == 24:
            return True
    return False


TRAINING = "training"
"""What a student's folder has beside the student: checkpoints, metrics, and what to go on training needs."""


HASHED_BYTES = 2 * 2**30  # larger models are named but not hashed: FLUX would take minutes before its first image


def fingerprint(path: str | Path, training: bool = False) -> str:
    """sha256 over the relative names, sizes and contents of a model's *.safetensors and *.json, in sorted order.

    A student's own `training/` is left out: the student is the same without it; `training` includes it, as older
    pictures have it. Cached per process until a file's size or modification time changes. A single file is its own
    list.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json") and p.is_file())
        if not training:
            found = [p for p in found if p.relative_to(path).parts[0] != TRAINING]
    else:
        found = [refuse_special(path)]
    stats = [p.stat() for p in found]
    key = tuple((str(p.absolute()), s.st_size, s.st_mtime_ns) for p, s in zip(found, stats, strict=True))
    if key not in _fingerprints:
        entries = []
        for p, s in zip(found, stats, strict=True):
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
    """A JSON file of a model without `_name_or_path`, where other libraries note the folder it was opened from; the
    same bytes if it has none."""
    try:
        value = parse_json(data)
    except ValueError:
        return data
    kept = _without(value)
    return data if kept == value else (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(one) for key, one in value.items() if key not in ("_name_or_path", "name_or_path")}
    return [_without(one) for one in value] if isinstance(value, list) else value


def files(folder: Path) -> dict[str, str]:
    """sha256 of every file of a student's folder by its name in it, `training/` left out."""
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if not name.startswith((f"{TRAINING}/", ".")):
            found[name] = sha256_file(path)
    return found


def weights(path: Path) -> frozenset[str]:
    """sha256 of each weights file of a model, wherever it lies and whatever it is called: two models that share one are
    the same model. The fingerprint where there is none."""
    inner = path.rglob("*") if path.is_dir() else [refuse_special(path)]
    files = sorted(p for p in inner if p.is_file() and (p == path or p.suffix in (".safetensors", ".bin")))
    return frozenset(map(sha256_file, files)) or frozenset({fingerprint(path)})


# Refuses configs that name more layers than their files have tensors, before anything is built of them. A config of a
# few lines may ask for ten million layers, and building those fills the memory, on the meta device too. Only the
# heads of weight files are read.

MOST = 1000  # layers that are built without comparing with the weights; no model has more
LONGEST_HEAD = 100 * 2**20  # bytes, as safetensors itself has it
_COUNTS = frozenset({"depth", "depths", "num_blocks", "n_blocks"})


def check_folder(folder: Path) -> None:
    """UserError if a config in a model's folder, or in those below it, names more layers than there are tensors."""
    for path in (folder / "config.json", *sorted(folder.glob("*/config.json"))):
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            continue
        _check_file(path, stamp)


def check(config: Any, where: str, tensors: int = 0) -> None:
    """UserError for a config that names more layers than `tensors` and than any model has."""
    for key, value in _counts(config):
        if value > max(tensors, MOST):
            has = f"and the weights beside it have {tensors} tensors" if tensors else "which no model has"
            raise UserError(f"{where}: {key} is {value}, {has}; the config is damaged, fetch it again")


@lru_cache(maxsize=64)
def _check_file(path: Path, stamp: int) -> None:
    refuse_special(path)
    try:
        config = parse_json(path.read_text("utf8"))
    except (OSError, ValueError):
        return  # whoever opens it says what is wrong
    if any(value > MOST for _, value in _counts(config)):
        check(config, str(path), _tensors(path.parent))


def _counts(config: Any) -> Iterator[tuple[str, int]]:
    """Numbers of layers, in the config and in those inside it."""
    todo = [config]
    while todo:
        one = todo.pop()
        for key, value in one.items() if isinstance(one, Mapping) else ():
            if isinstance(value, Mapping):
                todo.append(value)
            elif "layer" in str(key) or key in _COUNTS:
                numbers = value if isinstance(value, list | tuple) else [value]
                yield from ((str(key), n) for n in numbers if isinstance(n, int) and not isinstance(n, bool))


def _tensors(folder: Path) -> int:
    """How many tensors a folder's weights have, by their heads."""
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
