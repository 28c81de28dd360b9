"""Uploads to a repository of the Hugging Face Hub, or of whatever server `HF_ENDPOINT` names.

The token is the one of `hf auth login` or of `HF_TOKEN`; it is never printed. What the repository has already, by the
hashes that it lists, is not sent again; a large file that arrived before an interruption is not either.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UserError
from diptych.provenance.publishable import Material, ordered, stale

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

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
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.replace(token, "…")[:160]
