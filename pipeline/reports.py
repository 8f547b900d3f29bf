"""The newest report of a local run, brought from the object store into the run's directory."""

from dataclasses import dataclass
from pathlib import Path

from components.common import artifacts
from components.common.errors import ArtifactNotFound
from components.common.manifest import Manifest
from components.common.store import open_store
from pipeline.runs import RunDir

NAMES = ("report.html", "summary.md")


@dataclass(frozen=True)
class Report:
    """A report on this machine: the page, and its summary as Markdown."""

    path: Path
    summary: str


def export_report(run_dir: Path) -> Report:
    """Fetches the report of the run's newest evaluation.

    Raises:
        ArtifactNotFound: no evaluation is done yet.
    """
    run = RunDir(run_dir)
    store = open_store(run.settings()["store"])
    prefix = f"manifests/{run.fine_tune}/{run.name}/"
    keys = [stat.key for stat in store.list(prefix) if stat.key.endswith("/evaluation.json")]
    if not keys:
        raise ArtifactNotFound(f"{run.fine_tune}/{run.name} has no evaluation yet; `grpo show` tells how far it is")
    manifest = Manifest.parse(store.get_bytes(max(keys)), where=max(keys))
    artifacts.fetch(store, manifest, run_dir, [name for name in NAMES if name in manifest.names], own=True)
    summary = run_dir / "summary.md"
    return Report(run_dir / "report.html", summary.read_text() if summary.exists() else "")
