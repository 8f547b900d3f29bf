"""`grpo artifacts`: what is in the store, where it came from, whether it is whole, and what can go."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from components.common.gc import Plan
    from components.common.lineage import Node, Recorded
    from components.common.manifest import Manifest
    from components.common.store import Store

app = typer.Typer(no_args_is_help=True, help="Look into the object store: list, show, trace, fetch, verify, collect.")

StoreUrl = Annotated[
    str, typer.Option("--store", help="`s3://bucket/prefix?endpoint=...`, `file:///folder`, or a local path.")
]
Reference = Annotated[
    str, typer.Argument(help="A name as `ls` prints it, a manifest file, or the start of a digest.", metavar="ARTIFACT")
]
KeepLast = Annotated[int, typer.Option(help="Iterations of each fine-tune whose weights and rollouts stay.")]
DEFAULT_STORE, KEEP_LAST = "runs/store", 4


def _open(url: str) -> "Store":
    from components.common.errors import SettingsError
    from components.common.store import open_store

    if "://" in url:
        return open_store(url)
    if not Path(url).is_dir():
        raise SettingsError(f"--store: no folder {url}; name the store the run used")
    return open_store(Path(url).resolve().as_uri())


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, 160)  # a name that is cut cannot be copied
    return console


def human(size: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@app.command("ls")
def list_artifacts(
    prefix: Annotated[str, typer.Argument(help="Start of the names: `fine-tune/run`.", metavar="PREFIX")] = "",
    store: StoreUrl = DEFAULT_STORE,
    kind: Annotated[str, typer.Option(help="policy, optimizer, prompts, rollout, scored, evaluation, decision.")] = "",
) -> None:
    """List artifacts, oldest first; `gone` are those whose objects were collected or lost."""
    from rich.table import Table

    from components.common.lineage import history

    opened = _open(store)
    there = {stat.key for stat in opened.list("blobs/")}
    table = Table("artifact", "kind", "digest", "size", "stored", "created", box=None, pad_edge=False)
    for one in history(opened, prefix):
        manifest = one.manifest
        stored = human(_stored(one)) if all(key in there for key, _, _ in _objects(one)) else "gone"
        if kind in ("", manifest.kind):
            created = manifest.created.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
            table.add_row(one.name, manifest.kind, manifest.digest[7:19], human(manifest.size), stored, created)
    _console().print(table)


def _stored(one: "Recorded") -> int:
    """Bytes the artifact's own objects take: of a patched file its last patch."""
    return sum(file.patch.steps[-1].size if file.patch else file.size for file in one.manifest.files)


@app.command()
def show(
    artifact: Reference,
    store: StoreUrl = DEFAULT_STORE,
    prompt: Annotated[str, typer.Option(help="Id of a prompt: print its completions instead, a JSON line each.")] = "",
) -> None:
    """Print an artifact's manifest, or what it holds of one prompt."""
    from components.common.lineage import find

    opened = _open(store)
    manifest = find(opened, artifact).manifest
    if not prompt:
        typer.echo(manifest.dump().decode(), nl=False)
        return
    for row in _samples(opened, manifest, prompt):
        typer.echo(json.dumps(row, ensure_ascii=False))


def _samples(store: "Store", manifest: "Manifest", prompt: str) -> list[dict[str, Any]]:
    """Completions of a prompt in a rollout or scored artifact."""
    import tempfile

    from components.common import artifacts, scored
    from components.common.errors import SettingsError

    tables = [name for name in manifest.names if name.endswith(".parquet")]
    with tempfile.TemporaryDirectory() as folder:
        artifacts.fetch(store, manifest, Path(folder), tables)
        found = scored.samples_of(Path(folder), prompt)
    if not found:
        raise SettingsError(
            f"--prompt: no completions of {prompt!r} in this {manifest.kind} artifact; want a prompt_id of a rollout's"
        )
    return found


@app.command()
def lineage(artifact: Reference, store: StoreUrl = DEFAULT_STORE) -> None:
    """Show what an artifact derives from, back to the base model and the prompts."""
    from rich.tree import Tree

    from components.common import lineage as lines

    opened = _open(store)
    root = lines.lineage(lines.history(opened), lines.find(opened, artifact))

    def grow(tree: Any, node: "Node") -> None:
        for parent in node.parents:
            grow(tree.add(_label(parent)), parent)

    tree = Tree(_label(root))
    grow(tree, root)
    _console().print(tree)


def _label(node: "Node") -> str:
    role = f"{node.role}: " if node.role else ""
    if node.found is None:
        return f"{role}{node.digest[7:19]}, not in this store"
    manifest = node.found.manifest
    more = " (above)" if node.repeated and manifest.parents else ""
    return f"{role}[bold]{node.found.name}[/]  {manifest.digest[7:19]}  by {manifest.producer.stage}{more}"


