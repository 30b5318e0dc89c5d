"""Everything that can go wrong between here and a server is provoked, and gives a sentence that says what to do."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_lens.backend import Backend, Edit, Operation, Read, Sampling, TokenBatch, open_backend
from persona_lens.backend.batches import generate_rows
from persona_lens.backend.protocol import RemoteError, RequestTooLargeError
from persona_lens.cli import app
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.runs.settings import RolloutSettings
from tests.backends.fixtures import PROMPTS, direction
from tests.ndif.conftest import KEY, configured
from tests.ndif.server import free_ports
from tests.tiny import tiny_model, tiny_tokenizer

ONE = TokenBatch.of([[5, 6, 7]])


def remote(model: object, **options: Any) -> Backend:
    return open_backend("nnsight", str(model), remote=True, **options)


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def listening(handler: type[Quiet]) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def web_server(status: int) -> Iterator[str]:
    """Something else that listens."""

    class Answer(Quiet):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"hello")

        do_POST = do_GET  # noqa: N815 - the name that http.server looks for

    with listening(Answer) as host:
        yield host


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("http://127.0.0.1:{free}", r"nothing answers at http://127.0.0.1:\d+; set NDIF_HOST"),
        ("http://nowhere.invalid", r"nothing answers at http://nowhere.invalid; set NDIF_HOST"),
        ("127.0.0.1:8001", "must begin with http:// or https://; set NDIF_HOST"),
    ],
)
def test_no_server(models: Path, host: str, says: str) -> None:
    with configured(host.format(free=free_ports(1)[0])), pytest.raises(RemoteError, match=says):
        remote(models / "llama")


@pytest.mark.parametrize("status", [200, 404, 500])
def test_no_ndif_server(models: Path, status: int) -> None:
    with web_server(status) as host, configured(host), pytest.raises(RemoteError, match="is no NDIF server; set NDIF"):
        remote(models / "llama")


CLOSED, HELLO = b"\x88\x00", b"\x81\x05hello"  # frames of a web socket
ACCEPTS = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


@contextmanager
def web_socket(frame: bytes) -> Iterator[str]:
    """A server that takes the line, says one thing and hangs up."""

    class Greeting(Quiet):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            key = self.headers["Sec-WebSocket-Key"].encode()
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key + ACCEPTS).digest()).decode())
            self.end_headers()
            self.wfile.write(frame)
            self.rfile.read()  # until the other side lets go of the line, too

    with listening(Greeting) as host:
        yield host


@pytest.mark.parametrize(
    ("frame", "says"), [(CLOSED, "closed the connection in the middle of a request"), (HELLO, "is no NDIF server")]
)
def test_a_line_that_ends_before_a_request_is_taken(models: Path, frame: bytes, says: str) -> None:
    with web_socket(frame) as host, configured(host):
        backend: Any = remote(models / "llama", offline=True)
        backend._connection.patience = 0.01
        with pytest.raises(RemoteError, match=says):
            backend.forward(ONE, reads=Read.means((0,)))


@pytest.mark.parametrize("key", ["", "not-a-key", "11111111-2222-4333-8444-555555555555"])
def test_a_key_that_is_missing_or_wrong(strict_server: str, models: Path, key: str) -> None:
    says = "does not accept the key" if key else "wants a key"
    with configured(strict_server, key), pytest.raises(RemoteError, match=f"{says}; get one at") as raised:
        remote(models / "llama")
    with configured(strict_server, key):
        backend = remote(models / "llama", offline=True)
        with pytest.raises(RemoteError, match=f"{says}; get one at") as raised_later:
            backend.forward(ONE, reads=Read.means())
    for error in (raised.value, raised_later.value):
        shown: BaseException | None = error
        while shown is not None:  # as far as a traceback would show
            assert not key or key not in f"{shown!r} {shown}"
            shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


def test_a_key_that_is_accepted(strict_server: str, models: Path) -> None:
    result = CliRunner().invoke(app, ["remote", "status", "--json"], catch_exceptions=False)
    assert '"account": "someone@example.org"' in result.stdout
    assert KEY not in result.output
    remote(models / "llama").forward(ONE, reads=Read.means())


def test_the_key_is_in_nothing_that_is_kept(strict_server: str, models: Path, tmp_path: Path) -> None:
    backend = remote(models / "llama")
    settings = ExtractionSettings(questions=4, paired=False, rollouts=RolloutSettings(max_new_tokens=24))
    vectors = extract(backend, "optimistic", tmp_path / "run", settings=settings).vectors
    kept = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(kept) > 5
    for text in (*kept, repr(vars(backend)).encode(), vectors.to_bytes()):
        assert KEY.encode() not in text


def test_a_model_that_the_server_cannot_run(server: str, models: Path, tmp_path: Path) -> None:
    """Its configuration is here, its weights are nowhere; the message names what there is."""
    remote(models / "qwen2")
    tiny_model().config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RemoteError, match=r"is not deployed on http.*models that answer now: .*qwen2.* cannot run"):
        remote(tmp_path)


def test_a_client_that_is_too_old(later_server: str, models: Path) -> None:
    with pytest.raises(
        RemoteError, match=r"does not take requests of this client: .*below the minimum supported 99\.0"
    ):
        remote(models / "llama")


class Raising(Edit):
    """Names an operation that there is none of, which comes out once the model has reached its layer."""

    def plain(self) -> dict[str, Any]:
        return {**super().plain(), "operation": "explode"}


def test_a_block_that_raises(server: str, models: Path) -> None:
    backend: Any = remote(models / "llama")
    before = backend.traffic.requests
    edit = Raising(1, direction(), Operation.ADD, 1.0)
    with pytest.raises(RemoteError, match=r"a trace failed on the server: .*explode.* \(--debug") as raised:
        backend.forward(ONE, [edit], Read.means())
    assert "Traceback" in str(raised.value.__cause__)
    assert backend.traffic.requests == before + 1  # it would only raise again
    backend.forward(ONE, reads=Read.means())


def test_a_request_that_takes_too_long_here(server: str, models: Path) -> None:
    backend: Any = remote(models / "llama", request_timeout=60)
    backend._connection.timeout = 0.001
    with pytest.raises(RemoteError, match=r"no result after 0 s; .*--request-timeout"):
        backend.generate(PROMPTS, Sampling(40))


def test_a_request_that_takes_too_long_there_is_split(strict_server: str, models: Path) -> None:
    """The server's limit is three seconds; two rows run into it, and one row does too in the end."""
    backend: Any = remote(models / "llama")
    backend.end_ids = ()  # it never stops by itself
    backend.context_length = None  # and longer than the model was made for, which has rotary positions
    rows = [PROMPTS[0]] * 2
    with pytest.raises(RequestTooLargeError, match="took longer than the server allows; let fewer rows"):
        generate_rows(backend, rows, Sampling(4000))


