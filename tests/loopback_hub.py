"""A Hub on 127.0.0.1, for the real client: repositories, commits and large files in a folder, and faults on demand.

Speaks what `huggingface_hub` uses to create a repository, commit files (regular and LFS, basic transfer), list, and
download; not Xet, which the client must leave off (`HF_HUB_DISABLE_XET=1`). The address is reserved when this module
is imported, since the client reads `HF_ENDPOINT` at its own import; nothing answers there before a `LoopbackHub` does.
"""

import base64
import contextlib
import fnmatch
import hashlib
import io
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, TOKEN = "tester", "hf_loopback"

_reservation = socket.socket()
_reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
_reservation.bind(("127.0.0.1", 0))
ENDPOINT = f"http://127.0.0.1:{_reservation.getsockname()[1]}"
# Large files lie on another host, as on the Hub: there the client stops following and sends no token.
_STORAGE = ENDPOINT.replace("127.0.0.1", "localhost")

# As the Hub's own default for models, in short: what git keeps as pointers.
_LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.npz", "*.parquet", "*.arrow")
_GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS)
_LARGEST_REGULAR = 10 * 2**20

_REPO_API = re.compile(
    r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(preupload|commit|tree|revision|paths-info)/([^/]+))?(?:/(.*))?"
)
_RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LFS_BATCH = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = headers | ({"X-Error-Code": code} if code else {}) | {"X-Error-Message": message}


class Fault:
    """What happens to the next requests of a kind in the place of an answer."""

    def __init__(self, method, path, times, skip=0, status=None, headers=None, drop_after=None):
        self.method, self.path, self.times, self.skip = method, re.compile(path), times, skip
        self.status, self.headers, self.drop_after = status, headers or {}, drop_after


