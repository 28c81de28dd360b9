"""Authentication: bearer tokens for programs, a cookie for browsers, and signed addresses of images.

Tokens come from a file or from DIPTYCH_SERVE_TOKENS, never from the command line, where every user of the machine can
read them. They are compared in constant time and never appear in a log, response or error.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.errors import UsageError, UserError
from diptych.serve.limits import RateLimit
from diptych.utils.documents import read_text

if TYPE_CHECKING:
    from diptych.serve.job_store import JobStore

VARIABLE = "DIPTYCH_SERVE_TOKENS"
MIN_LENGTH = 16  # characters of a token
LOCAL = "local"  # the owner of everything on a server without tokens
COOKIE = "diptych_session"
SESSION_SECONDS = 12 * 3600
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger("diptych.serve")


def read(file: str | None) -> dict[str, str]:
    """Returns `{name: token}` from a token file and the environment.

    A line has one token, with an optional name before it; `#` starts a comment. The variable may also use commas.
    UsageError names a wrong line but never quotes it.
    """
    sources: list[tuple[str, str]] = []
    if file is not None:
        path = Path(file)
        try:
            sources.append((file, read_text(path)))
            if os.name == "posix" and path.stat().st_mode & 0o077:
                log.warning("Other users of this machine can read %s. Run: chmod 600 %s", file, file)
        except UserError as error:
            raise UsageError(error.code, f"--token-file {error}") from None
    if os.environ.get(VARIABLE):
        sources.append((VARIABLE, os.environ[VARIABLE].replace(",", "\n")))
    tokens: dict[str, str] = {}
    for source, text in sources:
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            name = words[0] if len(words) == 2 else f"key{len(tokens) + 1}"
            if len(words) > 2 or not _NAME.fullmatch(name):
                wrong = "write a token, or a name (letters, digits, . _ -) and a token"
            elif len(words[-1]) < MIN_LENGTH or not words[-1].isascii():
                wrong = f"a token needs at least {MIN_LENGTH} ASCII characters; make one with `openssl rand -hex 24`"
            elif name in tokens or words[-1] in tokens.values():
                wrong = "this name or token is there twice"
            else:
                tokens[name] = words[-1]
                continue
            raise UsageError("server_config_invalid", f"{source}, line {number}: {wrong}")
    if file is not None and not tokens:
        raise UsageError("server_config_invalid", f"--token-file {file}: no tokens. Write one per line.")
    return tokens


class Authenticator:
    """Finds the owner of a request. Without tokens every request is from `LOCAL`.

    `guesses` limits the wrong tokens per minute from one address. `sessions` stores logged-out cookies.
    """

    def __init__(self, tokens: Mapping[str, str], guesses: float = 0, sessions: JobStore | None = None) -> None:
        self._digests = {name: _digest(token) for name, token in tokens.items()}
        self._guesses = RateLimit(guesses)
        self._sessions = sessions
        self._revoked = set(sessions.revoked()) if sessions is not None else set()

    @property
    def open(self) -> bool:
        """Whether requests need no token."""
        return not self._digests

    def owner(self, token: str) -> str | None:
        """Returns the name of a token, in equal time for right and wrong ones."""
        given, owner = _digest(token), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                owner = name
        return owner

    def guessed(self, address: str) -> float:
        """Counts a wrong token. Returns 0, or the seconds until this address may try another one.

        Only wrong tokens count, so nobody can lock out others who share the address.
        """
        return self._guesses.take(_network(address))

    def session(self, owner: str) -> str:
        """Returns a session cookie: name, expiry, and a signature keyed by the token."""
        until, nonce = int(time.time()) + SESSION_SECONDS, secrets.token_hex(8)
        return f"{owner}:{until}:{nonce}.{self._sign(owner, until, nonce)}"

    def of_session(self, cookie: str) -> str | None:
        """Returns the owner of a cookie; None if it is forged, expired or logged out, or its token was removed."""
        owner, _, rest = cookie.partition(":")
        until, _, signature = rest.partition(":")
        nonce, _, signed = signature.partition(".")
        if not re.fullmatch(r"[0-9]{1,12}", until) or int(until) < time.time() or cookie in self._revoked:
            return None
        wanted = self._sign(owner, int(until), nonce) if owner in self._digests else ""
        return owner if wanted and hmac.compare_digest(wanted.encode(), signed.encode("utf8", "replace")) else None

    def revoke(self, cookie: str) -> None:
        """Ends a session, including copies of its cookie."""
        if self.of_session(cookie) is not None:
            self._revoked.add(cookie)
            if self._sessions is not None:
                self._sessions.revoke(cookie, float(cookie.split(":")[1]))

    def _sign(self, owner: str, until: int, nonce: str) -> str:
        text = f"session\0{owner}\0{until}\0{nonce}"
        return hmac.new(self._digests[owner], text.encode("utf8", "replace"), hashlib.sha256).hexdigest()


def _network(address: str) -> str:
    """The addresses that one client controls: a single IPv4 address, or a /64 network of IPv6."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


class AddressSigner:
    """Signs addresses that a browser may open without a header for `seconds`."""

    def __init__(self, secret: bytes, seconds: int = 3600) -> None:
        self.secret, self.seconds = secret, seconds

    def sign(self, name: str) -> str:
        """Returns the query string that grants access to `name`."""
        until = int(time.time()) + self.seconds
        return f"until={until}&signature={self._of(name, until)}"

    def fits(self, name: str, until: int, signature: str) -> bool:
        """Whether a query grants access to `name` now."""
        return until >= time.time() and hmac.compare_digest(self._of(name, until).encode(), signature.encode())

    def _of(self, name: str, until: int) -> str:
        return hmac.new(self.secret, f"{name}\0{until}".encode(), hashlib.sha256).hexdigest()


def _digest(token: str) -> bytes:
    return hashlib.sha256(b"diptych token\0" + token.encode("utf8", "surrogateescape")).digest()
