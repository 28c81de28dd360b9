"""The audit of a run: a sample of its pairs, for people to label in a browser or a spreadsheet.

    sample = draw("runs/first", 200, seed=0)    # `precision.report` evaluates the labels

The population is the pairs that reached the judge's decision, since a pair rejected as a copy or for its cut says
nothing about the judge. Half of the sample comes from the accepted and half from the rejected pairs. On each side the
quarter nearest to the threshold is sampled four times as densely as the farther half. The sizes of the strata are
known, so estimates are weighted back. Pairs are chosen by the hash of their id, so a larger sample includes the smaller
one, and shards do not matter.

The page is served to this machine only and shows one pair at a time. The labeler sees neither the judge's number nor
its verdict. Images are read from the run's parquet, only by the id of a sampled pair. A label is on the disk before the
page shows the next pair.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from diptych.data import records
from diptych.data.funnel import UNDECIDED, reached_judge
from diptych.data.labels import LABELS, Labels, write_sheet
from diptych.data.scan import batches, open_run, row
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.utils.documents import parse_json
from diptych.utils.io import make_folder, write_atomic

HOST = "127.0.0.1"
MAX_BODY = 10_000  # bytes of a request's body
POLICY = "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# Of each side: the quarter nearest to the threshold, the next quarter, the rest; and their shares of the sample.
BANDS = {"near": (0.0, 0.25, 0.5), "middle": (0.25, 0.5, 0.25), "far": (0.5, 1.0, 0.25)}
SMALL = ("id", "grid_id", "reference_panel", "target_panel", "similarity", "kept", "reason")


@dataclass(frozen=True)
class SampledPair:
    """A pair of the sample."""

    id: str
    subject: str
    shard: int
    number: int  # row in the shard
    stratum: int
    similarity: float
    above: int  # pairs of its stratum with at least this similarity


@dataclass(frozen=True)
class Band:
    """A stratum and the number of its pairs in the sample."""

    name: str
    kept: bool
    size: int
    low: float  # NaN without numbers
    high: float
    sampled: int


@dataclass(frozen=True)
class AuditSample:
    """The pairs to label, in the order of the page."""

    run: Path
    threshold: float
    question: str  # the task's question, for the labeler
    seed: int
    asked: int  # requested size
    left_out: int  # candidate rows that never reached the judge's decision
    bands: tuple[Band, ...]
    pairs: tuple[SampledPair, ...]

    @property
    def population(self) -> int:
        """Number of pairs that the sample represents. Both orders of two panels count once."""
        return sum(band.size for band in self.bands)

    def picture(self, id: str, side: str) -> bytes:
        """Returns the stored bytes of a sampled pair's `reference` or `target`. KeyError for any other id."""
        pair = {pair.id: pair for pair in self.pairs}[id]
        column = {"reference": "conditioning", "target": "image"}[side]
        return row(Dataset(self.run / "candidates"), pair.shard, pair.number, column)[column]["bytes"] or b""


def draw(run_dir: str | Path, size: int, seed: int) -> AuditSample:
    """Draws a stratified sample of at most `size` pairs. UsageError without a run, UserError without a judged pair.

    Reads small columns once, and holds about 40 bytes for each pair of the population.
    """
    folder, recipe, task = open_run(run_dir)
    threshold = task.thresholds(recipe.curate.thresholds).same
    candidates = Dataset(folder / "candidates")
    population = _population(candidates, seed)
    if not len(population.keys):
        raise UserError(
            "run_incomplete",
            f"{folder} has no pair with a judge's decision. Run: diptych curate {folder}/recipe.yaml --out {folder}",
        )
    members = _strata(population, threshold)
    counts = allocate(size, [len(rows) for _, _, rows in members], [_weight(name) for name, _, _ in members])
    bands, chosen = [], []
    for stratum, ((name, kept, rows), count) in enumerate(zip(members, counts, strict=True)):
        numbers = np.sort(population.similarity[rows])
        known = name != UNDECIDED
        low, high = (float(numbers[0]), float(numbers[-1])) if known else (np.nan, np.nan)
        bands.append(Band(name, kept, len(rows), low, high, count))
        for index in rows[np.argsort(population.keys[rows], kind="stable")[:count]]:
            similarity = float(population.similarity[index]) if known else np.nan
            above = len(numbers) - int(np.searchsorted(numbers, similarity)) if known else 0
            chosen.append((int(population.keys[index]), int(index), stratum, similarity, above))
    pairs = []
    for _, index, stratum, similarity, above in sorted(chosen):
        shard, number = int(population.shard[index]), int(population.number[index])
        names = row(candidates, shard, number, "id", "subject")
        pairs.append(SampledPair(names["id"], names["subject"], shard, number, stratum, similarity, above))
    question = task.curation.questions[-1]
    return AuditSample(folder, threshold, question, seed, size, population.left_out, tuple(bands), tuple(pairs))


