"""A stand-in for the Hugging Face hub on this machine: as much of its HTTP API as its own client uses here."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"  # noqa: S105


class Hub:
    """Repositories as branches of files; `listed` are names that a listing has besides, `requests` what was asked."""

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.listed: list[str] = []
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = unquote(urlsplit(self.path).path)
                outer.requests.append(f"{self.command} {path}")
                state, answer, headers = outer.answer(self.command, path, body, self.headers.get("Authorization"))
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(state)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = _any  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repository: str, branch: str = "main") -> str:
        """A name for the state of a branch."""
        files = self.repositories[repository][branch]
        digests = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in files.items())  # noqa: S324
        return hashlib.sha1(repr(digests).encode()).hexdigest()  # noqa: S324

    def answer(self, method: str, path: str, body: bytes, authorization: str | None):
        """State, content and headers."""
        allowed = authorization == f"Bearer {TOKEN}"
        if path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if method == "POST" and not allowed:
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "foreign":
                return 403, {}, {"X-Error-Message": "You don't have the rights to create a model under this namespace"}
            known = name in self.repositories
            self.repositories.setdefault(name, {"main": {".gitattributes": b""}})
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
            return (409 if known else 200), {"url": f"{self.url}/{name}", "error": "exists"}, {}
        found = re.match(r"(?:/api/models)?/([\w-]+/[\w.-]+?)(?:\.git)?(/.*)?$", path)
        name, rest = found[1], found[2] or ""
        if name not in self.repositories or (name in self.private and not allowed):
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self.of_repository(method, name, rest, body)

    def of_repository(self, method: str, name: str, rest: str, body: bytes):
        branches = self.repositories[name]
        if rest == "/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            actions = [{**one, "actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}} for one in objects]
            return 200, {"objects": actions, "transfer": "basic"}, {}
        if found := re.match(r"/branch/(.+)", rest):
            known = found[1] in branches
            branches.setdefault(found[1], dict(branches["main"]))
            return (409 if known else 200), {"error": "Reference already exists"}, {}
        kind, _, rest = rest.lstrip("/").partition("/")
        branch, _, file = rest.partition("/")
        branch = next((each for each in branches if branch in (each, self.commit(name, each))), branch or "main")
        if branch not in branches:
            return 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"}
        files = branches[branch]
        if kind == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".onnx")) else "regular",
                    "shouldIgnore": False,
                }
                for one in asked
            ]
            return 200, {"files": modes}, {}
        if kind == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
                else:
                    self.commits.append((name, branch, [value["summary"]]))
            oid = self.commit(name, branch)
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}, {}
        if kind in ("", "revision"):
            names = [*files, *self.listed]
            return (
                200,
                {"id": name, "sha": self.commit(name, branch), "siblings": [{"rfilename": n} for n in names]},
                {},
            )
        if kind == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": "0" * 40} for path, content in files.items()
            ]
            return 200, tree, {}
        if kind == "resolve" and file in files:
            content = files[file]
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.commit(name, branch)}
            return 200, content, headers
        return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
