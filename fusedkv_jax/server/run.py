"""Runs a server until SIGTERM or SIGINT, and then until its requests are answered."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from fusedkv_jax.server.app import Server

_log = logging.getLogger(__name__)


class _Uvicorn(uvicorn.Server):
    """The first signal drains, and /ready says so meanwhile; the second ends at once."""

    def __init__(self, config: uvicorn.Config, server: Server, shutdown_timeout: float):
        super().__init__(config)
        self._server, self._timeout = server, shutdown_timeout
        self._draining: asyncio.Task | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the parent's, which ends the process by the same signal in the end.
        del frame
        if not self._server.running.open:
            self.should_exit = self.force_exit = True
            return
        self._server.running.open = False
        _log.info("signal %d: %d requests to finish", sig, len(self._server.running))
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def _begin(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._server.running.drain(self._timeout)
        finally:
            self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can reach; port 0 takes a free one.

    Raises:
        ValueError: the address cannot be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        sock = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot listen on {host} port {port}: {reason}") from None
    # Connections inherit it. Without, the first token waits with the headers for the client's
    # delayed acknowledgement, 40 ms; asyncio sets it only where a socket names its protocol.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def run(server: Server, sock: socket.socket, shutdown_timeout: float = 30.0) -> None:
    """Serve. Returns after SIGTERM or SIGINT, when what was asked has been answered.

    Args:
        server: to run.
        sock: of `listen`.
        shutdown_timeout: seconds that requests have to finish after the signal; the rest are
            aborted, and their clients told so.

    Raises:
        RuntimeError: the server did not start; the log has the cause.
    """
    config = uvicorn.Config(
        server.app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
    )
    _log.info("listening on http://%s:%d", *sock.getsockname()[:2])
    runner = _Uvicorn(config, server, shutdown_timeout)
    asyncio.run(runner.serve(sockets=[sock]))
    if not runner.started:
        raise RuntimeError("the server did not start; its log has the cause")
