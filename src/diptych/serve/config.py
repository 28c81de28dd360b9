"""What a server is told at its start, and the limits that hold for everybody who asks."""

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
    """What one request, one key and the whole queue may ask for."""

    upload_bytes: int = 20 * MIB  # of a whole request
    upload_pixels: int = 25_000_000  # of a reference, before it is decoded
    pictures: int = 10  # of one request, as OpenAI has it
    prompt_letters: int = 4000
    steps: int = 100
    enlarged: int = 4  # a picture's pixels, as a multiple of those of the model's own size
    queue: int = 256  # pictures of one key that may wait
    kept_bytes: int = 2048 * MIB  # of references and results of one key; 0: no limit
    requests: int = 250  # of one key at a time, and of all who have shown none
    local_requests: int = 1000  # at a time, where no keys are asked for
    connections: int = 1000  # at a time; beyond it, the one that has been silent longest is closed
    rate: float = 0.0  # jobs and uploads a minute and key; 0: no limit
    head_seconds: float = 15.0  # to send a request's head
    body_seconds: float = 30.0  # to send a request's body
    wait_seconds: float = 600.0  # that a request may wait for its pictures
    guesses: int = 20  # wrong tokens a minute and address


@dataclass(frozen=True)
class ServerSettings:
    """A server. `loading` holds arguments of `Student.load` beside the device; `tokens` maps names to tokens."""

    folder: Path  # where `jobs.sqlite` is; nothing else is written
    loading: dict[str, Any] = field(default_factory=lambda: {"model": "pocket"})
    devices: tuple[str | None, ...] = (None,)
    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()  # other host names that the server is reached by
    proxies: tuple[str, ...] = ()  # addresses and networks whose X-Forwarded-For is believed
    tokens: dict[str, str] = field(default_factory=dict, repr=False)
    runs: Path | None = None  # folder of runs for the web app; None: no Data and Runs tabs
    batch: int = 8  # pictures drawn together
    keep_hours: float = 24.0  # that finished jobs and references are kept
    grace_seconds: float = 30.0  # for the batch in hand, when the server is told to stop
    watermark: str | None = field(default=None, repr=False)  # the key of the invisible mark; None: no mark
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.tokens:
            raise UsageError(
                f"--host {self.host} lets other machines in, and nobody is asked who they are: give --token-file FILE "
                "(one token a line), or leave --host out"
            )
        object.__setattr__(self, "proxies", tuple(_network(given) for given in self.proxies))
        if self.batch < 1:
            raise UsageError(f"a batch is at least 1 picture, not {self.batch}")

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that requests may be addressed to; None where tokens are asked for anyway and no name was given."""
        if self.host in LOOPBACK or self.names:
            return frozenset((*LOOPBACK, "[::1]", self.host, *self.names))
        return None


def _network(given: str) -> str:
    """An address, or a network as ADDRESS/BITS. UsageError for anything else: a name could be pointed elsewhere."""
    try:
        network = ipaddress.ip_network(given, strict=False)
    except ValueError:
        said = "the address of a proxy, such as 10.0.0.5, or a network, such as 10.0.0.0/8"
        raise UsageError(f"--trusted-proxy {given!r}: must be {said}") from None
    return str(network.network_address if network.num_addresses == 1 else network)
