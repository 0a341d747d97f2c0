"""A test double of the Hugging Face Hub, written from scratch.

It implements the HTTP requests of huggingface_hub and datasets with HF_HUB_DISABLE_XET=1: accounts and their rights,
repos, commits, tags, branches, the LFS store, downloads. Commits are content-addressed and compare-and-swap as on the
Hub; everything is in memory. Not implemented: Xet, pull requests, gated repos, pagination.

`Fault`s can be injected into requests: statuses with headers, connections cut during the request or the response, and
delays. `requests` is the log of all requests.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 10 << 20
LFS_NAMES = (".safetensors", ".bin", ".parquet", ".pt", ".arrow", ".gguf", ".tar", ".gz", ".zip")
ATTRIBUTES = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES).encode()
HEX = re.compile("[0-9a-f]{40}")


@dataclass
class Account:
    """The owner of a token, and its rights."""

    name: str = "alice"
    role: str = "write"
    organizations: tuple[str, ...] = ("ateam",)

    def may_write(self, namespace: str) -> bool:
        """Whether it may create and change repos in the namespace."""
        return self.role == "write" and namespace in (self.name, *self.organizations)


@dataclass
class Fault:
    """A fault in requests whose "METHOD /path" matches the pattern."""

    pattern: str = ""
    times: int = 1
    after: int = 0
    """The number of matching requests before the first one that it hits."""
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_request: int | None = None
    """The connection breaks after this many bytes of the request's body, and the request has no effect."""
    cut_answer: int | None = None
    """The request is executed, and the connection breaks after this many bytes of the response's body."""
    delay: float = 0.0
    call: Callable[[], object] | None = None
    """A function that is called when the fault hits, before the request is executed."""

    def hits(self, request: str) -> bool:
        """Whether the fault hits this request, which is counted."""
        if self.times <= 0 or not re.search(self.pattern, request):
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


@dataclass(frozen=True)
class Blob:
    """A file: its content, or the content of its pointer to the LFS store."""

    content: bytes
    lfs: bytes | None = None

    @property
    def oid(self) -> str:
        """The file's object id in git."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def data(self) -> bytes:
        """The content that a download returns."""
        return self.content if self.lfs is None else self.lfs

    def entry(self, path: str) -> dict[str, Any]:
        """The file's entry in the Hub's listings."""
        found: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.data), "path": path}
        if self.lfs is not None:
            lfs = {"oid": hashlib.sha256(self.lfs).hexdigest(), "size": len(self.lfs)}
            found["lfs"] = {**lfs, "pointerSize": len(self.content)}
        return found


@dataclass(frozen=True)
class Commit:
    """A commit of a repo."""

    title: str
    message: str
    parent: str | None
    tree: dict[str, Blob]

    @property
    def id(self) -> str:
        """The commit's id. It depends on the content, the history and the messages, but not on the time."""
        tree = sorted((path, blob.oid) for path, blob in self.tree.items())
        return hashlib.sha1(repr((self.title, self.message, self.parent, tree)).encode()).hexdigest()


