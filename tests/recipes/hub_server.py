"""A model and data-set hub on this machine: folders served over the Hugging Face hub's REST calls.

It answers what `huggingface_hub` and `datasets` ask to resolve a revision, list a repository and download its files
(huggingface_hub 2.4: `repo_info`, `list_repo_tree`, `paths-info`, `resolve`). Read only, one revision a repository.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def commit(folder: Path) -> str:
    """Forty hex digits for the content of a repository, as a git commit has."""
    digest = hashlib.sha1()
    for path in files(folder):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def files(folder: Path) -> list[Path]:
    """Every file of a repository."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Handler(BaseHTTPRequestHandler):
    """Serves `server.root / (models|datasets) / owner / name`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Stays silent; what was asked is in `server.asked`."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Sends what the path names, or the hub's own kind of 404."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if found := RESOLVE.fullmatch(path):
            kind, repository, _, name = found.groups()
            self.send_file(self.server.root / ("datasets" if kind else "models") / repository, name)
        elif found := API.fullmatch(path):
            kind, repository, call, _, below = found.groups()
            self.send_api(self.server.root / kind / repository, repository, call, below or "", body)
        else:
            self.send_missing("EntryNotFound")

    def send_api(self, folder: Path, repository: str, call: str | None, below: str, body: bytes) -> None:
        if not folder.is_dir():
            self.send_missing("RepoNotFound")
        elif call == "tree":
            self.send_json([entry(folder, path) for path in sorted((folder / below).rglob("*"))])
        elif call == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self.send_json([entry(folder, folder / name) for name in asked if (folder / name).exists()])
        else:
            siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files(folder)]
            self.send_json({"id": repository, "sha": commit(folder), "siblings": siblings, "tags": []})

    def send_file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            self.send_missing("EntryNotFound" if folder.is_dir() else "RepoNotFound")
            return
        data, total, status = path.read_bytes(), path.stat().st_size, 200
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit(folder)}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or total), total - 1)
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        self.send(status, data, headers)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_missing(self, code: str) -> None:
        self.send(404, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def entry(folder: Path, path: Path) -> dict[str, object]:
    """A file or folder as the hub lists it."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    data = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}


@contextmanager
def serve(root: Path) -> Iterator[ThreadingHTTPServer]:
    """The hub, on a free port of this machine, with a list of the requests it had in `asked`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.asked = root, []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
