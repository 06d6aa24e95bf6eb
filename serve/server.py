"""The process: uvicorn around the application, with what keeps slow clients and a full port from hurting it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from crossrep.errors import CrossrepError
from serve.answers import dumps
from serve.http import App
from serve.options import Options
from serve.serving import Served

log = logging.getLogger(__name__)

MAX_HEAD = 64 << 10  # bytes of a request's first line and headers
BACKLOG = 2048  # connections that wait to be taken
LOOK_EVERY = 0.5  # seconds between looks at whether the replicas still follow


def run(name: str, bootstrap: str, options: Options) -> None:
    """Serve a space, or what an alias stands for, until SIGTERM or SIGINT, or until a replica cannot go on.

    Raises:
        CrossrepError: the port, the certificate or the folder cannot be used; a replica has ended. The message says why.
    """
    sockets = [listen(options)]
    check_tls(options)
    sys.setswitchinterval(0.0005)  # or a look-up waits 5 ms for a thread that applies records
    served = Served(name, bootstrap, options)
    try:
        server = server_of(served, options)
        address = sockets[0].getsockname()
        scheme = "https" if options.tls_cert else "http"
        log.info("serving %s on %s://%s:%d", name, scheme, f"[{address[0]}]" if ":" in address[0] else address[0], address[1])
        server.run(sockets)
        served.now.check()
    finally:
        served.close()


def listen(options: Options) -> socket.socket:
    """The socket. Raises CrossrepError."""
    if not options.tokens and not options.insecure and not _is_loopback(options.host):
        raise CrossrepError(
            f"{options.host} can be reached from other machines, and anybody could read everything: give a token (--token-file, or "
            "CROSSREP_SERVE_TOKEN), or say --insecure"
        )
    try:
        family, kind, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20
        )  # most answers go at once, without waiting for a first acknowledgement
        bound.bind(address)
        bound.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise CrossrepError(f"{options.host}:{options.port} cannot be listened on: {error}. Choose another: --host, --port") from None
    return bound


def check_tls(options: Options) -> None:
    """Raises CrossrepError: the certificate or its key cannot be used."""
    if options.tls_cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_cert, options.tls_key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise CrossrepError(f"--tls-cert {options.tls_cert} with --tls-key {options.tls_key} cannot be used: {error}") from None


def server_of(served: Served, options: Options) -> uvicorn.Server:
    """The server, not yet running."""
    state: list[uvicorn.Server] = []
    app = App(served, options.limits, list(options.tokens), lambda: len(state[0].server_state.tasks))
    config = uvicorn.Config(
        app,
        http=_protocol(options.client_timeout),
        loop="uvloop",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(options.drain),
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the application logs what it fails at; cut connections are no news
    state.append(_Server(config, served))
    return state[0]


class _Server(uvicorn.Server):
    """Ends when a replica has, and by itself on a signal: uvicorn would raise the signal once more in the end."""

    def __init__(self, config: uvicorn.Config, served: Served):
        super().__init__(config)
        self._served = served

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: whoever runs it stops it
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
        gc.collect()
        gc.freeze()  # what is here now stays: no collection needs to look at it
        watch = loop.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while not self.should_exit:
            await asyncio.sleep(LOOK_EVERY)
            try:
                self._served.now.check()
            except CrossrepError:
                self.should_exit = True


def _protocol(timeout: float) -> type[HttpToolsProtocol]:
    """uvicorn's HTTP/1.1, without its trust in clients: one that takes longer than `timeout` seconds to send a request, or stops taking
    answers for so long, is cut off."""

    class Protocol(HttpToolsProtocol):
        _sending: asyncio.TimerHandle | None = None
        _taking: asyncio.TimerHandle | None = None
        _head = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._sending = self.loop.call_later(timeout, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._sending)
            _cancel(self._taking)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.scope
            super().data_received(data)
            # All of it belongs to one head that has not ended: it has no method yet, and httptools would take any length.
            inside = self.scope is before and before is not None and "method" not in before
            self._head = self._head + len(data) if inside else 0
            if self._head > MAX_HEAD:
                self._refuse(431, "the head of the request is too long", f"{MAX_HEAD} bytes are allowed")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._sending is None:
                self._sending = self.loop.call_later(timeout, self.transport.abort)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._sending = _cancel(self._sending)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._taking = self.loop.call_later(timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._taking = _cancel(self._taking)

        def timeout_keep_alive_handler(self) -> None:
            self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this is not HTTP/1.1", "send a well-formed request")

        def _refuse(self, status: int, error: str, fix: str) -> None:
            body = dumps({"error": error, "fix": fix})
            head = "HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self.transport.write((head % (status, len(body))).encode() + body)
            self.transport.close()

    return Protocol


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