class Repo:
    """A repo with its commits, branches and tags."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", None, "initial commit", "", {".gitattributes": Blob(ATTRIBUTES)})

    def commit(self, branch: str, parent: str | None, title: str, message: str, tree: dict[str, Blob]) -> str:
        """Add a commit to a branch, and return its id."""
        commit = Commit(title, message, parent, tree)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit.id

    def resolve(self, revision: str) -> str:
        """The commit id of a branch, a tag or an id."""
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        if HEX.fullmatch(revision) and revision in self.commits:
            return revision
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def tree(self, revision: str = "main") -> dict[str, Blob]:
        """The files of a revision."""
        return self.commits[self.resolve(revision)].tree

    def log(self, revision: str = "main") -> list[Commit]:
        """The commits that led to a revision, the newest first."""
        found, at = [], self.resolve(revision)
        while True:
            found.append(self.commits[at])
            parent = self.commits[at].parent
            if parent is None:
                return found
            at = parent


class RefusalError(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class HubDouble:
    """The double, used by `with HubDouble() as hub` and HF_ENDPOINT=hub.endpoint."""

    def __init__(self) -> None:
        self.tokens = {"hf_test": Account()}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.store: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubDouble":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that a process needs to use the double."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def repo(self, id: str, type: str = "model") -> Repo:
        """An existing repo."""
        return self.repos[type, id]

    def create(self, id: str, type: str = "model", *, private: bool = False, **files: bytes) -> Repo:
        """Create a repo, optionally with files ("__" in a name becomes a dot)."""
        repo = self.repos[type, id] = Repo(private)
        if files:
            tree = {name.replace("__", "."): Blob(content) for name, content in files.items()}
            repo.commit("main", repo.branches["main"], "somebody's", "", {**repo.tree(), **tree})
        return repo

    def state(self) -> dict[str, Any]:
        """The visible state: the refs of every repo with their histories and files."""
        found = {}
        for (type, id), repo in sorted(self.repos.items()):
            refs = {**repo.branches, **{f"tag {name}": at for name, at in repo.tags.items()}}
            found[f"{type} {id}"] = {
                name: [(c.title, {path: blob.oid for path, blob in sorted(c.tree.items())}) for c in repo.log(at)]
                for name, at in sorted(refs.items())
            }
        return found

    # Access rights.

    def account(self, token: str | None) -> Account | None:
        """The account of a token; None without a token."""
        if not token:
            return None
        if token not in self.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def open(self, type: str, id: str, account: Account | None, *, write: bool = False) -> Repo:
        """A repo, if the account may read it, or write to it."""
        repo = self.repos.get((type, id))
        namespace = id.partition("/")[0]
        member = account is not None and namespace in (account.name, *account.organizations)
        if repo is None or (repo.private and not member):
            raise RefusalError(404 if account else 401, f"Repository {id} not found", "RepoNotFound")
        if write and account is None:
            raise RefusalError(401, "Unauthorized")
        if write and account is not None and not account.may_write(namespace):
            raise RefusalError(403, f"Forbidden: you don't have the rights to write to {id}")
        return repo


def pointer(content: bytes) -> Blob:
    """The pointer of a file in the LFS store."""
    oid, size = hashlib.sha256(content).hexdigest(), len(content)
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
    return Blob(text.encode(), content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubDouble

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors, because killed clients cut their connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # buffered, so that a response is one packet
    server: _Server

    def do_any(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        request = f"{self.command} {unquote(url.path)}"
        with hub.lock:
            hub.requests.append(request)
            fault = next((fault for fault in hub.faults if fault.hits(request)), Fault())
        time.sleep(fault.delay)
        if fault.call is not None:
            fault.call()
        if fault.cut_request is not None:
            self._hang_up_after(self._body(fault.cut_request))
            return
        body = self._body()
        if fault.status is not None:
            self.answer(fault.status, {"error": f"injected: {fault.status}"}, fault.headers)
            return
        self.cut = fault.cut_answer
        token = self.headers.get("authorization", "").removeprefix("Bearer ").strip()
        try:
            with hub.lock:
                _answer(self, [unquote(part) for part in url.path.split("/")[1:]], parse_qs(url.query), body, token)
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            self.answer(refusal.status, {"error": str(refusal)}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any  # noqa: N815

    def _body(self, limit: int | None = None) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if limit is not None and sum(map(len, parts)) >= limit:
                    return b""
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("content-length", 0))
        return self.rfile.read(length if limit is None else min(limit, length))

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Send a response of JSON or bytes."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        cut = getattr(self, "cut", None)
        self.cut = None
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        if cut == 0:
            self._hang_up_after(b"")
            return
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self._hang_up_after(b"")

    def _hang_up_after(self, _: bytes) -> None:
        self._headers_buffer: list[bytes] = []
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Print nothing; the log is `requests`."""


