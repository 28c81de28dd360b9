"""The audit in a browser: a page on this machine only, which shows one pair at a time and takes a key for an answer.

The labeller sees neither the judge's number nor its verdict. Pictures come from the run's parquet, by the id of a
sampled pair and nothing else. A label is on the disk before the page goes on.
"""

from __future__ import annotations

import json
import threading
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from diptych.apps.audit import Sample
from diptych.data.labels import LABELS, Labels, write_sheet
from diptych.errors import UserError
from diptych.utils.documents import parse_json
from diptych.utils.io import write_atomic

HOST = "127.0.0.1"
MOST = 10_000  # bytes of a request's body
POLICY = "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class AuditServer(ThreadingHTTPServer):
    """Serves one sample to one labeller until somebody presses Finish."""

    daemon_threads = True

    def __init__(self, sample: Sample, labels: Labels, labeller: str, said: dict[str, str], port: int = 0) -> None:
        """`said` is what the labeller answered before. Raises UserError if the port is taken."""
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror or error}); choose another --port") from error
        self.sample, self.labels, self.labeller = sample, labels, labeller
        self.said = {pair.id: said[pair.id] for pair in sample.pairs if pair.id in said}
        self.ids = {pair.id for pair in sample.pairs}
        self.lock = threading.Lock()
        # A key press asks for the pair after next; it has been fetched before.
        self.picture = lru_cache(maxsize=16)(sample.picture)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def state(self) -> dict[str, Any]:
        """What the page needs to begin: pairs in order, answers so far."""
        with self.lock:
            pairs = [{"id": pair.id, "subject": pair.subject} for pair in self.sample.pairs]
            question = self.sample.question
            return {"pairs": pairs, "said": self.said, "question": question, "labeller": self.labeller}

    def put(self, id: str, label: str) -> int:
        """Keeps a label and returns how many pairs have one."""
        with self.lock:
            self.labels.add(id, label, self.labeller)
            self.said[id] = label
            return len(self.said)


def serve(server: AuditServer) -> None:
    """Answers until Finish or Ctrl-C, which mean the same: every label is on the disk already."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def media_type(data: bytes) -> str:
    """Of a stored picture, by its first bytes."""
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
            self._answer(Path(__file__).with_name("audit_page.html").read_bytes(), "text/html; charset=utf-8")
        elif parts == ["state"]:
            self._json(self.server.state())
        elif len(parts) == 3 and parts[0] == "picture" and parts[2] in ("reference", "target"):
            self._picture(parts[1], parts[2])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        # Another site's form cannot send this type without asking first, and nobody answers that.
        if self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON")
        elif self.path == "/label":
            self._label()
        elif self.path == "/finish":
            self._json({"done": len(self.server.said)})
            threading.Thread(target=self.server.shutdown).start()
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def _picture(self, id: str, side: str) -> None:
        try:
            data = self.server.picture(id, side)
        except (KeyError, UserError):
            data = b""
        if data:
            self._answer(data, media_type(data))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such picture in this sample")

    def _label(self) -> None:
        try:
            size = int(self.headers.get("Content-Length", ""))
            given = parse_json(self.rfile.read(size)) if 0 < size <= MOST else None
        except ValueError:
            given = None
        id, label = (given.get("id"), given.get("label")) if isinstance(given, dict) else (None, None)
        if not isinstance(id, str) or id not in self.server.ids or label not in LABELS:
            self._refuse(HTTPStatus.BAD_REQUEST, f"send {{id, label}}: an id of the sample, and {', '.join(LABELS)}")
            return
        try:
            self._json({"done": self.server.put(id, label)})
        except UserError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _is_ours(self) -> bool:
        """Refuses what comes by another name than this machine's: a page elsewhere whose name was pointed here."""
        port = self.server.server_port
        names = {f"{HOST}:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in names and (origin is None or origin.removeprefix("http://") in names):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "this page answers to this machine only")
        return False

    def _json(self, values: dict[str, Any]) -> None:
        self._answer(json.dumps(values, ensure_ascii=False).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # what is left of a body must not be read as the next request
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
        """Nothing: stderr belongs to news."""


# The audit without a browser: the pictures of a sample in a folder, and a spreadsheet that names them.

_ENDINGS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


def write(sample: Sample, sheet: Path) -> Path:
    """Writes `sheet` and, beside it, a folder of the stored pictures, undecoded; returns the folder.

    File names are the line's number: an id may hold anything. The sheet comes last.
    """
    folder = sheet.with_name(f"{sheet.stem}-pictures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error})") from error
    rows = []
    for number, pair in enumerate(sample.pairs, 2):  # as a spreadsheet counts its lines
        names = []
        for side in ("reference", "target"):
            data = sample.picture(pair.id, side)
            path = folder / f"{number:04d}-{side}{_ENDINGS.get(media_type(data), '.bin')}"
            write_atomic(path, data)
            names.append(f"{folder.name}/{path.name}")
        rows.append([pair.id, "", pair.subject, *names])
    write_sheet(sheet, rows)
    return folder
