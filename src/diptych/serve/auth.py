"""Who asks: bearer tokens for programs, a cookie for browsers, and the signatures of picture addresses.

Tokens come from a file or from DIPTYCH_SERVE_TOKENS, never from the command line, where every user of the machine can
read them. They are compared in constant time and appear in no log, answer or error.
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
from typing import Protocol

from diptych.errors import UsageError, UserError
from diptych.serve.limits import RateLimit
from diptych.utils.documents import read_text

VARIABLE = "DIPTYCH_SERVE_TOKENS"
SHORTEST = 16  # letters
LOCAL = "local"  # the owner of everything where no tokens are asked for
COOKIE = "diptych_session"
SESSION_SECONDS = 12 * 3600
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger("diptych.serve")


def read(file: str | None) -> dict[str, str]:
    """`{name: token}` of a token file and the environment: one token a line (in the variable also after a comma), with
    a name before it if you like; `#` begins a comment. UsageError says which line is wrong, and never what it says."""
    sources: list[tuple[str, str]] = []
    if file is not None:
        path = Path(file)
        try:
            sources.append((file, read_text(path)))
            if os.name == "posix" and path.stat().st_mode & 0o077:
                log.warning("other users of this machine can read %s; chmod 600 it", file)
        except UserError as error:
            raise UsageError(f"--token-file {error}") from None
    if os.environ.get(VARIABLE):
        sources.append((VARIABLE, os.environ[VARIABLE].replace(",", "\n")))
    found: dict[str, str] = {}
    for source, text in sources:
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            name = words[0] if len(words) == 2 else f"key{len(found) + 1}"
            where = f"{source}, line {number}"
            if len(words) > 2 or not _NAME.fullmatch(name):
                raise UsageError(f"{where}: a token, or a name (letters, digits, . _ -) and a token")
            if len(words[-1]) < SHORTEST or not words[-1].isascii():
                raise UsageError(f"{where}: a token has at least {SHORTEST} ASCII letters; `openssl rand -hex 24`")
            if name in found or words[-1] in found.values():
                raise UsageError(f"{where}: this name or token was there before")
            found[name] = words[-1]
    if file is not None and not found:
        raise UsageError(f"--token-file {file}: there is no token in it; one a line")
    return found


class Authenticator:
    """Who a request is from. Without tokens everybody is `LOCAL`. `guesses` is the number of wrong tokens a minute that
    one address may try; `sessions` keeps what was logged out of, over a restart."""

    def __init__(self, tokens: Mapping[str, str], guesses: float = 0, sessions: Sessions | None = None) -> None:
        self._digests = {name: _digest(token) for name, token in tokens.items()}
        self._guesses = RateLimit(guesses)
        self._sessions = sessions
        self._revoked = set(sessions.revoked()) if sessions is not None else set()

    @property
    def open(self) -> bool:
        """Whether no token is asked for."""
        return not self._digests

    def owner(self, token: str) -> str | None:
        """The name of a token. Takes equally long for all of them, right or wrong."""
        given, found = _digest(token), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found

    def guessed(self, address: str) -> float:
        """Counts a wrong token. 0, or the seconds until this address may try another. Only wrong tokens are counted
        and refused by it, so nobody can lock out others who share the address."""
        return self._guesses.take(_network(address))

    def session(self, owner: str) -> str:
        """A cookie for a browser that showed its token: name, end, signature by the token itself."""
        until, nonce = int(time.time()) + SESSION_SECONDS, secrets.token_hex(8)
        return f"{owner}:{until}:{nonce}.{self._sign(owner, until, nonce)}"

    def of_session(self, cookie: str) -> str | None:
        """Whose cookie this is; None if it is none of ours, too old, logged out of, or its token is no longer taken."""
        owner, _, rest = cookie.partition(":")
        until, _, signature = rest.partition(":")
        nonce, _, signed = signature.partition(".")
        if not re.fullmatch(r"[0-9]{1,12}", until) or int(until) < time.time() or cookie in self._revoked:
            return None
        wanted = self._sign(owner, int(until), nonce) if owner in self._digests else ""
        return owner if wanted and hmac.compare_digest(wanted.encode(), signed.encode("utf8", "replace")) else None

    def revoke(self, cookie: str) -> None:
        """Ends a session: its cookie is not taken any more, wherever it was copied to."""
        if self.of_session(cookie) is not None:
            self._revoked.add(cookie)
            if self._sessions is not None:
                self._sessions.revoke(cookie, float(cookie.split(":")[1]))

    def _sign(self, owner: str, until: int, nonce: str) -> str:
        text = f"session\0{owner}\0{until}\0{nonce}"
        return hmac.new(self._digests[owner], text.encode("utf8", "replace"), hashlib.sha256).hexdigest()


class Sessions(Protocol):
    """What keeps the cookies that were logged out of: the store."""

    def revoked(self) -> list[str]:
        """Those that have not ended by themselves."""
        ...

    def revoke(self, cookie: str, until: float) -> None:
        """Keeps another until its end."""
        ...


def _network(address: str) -> str:
    """What one client may have of addresses: one of IPv4, and 64 bits of IPv6."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return address


class AddressSigner:
    """Addresses that a browser may open without a header, for a while."""

    def __init__(self, secret: bytes, seconds: int = 3600) -> None:
        self.secret, self.seconds = secret, seconds

    def sign(self, name: str) -> str:
        """The query that opens `name`."""
        until = int(time.time()) + self.seconds
        return f"until={until}&signature={self._of(name, until)}"

    def fits(self, name: str, until: int, signature: str) -> bool:
        """Whether a query opens `name` now."""
        return until >= time.time() and hmac.compare_digest(self._of(name, until).encode(), signature.encode())

    def _of(self, name: str, until: int) -> str:
        return hmac.new(self.secret, f"{name}\0{until}".encode(), hashlib.sha256).hexdigest()


def _digest(token: str) -> bytes:
    return hashlib.sha256(b"diptych token\0" + token.encode("utf8", "surrogateescape")).digest()
