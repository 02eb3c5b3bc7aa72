"""HTTP for the servers of the tests: every request is recorded, and some go wrong when told to."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Request:
    """One request. `path` is unquoted and without the query."""

    origin: str
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] | None = None

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> "Answer":
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **named})

    @classmethod
    def error(cls, status: int, message: str, code: str | None = None) -> "Answer":
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        return cls(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **headers})


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that it is about.

    `kind`: a status to answer with; "drop" to close the connection while the request is still coming in; "lose" to do
    what was asked and close the connection without saying so.
    """

    method: str
    path: str  # a regular expression
    kind: int | str
    times: int = 1

    def takes(self, method: str, path: str) -> bool:
        if self.times > 0 and method == self.method and re.search(self.path, path):
            self.times -= 1
            return True
        return False


class Server:
    """A server on this machine; `answer` says what becomes of a request, `name` by what name of it others reach it."""

    def __init__(self, answer: Callable[[Request], Answer], name: str = "127.0.0.1") -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20

            def handle_one(self) -> None:
                server.handle(self, answer, lock)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one  # noqa: N815 (the names are http.server's)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://{name}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def handle(self, handler: BaseHTTPRequestHandler, answer: Callable[[Request], Answer], lock: Any) -> None:
        parts = urlsplit(handler.path)
        path = unquote(parts.path)
        with lock:
            fault = next((f for f in self.faults if f.takes(handler.command, path)), None)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(self.url, handler.command, path, query, headers, b"")
        self.requests.append(request)
        if fault is not None and fault.kind == "drop":
            handler.rfile.read(min(int(headers.get("content-length", 0)), 1000))
            self.hang_up(handler)
            return
        request.body = read_body(handler)
        if fault is not None and isinstance(fault.kind, int):
            reply = Answer.error(fault.kind, f"fault {fault.kind}")
        else:
            with lock:
                reply = answer(request)
        if fault is not None and fault.kind == "lose":
            self.hang_up(handler)
            return
        handler.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **(reply.headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(reply.body)

    @staticmethod
    def hang_up(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.connection.close()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    body = b""
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body
