"""A small stand-in of the Hugging Face hub: one data set of JSON lines, and connections that break."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "a" * 40
FILE = "train.jsonl"


class Hub(ThreadingHTTPServer):
    """Serves `owner/texts`, and cuts the first `breaks` answers that carry its text in half."""

    def __init__(self, content: bytes, breaks: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.breaks, self.cut = content, breaks, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        paths = asked.get("paths", [])
        self.answer(200, json.dumps([self.entry()] if FILE in paths else []).encode(), Content_Type="application/json")

    def entry(self) -> dict:
        return {"type": "file", "oid": "b" * 40, "size": len(self.server.content), "path": FILE}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/":
            return self.answer(200)
        if path.startswith("/api/datasets/owner/texts/tree/"):
            return self.answer(200, json.dumps([self.entry()]).encode(), Content_Type="application/json")
        if path.startswith("/api/datasets/owner/texts"):
            about = {"id": "owner/texts", "sha": SHA, "private": False, "siblings": [{"rfilename": FILE}], "tags": [], "downloads": 0, "likes": 0}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        if path.startswith("/datasets/owner/texts/resolve/") and path.endswith(FILE):
            return self.file()
        self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)

    def file(self) -> None:
        content, about = self.server.content, {"ETag": '"c"', "X_Repo_Commit": SHA, "Accept_Ranges": "bytes"}
        span = self.headers.get("Range")
        first, last = 0, len(content) - 1
        if span:
            first, _, end = span.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(end or last), last)
            about["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        part = content[first : last + 1]
        if self.command == "GET" and len(part) > 10_000 and self.server.cut < self.server.breaks:
            self.server.cut += 1
            self.send_response(206 if span else 200)
            for name, value in (about | {"Content_Length": str(len(part))}).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.answer(206 if span else 200, part, **about)
