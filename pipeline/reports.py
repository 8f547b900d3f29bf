"""What a local run came to: its newest report, brought from the object store into the run's directory; the verdict."""

import re
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from components.common import artifacts
from components.common.errors import ArtifactNotFound
from components.common.manifest import Manifest, manifest_key
from components.common.store import open_store
from pipeline.runs import RunDir

NAMES = ("report.html", "summary.md")


@dataclass(frozen=True)
class Report:
    """A report on this machine: the page, and its summary as Markdown."""

    path: Path
    summary: str

    @property
    def sentences(self) -> list[str]:
        """The summary without heading and table, for a console: with rich's markup, for bold."""
        lines = [line for line in self.summary.splitlines() if line and not line.startswith(("#", "|"))]
        return [re.sub(r"\*\*(.+?)\*\*", r"[bold]\1[/]", escape(line)) for line in lines]


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


def verdict(run: RunDir) -> str:
    """Whether the run's policy became the champion, and why; in rich's markup."""
    store = open_store(run.settings()["store"])
    key = manifest_key(run.fine_tune, run.name, None, "decision")
    try:
        decision = Manifest.parse(store.get_bytes(key), where=key).metadata
    except ArtifactNotFound:
        return "no policy was judged"
    word = "[green]accepted[/]" if decision["accepted"] else "[yellow]rejected[/]"
    return f"{word}: {escape(decision['reason'])}"
