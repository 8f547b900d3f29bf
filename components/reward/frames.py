"""Messages between the stage and its workers: an 8-byte length, then that many bytes. JSON and Arrow, never pickle."""

import json
import socket
import struct
import time
from typing import Any

LENGTH = struct.Struct(">Q")
MAX_REPLY_BYTES = 64 << 20
"""A longer reply is no honest one."""


def send(connection: socket.socket, data: bytes) -> None:
    """Sends one message."""
    connection.sendall(LENGTH.pack(len(data)))
    connection.sendall(data)


def send_json(connection: socket.socket, value: Any) -> None:
    """Sends one message of plain values."""
    send(connection, json.dumps(value).encode())


def receive(connection: socket.socket, *, deadline: float | None = None, limit: int | None = None) -> bytes | None:
    """The next message; None when the other side is gone.

    Raises:
        TimeoutError: it had not come whole at `deadline`, a `time.monotonic()`.
        ValueError: longer than `limit` bytes.
    """
    head = _exactly(connection, LENGTH.size, deadline)
    if head is None:
        return None
    (length,) = LENGTH.unpack(head)
    if limit is not None and length > limit:
        raise ValueError(f"a message of {length} bytes")
    return _exactly(connection, length, deadline)


def _exactly(connection: socket.socket, count: int, deadline: float | None) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        if deadline is not None:
            connection.settimeout(max(1e-3, deadline - time.monotonic()))
        try:
            part = connection.recv(min(count - len(parts), 1 << 20))
        except ConnectionError:  # it died with unread bytes: gone as well
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
