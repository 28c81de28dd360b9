"""What is published of a student or a data set, checked before a byte of it leaves this machine.

    push("runs/first", "OWNER/first")              # the run's student, to the hub
    push("runs/first/pairs", "hf://datasets/OWNER/first-pairs", private=True)
    push("runs/first/student", "./for-a-friend")   # a plain folder

What is sent, and what must hold of it, is in `publishable`. A push that finds everything there already writes nothing;
one that was interrupted sends what is missing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diptych.data.store import write_atomic
from diptych.errors import UsageError, UserError
from diptych.provenance.publishable import Material, material, ordered, stale
from diptych.utils.paths import inside

HUB_NAME = re.compile(r"(?:hf://(?P<kind>datasets/)?)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")


def push(
    source: str | Path,
    target: str,
    *,
    private: bool = False,
    licence: str = "",
    dry_run: bool = False,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Publishes `source` at `target` and returns what was sent: `files` (name to bytes), `sent`, `where`.

    `licence` is an identifier of the hub's for a card that knows none. `dry_run` checks all that can be checked here
    and asks no network. Raises UsageError for what is neither a student nor a data set and for a target that can mean
    two things, UserError where a file is not as it was made, no licence is known, or the target does not take it.
    """
    made = material(source, licence)
    repo = _repo(target, made.kind)
    if repo is None and private:
        raise UsageError(f"--private is for the hub; {target} is a folder of this machine")
    files = {name: made.size(name) for name in sorted(made.files)}
    told = {"source": str(source), "where": target, "kind": made.kind, "files": files, "bytes": sum(files.values())}
    if dry_run:
        return told | {"dry_run": True, "sent": []}
    if repo is not None:
        from diptych.provenance import push_hub

        where, sent = push_hub.upload(made, repo, private, report)
    else:
        where, sent = str(Path(target).expanduser()), _copy(made, Path(target).expanduser(), report)
    return told | {"dry_run": False, "where": where, "sent": sent}


def lines(told: dict[str, Any]) -> list[str]:
    """What a push did, or would do, for people."""
    files, sent = told["files"], told["sent"]
    total = f"{len(files)} files, {told['bytes']:,} bytes"
    if told["dry_run"]:
        return [*(f"{size:>15,}  {name}" for name, size in files.items()), f"{total} would go to {told['where']}"]
    if not sent:
        return [f"{told['where']} has all of it already ({total})"]
    some = f"{len(sent)} of {total}" if len(sent) < len(files) else total
    return [f"{some} are at {told['where']}"]


# Where it goes -------------------------------------------------------------------------------------------------------


def _repo(target: str, kind: str) -> str | None:
    """owner/name on the hub, or None for a folder of this machine."""
    match = HUB_NAME.fullmatch(target)
    if match is None:
        if "://" in target or not target.strip():
            raise UsageError(f"target '{target}': give OWNER/NAME, hf://datasets/OWNER/NAME, or a folder (./NAME)")
        return None
    if not target.startswith("hf://") and Path(target).exists():
        raise UsageError(f"'{target}' is a folder here and may be a repository too; say ./{target} or hf://{target}")
    if match["kind"] and kind == "model":
        raise UsageError(f"{target} is a repository of data, and this is a student; say {match['repo']}")
    return match["repo"]


def _copy(made: Material, out: Path, report: Callable[[str], None] | None) -> list[str]:
    """Writes what is not there yet, the card last; each file appears whole."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder")
    try:
        stale([p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()], made)
        sent = []
        for name in ordered(made.files):
            held, place = made.files[name], inside(out, name)
            if place.is_file() and place.stat().st_size == made.size(name) and _sha(place) == _sha(held):
                continue
            if report:
                report(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(held, bytes):
                write_atomic(place, held)
            else:
                temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
                try:
                    temporary.unlink(missing_ok=True)  # a link of that name would be followed
                    shutil.copyfile(held, temporary)
                    os.replace(temporary, place)
                finally:
                    temporary.unlink(missing_ok=True)
            sent.append(name)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    return sent


def _sha(held: Path | bytes) -> str:
    if isinstance(held, bytes):
        return hashlib.sha256(held).hexdigest()
    with held.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
