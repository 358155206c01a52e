"""A Hub on the loopback address that fails: it makes repositories and takes uploads up to the fault, and no further."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyHub(BaseHTTPRequestHandler):
    """Answers the three calls of an upload: make the repository, ask how to upload, commit."""

    # Part of a path -> the status it is answered with; 0 drops the connection in the middle of the request.
    faults: dict

    def do_POST(self):
        status = next((code for part, code in self.faults.items() if part in self.path), 200)
        if status == 0:
            self.rfile.read(100)
            self.connection.close()
            return
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else b"{}"
        answer = {"error": f"fault {status}"}
        if status == 200 and "preupload" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif status == 200:
            answer = {"url": "https://huggingface.co/me/model", "commitUrl": "https://huggingface.co/me/model/commit/1",
                      "commitOid": "1", "id": "me/model"}  # fmt: skip
        self.answer(status, answer)

    def do_GET(self):
        self.answer(self.faults.get("GET", 404), {"error": "nothing here"})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def faulty_hub(faults):
    """Address of a running Hub with these faults."""
    handler = type("Handler", (FaultyHub,), {"faults": faults})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
