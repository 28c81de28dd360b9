"""Overhead and throughput of the server: HTTP compared with the library's call, and batching under clients.

    python benchmarks/serve.py overhead [--rounds 30]          # a minute: the same image both ways in turn
    python benchmarks/serve.py throughput [--clients 8]        # minutes: servers at --batch 1 and --batch 8 in turn

Both use the packaged pocket model and servers in separate processes. serve_load.py and serve_fuzz.py have many clients,
kills and malformed requests.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import io
import itertools
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import measuring
import numpy as np
import torch
from PIL import Image
from serving import Server

from diptych import Student

CPU = torch.device("cpu")
ASKED: dict[str, Any] = {"prompt": "a cat on a beach", "steps": 8}
PER_CLIENT = 4  # requests in a round
BATCHES = (1, 8)


def overhead(rounds: int) -> dict[str, Any]:
    """Milliseconds that a request takes beyond the library's call for the same image; both end with its pixels.

    The server has its default settings, so it waits a moment for other requests to batch, though there are none.
    """
    student = Student.load("pocket", progress_bar=False)
    with ExitStack() as open_:
        server = open_.enter_context(Server(Path(open_.enter_context(tempfile.TemporaryDirectory())), "--no-app"))
        client = open_.enter_context(httpx.Client(base_url=server.url, timeout=120))

        def library(number: int) -> torch.Tensor:
            image = student.generate(None, ASKED["prompt"], seed=max(0, number), steps=ASKED["steps"])
            return torch.from_numpy(np.array(image))

        def http(number: int) -> torch.Tensor:
            answer = client.post("/v1/images/generations", json={**ASKED, "seed": max(0, number)})
            data = base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])
            return torch.from_numpy(np.array(Image.open(io.BytesIO(data))))

        def look() -> None:
            text = client.get("/metrics").text
            drawn.append(float(text.partition("\ndiptych_draw_seconds_sum ")[2].partition("\n")[0]))

        drawn: list[float] = []  # seconds of generation of the server, before each request and after the last
        http.prepare = look  # pyright: ignore[reportFunctionMemberAccess]
        seconds, pixels, _ = measuring.alternate({"library": library, "http": http}, rounds, CPU)
        look()
    apart = sorted(over - alone for over, alone in zip(seconds["http"], seconds["library"], strict=True))
    far = min((rounds - 1) // 2, int(0.98 * rounds**0.5) + 1)  # the median's 95 % interval, by order
    drawing = [after - before for before, after in itertools.pairwise(drawn[1:])]  # the first is the warm-up's
    beside = [whole - part for whole, part in zip(seconds["http"], drawing, strict=True)]
    return {
        "asked": ASKED,
        "side": len(pixels["http"]),
        "library": measuring.summary(seconds["library"]),
        "http": measuring.summary(seconds["http"]),
        "overhead_ms": round(1000 * statistics.median(apart), 1),  # of the differences within a round
        "overhead_ms_95": [round(1000 * apart[at], 1) for at in (rounds // 2 - far, (rounds - 1) // 2 + far)],
        "beside_drawing_ms": round(1000 * statistics.median(beside), 1),  # of a request, by the server's own clock
        "same_pixels": bool(torch.equal(pixels["library"], pixels["http"])),
    }


def throughput(clients: int, rounds: int) -> dict[str, Any]:
    """Images a second for N clients at once, generated one by one and in batches."""
    with ExitStack() as open_:
        folder = Path(open_.enter_context(tempfile.TemporaryDirectory()))
        pool = open_.enter_context(concurrent.futures.ThreadPoolExecutor(clients))
        servers = {
            batch: open_.enter_context(Server(folder / f"{batch}", "--no-app", "--batch", str(batch)))
            for batch in BATCHES
        }

        def asking(server: Server) -> Callable[[int], torch.Tensor]:
            def ask(first: int) -> None:
                with httpx.Client(base_url=server.url, timeout=600) as client:
                    for seed in range(first, first + PER_CLIENT):
                        client.post("/v1/images/generations", json={**ASKED, "seed": seed}).raise_for_status()

            def all_of_them(number: int) -> torch.Tensor:
                starts = [PER_CLIENT * (clients * max(0, number) + client) for client in range(clients)]
                return torch.tensor(len(list(pool.map(ask, starts))))

            return all_of_them

        seconds, _, _ = measuring.alternate({str(batch): asking(servers[batch]) for batch in BATCHES}, rounds, CPU)
    pictures = clients * PER_CLIENT
    rates = {f"batch_{batch}": round(pictures / statistics.median(seconds[str(batch)]), 2) for batch in BATCHES}
    gains = [one / together for one, together in zip(seconds["1"], seconds["8"], strict=True)]
    return {
        "asked": ASKED,
        "clients": clients,
        "pictures_a_round": pictures,
        "rounds": rounds,
        "pictures_per_second": rates,
        "gain": round(statistics.median(gains), 2),  # of a round's two times
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "throughput"])
    parser.add_argument("--rounds", type=int, help="Of each way in turn [default: 30, throughput 5].")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "overhead":
        result = overhead(arguments.rounds or 30)
    else:
        result = throughput(arguments.clients, arguments.rounds or 5)
    print(measuring.write(f"serve-{arguments.what}", {"about": measuring.about(CPU), **result}, arguments.out))
    print(result)


if __name__ == "__main__":
    main()
