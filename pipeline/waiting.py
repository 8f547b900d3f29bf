"""Waiting for a run on the cluster: the view a local run has, why pods do not start, and the log of one that failed."""

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from components.common.errors import GrpoError, StageError
from components.common.kube import STAGE_LABEL, troubles
from components.common.manifest import Manifest
from components.common.store import Store
from components.configure.start import policy_iterations
from pipeline.connection import ClusterError
from pipeline.following import Pods, Task, follow
from pipeline.resources import STAGES

if TYPE_CHECKING:
    from rich.console import Console

    from components.common.settings import RunContext

TAIL = 60
"""Lines of a failed pod's log."""
MANIFESTS = {"rollout": "completions", "reward": "scored", "update": "policy", "evaluate": "evaluation"}
"""Start of the name of the manifest that has a stage's metrics."""


class TaskEvents:
    """The tasks of a run as the events that a local run writes, so that one view shows both."""

    def __init__(self, metrics: Callable[[Task], dict[str, float]]) -> None:
        self.metrics = metrics
        self.events: list[dict[str, Any]] = []
        self._states: dict[str, str] = {}

    def take(self, tasks: list[Task]) -> None:
        """Adds what has changed."""
        for task in tasks:
            before = self._states.get(task.name, "PENDING")
            if task.state == before:
                continue
            self._states[task.name] = task.state
            self.events += self._events(task, before)

    def _events(self, task: Task, before: str) -> Iterator[dict[str, Any]]:
        base = {"task": task.name, "stage": task.stage, "iteration": task.iteration, "shard": None}
        begun = _seconds(task.began) or time.time()
        if before == "PENDING":
            yield {"time": begun, "event": "start", **base}
        if task.state == "SUCCEEDED":
            seconds = max(0.0, (_seconds(task.ended) or time.time()) - begun)
            yield {"time": begun + seconds, "event": "done", **base, "seconds": seconds, "metrics": self.metrics(task)}
        elif task.state == "SKIPPED":
            yield {"time": time.time(), "event": "skipped", **base, "metrics": self.metrics(task)}
        elif task.state in ("FAILED", "CANCELED"):
            yield {"time": time.time(), "event": "failed", **base}


def _seconds(moment: datetime | None) -> float | None:
    return moment.timestamp() if moment and moment.timestamp() > 0 else None


def metrics_in(store: Store, fine_tune: str, run: str, task: Task) -> dict[str, float]:
    """What a task of a run has measured, out of its manifests; nothing where there are none."""
    if task.iteration is None or task.stage not in MANIFESTS:
        return {}
    first = min(policy_iterations(store, fine_tune, run), default=0)
    number = first + task.iteration + (task.stage == "update")  # the policy after the update
    found: dict[str, float] = {}
    for stat in store.list(f"manifests/{fine_tune}/{run}/{number:04d}/{MANIFESTS[task.stage]}"):
        found |= Manifest.parse(store.get_bytes(stat.key), where=stat.key).metrics
    return found


class PodNews:
    """What is new about the pods of a run: why one does not run, and the log of one that failed. Each is told once."""

    def __init__(self, namespace: str | None) -> None:
        self.namespace = namespace
        self.blind = False
        self.logged: set[str] = set()
        """Stages a failed pod's log was shown of."""
        self._told: set[str] = set()

    def lines(self, run_id: str) -> Iterator[str]:
        """Lines for the user; where pods may not be looked at, one says so and no more come."""
        if self.blind:
            return
        try:
            pods = Pods.connect(self.namespace)
            for pod in pods.of_run(run_id):
                yield from self._of(pods, pod)
        except ClusterError as error:
            self.blind = True
            yield f"(pods and their logs are not shown: {error})"

    def _new(self, line: str) -> bool:
        known = line in self._told
        self._told.add(line)
        return not known

    def _of(self, pods: Pods, pod: Any) -> Iterator[str]:
        name = pod.metadata.name
        lines = [found if name in found else f"{name}: {found}" for found in troubles(pod)]
        yield from filter(self._new, lines)
        if pod.status.phase == "Failed" and self._new(f"failed {name}"):
            stage = (pod.metadata.labels or {}).get(STAGE_LABEL, "")
            self.logged |= {stage}
            yield f"{name} failed; the end of its log:"
            yield from (f"  {line}" for line in pods.log_of(pod, tail=TAIL))


def watch(
    client: Any, run_id: str, context: "RunContext", console: "Console", *, namespace: str | None, store: Store | None
) -> None:
    """Follows a run to its end, and shows it.

    Raises:
        StageError: it did not succeed.
    """
    from pipeline.live import Watcher
    from pipeline.progress import iteration_records, iteration_table

    def metrics(task: Task) -> dict[str, float]:
        nonlocal store
        try:
            return metrics_in(store, context.fine_tune, context.run, task) if store else {}
        except GrpoError as error:  # figures are for the eye: the run goes on without them
            console.print(f"(metrics are not shown: {error})", markup=False, soft_wrap=True)
            store = None
            return {}

    events, news, state, tasks = TaskEvents(metrics), PodNews(namespace), "", []
    with Watcher(console, context.fine_tune, iterations=context.iterations) as show:
        for run, tasks in follow(client, run_id):
            state = run.state
            events.take(tasks)
            show(events.events)
            for line in news.lines(run_id):
                console.print(line, markup=False, soft_wrap=True)
    console.print(iteration_table(iteration_records(events.events)))
    if state == "SUCCEEDED":
        return
    failed = [task for task in tasks if task.state == "FAILED"]
    if failed and not news.blind and failed[-1].stage not in news.logged and failed[-1].stage in STAGES:
        for line in _last_words(namespace, run_id, failed[-1].stage):
            console.print(line, markup=False, soft_wrap=True)
    raise StageError(f"run {run_id} ended as {state.lower()}" + (f" in {failed[-1].name}" if failed else ""))


def _last_words(namespace: str | None, run_id: str, stage: str) -> Iterator[str]:
    try:
        yield from Pods.connect(namespace).log(run_id, stage, tail=TAIL)
    except GrpoError as error:  # how the run ended matters more
        yield f"({error})"