def _answer(at: _Handler, path: list[str], query: dict[str, list[str]], body: bytes, token: str) -> None:
    """Execute a request and send its response."""
    hub = at.server.hub
    match at.command, path:
        case "GET", ["api", "whoami-v2"]:
            account = hub.account(token)
            if account is None:
                raise RefusalError(401, "Invalid username or password.")
            orgs = [{"name": name, "roleInOrg": account.role} for name in account.organizations]
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
            at.answer(200, {"type": "user", "name": account.name, "orgs": orgs, "auth": auth})
        case "POST", ["api", "validate-yaml"]:
            at.answer(200, {"errors": [], "warnings": []})
        case "POST", ["api", "repos", "create"]:
            at.answer(*_create(hub, hub.account(token), json.loads(body)))
        case _, ["_lfs", oid, *_]:
            _store(at, hub, oid, body)
        case "POST", [*place, "info", "lfs", "objects", "batch"]:
            type, id = _named(place)
            hub.open(type, id.removesuffix(".git"), hub.account(token), write=True)
            at.answer(200, {"transfer": "basic", "objects": [_slot(hub, o) for o in json.loads(body)["objects"]]})
        case (("GET" | "HEAD"), [first, *_]) if first != "api" and "resolve" in path[2:4]:
            place, (_, revision, *inside) = path[: path.index("resolve", 2)], path[path.index("resolve", 2) :]
            type, id = _named(place)
            _download(at, hub.open(type, id, hub.account(token)), revision, "/".join(inside))
        case _, ["api", ("models" | "datasets") as types, owner, name, *rest]:
            type, id = types[:-1], f"{owner}/{name}"
            writes = (
                at.command == "DELETE" or rest[:1] in (["preupload"], ["commit"], ["tag"]) or rest[-1:] == ["write"]
            )
            repo = hub.open(type, id, hub.account(token), write=writes)
            at.answer(200, _of_repo(hub, repo, f"{type}s/{id}", at.command, rest, query, body))
        case _:
            raise RefusalError(404, f"no such route: {at.command} {'/'.join(path)}")


def _named(place: list[str]) -> tuple[str, str]:
    return ("dataset", "/".join(place[1:])) if place[0] == "datasets" else ("model", "/".join(place))


def _create(hub: HubDouble, account: Account | None, asked: dict[str, Any]) -> tuple[int, Any]:
    if account is None:
        raise RefusalError(401, "Unauthorized")
    type, namespace = asked.get("type") or "model", asked.get("organization") or account.name
    id = f"{namespace}/{asked['name']}"
    if not account.may_write(namespace):
        raise RefusalError(403, f"You don't have the rights to create a {type} under the namespace {namespace!r}")
    url = f"{hub.endpoint}/{'datasets/' if type == 'dataset' else ''}{id}"
    if (type, id) in hub.repos:
        return 409, {"error": "You already created this repo", "url": url}
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    hub.repos[type, id] = Repo(private)
    return 200, {"url": url, "name": id, "id": "0"}


