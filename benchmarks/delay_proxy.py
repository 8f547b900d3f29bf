"""A TCP proxy that adds latency: `python benchmarks/delay_proxy.py PORT --delay-ms 10 --window-kib 1024`.

Every byte arrives `delay` later in each direction (so the round trip grows by twice that), and no more than `window`
bytes of a connection and direction are under way, as with a TCP window of that size. Prints the port it listens on.
"""

import argparse
import socket
import threading
import time
from collections import deque

CHUNK = 256 << 10


class Pipe:
    """One direction of a connection: a queue of (time due, bytes), bounded by the window."""

    def __init__(self, source: socket.socket, target: socket.socket, delay: float, window: int) -> None:
        self.source, self.target, self.delay, self.window = source, target, delay, window
        self.queue: deque[tuple[float, bytes]] = deque()
        self.under_way, self.changed = 0, threading.Condition()
        for work in (self._take, self._give):
            threading.Thread(target=work, daemon=True).start()

    def _take(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.under_way < self.window)
                room = min(CHUNK, self.window - self.under_way)
            try:
                data = self.source.recv(room)
            except OSError:
                data = b""
            with self.changed:
                self.queue.append((time.monotonic() + self.delay, data))
                self.under_way += len(data)
                self.changed.notify_all()
            if not data:
                return

    def _give(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: bool(self.queue))
                due, data = self.queue.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if not data:
                    self.target.shutdown(socket.SHUT_WR)
                    return
                self.target.sendall(data)
            except OSError:
                return
            with self.changed:
                self.under_way -= len(data)
                self.changed.notify_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int, help="port of the server on this machine")
    parser.add_argument("--delay-ms", type=float, default=10.0, help="one way")
    parser.add_argument("--window-kib", type=int, default=1024)
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", options.port))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target in ((client, server), (server, client)):
            Pipe(source, target, options.delay_ms / 1000, options.window_kib << 10)


if __name__ == "__main__":
    main()
