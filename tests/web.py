"""A server on this machine that can be told to misbehave."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Serves `files` by their path, and `content` at every other one; attributes say how it misbehaves."""

    def __init__(self, content: bytes = b""):
        self.content, self.ranges, self.sized = content, True, True
        self.kind: str | None = "application/octet-stream"
        self.files: dict[str, bytes] = {}
        self.paths: list[str] = []
        self.cuts: list[int] = []  # after how many bytes the next answers break off
        self.states: list[int] = []  # the next answers are these instead
        self.asked: list[str | None] = []  # the Range of each request
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.asked.append(asked)
                outer.paths.append(self.path)
                if self.path.startswith("/moved="):
                    self.send_response(302)
                    self.send_header("Location", self.path.removeprefix("/moved="))
                    self.end_headers()
                    return
                if outer.states:
                    self.send_error(outer.states.pop(0))
                    return
                content = outer.files.get(self.path, outer.content)
                if not content:
                    self.send_error(404)
                    return
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and outer.ranges else 0
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                body = content[start:]
                if outer.kind:
                    self.send_header("Content-Type", outer.kind)
                if outer.sized:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.cuts.pop(0)] if outer.cuts else body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.root}/file.bin"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