@dataclass(frozen=True)
class _Population:
    """Arrays (N,) over the pairs that reached the judge."""

    similarity: np.ndarray
    kept: np.ndarray
    undecided: np.ndarray
    keys: np.ndarray  # pseudorandom, from the seed and the id
    shard: np.ndarray
    number: np.ndarray
    left_out: int


def _population(candidates: Dataset, seed: int) -> _Population:
    similarity, keys, shards, numbers = array("d"), array("q"), array("q"), array("q")
    kept, undecided = bytearray(), bytearray()
    left_out, grid, seen = 0, None, set()
    for shard, start, batch in batches(candidates, *SMALL):
        for offset, (id, of, a, b, number, keep, reason) in enumerate(zip(*batch.values(), strict=True)):
            if not reached_judge(reason):
                left_out += 1
                continue
            if of != grid:  # the rows of a grid stand together
                grid, seen = of, set()
            # Both orders of two panels count once, unless the judge decided on each order separately.
            decision = (min(a, b), max(a, b), str(number), keep)
            if decision in seen:
                continue
            seen.add(decision)
            unknown = number is None or number != number or reason.startswith(UNDECIDED)
            similarity.append(0.0 if number is None or unknown else number)
            undecided.append(unknown)
            kept.append(keep)
            keys.append(records.seed_of(seed, id, "audit"))
            shards.append(shard)
            numbers.append(start + offset)
    flags = [np.frombuffer(bytes(flag), dtype=bool) for flag in (kept, undecided)]
    places = np.array(keys), np.array(shards), np.array(numbers)
    return _Population(np.array(similarity), flags[0], flags[1], *places, left_out)


def _strata(population: _Population, threshold: float) -> list[tuple[str, bool, np.ndarray]]:
    """(name, verdict, indices of its pairs) of each stratum that is not empty."""
    strata = []
    for kept in (True, False):
        side = np.flatnonzero((population.kept == kept) & ~population.undecided)
        distance = np.abs(population.similarity[side] - threshold)
        bounds = {share: float(np.quantile(distance, share)) for share in (0.25, 0.5)} if len(side) else {}
        for name, (start, end, _) in BANDS.items():
            inside = (distance > bounds.get(start, -1.0)) & (distance <= bounds.get(end, np.inf))
            strata.append((name, kept, side[inside]))
    strata.append((UNDECIDED, False, np.flatnonzero(population.undecided)))
    return [(name, kept, rows) for name, kept, rows in strata if len(rows)]


def _weight(name: str) -> float:
    return BANDS[name][2] if name in BANDS else 0.25


