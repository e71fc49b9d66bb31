"""A server that answers as the Hub does, with its ways to fail; and plain files beside it.

Large files answer with a redirect to another host name, as the Hub's do to its CDN, and carry
their SHA-256 as X-Linked-Etag; `.json` files come at once, with git's SHA-1.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import huggingface_hub
import pytest
from packaging.version import Version

COMMIT = "c" * 40
OLD_COMMIT = "0" * 40
PIECE = 1 << 16
OLD_HUB = Version(huggingface_hub.__version__) < Version("1.20")
goes_on_within_the_call = pytest.mark.skipif(
    OLD_HUB,
    reason="before 1.20 huggingface_hub ends the call when a connection breaks; the next resumes",
)


class Request(NamedTuple):
    method: str
    path: str
    range: str
    token: str


class HubServer:
    """Files and faults by path; `asked` is what came in.

    Attributes:
        repos: repository -> file -> bytes.
        plain: name -> bytes, at /plain/NAME.
        refuse: file or name -> (status, X-Error-Code).
        cut: file or name -> after how many bytes its connections break, one each.
        announce: file -> a size other than the true one.
        wrong: files and names whose bytes arrive changed.
        ranges: whether Range is honoured.
        hub: whether it answers with the Hub's own headers.
    """

    def __init__(self):
        self.repos, self.plain = {}, {}
        self.refuse, self.cut, self.announce = {}, {}, {}
        self.wrong = set()
        self.ranges = self.hub = True
        self.content_type = "application/octet-stream"
        self.revisions = {"main": COMMIT, "v0": OLD_COMMIT, COMMIT: COMMIT, OLD_COMMIT: OLD_COMMIT}
        self.asked = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.hub = self
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def bodies(self, ending=""):
        """Requests that asked for bytes of a file, not only for its headers."""
        return [
            each
            for each in self.asked
            if each.method == "GET"
            and each.path.startswith(("/cdn/", "/plain/"))
            and each.path.endswith(ending)
        ]


def git_digest(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        with contextlib.suppress(ConnectionError):
            self.answer()

    def answer(self):
        self.hub = self.server.hub
        get = self.headers.get
        self.hub.asked.append(
            Request(self.command, self.path, get("Range", ""), get("Authorization", ""))
        )
        kind, _, rest = self.path.lstrip("/").partition("/")
        if kind == "plain":
            self.answer_plainly(rest)
        elif kind == "cdn":
            repo, _, file = rest.partition("//")
            self.send(file, self.hub.repos[repo][file], {})
        else:
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            self.resolve(repo, *rest.partition("/")[::2])

    def answer_plainly(self, name):
        if name in self.hub.refuse or name not in self.hub.plain:
            self.refused(*self.hub.refuse.get(name, (404, "")))
            return
        content = self.hub.plain[name]
        self.send(name, content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def resolve(self, repo, revision, file):
        hub = self.hub
        for wrong, status, code in (
            (file in hub.refuse, *hub.refuse.get(file, (0, ""))),
            (repo not in hub.repos, 401, "RepoNotFound"),
            (revision not in hub.revisions, 404, "RevisionNotFound"),
            (file not in hub.repos.get(repo, ()), 404, "EntryNotFound"),
        ):
            if wrong:
                self.refused(status, code)
                return
        content = hub.repos[repo][file]
        headers = {"X-Repo-Commit": hub.revisions[revision]} if hub.hub else {}
        if file.endswith(".json"):
            self.send(file, content, {**headers, "ETag": f'"{git_digest(content)}"'})
            return
        if hub.hub:
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(hub.announce.get(file, len(content)))
        headers["Location"] = f"http://localhost:{hub.port}/cdn/{repo}//{file}"
        self.begin(302, {**headers, "Content-Length": "0"})

    def refused(self, status, code):
        headers = {"X-Error-Code": code, "X-Error-Message": "no"} if code else {}
        self.begin(status, {**headers, "Content-Length": "0"})

    def begin(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, name, content, headers):
        hub, start, status, whole = self.hub, 0, 200, len(content)
        if name in hub.wrong:
            content = bytes(byte ^ 1 for byte in content[:100]) + content[100:]
        same = self.headers.get("If-Range") in (None, headers.get("ETag"))
        if hub.ranges and same and (asked := self.headers.get("Range")):
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        headers["Content-Length"] = str(hub.announce.get(name, whole) - start)
        self.begin(status, {"Content-Type": hub.content_type, **headers})
        if self.command == "HEAD":
            return
        end = whole
        if hub.cut.get(name):
            end = min(start + hub.cut[name].pop(0), whole)
        for at in range(start, end, PIECE):
            self.wfile.write(content[at : min(at + PIECE, end)])
        if end < whole:
            self.close_connection = True