class Repository:
    """Files by content and commits by hash, below one folder."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "blobs").mkdir(parents=True)
        self.head = None
        self.commit("initial commit", {".gitattributes": self.store(_GIT_ATTRIBUTES.encode())})

    def store(self, content):
        """Keep a regular file; its entry in a commit has the hash that git gives a blob."""
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self.folder / "blobs" / oid).write_bytes(content)
        return {"oid": oid, "size": len(content), "lfs": None}

    def commit(self, message, files):
        content = json.dumps({"parent": self.head, "message": message, "date": time.time(), "files": files}).encode()
        self.head = hashlib.sha1(content).hexdigest()
        (self.folder / f"{self.head}.json").write_bytes(content)
        return self.head

    def sha(self, revision):
        revision = unquote(revision)
        sha = self.head if revision in ("main", "HEAD") else revision
        if not (self.folder / f"{sha}.json").is_file():
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision="main"):
        return json.loads((self.folder / f"{self.sha(revision)}.json").read_text())["files"]

    def messages(self):
        """Of all commits, newest first."""
        found, sha = [], self.head
        while sha:
            commit = json.loads((self.folder / f"{sha}.json").read_text())
            found, sha = [*found, commit["message"]], commit["parent"]
        return found


class LoopbackHub:
    """The server.

    Attributes:
        requests: (method, path) of everything asked for, in order.
        unknown: those among them that no part of this file knows; a test of a whole life should find none.
    """

    def __init__(self, folder):
        self.folder, self.repositories, self.faults = Path(folder), {}, []
        self.requests, self.unknown, self.connections, self.lock = [], [], [], threading.RLock()
        (self.folder / "lfs").mkdir(parents=True)
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(_reservation.getsockname(), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self):
        """Stop, and cut the connections that the client keeps open: the next Hub is another one."""
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fail(self, method, path, status, times=1, skip=0, **headers):
        """Answer `times` requests whose path matches with an error, after the next `skip` such."""
        self.faults.append(Fault(method, path, times, skip, status=status, headers=headers))

    def drop(self, method, path, after, times=1):
        """Cut the next such requests off after so many bytes: reset in their body, or an end in that of the answer."""
        self.faults.append(Fault(method, path, times, drop_after=after))

    def fault_of(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path.search(path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def repository(self, kind, name):
        if (kind, name) not in self.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.repositories[kind, name]

    def count(self, method, path):
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def content(self, entry, repository):
        """Bytes of a file of a commit."""
        folder = self.folder / "lfs" if entry["lfs"] else repository.folder / "blobs"
        return (folder / (entry["lfs"] or entry["oid"])).read_bytes()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *_):
        pass

    # --- the wire --------------------------------------------------------------------------------------------------

    def _pieces(self):
        """The body, as it comes."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                raise ConnectionError
            left -= len(piece)
            yield piece

    def _serve(self):
        method, path = self.command, self.path
        with self.hub.lock:
            self.hub.requests.append((method, path))
        fault = self.hub.fault_of(method, path)
        body = bytearray()
        for piece in self._pieces():
            body += piece
            if fault and fault.drop_after is not None and len(body) >= fault.drop_after:
                return self._reset()
        self._drop_after = fault.drop_after if fault else None
        try:
            if fault and fault.status:
                raise Refused(fault.status, "fault on demand", **fault.headers)
            self._answer(*self._route(method, urlsplit(path), bytes(body)))
        except Refused as refused:
            content = json.dumps({"error": refused.message}).encode()
            self._answer(refused.status, content, {"Content-Type": "application/json", **refused.headers})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _reset(self):
        # Linger of zero seconds: the client sees a reset, not an end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._hang_up()

    def _hang_up(self):
        self.close_connection = True
        for end in (self.rfile, self.wfile, self.connection):
            end.close()
        # What the base class flushes and closes after this.
        self.rfile, self.wfile = io.BytesIO(), io.BytesIO()

    def _answer(self, status, content, headers=None):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        headers = {"Content-Length": str(len(content)), "X-Request-Id": "loopback", **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self._drop_after is not None:
            self.wfile.write(content[: self._drop_after])
            return self._hang_up()
        self.wfile.write(content)
        return None

    # --- what is asked for -----------------------------------------------------------------------------------------

    def _route(self, method, url, body):
        path = url.path
        if path == "/api/whoami-v2":
            self._require_token()
            return 200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}
        if path == "/api/agent-harnesses":
            raise Refused(404, "no registry of programs: the client goes on without it")
        if (method, path) == ("POST", "/api/repos/create"):
            return self._create(json.loads(body))
        if (method, path) == ("POST", "/api/validate-yaml"):
            return _validate_yaml(json.loads(body)["content"])
        if match := _LFS_BATCH.fullmatch(path):
            self._require_token()
            self.hub.repository(match[1] or "models", match[2])
            return self._lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})(/verify)?", path):
            return (
                self._lfs_verify(match[1], json.loads(body)) if match[2] else self._lfs_object(method, match[1], body)
            )
        if match := _RESOLVE.fullmatch(path):
            return self._resolve(match[1] or "models", match[2], match[3], unquote(match[4]))
        if match := _REPO_API.fullmatch(path):
            kind, name, action, revision, rest = match.groups()
            repository = self.hub.repository(kind, name)
            if method == "POST" and action in ("preupload", "commit"):
                self._require_token()
                with self.hub.lock:
                    return self._preupload(repository, json.loads(body)) if action == "preupload" else self._commit(
                        repository, f"{ENDPOINT}/{name}", body)  # fmt: skip
            if action == "tree":
                recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
                return 200, _tree(repository, revision, unquote(rest or ""), recursive)
            if action == "paths-info":
                return 200, [e for e in _tree(repository, revision, "", True) if e["path"] in _form(body)["paths"]]
            if rest is None:
                return 200, self._info(repository, name, revision or "main")
        self.hub.unknown.append((method, path))
        raise Refused(404, f"loopback Hub does not know {method} {path}")

    def _require_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "Invalid credentials in Authorization header")

    def _create(self, asked):
        self._require_token()
        name, kind = f"{asked.get('organization') or USER}/{asked['name']}", f"{asked.get('type') or 'model'}s"
        if not name.startswith(f"{USER}/"):
            raise Refused(403, f"You don't have the rights to create a {kind[:-1]} under this namespace")
        url = f"{ENDPOINT}/{'' if kind == 'models' else kind + '/'}{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.repositories:
                return 409, {"error": f"You already created this {kind[:-1]} repo", "url": url}
            self.hub.repositories[kind, name] = Repository(self.hub.folder / kind / name)
        return 200, {"url": url, "name": name, "id": name}

    def _info(self, repository, name, revision):
        files = repository.files(revision)
        card = self.hub.content(files["README.md"], repository).decode() if "README.md" in files else ""
        metadata = _metadata(card) or {}
        return {
            "id": name,
            "author": USER,
            "sha": repository.sha(revision),
            "private": False,
            "siblings": [{"rfilename": path} for path in files],
            "tags": metadata.get("tags", []),
            "pipeline_tag": metadata.get("pipeline_tag"),
            "library_name": metadata.get("library_name"),
            "cardData": metadata,
        }

    def _preupload(self, repository, asked):
        known, answers = repository.files(), []
        for file in asked["files"]:
            is_lfs = any(fnmatch.fnmatch(file["path"].split("/")[-1], pattern) for pattern in _LFS_PATTERNS)
            # Binary files are kept as pointers whatever their name, as the Hub asks for.
            is_lfs |= file["size"] > _LARGEST_REGULAR or not _is_text(base64.b64decode(file["sample"]))
            entry = known.get(file["path"], {})
            answers.append(
                {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False,
                 "oid": entry.get("lfs") or entry.get("oid")}
            )  # fmt: skip
        return 200, {"files": answers}

    def _lfs_batch(self, asked):
        assert asked["operation"] == "upload"
        assert "basic" in asked["transfers"]
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if not (self.hub.folder / "lfs" / wanted["oid"]).is_file():
                link = f"{_STORAGE}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": link}, "verify": {"href": f"{link}/verify"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def _lfs_object(self, method, oid, body):
        path = self.hub.folder / "lfs" / oid
        if method == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise Refused(400, "the content does not have the hash it was announced by")
            path.write_bytes(body)
            return 200, b""
        if not path.is_file():
            raise Refused(404, "no such object")
        return self._ranged(path.read_bytes(), {"ETag": f'"{oid}"'})

    def _lfs_verify(self, oid, asked):
        path = self.hub.folder / "lfs" / oid
        if not path.is_file() or path.stat().st_size != asked["size"]:
            raise Refused(404, "the object was not uploaded")
        return 200, {}

    def _commit(self, repository, url, body):
        files, message = repository.files(), None
        for operation in map(json.loads, body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repository.head):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = repository.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not (self.hub.folder / "lfs" / value["oid"]).is_file():
                    raise Refused(400, f"the LFS object of {value['path']} was not uploaded")
                pointer = (
                    f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {value['size']}\n"
                )
                files[value["path"]] = repository.store(pointer.encode()) | {"size": value["size"], "lfs": value["oid"]}
            elif key in ("deletedFile", "deletedFolder"):
                files = {p: f for p, f in files.items() if p != value["path"] and not p.startswith(value["path"] + "/")}
            else:
                raise Refused(400, f"unknown operation {key}")
        sha = repository.commit(message, files)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}

    def _resolve(self, kind, name, revision, path):
        repository = self.hub.repository(kind, name)
        entry = repository.files(revision).get(path)
        headers = {"X-Repo-Commit": repository.sha(revision), "Accept-Ranges": "bytes"}
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]}"', "X-Linked-Size": str(entry["size"])}
            return 302, b"", {**headers, "Location": f"{_STORAGE}/lfs/{entry['lfs']}"}
        return self._ranged(self.hub.content(entry, repository), {**headers, "ETag": f'"{entry["oid"]}"'})

    def _ranged(self, content, headers):
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match is None:
            return 200, content, headers
        start = int(match[1])
        return 206, content[start:], {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}


