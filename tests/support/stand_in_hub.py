"""A stand-in for the hub's upload interface on the loopback device: it knows one token, and keeps what it is sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandInHub:
    """`with StandInHub(token) as hub:`; hub.address is what HF_ENDPOINT has to be."""

    def __init__(self, token: str):
        self.token = token
        self.created: dict[str, dict] = {}  # repository → what was asked for
        self.files: dict[str, bytes] = {}  # name → content, of all commits
        self.requests: list[str] = []  # method and path
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self._serve()

            do_POST = do_HEAD = do_GET

            def _serve(self):
                length = int(self.headers.get("Content-Length") or 0)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b"".join(iter(self._chunk, b""))
                else:
                    body = self.rfile.read(length)
                hub.requests.append(f"{self.command} {self.path}")
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self._reply(401, {"error": "Invalid username or password."})
                self._reply(*hub.answer(self.command, self.path.partition("?")[0], body))

            def _chunk(self):
                size = int(self.rfile.readline(), 16)
                data = self.rfile.read(size)
                self.rfile.readline()
                return data

            def _reply(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "type": "user", "orgs": [], "auth": {}}
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created[f"{asked.get('organization') or 'someone'}/{asked['name']}"] = asked
            return 200, {"url": f"{self.address}/someone/{asked['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": files}
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit, repository = "0" * 40, path.removeprefix("/api/models").partition("/commit/")[0]
            address = f"{self.address}{repository}/commit/{commit}"
            return 200, {"commitUrl": address, "commitOid": commit, "success": True}
        if "/revision/" in path or path.startswith("/api/models/"):
            return 200, {"id": "someone/model", "sha": "0" * 40, "siblings": [], "private": True, "tags": []}
        return 404, {"error": "not found"}

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
