"""The log of a pod as it grows, over connections that break."""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from components.common.kube import explain, status_of

RECONNECT_SECONDS = 1.0
SKEW_SECONDS = 60
"""Clocks of two machines may differ by that much; lines that come twice are told apart by their time stamps."""
READ_SECONDS = 120.0
"""Silence after which the connection is made anew."""
LAST_ATTEMPTS = 5
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")

log = logging.getLogger("grpo")


class PodLog:
    """The log of a pod's container from its beginning; each line comes once."""

    def __init__(self, core: Any, namespace: str, pod: str, container: str) -> None:
        self.core, self.namespace, self.pod, self.container = core, namespace, pod, container
        self.last: tuple[datetime, str] | None = None

    def follow(self, over: Callable[[], bool], pause: Callable[[float], Any] = time.sleep) -> Iterator[str]:
        """Lines as they come; ends with what there is once `over()`. A connection that breaks is made again.

        Raises:
            ClusterError: the log may not be read.
        """
        import urllib3
        from kubernetes.client.exceptions import ApiException

        attempts = 0  # to read what there is at the end
        while True:
            last = over()
            try:
                yield from self.lines(follow=not last)
                if last:
                    return
            except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
                refused = explain(error, f"read the log of {self.pod}")
                if status_of(error) in (401, 403):
                    raise refused from error
                attempts += last
                if last and (status_of(error) in (400, 404) or attempts == LAST_ATTEMPTS):
                    yield f"({refused})"
                    return
                log.info("%s: the log broke off (%s); connecting again", self.pod, type(error).__name__)
            pause(RECONNECT_SECONDS)

    def lines(self, *, follow: bool) -> Iterator[str]:
        """New whole lines, until the connection ends."""
        since: dict[str, Any] = {}
        if self.last:
            silent = datetime.now(UTC) - self.last[0]
            since["since_seconds"] = max(int(silent.total_seconds()), 0) + SKEW_SECONDS
        answer = self.core.read_namespaced_pod_log(
            self.pod, self.namespace, container=self.container, follow=follow, timestamps=True,
            _preload_content=False, _request_timeout=(10, READ_SECONDS), **since,
        )  # fmt: skip
        with contextlib.closing(answer):
            rest = b""
            for chunk in answer.stream(amt=None, decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from self._new(lines)
            if rest and not follow:  # else the connection broke, and it comes again whole
                yield from self._new([rest])

    def _new(self, lines: list[bytes]) -> Iterator[str]:
        for line in lines:
            stamp, _, text = line.decode(errors="replace").partition(" ")
            if not STAMP.fullmatch(stamp):  # what the kubelet says itself
                yield f"{stamp} {text}".rstrip()
                continue
            # in the node's own time zone; the text tells what is below a microsecond
            moment = datetime.fromisoformat(stamp), stamp
            if self.last is None or moment > self.last:
                self.last = moment
                yield text
