"""Being told to end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raising_on_sigterm(error: type[BaseException]) -> Iterator[None]:
    """SIGTERM raises `error` instead of cutting the process off; in another thread than the main one, which alone may
    catch signals, this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def tell(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
