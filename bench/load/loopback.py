"""Bytes from one process to another through a plain socket: what this machine's loopback can do."""

from __future__ import annotations

import socket
import threading
import time


class Sender:
    """Sends the same bytes to whoever connects, from a thread.

    Args:
        num_bytes: how many.
    """

    def __init__(self, num_bytes: int) -> None:
        self._payload = memoryview(bytes(num_bytes))
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def port(self) -> int:
        """Return where to connect."""
        port: int = self._listening.getsockname()[1]
        return port

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection:
                connection.sendall(self._payload)


def receive(port: int, num_bytes: int) -> float:
    """Fetch that many bytes into fresh memory; return the seconds from connecting on."""
    began = time.perf_counter()
    target = memoryview(bytearray(num_bytes))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        filled = 0
        while filled < num_bytes:
            filled += connection.recv_into(target[filled:])
    return time.perf_counter() - began