def test_a_result_that_does_not_fit_is_split(server: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from persona_lens_nnsight import remote_adapter

    backend: Any = remote(models / "llama")
    whole = backend.generate([*PROMPTS, PROMPTS[0]], Sampling(3), (), Read.means())
    before = backend.traffic.requests
    # What two rows bring back: three means at three layers.
    monkeypatch.setattr(remote_adapter, "INLINE_BYTES", 2 * 4 * whole.reads["prompt_mean"][0].numel() * 3)
    found = generate_rows(backend, [*PROMPTS, PROMPTS[0]], Sampling(3), (), Read.means())
    assert backend.traffic.requests == before + 2
    assert found.responses == whole.responses


def test_a_store_elsewhere_is_not_trusted(server: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from persona_lens_nnsight.request import Request

    backend: Any = remote(models / "llama")
    request = Request(backend._connection)
    with pytest.raises(RequestTooLargeError, match=r"--store-host store\.example"):
        request.download_result("https://store.example/result?signature=1")


def test_a_server_that_fails_for_a_moment(server: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line goes dead twice in the middle of a request; the same request is sent again."""
    import websocket

    from persona_lens_nnsight.request import Request

    said: list[str] = []
    backend: Any = remote(models / "llama", on_status=said.append)
    wanted = backend.generate(PROMPTS, Sampling(4))
    connection = backend._connection
    connection.patience = 0.01
    original, fails = Request._next, [True, True]

    def failing(self: Any, *arguments: Any) -> Any:
        if fails:
            fails.pop()
            raise websocket.WebSocketConnectionClosedException("gone")
        return original(self, *arguments)

    monkeypatch.setattr(Request, "_next", failing)
    before = backend.traffic.requests
    assert backend.generate(PROMPTS, Sampling(4)) == wanted
    assert backend.traffic.requests == before + 3
    assert sum("closed the connection in the middle of a request; attempt" in text for text in said) == 2
    assert any(text.startswith(("queued", "running")) for text in said)


def test_options_that_mean_nothing(models: Path) -> None:
    with pytest.raises(Exception, match="dtype is the server's to choose"):
        remote(models / "llama", dtype="float32")
    with pytest.raises(Exception, match="request_timeout only means something for a remote model"):
        open_backend("nnsight", str(models / "llama"), request_timeout=3)