def _tree(repository, revision, folder, recursive):
    prefix, listed = folder + "/" if folder else "", {}
    for path, entry in repository.files(revision).items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            place = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                listed[place] = {
                    "type": "directory",
                    "path": place,
                    "size": 0,
                    "oid": hashlib.sha1(place.encode()).hexdigest(),
                }
        if recursive or len(parts) == 1:
            lfs = {"lfs": {"oid": entry["lfs"], "size": entry["size"], "pointerSize": 130}} if entry["lfs"] else {}
            listed[path] = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"], **lfs}
    if folder and not listed:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return list(listed.values())


def _form(body):
    return parse_qs(body.decode())


def _is_text(sample):
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        # A sample may end within a character.
        return error.start > len(sample) - 4
    return b"\0" not in sample


def _metadata(card):
    match = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def _validate_yaml(card):
    """As the Hub does before a commit, as far as it concerns a model's card."""
    try:
        metadata = _metadata(card)
    except yaml.YAMLError as error:
        return 400, {"errors": [{"message": str(error)}], "warnings": []}
    errors = []
    for result in (entry for model in (metadata or {}).get("model-index", []) for entry in model["results"]):
        for name in ("task", "dataset", "metrics"):
            if not result.get(name):
                errors.append({"message": f'"model-index[0].results[0].{name}" is required'})
        errors += [{"message": f"metric without a value: {m}"} for m in result["metrics"] if "value" not in m]
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return (400 if errors else 200), {"errors": errors, "warnings": warnings}