@app.command()
def fetch(
    artifact: Reference,
    folder: Annotated[Path, typer.Argument(help="Folder to write the files to.", metavar="DIR")],
    store: StoreUrl = DEFAULT_STORE,
    names: Annotated[list[str] | None, typer.Option("--file", help="Only this file; repeatable.")] = None,
) -> None:
    """Bring an artifact's files here, each checked against its digest."""
    import time

    from components.common import artifacts
    from components.common.errors import SettingsError
    from components.common.lineage import find

    opened = _open(store)
    manifest = find(opened, artifact).manifest
    if unknown := set(names or ()) - manifest.names:
        raise SettingsError(
            f"--file: no {', '.join(sorted(unknown))} in it; it has {', '.join(sorted(manifest.names))}"
        )
    started = time.monotonic()
    artifacts.fetch(opened, manifest, folder, names, own=True)
    size = sum(file.size for file in manifest.files if not names or file.name in names)
    typer.echo(f"{folder}: {human(size)} in {time.monotonic() - started:.1f} s, verified")


@app.command()
def verify(
    prefix: Annotated[str, typer.Argument(help="Start of the names; nothing: all of them.", metavar="PREFIX")] = "",
    store: StoreUrl = DEFAULT_STORE,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only look whether objects are there, whole in length.")
    ] = False,
    keep_last: KeepLast = KEEP_LAST,
) -> None:
    """Read every object that artifacts name and check its digest; status 1 when one is changed, or missing from what a
    collection with this --keep-last keeps. What is missing elsewhere counts as collected."""
    from components.common import gc as collector
    from components.common.lineage import PREFIX, history

    opened = _open(store)
    records = history(opened)
    live = collector.kept(opened, records, keep_last=keep_last)
    chosen = [one for one in records if one.key.startswith(PREFIX + prefix)]
    sizes = {key: size for one in chosen for key, _, size in _objects(one)}
    needed = {key for one in chosen if one.key in live for key, _, _ in _objects(one)}
    collected = sizes.keys() - needed - {stat.key for stat in opened.list("blobs/")}
    objects = {key: size for key, size in sorted(sizes.items()) if key not in collected}
    problems = [found for key, size in objects.items() if (found := _problem(opened, key, size, quick))]
    for line in [*(f"{key}: collected" for key in sorted(collected)), *problems]:
        typer.echo(line)
    total = sum(objects.values())
    typer.echo(
        f"{len(objects)} objects, {human(total)}, {len(problems)} missing or changed; {len(collected)} collected"
    )
    if problems:
        raise typer.Exit(1)


def _objects(one: "Recorded") -> Iterator[tuple[str, str, int]]:
    for file in one.manifest.files:
        whole = (file.patch.base, file.patch.base_size) if file.patch else (file.digest, file.size)
        yield file.key, *whole
        for step in file.patch.steps if file.patch else ():
            yield step.key, step.digest, step.size


def _problem(store: "Store", key: str, size: int, quick: bool) -> str | None:
    """What is wrong with an object. Its name says its digest, so reading it checks it."""
    import tempfile

    from components.common.errors import ArtifactNotFound, DigestMismatch

    found = store.stat(key)
    if found is None:
        return f"{key}: missing"
    if found.size != size:
        return f"{key}: {found.size} bytes, want {size}"
    if quick:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            store.get_file(key, Path(folder) / "object")
        except (ArtifactNotFound, DigestMismatch) as error:
            return str(error)
    return None


@app.command()
def gc(
    store: StoreUrl = DEFAULT_STORE,
    keep_last: KeepLast = KEEP_LAST,
    keep_champions: Annotated[bool, typer.Option(help="Keep accepted policies too.")] = True,
    grace_hours: Annotated[
        float, typer.Option(help="Younger blobs stay; below 24 only while nothing is being published.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete blobs that no kept artifact needs; manifests stay as the history."""
    from components.common import gc as collector

    opened, grace = _open(store), timedelta(hours=grace_hours)
    plan = collector.plan(opened, keep_last=keep_last, keep_champions=keep_champions, grace=grace)
    _tell(plan, dry_run)
    if not dry_run:
        typer.echo(f"freed {human(collector.sweep(opened, plan, grace=grace))}")


def _tell(plan: "Plan", dry_run: bool) -> None:
    if dry_run:
        for blob in plan.sweep:
            typer.echo(f"{blob.key}  {human(blob.size)}  {blob.modified:%Y-%m-%d %H:%M}")
    waiting = sum(stat.size for stat in plan.young)
    typer.echo(
        f"{len(plan.live)} artifacts kept, {human(plan.live_bytes)}; {len(plan.sweep)} blobs to go, "
        f"{human(plan.bytes)}; {len(plan.young)} not needed but young, {human(waiting)}"
    )
