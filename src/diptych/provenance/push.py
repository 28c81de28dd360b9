"""What is published of a student or a data set, checked before a byte of it leaves this machine.

    push("runs/first", "OWNER/first")              # the run's student, to the hub
    push("runs/first/pairs", "hf://datasets/OWNER/first-pairs", private=True)
    push("runs/first/student", "./for-a-friend")   # a plain folder

What is sent, and what must hold of it, is in `publishable`. A push that finds everything there already writes nothing;
one that was interrupted sends what is missing.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, UserError, describe
from diptych.provenance.publishable import Material, material, ordered, stale
from diptych.utils.io import publish, sha256, sha256_file, write_atomic
from diptych.utils.paths import inside

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

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
        pass

        where, sent = upload(made, repo, private, report)
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
                with publish(place) as partial:
                    shutil.copyfile(held, partial)
            sent.append(name)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    return sent


def _sha(held: Path | bytes) -> str:
    if isinstance(held, bytes):
        return sha256(held)
    return sha256_file(held)


# Uploads to a repository of the Hugging Face Hub, or of whatever server `HF_ENDPOINT` names. The token is the one of
# `hf auth login` or of `HF_TOKEN`; it is never printed. What the repository has already, by the hashes that it lists,
# is not sent again; a large file that arrived before an interruption is not either.

COMMIT = 100  # files; the hub grows slow with commits of thousands


def upload(made: Material, repo: str, private: bool, report: Callable[[str], None] | None) -> tuple[str, list[str]]:
    """Commits what the repository `owner/name` does not have; returns its address and the names of what was sent.

    The repository is made if it is not there. UserError without a token, without the right to write, or a network, and
    where `private` is asked of a repository that everybody can read.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi

    token = huggingface_hub.get_token()
    if not token:
        raise UserError("no token for the hub; `hf auth login`, or set HF_TOKEN to one that may write")
    if report is None or not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    api = HfApi(token=token, library_name="diptych")
    with _told(repo, token):
        where = str(api.create_repo(repo, repo_type=made.kind, private=private or None, exist_ok=True))
        if private and not api.repo_info(repo, repo_type=made.kind).private:
            raise UserError(f"{repo} is there and public; make it private on the hub first, or choose another name")
        there: dict[str, Any] = {
            each.path: each
            for each in api.list_repo_tree(repo, repo_type=made.kind, recursive=True)
            if hasattr(each, "blob_id")
        }
        stale(list(there), made)
        new = [name for name in ordered(made.files) if not _same(made.files[name], there.get(name))]
        for start in range(0, len(new), COMMIT):
            names = new[start : start + COMMIT]
            if report:
                report(f"{start + len(names)} of {len(new)} files")
            held = [(name, made.files[name]) for name in names]
            whole = start + COMMIT >= len(new)
            api.create_commit(
                repo,
                [CommitOperationAdd(name, data if isinstance(data, bytes) else str(data)) for name, data in held],
                commit_message="Pushed by diptych" if whole else "Pushed by diptych, in part",
                repo_type=made.kind,
            )
    return where, new


def _same(held: Path | bytes, there: RepoFile | None) -> bool:
    """Whether the repository's file is this one: by sha256 where it keeps it apart, else by git's own hash."""
    size = len(held) if isinstance(held, bytes) else held.stat().st_size
    if there is None or there.size != size:
        return False
    digest = hashlib.sha256() if there.lfs else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    if isinstance(held, bytes):
        digest.update(held)
    else:
        with held.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() == (there.lfs.sha256 if there.lfs else there.blob_id)


@contextmanager
def _told(repo: str, token: str) -> Iterator[None]:
    """The hub's refusals and the network's failures as one line, the token left out of it."""
    from huggingface_hub.errors import HfHubHTTPError

    again = "run the same command again: what arrived is not sent twice"
    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        said = {
            401: "the hub does not take this token; `hf auth login` again, or set HF_TOKEN to one that may write",
            403: f"this token may not write to {repo}; is the owner right, and may the token write there?",
            404: f"the hub has no owner or repository {repo} that this token sees; check the spelling",
        }
        raise UserError(said.get(code) or f"the hub refused {repo}: {_line(error, token)}; {again}") from None
    except UserError:
        raise
    except Exception as error:
        # The hub client lets its HTTP library's errors through, and has changed that library before.
        known = isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))
        if not known:
            raise
        raise UserError(f"{repo}: the hub cannot be reached ({_line(error, token)}); {again}") from None


def _line(error: Exception, token: str) -> str:
    return describe(error, limit=None).replace(token, "…")[:160]
