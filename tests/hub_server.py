"""A server that answers as the Hub does, with its ways to fail; and plain files beside it.

Large files answer with a redirect to another host name, as the Hub's do to its CDN, and carry
their SHA-256 as X-Linked-Etag; small text files come at once, with git's SHA-1.

Uploads: tokens with rights, new repositories, and commits of text and of LFS objects. The client
must have HF_HUB_DISABLE_XET=1: a server of Xet's chunks is not here.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import inspect
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from packaging.version import Version

COMMIT = "c" * 40
OLD_COMMIT = "0" * 40
PIECE = 1 << 16
TEXT = (".json", ".md", ".py")
LICENCES = ("mit", "apache-2.0", "cc-by-nc-4.0", "unknown")  # some of the Hub's
OLD_HUB = Version(huggingface_hub.__version__) < Version("1.20")
goes_on_within_the_call = pytest.mark.skipif(
    OLD_HUB,
    reason="before 1.20 huggingface_hub ends the call when a connection breaks; the next resumes",
)
CHECKS_CARDS_ELSEWHERE = "huggingface.co" in inspect.getsource(huggingface_hub.ModelCard.validate)
pushes_a_card = pytest.mark.skipif(
    CHECKS_CARDS_ELSEWHERE,
    reason="this huggingface_hub asks huggingface.co about model cards, not HF_ENDPOINT",
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
        users: token -> (name, organisations, role).
        private: private repositories.
        commits: repository -> (commit, files) of each upload, oldest first.
        lfs: SHA-256 -> bytes of uploaded objects.
    """

    def __init__(self):
        self.repos, self.plain = {}, {}
        self.refuse, self.cut, self.announce = {}, {}, {}
        self.wrong = set()
        self.ranges = self.hub = True
        self.content_type = "application/octet-stream"
        self.revisions = {"main": COMMIT, "v0": OLD_COMMIT, COMMIT: COMMIT, OLD_COMMIT: OLD_COMMIT}
        self.asked = []
        self.users = {
            "hf_me": ("me", ("lab",), "write"),
            "hf_reader": ("me", ("lab",), "read"),
            "hf_you": ("you", (), "write"),
        }
        self.private, self.commits, self.lfs = set(), {}, {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.hub = self
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def commit_of(self, repo, revision):
        """The commit of a revision; None if there is none."""
        known = {commit: commit for commit, _ in self.commits.get(repo, ())}
        if known:
            known["main"] = list(known)[-1]
        return {**self.revisions, **known}.get(revision)

    def files_at(self, repo, commit):
        return dict(self.commits.get(repo, ())).get(commit, self.repos[repo])

    def variables(self, home, token=""):
        """The environment of a process whose Hub this is."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
        }

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


def use_hub(server, monkeypatch, home, token="hf_me"):
    """Makes it the Hub of this process, with an empty cache in `home`."""
    from huggingface_hub import hf_api

    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, "huggingface_hub.file_download"):  # the latter's before version 1
        monkeypatch.setattr(f"{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("HF_TOKEN", token)


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

    do_POST = do_PUT = do_GET

    def answer(self):
        self.body = self.read_body()
        self.hub = self.server.hub
        get = self.headers.get
        self.hub.asked.append(
            Request(self.command, self.path, get("Range", ""), get("Authorization", ""))
        )
        kind, _, rest = self.path.lstrip("/").partition("/")
        if kind == "plain":
            self.answer_plainly(rest)
        elif kind == "cdn":
            place, _, file = rest.partition("//")
            commit, _, repo = place.partition(":")
            self.send(file, self.hub.files_at(repo, commit)[file], {})
        elif kind == "api":
            self.api(unquote(urlsplit(rest).path))
        elif kind == "lfs":
            self.hub.lfs[rest] = self.body
            self.reply({})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self.lfs_batch()
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
        commit = hub.commit_of(repo, unquote(revision))
        for wrong, status, code in (
            (file in hub.refuse, *hub.refuse.get(file, (0, ""))),
            (not self.may_read(repo), 401, "RepoNotFound"),
            (commit is None, 404, "RevisionNotFound"),
            (file not in hub.repos.get(repo, ()), 404, "EntryNotFound"),
        ):
            if wrong:
                self.refused(status, code)
                return
        content = hub.files_at(repo, commit)[file]
        headers = {"X-Repo-Commit": commit} if hub.hub else {}
        if file.endswith(TEXT):
            self.send(file, content, {**headers, "ETag": f'"{git_digest(content)}"'})
            return
        if hub.hub:
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(hub.announce.get(file, len(content)))
        headers["Location"] = f"http://localhost:{hub.port}/cdn/{commit}:{repo}//{file}"
        self.begin(302, {**headers, "Content-Length": "0"})

    # --- The API

    def read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def user(self):
        """Name, organisations and role of the token; None without a known one."""
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_read(self, repo):
        user = self.user()
        owners = (user[0], *user[1]) if user else ()
        of_them = repo.partition("/")[0] in owners
        return repo in self.hub.repos and (repo not in self.hub.private or of_them)

    def api(self, path):
        if self.headers.get("Authorization") and self.user() is None:
            self.refused(401, "")
        elif path == "whoami-v2":
            name, orgs, role = self.user() or ("", (), "")
            orgs = [{"name": each} for each in orgs]
            self.reply({"name": name, "orgs": orgs, "auth": {"accessToken": {"role": role}}})
        elif path == "validate-yaml":
            self.validate(json.loads(self.body)["content"])
        elif path == "repos/create":
            self.create(json.loads(self.body))
        elif not path.startswith("models/"):
            self.refused(404, "")
        else:
            _, owner, name, *rest = path.split("/", 4)
            action, revision = rest or ("info", "main")
            self.of_repo(f"{owner}/{name}", action, revision)

    def of_repo(self, repo, action, revision):
        commit = self.hub.commit_of(repo, revision)
        if not self.may_read(repo) or repo in self.hub.refuse:
            self.refused(*self.hub.refuse.get(repo, (401, "RepoNotFound")))
        elif commit is None:
            self.refused(404, "RevisionNotFound")
        elif action in ("preupload", "commit") and not self.may_write(repo):
            self.refused(403, "")
        elif action == "preupload":
            self.preupload(repo, json.loads(self.body)["files"])
        elif action == "commit":
            self.commit(repo, [json.loads(line) for line in self.body.splitlines()])
        else:
            files = self.hub.files_at(repo, commit)
            if action == "tree":
                found = [(name, files[name]) for name in files]
                kind = {"type": "file"}
                listed = [
                    {**kind, "path": n, "size": len(c), "oid": git_digest(c)} for n, c in found
                ]
                self.reply(listed)
                return
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            private = repo in self.hub.private
            about = {"id": repo, "modelId": repo, "sha": commit, "private": private}
            self.reply({**about, "siblings": siblings, "tags": [], "downloads": 0})

    def may_write(self, repo):
        user = self.user()
        return user and user[2] == "write" and repo.partition("/")[0] in (user[0], *user[1])

    def validate(self, content):
        told = yaml.safe_load(content.split("---")[1])
        wrong = told.get("license") not in LICENCES
        errors = [{"message": f'"license" must be one of {", ".join(LICENCES)}'}] if wrong else []
        self.reply({"warnings": [], "errors": errors}, 400 if wrong else 200)

    def create(self, wanted):
        user = self.user()
        repo = f"{wanted.get('organization') or user[0]}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo}"}
        if not self.may_write(repo):
            self.refused(403, "")
        elif repo in self.hub.repos:
            self.reply({"error": "You already created this model repo", **url}, 409)
        else:
            self.hub.repos[repo] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(repo)
            self.reply(url)

    def preupload(self, repo, files):
        here = self.hub.repos[repo]
        told = []
        for each in files:
            name = each["path"]
            text, oid = name.endswith(TEXT), None
            if name in here:
                digest = git_digest if text else lambda c: hashlib.sha256(c).hexdigest()
                oid = digest(here[name])
            mode = "regular" if text else "lfs"
            told.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": told, "commitOid": None})

    def lfs_batch(self):
        objects = []
        for each in json.loads(self.body)["objects"]:
            told = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.lfs:
                told["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            objects.append(told)
        self.reply({"transfer": "basic", "objects": objects})

    def commit(self, repo, lines):
        files = dict(self.hub.repos[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.lfs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            elif line["key"].startswith("deleted"):
                files.pop(value["path"])
        made = self.hub.commits.setdefault(repo, [])
        commit = hashlib.sha1(f"{repo} {len(made)}".encode()).hexdigest()
        made.append((commit, files))
        self.hub.repos[repo] = files
        self.reply({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def reply(self, content, status=200):
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.begin(status, headers)
        if self.command != "HEAD":
            self.wfile.write(body)

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
