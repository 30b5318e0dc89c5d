"""A hub on the loopback interface that takes commits and gives files out, as far as huggingface_hub asks for it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>preupload|commit|revision)/(?P<revision>[^/?]+))?")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class LoopbackHub:
    """Repositories in memory.

    Attributes:
        files: Content by repository and name.
        commits: Commits of each repository, in their order.
        refuses: Answer every commit with this status.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.made: list[dict[str, Any]] = []
        self.refuses: int | None = None

    def head(self, repo: str) -> str:
        return self.commits[repo][-1]

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        for line in lines:
            if line["key"] == "file":
                self.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.commits[repo].append(hashlib.sha1(str(len(self.commits[repo])).encode()).hexdigest())
        return self.head(repo)


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        @property
        def _address(self) -> str:
            return f"http://{self.headers['Host']}"

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _missing(self, code: str) -> None:
            self._send(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

        def do_POST(self) -> None:
            path, body = urlsplit(self.path).path, self._body()
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
                hub.made.append(asked)
                if repo in hub.files:
                    self._send(409, {"error": "exists", "url": f"{self._address}/{repo}"})
                    return
                hub.files[repo], hub.commits[repo] = {}, ["0" * 40]
                self._send(200, {"url": f"{self._address}/{repo}"})
                return
            if path == "/api/validate-yaml":
                self._send(200, {"errors": [], "warnings": []})
                return
            found = API.fullmatch(path)
            assert found is not None, path
            repo = found["repo"]
            if found["verb"] == "preupload":
                names = [each["path"] for each in json.loads(body)["files"]]
                files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self._send(200, {"files": files})
            elif hub.refuses is not None:
                self._send(hub.refuses, {"error": "no"})
            else:
                lines = [json.loads(line) for line in body.splitlines()]
                assert lines[0]["value"]["parentCommit"] == hub.head(repo)
                commit = hub.commit(repo, lines)
                self._send(200, {"commitUrl": f"{self._address}/{repo}/commit/{commit}", "commitOid": commit})

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == "/api/agent-harnesses":
                self._missing("NotFound")
                return
            if found := API.fullmatch(path):
                if found["repo"] not in hub.files:
                    self._missing("RepoNotFound")
                else:
                    self._send(200, {"id": found["repo"], "sha": hub.head(found["repo"]), "siblings": []})
                return
            found = FILE.fullmatch(path)
            assert found is not None, path
            if found["repo"] not in hub.files:
                self._missing("RepoNotFound")
            elif found["revision"] not in ("main", *hub.commits[found["repo"]]):
                self._missing("RevisionNotFound")
            elif found["name"] not in hub.files[found["repo"]]:
                self._missing("EntryNotFound")
            else:
                content = hub.files[found["repo"]][found["name"]]
                etag = hashlib.sha256(content).hexdigest()
                self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": hub.head(found["repo"])})

        do_HEAD = do_GET  # noqa: N815

    return Handler


@contextmanager
def serving(hub: LoopbackHub) -> Iterator[str]:
    """The hub's address while the context is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
