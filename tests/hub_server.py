"""A server that speaks the hub's protocol as far as huggingface_hub calls it to publish and to download.

It keeps what it is sent as the hub does: large files by sha256, checked on arrival, the rest in the commit. A commit
that names a large file which never came is refused. `calls` are the requests, `PUT`s and commits included.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER, TOKEN = "me", "hf_the_token_that_may_write"
LARGE = (".safetensors", ".parquet", ".tar", ".png")
_API = re.compile(r"/api/(?P<type>model|dataset)s/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>\w+)(?:-info)?/(?P<rev>[^/]+))?")
_LFS = re.compile(r"/(?P<data>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_FILE = re.compile(r"/(?P<data>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)")


class Hub:
    """Repositories by (type, owner/name): `files` as path to (bytes, kept apart), `private`, `commits`."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.break_commit = 0
        """How many commits are answered with 500."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self, type: str, repo: str) -> dict[str, bytes]:
        """What a repository holds, but for what the hub itself puts in."""
        held = self.repos[type, repo]["files"]
        return {path: data for path, (data, _) in held.items() if path != ".gitattributes"}

    def close(self) -> None:
        """Frees the port."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, code: int, said: Any = b"", **headers: str) -> None:
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _any(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("/upload/"):  # as on the hub, the address itself is the right to write
            oid = path.rsplit("/", 1)[1]
            if hashlib.sha256(body).hexdigest() != oid:
                return self._send(400, {"error": "other bytes than announced"})
            self.hub.objects[oid] = body
            return self._send(200)
        if self.command == "POST" and not signed:
            return self._send(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        if path == "/api/whoami-v2":
            return self._send(200 if signed else 401, {"name": OWNER, "type": "user"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := _LFS.fullmatch(path):
            return self._batch(json.loads(body))
        if match := _FILE.fullmatch(path):
            return self._file("dataset" if match["data"] else "model", match["repo"], match["path"])
        if match := _API.match(path):
            return self._repo(match, body)
        return self._send(404, {"error": f"no {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _any

    def _create(self, asked: dict[str, Any]) -> None:
        owner, type = asked.get("organization") or OWNER, asked.get("type") or "model"
        name = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if type == 'dataset' else ''}{name}"
        if owner != OWNER:
            return self._send(403, {"error": f"You don't have the rights to create a {type} under {owner}"})
        if (type, name) in self.hub.repos:
            return self._send(409, {"error": "You already created this repo", "url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        files = {".gitattributes": (b"*.safetensors filter=lfs\n", False)}
        self.hub.repos[type, name] = {"files": files, "private": private, "commits": []}
        return self._send(200, {"url": url, "name": name})

    def _repo(self, match: re.Match[str], body: bytes) -> None:
        repo = self.hub.repos.get((match["type"], match["repo"]))
        if repo is None:
            return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files, sha = repo["files"], f"{len(repo['commits']):040x}"
        if match["what"] == "tree":
            under = unquote(urlsplit(self.path).path)[match.end() :].strip("/")
            every = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
            return self._send(200, _tree(files, under, every, sha))
        if match["what"] == "paths":
            asked = [path.strip("/") for path in parse_qs(body.decode()).get("paths", [])]
            known = [_listed(path, *files[path]) for path in asked if path in files]
            folders = [path for path in asked if any(name.startswith(f"{path}/") for name in files)]
            return self._send(200, known + [{"type": "directory", "path": path, "oid": sha} for path in folders])
        if match["what"] == "preupload":
            asked = json.loads(body)["files"]
            said = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in asked
            ]
            return self._send(200, {"files": said})
        if match["what"] == "commit":
            if match["repo"].split("/")[0] != OWNER:
                return self._send(403, {"error": "no right to write"})
            if self.hub.break_commit:
                self.hub.break_commit -= 1
                return self._send(500, {"error": "Internal"})
            return self._commit(match, repo, [json.loads(line) for line in body.splitlines()])
        siblings = [{"rfilename": path} for path in files]
        return self._send(200, {"id": match["repo"], "private": repo["private"], "sha": sha, "siblings": siblings})

    def _commit(self, match: re.Match[str], repo: dict[str, Any], operations: list[dict[str, Any]]) -> None:
        held = dict(repo["files"])
        for each in operations:
            value = each["value"]
            if each["key"] == "file":
                held[value["path"]] = (base64.b64decode(value["content"]), False)
            elif each["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._send(400, {"error": f"{value['path']} was never uploaded"})
                held[value["path"]] = (self.hub.objects[value["oid"]], True)
        repo["files"] = held
        repo["commits"].append(operations[0]["value"]["summary"])
        oid = f"{len(repo['commits']):040x}"
        url = f"{self.hub.url}/{'datasets/' if match['type'] == 'dataset' else ''}{match['repo']}"
        return self._send(200, {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "success": True})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}", "header": {}}}
            objects.append(each if each["oid"] in self.hub.objects else {**each, "actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _file(self, type: str, name: str, path: str) -> None:
        repo = self.hub.repos.get((type, name))
        if repo is None or path not in repo["files"]:
            return self._send(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        data = repo["files"][path][0]
        commit = f"{len(repo['commits']):040x}"
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part:
            first, last = int(part[1]), min(int(part[2]), len(data) - 1)
            return self._send(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}")
        return self._send(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit)


def _tree(files: dict[str, tuple[bytes, bool]], under: str, every: bool, oid: str) -> list[dict[str, Any]]:
    """What lies in a folder, folders too; with `every` what lies in those as well."""
    inside = {path: held for path, held in files.items() if not under or path.startswith(f"{under}/")}
    depth = under.count("/") + 1 if under else 0
    parents = {"/".join(path.split("/")[:n]) for path in inside for n in range(depth + 1, path.count("/") + 1)}
    folders = sorted(folder for folder in parents if every or folder.count("/") == depth)
    shown = [_listed(path, *held) for path, held in inside.items() if every or path.count("/") == depth]
    return [*({"type": "directory", "path": folder, "oid": oid} for folder in folders), *shown]


def _listed(path: str, data: bytes, large: bool) -> dict[str, Any]:
    pointer = f"oid sha256:{hashlib.sha256(data).hexdigest()}".encode() if large else data
    oid = hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer).hexdigest()
    said: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if large:
        said["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": len(pointer)}
    return said
