"""What the nodes of a TrainJob say: the first one's log as it grows, every one's last lines, why they do not start."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from components.common.kube import ClusterError, call, troubles
from components.update.cluster import Here, node_number

CONTAINER = "node"
LAST_LINES = 20
RECONNECT_SECONDS = 1.0
SKEW_SECONDS = 60
"""Clocks of two machines may differ by that much; lines that come twice are told apart by their time stamps."""
READ_SECONDS = 120.0
"""Silence after which the connection is made anew."""

log = logging.getLogger("grpo")


class LogFollower:
    """Prints the first node's log in a thread; a connection that breaks is made again, and no line comes twice."""

    def __init__(self, here: Here, job: str) -> None:
        self.here, self.job, self.ended = here, job, threading.Event()
        self.pod = ""
        self.last: tuple[datetime, str] | None = None
        self.thread: threading.Thread | None = None

    def attend(self, pods: list[Any]) -> None:
        """Begins once the first node runs."""
        first = next((pod for pod in pods if node_number(pod) == 0 and pod.status.phase != "Pending"), None)
        if first is not None and self.thread is None:
            self.pod = first.metadata.name
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """Ends; what the log had up to here is printed first when the connection stands."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join(timeout=2 * RECONNECT_SECONDS + 1)

    def _run(self) -> None:
        import urllib3
        from kubernetes.client.exceptions import ApiException

        while True:
            over = self.ended.is_set()
            try:
                for line in self._lines(follow=not over):
                    print(f"[node 0] {line}", flush=True)
            except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
                log.info("TrainJob %s: the log broke off (%s); connecting again", self.job, type(error).__name__)
            if over:
                return
            self.ended.wait(RECONNECT_SECONDS)

    def _lines(self, *, follow: bool) -> Iterator[str]:
        """New whole lines, until the connection ends."""
        since: dict[str, Any] = {}
        if self.last:
            silent = datetime.now(UTC) - self.last[0]
            since["since_seconds"] = max(int(silent.total_seconds()), 0) + SKEW_SECONDS
        answer = self.here.core.read_namespaced_pod_log(
            self.pod, self.here.namespace, container=CONTAINER, follow=follow, timestamps=True,
            _preload_content=False, _request_timeout=(10, READ_SECONDS), **since,
        )  # fmt: skip
        with contextlib.closing(answer):
            rest = b""
            for chunk in answer.stream(amt=None, decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from self._new(lines)
            yield from self._new([rest] if rest else [])  # not reached when the connection broke: it comes again whole

    def _new(self, lines: list[bytes]) -> Iterator[str]:
        for line in lines:
            stamp, _, text = line.decode(errors="replace").partition(" ")
            try:  # in the node's own time zone; the text tells what is below a microsecond
                moment = datetime.fromisoformat(stamp), stamp
            except ValueError:  # what the kubelet says itself has no time stamp
                yield f"{stamp} {text}".rstrip()
                continue
            if self.last is None or moment > self.last:
                self.last = moment
                yield text


def last_words(here: Here, job: str) -> str:
    """Last lines of every node, and the warnings about the job, for an error's message."""
    parts = []
    for pod in here.pods(job):
        parts += [f"  {trouble}" for trouble in troubles(pod)]
        parts.append(f"  node {node_number(pod)} ({pod.metadata.name}), {pod.status.phase}, its last lines:")
        parts += [f"    {line}" for line in _tail(here, pod.metadata.name)]
    parts += [f"  event: {event}" for event in warnings_of(here, job)]
    return "".join("\n" + part for part in parts) or "\n  (no pod of it is left)"


def _tail(here: Here, pod: str) -> list[str]:
    read = here.core.read_namespaced_pod_log
    try:
        text = call("read the log", lambda: read(pod, here.namespace, container=CONTAINER, tail_lines=LAST_LINES))
    except ClusterError as error:  # never started, or gone with its machine
        return [f"(no log: {error})"]
    return text.splitlines() or ["(none)"]


def warnings_of(here: Here, name: str) -> list[str]:
    """Warnings about the job and whatever was made for it, oldest first, each once."""
    selector = "type=Warning"
    listing = call("list the events", lambda: here.core.list_namespaced_event(here.namespace, field_selector=selector))
    found = listing.items
    ours = [event for event in found if (event.involved_object.name or "").startswith(name)]
    ours.sort(key=lambda event: str(event.last_timestamp or event.event_time or ""))
    return list(dict.fromkeys(f"{event.involved_object.name}: {event.reason}: {event.message}" for event in ours))


def node_troubles(here: Here, job: str, pods: list[Any]) -> str:
    """Why the nodes do not start, in one text; blank when nothing is wrong."""
    if not pods:  # a quota or a policy keeps them from being made
        return "; ".join(warnings_of(here, job)[-3:])
    return "; ".join(trouble for pod in pods if pod.status.phase == "Pending" for trouble in troubles(pod))
