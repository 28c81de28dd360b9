"""Malformed requests: `Maker(seed, app).case()`.

There are eight kinds: hostile images, JSON, forms, names and addresses, routes of the web app, its events, bytes that
are hardly HTTP, and requests that are cut off. All are made from a seed, so that a case can be repeated by its number.
"""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from PIL import Image

from diptych.utils.paths import packaged

FORM = "XboundaryX"
TRAVERSALS = ("..", "../..", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd",
              "/etc/passwd", "....//....//etc/passwd", "..%5c..%5cwin.ini", "%00", "file:///etc/passwd", "C:\\win.ini",
              "jobs.sqlite", "..%252f..%252fetc/passwd", "a" * 3000, "%ff%fe", "é", "~root", ".", "*", "{id}",
              "' OR 1=1 --")  # fmt: skip
VALUES = (None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -0.0, 1e308, "", " ", "a", "a" * 5000, "\x00",
          "\ud800", "\u202e\ufeff", "😀" * 300, "1", "nan", "../../x", [], [None], [[]] * 3, ["a"] * 200, {},
          {"a": {"b": []}}, "data:image/png;base64,AAAA", "data:,", "https://example.org/x.png", "file:///etc/passwd",
          "32x32", "0x0", "99999x1", "99999x99999", "-1", "64", "auto", "png", "webp", "white", "#12345",
          "rgb(1,2,3)")  # fmt: skip
FIELDS = ("prompt", "n", "size", "seed", "steps", "guidance", "image_guidance", "text_guidance", "negative_prompt",
          "fit", "speed", "job", "wait", "stream", "partial_images", "response_format", "output_format", "background",
          "quality", "user", "model", "style", "moderation", "output_compression", "reference", "mask", "image",
          "light", "panel", "scene", "detail", "title", "captions", "panel_seed", "promt", "__proto__",
          "kind")  # fmt: skip
GRADIO = ("file=/etc/passwd", "file/etc/passwd", "upload", "upload_progress", "proxy=http://127.0.0.1:1/",
          "stream/a/b/c", "component_server", "deep_link", "custom_component/a/b/c/d", "queue/join", "queue/data",
          "queue/status", "heartbeat/abc", "reset", "reset/", "cancel", "startup-events", "app_id", "info", "info/",
          "run/predict", "api/predict", "call/on_draw", "call/on_draw/abc", "process_recording", "vibe-edit", "login",
          "login_check", "theme.css", "monitoring", "queue/join/", "mcp/sse", "mcp", "dev/reload", "static/../../x",
          "file=C:/x", "token", "user", "config")  # fmt: skip
PLACES = ("/app/", "/app", "/app/config", "/app/assets/", "/app/static/", "/app/theme.css", "/app/robots.txt",
          "/app/manifest.json", "/app/monitoring", "/app/monitoring/x", "/app/login", "/app/logout", "/app/svelte/",
          "/app/?deep_link=../../x", "/app/_app/", "/app/page/x", "/docs", "/openapi.json", "/metrics", "/logout", "/",
          "//", "/v1", "/v1/", "/v2/x", "/app/custom_component/")  # fmt: skip


@dataclass
class Case:
    """A request as parts, or as `raw` bytes, in which `AUTH` is the place of the token's header."""

    kind: str
    method: str = "GET"
    target: str = "/"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    raw: bytes = b""
    session: str = ""  # of an event of the web app, whose answer comes elsewhere

    def wire(self, host: str, authorization: str) -> bytes:
        """Its bytes."""
        auth = f"{authorization}\r\n" if authorization else ""
        if self.raw:
            return self.raw.replace(b"HOST", host.encode()).replace(b"AUTH", auth.encode())
        lines = {"host": f"Host: {host}", "connection": "Connection: close"}
        if self.body or self.method in ("POST", "PUT", "PATCH"):
            lines["content-length"] = f"Content-Length: {len(self.body)}"
        lines |= {name.lower(): f"{name}: {value}" for name, value in self.headers}
        head = f"{self.method} {self.target} HTTP/1.1\r\n" + "".join(f"{line}\r\n" for line in lines.values()) + auth
        return head.encode("latin1", "replace") + b"\r\n" + self.body


