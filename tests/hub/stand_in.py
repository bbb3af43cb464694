"""A stand-in for the Hugging Face Hub on loopback: real HTTP for the real client, in memory, with faults on demand.

It answers what `huggingface_hub` asks when it pushes and pulls without Xet: whoami, repositories, branches, pre-upload,
the LFS batch and its uploads, commits as ndjson, trees, and downloads with ETag and Range. Hashes are computed here
from the bytes that came, so a client that sends or stores something else is found out.

    with StandIn() as hub:
        hub.fail("PUT", "/lfs/", times=1, cut_after=1000)
        ...
        hub.requests  # (method, path) of everything that was asked
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standinstandinstandin"
USER, ORGANIZATION = "ada", "engine"
# As on the hub: what is neither short nor text goes by LFS.
_LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".gguf", ".pt")


@dataclass
class Repo:
    """Branches to commits, and commits to files."""

    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that fit, after `skip` of them."""

    method: str
    path: re.Pattern[str]
    times: int
    skip: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    says: str = ""
    cut_after: int | None = None
    hang: threading.Event | None = None


class StandIn:
    """The hub. `url` is what HF_ENDPOINT must be; `tokens` maps accepted tokens to their roles."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens: dict[str, dict[str, Any]] = {TOKEN: {"role": "write"}}
        self.organizations: list[dict[str, str]] = [{"name": ORGANIZATION, "roleInOrg": "write"}]
        self.requests: list[tuple[str, str]] = []
        self.uploaded: list[str] = []
        self.ranges: list[int] = []
        self.spoil: Callable[[bytes], bytes] = lambda content: content
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, *, times: int = 10**6, **how: Any) -> Fault:
        """Makes the next requests whose path fits (a regular expression) go wrong; see `Fault`."""
        fault = Fault(method, re.compile(path), times, **how)
        self.faults.append(fault)
        return fault

    def add(self, repo_id: str, files: Mapping[str, bytes], *, private: bool = False, **card: Any) -> str:
        """A repository that is there already; returns its commit."""
        repo = self.repos.setdefault(repo_id, Repo(private, card))
        return self.commit(repo, "main", dict(files), "before")

    def commit(self, repo: Repo, branch: str, files: dict[str, bytes], message: str) -> str:
        digest = hashlib.sha1(message.encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        sha = digest.hexdigest()
        repo.commits[sha], repo.branches[branch] = files, sha
        repo.messages.append(message)
        return sha

    def count(self, method: str, path: str) -> int:
        """How often a path (a regular expression) was asked for."""
        return sum(asked == method and bool(re.search(path, where)) for asked, where in self.requests)


def blob_id(content: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(content: bytes) -> bytes:
    """The text that git holds in the place of an LFS file."""
    oid = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()


class _Refused(Exception):
    def __init__(self, status: int, says: str = "", headers: Mapping[str, str] | None = None):
        super().__init__(says)
        self.status, self.says, self.headers = status, says, dict(headers or {})


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # ---- one request ------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            fault = self._fault(path)
        length = int(self.headers.get("Content-Length", 0))
        if fault is not None and self.command == "PUT" and fault.cut_after is not None:
            self.rfile.read(min(length, fault.cut_after))
            if fault.hang is not None:
                fault.hang.set()
                self.rfile.read()  # until the client is gone
            return self._cut()
        body = self._body(length)
        if fault is not None and fault.status is not None:
            return self._send(fault.status, {"error": fault.says}, fault.headers)
        self._cut_after = None if fault is None else fault.cut_after
        if self._cut_after == 0:
            return self._cut()
        try:
            with self.hub.lock:
                self._route(path, body)
        except _Refused as refused:
            self._send(refused.status, {"error": refused.says}, refused.headers)
        return None

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.method == self.command and fault.path.search(path) and fault.times > 0:
                if fault.skip > 0:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                return fault
        return None

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._cut_after is not None and self._cut_after < len(body):
            self.wfile.write(body[: self._cut_after])
            self.wfile.flush()
            self._cut()
        else:
            self.wfile.write(body)

    _cut_after: int | None = None

    # ---- what the hub knows -----------------------------------------------------------------------------------------

    def _route(self, path: str, body: bytes) -> None:
        routes: tuple[tuple[str, str, Callable[..., None]], ...] = (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", lambda body: self._send(200, {"errors": [], "warnings": []})),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/([0-9a-f]{64})", self._upload),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        )
        for method, pattern, answer in routes:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return answer(*match.groups(), body)
        raise _Refused(404, f"the stand-in has no {self.command} {path}")

    def _token(self) -> dict[str, Any] | None:
        """The rights of the token that came with the request; refuses one that is unknown."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        token = given.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            says = "Invalid credentials in Authorization header"
            # The real one repeats nothing; this one is as bad as can be.
            raise _Refused(401, f"{says}: {given}", {"X-Error-Message": says})
        return self.hub.tokens[token]

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        token = self._token()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token is None):
            # Without a token the hub does not say which it is.
            status = 404 if token is not None else 401
            raise _Refused(status, "Repository not found", {"X-Error-Code": "RepoNotFound"} if token else {})
        if write and (token is None or token["role"] == "read"):
            raise _Refused(403, "you don't have the right", {"X-Error-Message": "you don't have the right"})
        return repo

    def _commit_of(self, repo: Repo, revision: str | None) -> str:
        sha = repo.branches.get(revision or "main", revision or "main")
        if sha not in repo.commits:
            raise _Refused(404, "Invalid rev id", {"X-Error-Code": "RevisionNotFound"})
        return sha

    def _whoami(self, _: bytes) -> None:
        token = self._token()
        if token is None:
            raise _Refused(401, "no token")
        self._send(200, {"name": USER, "orgs": self.hub.organizations, "auth": {"accessToken": token}})

    def _create(self, body: bytes) -> None:
        token, asked = self._token(), json.loads(body)
        if token is None or token["role"] == "read":
            raise _Refused(403, "no right", {"X-Error-Message": "you don't have the right"})
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        if repo_id in self.hub.repos:
            raise _Refused(409, "You already created this model repo")
        repo = self.hub.repos[repo_id] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._send(200, {"url": f"{self.hub.url}/{repo_id}"})

    def _info(self, repo_id: str, revision: str | None, _: bytes) -> None:
        repo = self._repo(repo_id)
        sha = self._commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        about = {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "cardData": repo.card}
        self._send(200, about)

    def _tree(self, repo_id: str, revision: str, _: bytes) -> None:
        repo = self._repo(repo_id)
        entries = []
        for path, content in repo.commits[self._commit_of(repo, revision)].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if path.endswith(_LFS_SUFFIXES):
                entry["oid"] = blob_id(pointer(content))
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._send(200, entries)

    def _branch(self, repo_id: str, branch: str, _: bytes) -> None:
        repo = self._repo(repo_id, write=True)
        if branch in repo.branches:
            raise _Refused(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._send(201, {})

    def _preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        repo = self._repo(repo_id, write=True)
        held = repo.commits[self._commit_of(repo, revision)]
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            lfs = path.endswith(_LFS_SUFFIXES)
            old = held.get(path)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else blob_id(old)
            mode = "lfs" if lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": files})

    def _batch(self, repo_id: str, body: bytes) -> None:
        self._repo(repo_id, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            if asked["oid"] not in self.hub.lfs:
                # Signed, as a real one is: whoever has it may write.
                href = f"{self.hub.url}/lfs/{asked['oid']}?signature=secret"
                asked = asked | {"actions": {"upload": {"href": href}}}
            objects.append(asked)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the content is not what its name says")
        self.hub.lfs[oid] = body
        self.hub.uploaded.append(oid)
        self._send(200, {})

    def _commit(self, repo_id: str, branch: str, body: bytes) -> None:
        repo = self._repo(repo_id, write=True)
        files = dict(repo.commits[self._commit_of(repo, branch)])
        message = ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise _Refused(400, f"{value['path']}: its content was not uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(repo, branch, files, message)
        self._send(200, {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def _resolve(self, repo_id: str, revision: str, path: str, _: bytes) -> None:
        repo = self._repo(repo_id)
        sha = self._commit_of(repo, revision)
        if path not in repo.commits[sha]:
            raise _Refused(404, "Entry not found", {"X-Error-Code": "EntryNotFound"})
        content = repo.commits[sha][path]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(_LFS_SUFFIXES) else blob_id(content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self._send(200, b"", headers | {"Content-Length": str(len(content))})
        content = self.hub.spoil(content)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is not None and int(start[1]) > 0:
            first = int(start[1])
            self.hub.ranges.append(first)
            where = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[first:], headers | {"Content-Range": where})
        return self._send(200, content, headers)
