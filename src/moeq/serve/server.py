"""Runs the application until it is told to stop, and ends what is begun."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from fastapi import FastAPI

PATIENCE: Final = 5
"""Seconds for what is open to end when the server is told to stop."""


class Server(uvicorn.Server):
    """Tells when it listens and when it is told to stop, which by SIGINT and SIGTERM is the usual end."""

    def __init__(
        self, app: FastAPI, listening: Callable[[], None], stopping: Callable[[], None], *, requests: bool
    ) -> None:
        """Make it.

        Args:
            app: the application.
            listening: called when requests are taken.
            stopping: called when no more are; it ends the answers that are in the making.
            requests: log each of them.
        """
        super().__init__(
            uvicorn.Config(
                app,
                log_level="info" if requests else "warning",
                timeout_graceful_shutdown=PATIENCE,
                lifespan="off",
                server_header=False,
            )
        )
        self._listening, self._stopping = listening, stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so, then wait for what is open."""
        self._stopping()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals stop the server and nothing else: they are not raised again after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
