"""Ports for servers that tests start."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A port that the system gives to nobody else meanwhile, and on which a server may listen all the same."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's own; this one never listens
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
