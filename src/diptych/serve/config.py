"""Settings of a server, and the limits that apply to every request."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.errors import UsageError

MIB = 2**20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Limits of one request, of one key, and of the queue."""

    upload_bytes: int = 20 * MIB  # size of a whole request
    upload_pixels: int = 25_000_000  # pixels of a reference, checked before it is decoded
    pictures: int = 10  # images per request, as in OpenAI's API
    prompt_letters: int = 4000
    steps: int = 100
    enlarged: int = 4  # pixels of an image, as a multiple of the pixels at the model's size
    queue: int = 256  # queued images per key
    kept_bytes: int = 2048 * MIB  # stored references and results per key; 0: no limit
    requests: int = 250  # simultaneous requests per key, and of all clients without a token
    local_requests: int = 1000  # simultaneous requests on a server without tokens
    connections: int = 1000  # open connections; beyond it, the one that was idle longest is closed
    rate: float = 0.0  # jobs and uploads per minute and key; 0: no limit
    head_seconds: float = 15.0  # time to send a request's head
    body_seconds: float = 30.0  # time to send a request's body
    wait_seconds: float = 600.0  # time that a request waits for its images
    guesses: int = 20  # wrong tokens per minute and address


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server. `loading` holds the arguments of `Student.load` except the device; `tokens` maps names to
    tokens. UsageError for settings that are unsafe or impossible."""

    folder: Path  # holds `jobs.sqlite`, the only file that is written
    loading: dict[str, Any] = field(default_factory=lambda: {"model": "pocket"})
    devices: tuple[str | None, ...] = (None,)
    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()  # further host names of the server
    proxies: tuple[str, ...] = ()  # addresses and networks whose X-Forwarded-For is trusted
    tokens: dict[str, str] = field(default_factory=dict, repr=False)
    runs: Path | None = None  # folder of runs for the web app; None: no Data and Runs tabs
    batch: int = 8  # images generated together
    keep_hours: float = 24.0  # hours to keep finished jobs and references
    grace_seconds: float = 30.0  # time for the running batch when the server stops
    watermark: str | None = field(default=None, repr=False)  # key of the invisible watermark; None: no watermark
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.tokens:
            raise UsageError(
                "server_config_invalid",
                f"--host {self.host} opens the server to other machines, which requires tokens. Pass --token-file FILE "
                "(one token per line), or leave --host out.",
            )
        object.__setattr__(self, "proxies", tuple(_network(given) for given in self.proxies))
        if self.batch < 1:
            raise UsageError("server_config_invalid", f"A batch needs at least 1 image, not {self.batch}.")

    @property
    def hosts(self) -> frozenset[str] | None:
        """Host names that requests may use; None for any, on a server with tokens and without `names`."""
        if self.host in LOOPBACK or self.names:
            return frozenset((*LOOPBACK, "[::1]", self.host, *self.names))
        return None


def _network(given: str) -> str:
    """An address, or a network as ADDRESS/BITS. UsageError for a host name, since its address could change."""
    try:
        network = ipaddress.ip_network(given, strict=False)
    except ValueError:
        raise UsageError(
            "server_config_invalid",
            f"--trusted-proxy {given!r}: must be an address, such as 10.0.0.5, or a network, such as 10.0.0.0/8",
        ) from None
    return str(network.network_address if network.num_addresses == 1 else network)