def allocate(size: int, sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Returns the number of pairs to draw from each stratum: in proportion to `weights`, at most its size.

    A larger `size` never lowers any of them.
    """
    counts = [0] * len(sizes)
    for _ in range(min(size, sum(sizes))):
        open_ = [i for i, count in enumerate(counts) if count < sizes[i]]
        counts[max(open_, key=lambda i: (weights[i] / (counts[i] + 0.5), -i))] += 1
    return counts


class AuditServer(ThreadingHTTPServer):
    """Serves one sample to one labeler until Finish is pressed."""

    daemon_threads = True

    def __init__(
        self, sample: AuditSample, labels: Labels, labeller: str, earlier: dict[str, str], port: int = 0
    ) -> None:
        """`earlier` holds the labeler's labels so far, by id. Raises UserError if the port is taken."""
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            reason = error.strerror or error
            raise UserError("port_unavailable", f"Port {port}: {reason}. Choose another --port.") from error
        self.sample, self.labels, self.labeller = sample, labels, labeller
        self.answers = {pair.id: earlier[pair.id] for pair in sample.pairs if pair.id in earlier}
        self.ids = {pair.id for pair in sample.pairs}
        self.lock = threading.Lock()
        # The page fetches the images of the next pair ahead, so they are read once.
        self.picture = lru_cache(maxsize=16)(sample.picture)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def state(self) -> dict[str, Any]:
        """Returns the initial state of the page: pairs in order, labels so far."""
        with self.lock:
            pairs = [{"id": pair.id, "subject": pair.subject} for pair in self.sample.pairs]
            question = self.sample.question
            return {"pairs": pairs, "answers": self.answers, "question": question, "labeller": self.labeller}

    def put(self, id: str, label: str) -> int:
        """Stores a label and returns the number of labeled pairs."""
        with self.lock:
            self.labels.add(id, label, self.labeller)
            self.answers[id] = label
            return len(self.answers)


def serve(server: AuditServer) -> None:
    """Serves until Finish or Ctrl-C. Either way, every label is on the disk already."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def media_type(data: bytes) -> str:
    """Returns the media type of a stored image, from its first bytes."""
    if data.startswith(b"\x89PNG"):
        return "image/png"
    if data.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return "application/octet-stream"


class _Handler(BaseHTTPRequestHandler):
    server: AuditServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        parts = [unquote(part) for part in self.path.partition("?")[0].split("/")[1:]]
        if parts == [""]:
            self._answer(Path(__file__).with_name("audit.html").read_bytes(), "text/html; charset=utf-8")
        elif parts == ["state"]:
            self._json(self.server.state())
        elif len(parts) == 3 and parts[0] == "picture" and parts[2] in ("reference", "target"):
            self._picture(parts[1], parts[2])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "Page not found.")

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        # A form of another site cannot send this type without a preflight request, which gets no answer here.
        if self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must be application/json.")
        elif self.path == "/label":
            self._label()
        elif self.path == "/finish":
            self._json({"done": len(self.server.answers)})
            threading.Thread(target=self.server.shutdown).start()
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "Page not found.")

    def _picture(self, id: str, side: str) -> None:
        try:
            data = self.server.picture(id, side)
        except (KeyError, UserError):
            data = b""
        if data:
            self._answer(data, media_type(data))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "The sample has no such image.")

    def _label(self) -> None:
        try:
            size = int(self.headers.get("Content-Length", ""))
            given = parse_json(self.rfile.read(size)) if 0 < size <= MAX_BODY else None
        except ValueError:
            given = None
        id, label = (given.get("id"), given.get("label")) if isinstance(given, dict) else (None, None)
        if not isinstance(id, str) or id not in self.server.ids or label not in LABELS:
            self._refuse(
                HTTPStatus.BAD_REQUEST, f"Send {{id, label}}: an id of the sample, and one of {', '.join(LABELS)}."
            )
            return
        try:
            self._json({"done": self.server.put(id, label)})
        except UserError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _is_ours(self) -> bool:
        """Rejects requests under another host name, which a page elsewhere could have pointed here (DNS rebinding)."""
        port = self.server.server_port
        names = {f"{HOST}:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in names and (origin is None or origin.removeprefix("http://") in names):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "This page is for this machine only.")
        return False

    def _json(self, values: dict[str, Any]) -> None:
        self._answer(json.dumps(values, ensure_ascii=False).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # the rest of a body must not be read as the next request
        self._answer(why.encode(), "text/plain; charset=utf-8", status)

    def _answer(self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: stderr is for warnings."""


_ENDINGS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


def write(sample: AuditSample, sheet: Path) -> Path:
    """Writes `sheet` and, beside it, a folder of the stored images, undecoded. Returns the folder.

    Files are named by the line's number, since an id may have any characters. The sheet is written last.
    """
    folder = sheet.with_name(f"{sheet.stem}-pictures")
    make_folder(folder)
    rows = []
    for number, pair in enumerate(sample.pairs, 2):  # a spreadsheet's line numbers
        names = []
        for side in ("reference", "target"):
            data = sample.picture(pair.id, side)
            path = folder / f"{number:04d}-{side}{_ENDINGS.get(media_type(data), '.bin')}"
            write_atomic(path, data)
            names.append(f"{folder.name}/{path.name}")
        rows.append([pair.id, "", pair.subject, *names])
    write_sheet(sheet, rows)
    return folder
