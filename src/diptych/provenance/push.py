"""Publishes a student or a dataset, which is checked before anything leaves this machine.

    push("runs/first", "OWNER/first")              # the run's student, to the hub
    push("runs/first/pairs", "hf://datasets/OWNER/first-pairs", private=True)
    push("runs/first/student", "./for-a-friend")   # a plain folder

`publishable` selects and checks the files. A push sends only what the target lacks, so an interrupted one can be
repeated.
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
from diptych.provenance.publishable import Publication, check_target, material, ordered
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
    license: str = "",
    dry_run: bool = False,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Publishes `source` at `target`.

    Args:
        `license`: license id of the hub, for a card without a license.
        dry_run: check everything on this machine, without the network.

    Returns:
        `files` (name -> bytes), `sent` (names), `where`, and more.

    Raises:
        UsageError: `source` is neither a student nor a dataset, or `target` is ambiguous.
        UserError: a file changed since it was made, the license is unknown, or the target rejects the files.
    """
    made = material(source, license)
    repo = _repo(target, made.kind)
    if repo is None and private:
        raise UsageError(
            "option_unsuited", f"--private applies to the hub, and {target} is a local folder. Leave it out."
        )
    files = {name: made.size(name) for name in sorted(made.files)}
    result = {"source": str(source), "where": target, "kind": made.kind, "files": files, "bytes": sum(files.values())}
    if dry_run:
        return result | {"dry_run": True, "sent": []}
    if repo is not None:
        where, sent = upload(made, repo, private, report)
    else:
        where, sent = str(Path(target).expanduser()), _copy(made, Path(target).expanduser(), report)
    return result | {"dry_run": False, "where": where, "sent": sent}


def format_push(result: dict[str, Any]) -> list[str]:
    """The result of a push as text."""
    files, sent = result["files"], result["sent"]
    total = f"{len(files)} files, {result['bytes']:,} bytes"
    if result["dry_run"]:
        return [*(f"{size:>15,}  {name}" for name, size in files.items()), f"{total} would go to {result['where']}"]
    if not sent:
        return [f"{result['where']} already has everything ({total})"]
    some = f"{len(sent)} of {total}" if len(sent) < len(files) else total
    return [f"{some} sent to {result['where']}"]


def _repo(target: str, kind: str) -> str | None:
    """owner/name on the hub, or None for a local folder."""
    match = HUB_NAME.fullmatch(target)
    if match is None:
        if "://" in target or not target.strip():
            message = f"Target '{target}' is not OWNER/NAME, hf://datasets/OWNER/NAME, or a folder (./NAME)."
            raise UsageError("option_invalid", message)
        return None
    if not target.startswith("hf://") and Path(target).exists():
        message = f"'{target}' is a folder here and may also be a repository. Pass ./{target} or hf://{target}."
        raise UsageError("option_conflict", message)
    if match["kind"] and kind == "model":
        message = f"{target} is a dataset repository, but the source is a student. Pass {match['repo']}."
        raise UsageError("option_conflict", message)
    return match["repo"]


def _copy(made: Publication, out: Path, report: Callable[[str], None] | None) -> list[str]:
    """Writes the missing files atomically, the card last, and returns their names."""
    if out.exists() and not out.is_dir():
        raise UsageError("path_wrong_kind", f"{out} is a file. Pass a folder.")
    try:
        check_target([p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()], made)
        sent = []
        for name in ordered(made.files):
            file, target = made.files[name], inside(out, name)
            if target.is_file() and target.stat().st_size == made.size(name) and _sha(target) == _sha(file):
                continue
            if report:
                report(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, bytes):
                write_atomic(target, file)
            else:
                with publish(target) as partial:
                    shutil.copyfile(file, partial)
            sent.append(name)
    except OSError as error:
        raise UserError("path_unwritable", f"Cannot write to {out}: {error.strerror or error}.") from error
    return sent


def _sha(file: Path | bytes) -> str:
    return sha256(file) if isinstance(file, bytes) else sha256_file(file)


# Uploads go to the Hugging Face Hub, or to the server that `HF_ENDPOINT` names. The token is never printed. Files that
# the repository already has, by hash, are not sent again.

COMMIT = 100  # files; the hub is slow with commits of thousands of files


def upload(made: Publication, repo: str, private: bool, report: Callable[[str], None] | None) -> tuple[str, list[str]]:
    """Commits the files that the repository `owner/name` lacks; returns its address and the names of these files.

    A missing repository is created. UserError without a token, the right to write, or a network, and if `private` is
    set for a public repository.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi

    token = huggingface_hub.get_token()
    if not token:
        raise UserError(
            "model_gated", "No token for the hub. Run `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    if report is None or not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    api = HfApi(token=token, library_name="diptych")
    with _hub_errors(repo, token):
        where = str(api.create_repo(repo, repo_type=made.kind, private=private or None, exist_ok=True))
        if private and not api.repo_info(repo, repo_type=made.kind).private:
            message = f"{repo} exists and is public. Make it private on the hub first, or choose another name."
            raise UserError("publish_refused", message)
        present: dict[str, Any] = {
            each.path: each
            for each in api.list_repo_tree(repo, repo_type=made.kind, recursive=True)
            if hasattr(each, "blob_id")
        }
        check_target(list(present), made)
        new = [name for name in ordered(made.files) if not _same(made.files[name], present.get(name))]
        for start in range(0, len(new), COMMIT):
            names = new[start : start + COMMIT]
            if report:
                report(f"{start + len(names)} of {len(new)} files")
            batch = [(name, made.files[name]) for name in names]
            whole = start + COMMIT >= len(new)
            api.create_commit(
                repo,
                [CommitOperationAdd(name, data if isinstance(data, bytes) else str(data)) for name, data in batch],
                commit_message="Pushed by diptych" if whole else "Pushed by diptych, in part",
                repo_type=made.kind,
            )
    return where, new


def _same(file: Path | bytes, remote: RepoFile | None) -> bool:
    """Whether the repository's file is this one, by sha256 for large files and by git's hash for others."""
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if remote is None or remote.size != size:
        return False
    digest = hashlib.sha256() if remote.lfs else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    if isinstance(file, bytes):
        digest.update(file)
    else:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() == (remote.lfs.sha256 if remote.lfs else remote.blob_id)


@contextmanager
def _hub_errors(repo: str, token: str) -> Iterator[None]:
    """Turns errors of the hub and the network into a UserError without the token."""
    from huggingface_hub.errors import HfHubHTTPError

    again = "Run the same command again; files that arrived are not sent twice."
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        causes = {
            401: "The hub rejects this token. Run `hf auth login` again, or set HF_TOKEN to a token that may write.",
            403: f"This token may not write to {repo}. Check the owner and the rights of the token.",
            404: f"The hub has no owner or repository {repo} that this token can see. Check the spelling.",
        }
        code = "model_gated" if status in (401, 403) else "model_not_found" if status == 404 else "hub_unreachable"
        raise UserError(code, causes.get(status, f"The hub rejected {repo}: {_line(error, token)}. {again}")) from None
    except UserError:
        raise
    except Exception as error:
        # The hub client passes on errors of its HTTP library, which has changed before.
        known = isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))
        if not known:
            raise
        message = f"{repo}: the hub cannot be reached ({_line(error, token)}). {again}"
        raise UserError("hub_unreachable", message) from None


def _line(error: Exception, token: str) -> str:
    return describe(error, limit=None).replace(token, "…")[:160]
