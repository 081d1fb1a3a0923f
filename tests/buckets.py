"""Servers of both protocols on this machine, and a proxy before them that can fail on purpose."""

import contextlib
import dataclasses
import http.client
import http.server
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass
class Faults:
    """What the proxy does with the next requests; all of it may change while it serves."""

    status: int = 0  # answered to every request while it is set
    cut: int = 0  # so many answers end in the middle of their content
    delay: float = 0.0  # seconds before every answer
    lost: int = 0  # so many answers to what writes are lost, after the server has done it
    only: Callable[[str, str], bool] = lambda method, path: True
    seen: list[str] = dataclasses.field(default_factory=list)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behind: tuple[str, int]
    faults: Faults
    lock: threading.Lock

    def _serve(self) -> None:
        body = self._body()
        if body is None:  # who sent it was killed; a server does nothing then
            self.close_connection = True
            return
        faults = self.faults
        faults.seen.append(f"{self.command} {self.path}")
        concerned = bool(faults.only(self.command, self.path))
        if concerned and faults.delay:
            time.sleep(faults.delay)
        if concerned and faults.status:
            self._answer(faults.status, [], b'{"error": {"message": "on purpose"}}')
            return
        with self._precondition() as kept:
            if not kept:
                self._answer(412, [], b'{"error": {"message": "conditionNotMet"}}')
                return
            connection = http.client.HTTPConnection(*self.behind, timeout=120)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
        if concerned and faults.lost and self.command in ("POST", "PUT"):
            faults.lost -= 1
            self.close_connection = True
            return
        headers = [
            (k, v)
            for k, v in answer.getheaders()
            if k.lower() not in ("transfer-encoding", "content-length", "connection")
        ]
        if self.command == "HEAD":
            headers += [("Content-Length", answer.getheader("Content-Length") or "0")]
        cut = concerned and faults.cut > 0 and self.command == "GET" and len(content) > 1
        faults.cut -= cut
        self._answer(answer.status, headers, content, cut=cut)

    @contextlib.contextmanager
    def _precondition(self) -> Iterator[bool]:
        """Google's ifGenerationMatch=0, which the emulator does not know: no such object yet."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if query.get("ifGenerationMatch") != ["0"]:
            yield True
            return
        with self.lock:
            bucket = re.search(r"/b/([^/]+)/o", self.path)
            assert bucket is not None
            name = query.get("name") or re.findall(r'"name": ?"([^"]+)"', self._text)
            connection = http.client.HTTPConnection(*self.behind, timeout=120)
            quoted = urllib.parse.quote(name[0], safe="")
            connection.request("GET", f"/storage/v1/b/{bucket[1]}/o/{quoted}")
            free = connection.getresponse().status == 404
            connection.close()
            yield free

    def _body(self) -> bytes | None:
        """The content of a request; None where it breaks off."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0] or b"-1", 16):
                parts.append(self.rfile.read(max(size, 0)))
                if len(parts[-1]) != size or not self.rfile.readline():
                    return None
            self.rfile.readline()
            content = b"".join(parts)
        else:
            size = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(size)
            if len(content) != size:
                return None
        self._text = content[:4096].decode("latin-1")
        return content

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _serve  # noqa: N815

    def log_message(self, *about: Any) -> None:
        pass


@contextlib.contextmanager
def proxy(host: str, port: int) -> Iterator[tuple[str, Faults]]:
    """The address of a proxy before a server, and what it does wrong."""
    faults = Faults()
    content = {"behind": (host, port), "faults": faults, "lock": threading.Lock()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), content))
    server.daemon_threads = True
    server.handle_error = lambda *about: None  # clients that hang up
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def google() -> Iterator[tuple[str, int]]:
    """An emulator of Google's storage with one bucket, "bucket"."""
    from gcp_storage_emulator import server as emulator

    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        yield "127.0.0.1", server._api._httpd.server_port
    finally:
        server.stop()


@contextlib.contextmanager
def amazon() -> Iterator[tuple[str, int]]:
    """moto as S3, with one bucket, "bucket"."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    try:
        yield host, port
    finally:
        server.stop()


@contextlib.contextmanager
def own_place(served: Any, name: str, monkeypatch: Any) -> Iterator[tuple[str, Faults]]:
    """For one test: an address that no other has, and the proxy's faults, mended at the end."""
    address, environment, faults = served
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    yield f"{address}/{abs(hash(name)):x}", faults
    for key, value in vars(Faults()).items():
        setattr(faults, key, value)


@contextlib.contextmanager
def serving(scheme: str) -> Iterator[tuple[str, dict[str, str], Faults]]:
    """An address in a bucket, the environment in which it is reached, and the proxy's faults."""
    with {"gs": google, "s3": amazon}[scheme]() as (host, port), proxy(host, port) as (url, faults):
        environment = {
            "gs": {"STORAGE_EMULATOR_HOST": url},
            "s3": {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        }[scheme]
        yield f"{scheme}://bucket/runs/one", environment, faults