class Maker:
    """`app` is the web app's configuration: its events and what they take."""

    def __init__(self, seed: int, app: dict[str, Any]) -> None:
        self.by = random.Random(seed)
        self.events = app["dependencies"]
        cat = Image.open(packaged("examples/references") / "cat.png").convert("RGB")
        self.cat = saved(cat, "PNG")
        self.pictures = [
            *hostile(cat),
            *(saved(cat, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "TIFF")),
        ]
        self.kinds = (self.picture, self.json, self.form, self.name, self.route, self.event, self.bytes, self.cut)

    def case(self) -> Case:
        return self.by.choice(self.kinds)()

    def broken(self, data: bytes) -> bytes:
        """Bytes with some of them changed, lost, doubled or cut off; one time in eight as they were."""
        out = bytearray(data)
        for _ in range(self.by.choice((0, 1, 1, 2, 4, 8, 30, 200))):
            at = self.by.randrange(max(1, len(out)))
            match self.by.randrange(6):
                case 0:
                    out[at : at + 1] = bytes([self.by.randrange(256)])
                case 1:
                    del out[at : at + self.by.randrange(1, 40)]
                case 2:
                    out[at:at] = out[at : at + self.by.randrange(1, 40)]
                case 3 if len(out) > 40:  # in the header, where sizes and offsets are
                    out[self.by.randrange(40)] = self.by.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 4:
                    out[at : at + 4] = struct.pack(
                        self.by.choice(("<I", ">I")), self.by.choice((0, 1, 2**31, 2**32 - 1))
                    )
                case _ if self.by.random() < 0.2:
                    del out[at:]
        return bytes(out)

    def picture(self) -> Case:
        data = self.broken(self.by.choice(self.pictures))
        match self.by.randrange(4):
            case 0:
                return Case("pictures", "POST", "/v1/references", (("Content-Type", "image/png"),), data)
            case 1:
                asked = {"prompt": "a cat", "steps": 1, "wait": False, "reference": base64.b64encode(data).decode()}
                return posted("pictures", "/v1/images/generations", json.dumps(asked).encode())
            case 2:
                return form(
                    "pictures", "/v1/images/edits", [("prompt", "a cat"), ("steps", "1"), ("wait", "0")], image=data
                )
            case _:
                both = (
                    {"image": self.cat, "mask": data} if self.by.random() < 0.5 else {"image": data, "mask": self.cat}
                )
                return form(
                    "pictures", "/v1/relights", [("light", "blue light"), ("steps", "1"), ("wait", "0")], **both
                )

    def json(self) -> Case:
        asked: dict[str, Any] = {"prompt": "a cat", "steps": 1, "wait": False}
        asked |= {self.by.choice(FIELDS): self.by.choice(VALUES) for _ in range(self.by.randrange(1, 4))}
        body = json.dumps(asked).encode()
        match self.by.randrange(8):
            case 0:
                body = self.broken(body)
            case 1:
                body = b"[" * self.by.choice((1, 100, 100_000)) + body
            case 2:
                body = (
                    b'{"prompt": "a", "seed": '
                    + self.by.choice((b"1" * 5000, b"NaN", b"-Infinity", b"1e999", b"0x1"))
                    + b"}"
                )
            case 3:
                body = body.decode().encode(self.by.choice(("utf-16", "utf-7", "utf-32"))) + b"\xff\xfe"
        media = self.by.choice(
            ("application/json",) * 6 + ("text/plain", "application/xml", "application/json; charset=utf-16", "")
        )
        return posted("json", "/v1/images/generations", body, media)

    def form(self) -> Case:
        target = self.by.choice(("/v1/images/edits", "/v1/relights", "/v1/stories", "/login"))
        fields = [("steps", "1"), ("wait", "false"), ("prompt" if "edits" in target else "light", "a cat")]
        fields += [(self.by.choice(FIELDS), str(self.by.choice(VALUES))) for _ in range(self.by.randrange(4))]
        if "stories" in target:
            fields = [(n, v) for n, v in fields if n != "light"] + [("panel", "a cat | hello")] * self.by.randrange(6)
        made = form(
            "forms",
            target,
            fields * self.by.choice((1, 1, 1, 40)),
            **({"image": self.cat} if self.by.random() < 0.8 else {}),
        )
        if self.by.random() < 0.5:
            made.body = self.broken(made.body)
        if self.by.random() < 0.2:
            kinds = ("multipart/form-data", "multipart/form-data; boundary=",
                     f"multipart/form-data; boundary={'b' * 300}", "multipart/form-data; boundary=\x80",
                     "application/x-www-form-urlencoded", "multipart/mixed; boundary=X")  # fmt: skip
            made.headers = (("Content-Type", self.by.choice(kinds)),)
        return made

    def name(self) -> Case:
        odd = self.by.choice((*TRAVERSALS, *(quote(str(v)[:500], safe="", errors="replace") for v in VALUES),
                              "job_" + "a" * 24, "img_" + "a" * 24, "ref_" + "0" * 40, "c-000001-01"))  # fmt: skip
        path = self.by.choice(("/v1/jobs/{}", "/v1/jobs/{}/events", "/v1/jobs/{}/images", "/v1/jobs/{}/page",
                               "/v1/pictures/{}", "/v1/references/{}", "/v1/runs/{}/report", "/v1/runs/{}/sheets/0",
                               "/v1/runs/run/sheets/{}", "/v1/runs/run/pairs/{}/target",
                               "/v1/runs/{}/pairs/c-000001-01/reference", "/v1/{}", "/{}"))  # fmt: skip
        queries = ("", "", f"?format={odd}", f"?limit={odd}", f"?until={odd}&signature={odd}",
                   "?until=99999999999&signature=" + "0" * 64, f"?response_format={odd}", f"?previews={odd}",
                   f"?{odd}", "?" + "a=b&" * 500)  # fmt: skip
        method = self.by.choice(("GET",) * 6 + ("DELETE", "POST", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "NOPE"))
        return Case("names", method, (path.format(odd) + self.by.choice(queries)).replace(" ", "+").replace("\x00", ""))

    def route(self) -> Case:
        known = self.by.choice((self.by.choice(PLACES), "/app/gradio_api/" + self.by.choice(GRADIO)))
        target = self.by.choice(
            (known, known + self.by.choice(TRAVERSALS), known.replace("/app", "/app/.."), known.upper())
        )
        if self.by.random() < 0.3:
            target += self.by.choice(
                ("?session_hash=abc", "?upload_id=x", "?__theme=light", "?session_hash=" + "x" * 2000, "?a[]=%00")
            )
        method = self.by.choice(("GET", "GET", "GET", "POST", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"))
        body = (
            b""
            if method != "POST"
            else self.by.choice((b"", b"{}", b"[]", b"null", b"\xff", b'{"session_hash": 1}', b"a" * 99_999))
        )
        odd = (("Cookie", self.by.choice(('diptych_session="ana:9:9"', "a" * 3000, "=;=;", "access-token=x", '"'))),
               ("Origin", "https://evil.example"), ("X-Forwarded-For", "10.0.0.1, \x80"), ("Upgrade", "websocket"),
               ("Range", "bytes=9-1"), ("Accept-Language", "é" * 500), ("Host", "evil.example"), ("Content-Length",
               "-5"), ("Content-Length", "9" * 30), ("Transfer-Encoding", "chunked"), ("Expect", "100-continue"),
               ("X-Gradio-User", "x"), ("Referer", "http://[::1"))  # fmt: skip
        headers = tuple(self.by.sample(odd, self.by.choice((0, 0, 1, 2))))
        return Case("routes", method, target.replace(" ", "+"), (("Content-Type", "application/json"), *headers), body)

    def event(self) -> Case:
        event = self.by.choice(self.events)
        session = f"s{self.by.randrange(10**9)}"
        data: list[Any] = [self.by.choice(("", "a cat", 1, "1", None)) for _ in event["inputs"]]
        for at in range(len(data)):
            if self.by.random() < 0.4:
                data[at] = self.by.choice(VALUES)
        odd = (
            {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
            {"path": "http://127.0.0.1:1/x", "url": "x"},
        )
        if data and self.by.random() < 0.2:
            data[self.by.randrange(len(data))] = self.by.choice(odd)
        if self.by.random() < 0.1:
            data = self.by.choice(([], data * 9, [data], {}))  # pyright: ignore
        asked = {"data": data, "fn_index": event["id"], "session_hash": session, "trigger_id": 1, "event_data": None}
        if self.by.random() < 0.3:
            asked[self.by.choice((*asked, "api_name", "batched", "request", "simple_format"))] = self.by.choice(
                (*VALUES, -9, 9999)
            )
        body = json.dumps(asked).encode()
        return posted(
            "events",
            "/app/gradio_api/queue/join",
            self.broken(body) if self.by.random() < 0.1 else body,
            session=session,
        )

    def bytes(self) -> Case:
        line = self.by.choice((b"GET /v1/models HTTP/1.1", b"GET /v1/models HTTP/9.9", b"GET  HTTP/1.1",
                               b"\x16\x03\x01\x02\x00", b"GET /v1/jobs", b"POST /v1/references HTTP/1.1",
                               b"GET /\x00 HTTP/1.1", b"PRI * HTTP/2.0", b"CONNECT a:1 HTTP/1.1",
                               b"GET http://evil.example/v1/jobs HTTP/1.1", b"get /v1/jobs http/1.1",
                               b"GET /v1/jobs HTTP/1.0"))  # fmt: skip
        lines = (b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: +5", b"Transfer-Encoding: chunked",
                 b"Transfer-Encoding: x, chunked", b"Content-Length: 4\r\nTransfer-Encoding: chunked", b": x",
                 b"A" * 70_000 + b": b", b"a: " + b"b" * 70_000, b"Host: HOST", b"a:\x00b", b"a: b\r\n c", b"no colon",
                 b"Host: evil.example\r\nHost: HOST", b"Content-Length: 99999999999999999999", b"Host:", b"Host: [::1",
                 b"Host: a:b:c", b"a: b\n\nGET /v1/jobs HTTP/1.1")  # fmt: skip
        some = self.by.sample(lines, self.by.randrange(4))
        bodies = (
            b"",
            b"0\r\n\r\n",
            b"zz\r\nabc\r\n",
            b"5\r\nabc",
            b"ffffffffffffffff\r\na",
            b"abcd",
            b"\x00" * 100,
            b"GET /v1/jobs HTTP/1.1\r\n\r\n",
        )
        host = [b"Host: HOST"] if self.by.random() < 0.7 else []
        raw = (
            line + b"\r\nAUTH" + b"".join(part + b"\r\n" for part in (*host, *some)) + b"\r\n" + self.by.choice(bodies)
        )
        return Case("bytes", raw=raw if self.by.random() < 0.8 else raw[: self.by.randrange(1, len(raw))])

    def cut(self) -> Case:
        """A request whose client leaves in the middle of it."""
        whole = self.by.choice((self.picture, self.form, self.event))().wire("HOST", "AUTH")
        whole = whole.replace(b"AUTH\r\n", b"AUTH")
        return Case("cut", raw=whole[: self.by.randrange(len(whole) // 2, len(whole))])


def posted(kind: str, target: str, body: bytes, media: str = "application/json", session: str = "") -> Case:
    return Case(kind, "POST", target, (("Content-Type", media),), body, session=session)


def form(kind: str, target: str, fields: list[tuple[str, str]], **files: bytes) -> Case:
    """A form; file names are none that one would want used."""
    parts = [
        f'--{FORM}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode("utf8", "replace")
        for n, v in fields
    ]
    for name, data in files.items():
        head = f'--{FORM}\r\nContent-Disposition: form-data; name="{name}"; filename="../../../tmp/x.png"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return posted(kind, target, b"".join(parts) + f"--{FORM}--\r\n".encode(), f"multipart/form-data; boundary={FORM}")


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def hostile(cat: Image.Image) -> list[bytes]:
    """Pictures that are valid, or nearly, and meant to hurt or confuse who decodes them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2, *more: bytes) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

    zeros = bytes(20_000_000)
    exif = Image.Exif()
    exif[0x0112] = 99
    turned = saved(cat, "JPEG", exif=exif)
    frames = [cat.resize((64, 64)).rotate(n) for n in range(30)]
    return [
        png(60_000, 60_000, zeros),
        png(0, 0, b""),
        png(1, 1, b""),
        png(2**31 - 1, 2**31 - 1, b"\0"),
        png(5_000, 5_000, zeros),
        png(100_000, 1, zeros),
        png(1, 100_000, zeros),
        png(4, 4, b"\0" * 99, 16, 6),
        png(4, 4, b"\0\xff\xff\xff\xff" * 4, 8, 3),  # a palette that is not there
        png(4, 4, b"\0" * 99, 8, 2, chunk(b"iCCP", b"x\0\0" + zlib.compress(zeros))),
        png(4, 4, b"\0" * 99, 8, 2, chunk(b"zTXt", b"x\0\0" + zlib.compress(zeros)) * 3),
        png(4, 4, b"\0" * 99, 8, 2, chunk(b"acTL", struct.pack(">II", 2**31, 0))),
        png(4, 4, b"\0" * 99, 8, 2, chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)),
        saved(cat, "PNG", icc_profile=b"no profile" * 50),
        turned,
        turned + b"PK\x03\x04" * 100,
        saved(cat.convert("CMYK"), "JPEG", icc_profile=b"\0" * 200),
        saved(cat.convert("I;16"), "PNG"),
        saved(cat.convert("1"), "PNG"),
        saved(cat.convert("P"), "PNG", transparency=bytes(range(256))),
        saved(cat.convert("LA"), "WEBP"),
        saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        b"GIF89a\xff\xff\xff\xff\x80\0\0" + b"\0" * 60,
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -1, -(2**31), 1, 24, 0, 0, 0, 0, 2**31, 0),
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run",
        b"8BPS\0\1" + b"\0" * 100,
        b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        b"",
    ]