def _slot(hub: HubDouble, asked: dict[str, Any]) -> dict[str, Any]:
    """The upload address for a file of the LFS store; none if the store has it already."""
    href, slot = f"{hub.endpoint}/_lfs/{asked['oid']}", {"oid": asked["oid"], "size": asked["size"]}
    if asked["oid"] in hub.store:
        return slot
    return {**slot, "actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}


def _store(at: _Handler, hub: HubDouble, oid: str, body: bytes) -> None:
    if at.command == "PUT":
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusalError(400, "sha256 mismatch")
        hub.store[oid] = body
    elif oid not in hub.store or len(hub.store[oid]) != json.loads(body)["size"]:
        raise RefusalError(404, "LFS object missing")
    at.answer(200, {}, {"ETag": f'"{oid}"'})


def _download(at: _Handler, repo: Repo, revision: str, path: str) -> None:
    commit = repo.resolve(revision)
    blob = repo.commits[commit].tree.get(path)
    if blob is None:
        headers = {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        at.answer(404, {"error": "Entry not found"}, headers)
        return
    etag = hashlib.sha256(blob.lfs).hexdigest() if blob.lfs is not None else blob.oid
    headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if blob.lfs is not None:
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(blob.lfs))}
    data = blob.data
    if found := re.fullmatch(r"bytes=(\d+)-(\d*)", at.headers.get("range", "")):
        first, last = int(found[1]), int(found[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
        at.answer(206, data[first : last + 1], headers)
    else:
        at.answer(200, data, headers)


def _of_repo(
    hub: HubDouble, repo: Repo, place: str, method: str, rest: list[str], query: dict[str, list[str]], body: bytes
) -> Any:
    match method, rest:
        case "GET", []:
            return _info(repo, place, "main")
        case "GET", ["revision", revision]:
            return _info(repo, place, revision)
        case "GET", ["auth-check", *_]:
            return {}
        case "GET", ["tree", revision, *inside]:
            return _listed(
                repo.tree(revision), "/".join(inside), query.get("recursive", ["false"])[0].lower() == "true"
            )
        case "POST", ["paths-info", revision]:
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            tree = repo.tree(revision)
            return [tree[path].entry(path) for path in asked if path in tree]
        case "GET", ["refs"]:
            kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
            refs = {
                kind: [{"name": name, "ref": f"refs/{short}/{name}", "targetCommit": at} for name, at in names.items()]
                for kind, (short, names) in kinds.items()
            }
            return {**refs, "converts": [], "pullRequests": []}
        case "GET", ["commits", revision]:
            about = {"date": "2026-01-01T00:00:00.000Z", "authors": [{"user": "alice"}]}
            return [{"id": c.id, "title": c.title, "message": c.message, **about} for c in repo.log(revision)]
        case "POST", ["tag", revision]:
            at, tag = repo.resolve(revision), json.loads(body)["tag"]
            if tag in repo.tags:
                raise RefusalError(409, f"Tag reference exists already: {tag}")
            repo.tags[tag] = at
            return {}
        case "DELETE", ["tag", tag]:
            del repo.tags[tag]
            return {}
        case "POST", ["preupload", revision]:
            return _modes(repo, revision, json.loads(body)["files"])
        case "POST", ["commit", branch]:
            return _commit(hub, repo, place, branch, body)
    raise RefusalError(404, f"no such route: {method} {place} {rest}")


def _info(repo: Repo, place: str, revision: str) -> dict[str, Any]:
    commit, id = repo.resolve(revision), place.partition("/")[2]
    files = [{"rfilename": path} for path in repo.commits[commit].tree]
    about = {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "private": repo.private}
    return {"_id": "0", "id": id, "sha": commit, "siblings": files, **about}


def _listed(tree: dict[str, Blob], inside: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{inside}/" if inside else ""
    found: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(tree.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = prefix + "/".join(parts[:depth])
            found[folder] = {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "path": folder}
            found[folder]["size"] = 0
        if recursive or len(parts) == 1:
            found[path] = blob.entry(path)
    if inside and not found:
        raise RefusalError(404, f"{inside} does not exist", "EntryNotFound")
    return list(found.values())


def _modes(repo: Repo, revision: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    """The upload mode of each file: whether it goes to the LFS store."""
    tree, found = repo.tree(revision), []
    for file in files:
        binary = b"\0" in base64.b64decode(file["sample"])
        lfs = file["size"] > LFS_BYTES or file["path"].endswith(LFS_NAMES) or binary
        there = tree.get(file["path"])
        entry = there.entry(file["path"]) if there else {}
        oid = entry.get("lfs", entry).get("oid")
        mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
        found.append({"path": file["path"], **mode})
    return {"files": found, "commitOid": repo.resolve(revision)}


def _commit(hub: HubDouble, repo: Repo, place: str, branch: str, body: bytes) -> dict[str, Any]:
    parent = repo.resolve(branch)
    tree, header = dict(repo.tree(branch)), {}
    for line in filter(None, body.splitlines()):
        asked = json.loads(line)
        value = asked["value"]
        match asked["key"]:
            case "header":
                header = value
            case "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]))
            case "lfsFile":
                if value["oid"] not in hub.store:
                    raise RefusalError(400, f"LFS object {value['oid']} not uploaded")
                tree[value["path"]] = pointer(hub.store[value["oid"]])
            case "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise RefusalError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
    if header.get("parentCommit") not in (None, parent):
        raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
    made = repo.commit(branch, parent, header["summary"], header.get("description", ""), tree)
    url = f"{hub.endpoint}/{place.removeprefix('models/')}/commit/{made}"
    return {"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""}
