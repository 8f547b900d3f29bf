"""What the nodes of a TrainJob say: the first one's log as it grows, every one's last lines, why they do not start."""

import logging
import threading
from typing import Any

from components.common.kube import ClusterError, call, troubles
from components.common.podlog import RECONNECT_SECONDS, PodLog
from components.update.cluster import Here, node_number

CONTAINER = "node"
LAST_LINES = 20

log = logging.getLogger("grpo")


class LogFollower:
    """Prints the first node's log in a thread."""

    def __init__(self, here: Here, job: str) -> None:
        self.here, self.job, self.ended = here, job, threading.Event()
        self.thread: threading.Thread | None = None

    def attend(self, pods: list[Any]) -> None:
        """Begins once the first node runs."""
        first = next((pod for pod in pods if node_number(pod) == 0 and pod.status.phase != "Pending"), None)
        if first is not None and self.thread is None:
            node = PodLog(self.here.core, self.here.namespace, first.metadata.name, CONTAINER)
            self.thread = threading.Thread(target=self._run, args=(node,), daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """Ends; what the log had up to here is printed first when the connection stands."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join(timeout=2 * RECONNECT_SECONDS + 1)

    def _run(self, node: PodLog) -> None:
        try:
            for line in node.follow(self.ended.is_set, self.ended.wait):
                print(f"[node 0] {line}", flush=True)
        except ClusterError as error:  # the job goes on unseen
            log.warning("TrainJob %s: %s", self.job, error)


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
