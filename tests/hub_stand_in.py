"""A Hugging Face Hub on loopback: just enough of it to create a repository, push to it and download from it."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, urlsplit

SHA = "0123456789" * 4  # the commit of every data set


class HubStandIn(ThreadingHTTPServer):
    """`with HubStandIn() as hub:` serves at `hub.url`; `hub.files` maps a path to its bytes at the newest commit.

    Attributes:
        commits: the messages, oldest first.
        tokens: the authorization headers seen.
        large: suffixes that have to come by LFS, the rest being sent within the commit.
        failures: a part of the path to the answer that it gets: a status, or 0 for a connection cut; a list of them
            is used up, and then the Hub has recovered.
        created: what was asked of `create_repo`.
        paths: what was asked for, in order.
        gate: cleared, it holds commits back until it is set.
        datasets: name of a data set → its files, as `files` of the model; it has one commit.
        refusals: name of a data set → status, error code and message, as the Hub refuses a gated one or a bad token.
    """

    daemon_threads = True

    def __init__(self, user="speech-lab"):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.user, self.url = user, f"http://127.0.0.1:{self.server_address[1]}"
        self.files, self.blobs, self.failures, self.datasets, self.refusals = {}, {}, {}, {}, {}
        self.commits, self.tokens, self.large, self.created, self.paths = [], set(), (), [], []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def sha(self):
        return hashlib.sha1(f"{self.commits}".encode()).hexdigest()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.gate.set()
        self.shutdown()
        self.server_close()


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        hub, body = self.server, self._read()
        if self._fails():
            return
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            hub.created.append(wanted)
            name = f"{wanted.get('organization') or hub.user}/{wanted['name']}"
            self._answer({"url": f"{hub.url}/{name}"}, 200 if len(hub.created) == 1 else 409)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if hub.large and path.endswith(hub.large) else "regular" for path in paths}
            answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._answer({"files": answer})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for wanted in objects:
                wanted["actions"] = {"upload": {"href": f"{hub.url}/put/{wanted['oid']}"}}
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            hub.gate.wait()
            self._commit([json.loads(line) for line in body.splitlines()])
            repository = "/".join(self.path.split("/")[3:5])
            url = f"{hub.url}/{repository}/commit/{hub.sha}"
            self._answer({"commitUrl": url, "commitOid": hub.sha, "hookOutput": ""})
        elif listed := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", self.path):
            paths = json.loads(body)["paths"]
            self._answer([entry for entry in self._tree(hub.datasets[listed[1]]) if entry["path"] in paths])
        else:
            self._answer({"error": "Not Found"}, 404)

    def do_PUT(self):
        body = self._read()
        self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def do_GET(self):
        hub = self.server
        if self._fails():
            return
        if re.match(r"(/api)?/datasets\b", self.path):
            return self._show_dataset(urlsplit(self.path))
        resolved = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", self.path)
        if resolved and resolved[1] in hub.files:
            self._answer(hub.files[resolved[1]])
        elif re.match(r"/api/models/[^/]+/[^/]+/tree/", self.path):
            contents = hub.files.items()
            self._answer([{"type": "file", "path": path, "size": len(body), "oid": "0"} for path, body in contents])
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+(/revision/[^/]+)?(\?.*)?", self.path):
            siblings = [{"rfilename": path} for path in hub.files]
            self._answer({"id": "/".join(self.path.split("/")[3:5]), "sha": hub.sha, "siblings": siblings})
        elif resolved:
            self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._answer({"error": "Not Found"}, 404)

    do_HEAD = do_GET

    def _show_dataset(self, url):
        hub = self.server
        if url.path == "/api/datasets":
            owner = parse_qs(url.query)["author"][0] + "/"
            return self._answer([{"id": name} for name in hub.datasets if name.startswith(owner)])
        name, what, path = re.fullmatch(
            r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(resolve|tree|revision)/[^/]+)?/?(.*)", url.path
        ).groups()
        files = hub.datasets.get(name)
        if files is None or name in hub.refusals:
            status, code, message = hub.refusals.get(name, (404, "RepoNotFound", "Repository not found"))
            self._answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})
        elif what == "tree":
            below = [entry for entry in self._tree(files) if entry["path"].startswith(path)]
            if "recursive=true" not in url.query.lower():
                below = [entry for entry in below if "/" not in entry["path"][len(path) :].strip("/")]
            self._answer(below)
        elif what != "resolve":
            siblings = [{"rfilename": path} for path in files]
            self._answer({"id": name, "sha": SHA, "siblings": siblings})
        elif path in files:
            self._answer(files[path], headers={"X-Repo-Commit": SHA})
        else:
            self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})

    @staticmethod
    def _tree(files):
        folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0"} for path in sorted(folders)]
        return entries + [
            {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for path, body in files.items()
        ]

    def _read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = iter(lambda: self.rfile.read(int(self.rfile.readline(), 16) + 2)[:-2], b"")
        return b"".join(chunks)

    def _fails(self):
        self.server.tokens.add(self.headers.get("Authorization"))
        self.server.paths.append(self.path)
        status = next((status for part, status in self.server.failures.items() if part in self.path), None)
        if isinstance(status, list):
            status = status.pop(0) if status else None
        if status == 0:
            self.close_connection = True
            self.connection.close()
        elif status is not None:
            self._answer({"error": f"refused, {self.headers.get('Authorization')}"}, status)
        return status is not None

    def _commit(self, lines):
        hub = self.server
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                hub.commits.append(value["summary"])
            elif line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.blobs[value["oid"]]

    def _answer(self, body, status=200, headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        for name, value in ({"X-Repo-Commit": self.server.sha} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass
