"""The harness every stage runs in: logging, events, artifacts in and out, and never the same work twice."""

import json
import logging
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from components.common import artifacts, champion
from components.common.errors import AlreadyPublished, ArtifactNotFound, GrpoError, StageError
from components.common.events import Events
from components.common.logs import task_log
from components.common.manifest import File, Kind, Manifest, Producer, code_version, manifest_key, text_digest
from components.common.settings import Settings, TrackingSettings, dump_stage, load_stage
from components.common.signals import raising_on_sigterm
from components.common.store import Store, open_store, write_whole

S = TypeVar("S", bound=Settings)
Inputs = Mapping[str, Path | Sequence[Path]]

log = logging.getLogger("grpo")


@dataclass
class Stage(Generic[S]):
    """One task: a stage's settings, the manifests it reads, the manifests it writes.

    `inputs` and `outputs` map a role (the parameter's name) to manifest files. `names` gives an output's name in
    the store where it is not its role. `iteration` is given as the run counts it, from 0, and held as the fine-tune
    counts it; `output_offset` is 1 where the outputs belong to the policy after this iteration's update. `rests_on`
    names the settings that the result depends on, of the stage's own; none: on all, and on what the run says.
    """

    name: str
    model: type[S]
    settings_text: str
    inputs: Inputs
    outputs: Mapping[str, Path]
    iteration: int | None = None
    shard: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    output_offset: int = 0
    rests_on: Sequence[str] | None = None
    work_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        self.context, self.settings = load_stage(self.model, self.settings_text)
        if self.iteration is not None:
            self.iteration += self.context.first_iteration
        self.events = Events(self.task, stage=self.name, iteration=self.iteration, shard=self.shard)
        self._manifests = {role: self._load(paths) for role, paths in self.inputs.items()}
        self._published: dict[str, Manifest] = {}
        self._outdated: set[str] = set()
        self.started = time.monotonic()
        self.fetch_seconds = 0.0

    @staticmethod
    def _load(paths: Path | Sequence[Path]) -> list[Manifest]:
        return [Manifest.load(Path(path)) for path in ([paths] if isinstance(paths, str | Path) else paths)]

    @property
    def task(self) -> str:
        """Name of this task within its run, as its log file has it."""
        parts = [self.name]
        parts += [] if self.iteration is None else [f"{self.iteration:04d}"]
        parts += [] if self.shard is None or self.context.shards == 1 else [f"shard{self.shard:02d}"]
        return "-".join(parts)

    @property
    def store(self) -> Store:
        """The run's object store."""
        if not hasattr(self, "_store"):
            self._store = open_store(self.context.store)
        return self._store

    @property
    def producer(self) -> Producer:
        """Identity of this task: the same key, the same result."""
        code, settings = code_version(self.name), self._what_counts()
        parents = {role: [manifest.digest for manifest in found] for role, found in sorted(self._manifests.items())}
        key = json.dumps([self.name, settings, parents, self.iteration, self.shard, code])
        return Producer(stage=self.name, key=text_digest(key), settings_digest=text_digest(settings), code_version=code)

    def _what_counts(self) -> str:
        """The settings that the result depends on; where metrics are reported to changes none."""
        if self.rests_on is None:
            return dump_stage(self.context.model_copy(update={"tracking": TrackingSettings()}), self.settings)
        chosen = self.settings.model_dump(mode="json", include=set(self.rests_on))
        return json.dumps([self.context.fine_tune, self.context.run, chosen], sort_keys=True)

    def run_settings(self) -> dict[str, Any]:
        """All settings of the run, as `configure` noted them last; empty for a stage that runs by itself."""
        context = self.context
        key = manifest_key(context.fine_tune, context.run, context.first_iteration, "history")
        try:
            return Manifest.parse(self.store.get_bytes(key), where=key).metadata.get("settings", {})
        except ArtifactNotFound:
            return {}

    def manifest(self, role: str) -> Manifest:
        """The one manifest of an input."""
        (manifest,) = self._manifests[role]
        return manifest

    def manifests(self, role: str) -> list[Manifest]:
        """All manifests of an input that is a list."""
        return self._manifests[role]

    def fetch(self, role: str, names: Sequence[str] | None = None) -> Path:
        """Brings an input's files (or only `names`) into the work directory, verified; gives their folder."""
        return self.fetch_manifest(self.manifest(role), role, names)

    def fetch_manifest(self, manifest: Manifest, folder: str, names: Sequence[str] | None = None) -> Path:
        """Brings the files of any manifest into `folder` of the work directory."""
        directory = self.work_dir / folder
        directory.mkdir(parents=True, exist_ok=True)
        source = self.store if manifest.store == self.store.url else open_store(manifest.store)
        started = time.monotonic()
        try:
            return artifacts.fetch(source, manifest, directory, names)
        finally:
            self.fetch_seconds += time.monotonic() - started

    def publish(
        self,
        role: str,
        *,
        kind: Kind,
        files: Mapping[str, Path] | None = None,
        reuse: Sequence[File] = (),
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Publishes an output; its manifest file appears when the whole stage is done.

        `metadata["seconds"]` says how long the stage has worked until then.
        """
        assert role in self.outputs, f"{self.name} has no output {role}"
        self._make_room(role)
        seconds = {"seconds": round(time.monotonic() - self.started, 3)}
        if kind == "policy" and self.fetch_seconds:
            metrics = {**(metrics or {}), "artifact/fetch_seconds": self.fetch_seconds}
        self._published[role] = artifacts.publish(
            self.store, self.context, name=self._name(role), kind=kind, files=files or {}, reuse=reuse,
            producer=self.producer, parents=self._parents(), iteration=self._iteration(),
            metrics=metrics, metadata={**(metadata or {}), **seconds},
        )  # fmt: skip
        return self._published[role]

    def withdraw(self, role: str) -> None:
        """Takes back an output that an attempt published before it was killed, for one that belongs with the others."""
        if self._published.pop(role, None):
            self.store.delete(self.key(role))

    def adopt(self) -> bool:
        """Takes over what another node of this very task has published; False: it is not all there yet."""
        self._published = self._already()
        return len(self._published) == len(self.outputs)

    def progress(self, done: int, total: int, **figures: float) -> None:
        """Tells how far a long stage is: in its log and in the live view."""
        shown = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
        log.info("%s: %d of %d %s", self.task, done, total, shown)
        self.events.emit("progress", done=done, total=total, figures=figures)

    def _make_room(self, role: str) -> None:
        """Removes what this very run had published before its settings or code changed, now that it is made anew."""
        if role in self._outdated:
            self.store.delete(self.key(role))
            self._outdated.discard(role)

    def key(self, role: str) -> str:
        """Where an output's manifest lies in the store."""
        return manifest_key(self.context.fine_tune, self.context.run, self._iteration(), self._name(role))

    def _name(self, role: str) -> str:
        name = self.names.get(role, role)
        return name if self.shard is None else f"{name}-{self.shard:02d}"

    def _iteration(self) -> int | None:
        return None if self.iteration is None else self.iteration + self.output_offset

    def _parents(self) -> dict[str, str]:
        """Role → digest; a list's members are numbered."""
        return {
            role if len(found) == 1 else f"{role}[{position}]": manifest.digest
            for role, found in self._manifests.items()
            for position, manifest in enumerate(found)
        }

    def _already(self) -> dict[str, Manifest]:
        """Outputs that the same work has published before. Raises AlreadyPublished when other work took the name."""
        found = {}
        work = self.producer.key
        for role in self.outputs:
            name = self.key(role)
            try:
                manifest = Manifest.parse(self.store.get_bytes(name), where=name)
            except ArtifactNotFound:
                continue
            if manifest.producer.key != work:
                self._check_own(name, manifest)
                self._outdated.add(role)
            elif all(self.store.stat(key) for file in manifest.files for key in file.keys):
                found[role] = manifest
            else:  # collected or lost: the manifest promises what is gone, so the work is done again
                self.store.delete(name)
        return found

    def _check_own(self, name: str, manifest: Manifest) -> None:
        """Only what this run directory has made itself may be made anew, and not under a champion's feet.

        Raises:
            AlreadyPublished
        """
        if manifest.producer.key not in self.events.own_keys():
            raise AlreadyPublished(
                f"{name} was made with other settings, inputs or code: start another run, or resume this as it was"
            )
        present = champion.read(self.store, self.context.fine_tune)
        if present and name in (present.manifest, present.evaluation):
            raise AlreadyPublished(f"{name} is the champion's: resume this run as it was, or start another")


def run_stage(stage: Stage[S], body: Callable[[Stage[S]], None]) -> None:
    """Runs `body` unless its outputs are in the store already; then writes the manifest files.

    Raises:
        GrpoError: as the body raises it, after the failure was logged and told.
    """
    with task_log(stage.events.log_path):
        try:
            with raising_on_sigterm(_Ended):  # stages with more to save handle it themselves
                _run(stage, body)
        except BaseException as error:
            message = str(error) if isinstance(error, GrpoError | _Ended) else f"{type(error).__name__}: {error}"
            stage.events.emit("failed", error=message, log=str(stage.events.log_path or ""))
            log.error("%s failed: %s", stage.task, message, exc_info=not isinstance(error, GrpoError | _Ended))
            raise


class _Ended(SystemExit):
    """SIGTERM came: the process ends as by the signal, after its work directory was removed."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "told to end (SIGTERM); nothing was published"


def _run(stage: Stage[S], body: Callable[[Stage[S]], None]) -> None:
    stage._published = stage._already()
    if len(stage._published) == len(stage.outputs):
        log.info("%s: done before, nothing to do", stage.task)
        outcome = "skipped"
    else:
        log.info("%s: start", stage.task)
        _work(stage, body)
        outcome = "done"
    for role, path in stage.outputs.items():
        write_whole(Path(path), stage._published[role].dump())
    seconds = time.monotonic() - stage.started
    log.info("%s: %s in %.1f s", stage.task, outcome, seconds)
    stage.events.emit(outcome, seconds=seconds, metrics=_all_metrics(stage))


def _work(stage: Stage[S], body: Callable[[Stage[S]], None]) -> None:
    stage.work_dir = Path(tempfile.mkdtemp(prefix=f"grpo-{stage.task}-"))
    try:
        stage.events.emit("start", key=stage.producer.key, work_dir=str(stage.work_dir))
        body(stage)
    finally:
        shutil.rmtree(stage.work_dir, ignore_errors=True)
    forgotten = set(stage.outputs) - set(stage._published)
    if forgotten:
        raise StageError(f"{stage.task} ended without publishing {', '.join(sorted(forgotten))}")


def _all_metrics(stage: Stage[S]) -> dict[str, float]:
    return {name: value for manifest in stage._published.values() for name, value in manifest.metrics.items()}
