"""The `grpo` commands that look before a run: plan and doctor."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.options import Overrides, SettingsFile, connected

app = typer.Typer()


@app.command()
def plan(
    file: SettingsFile,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="The model's config.json, where the model itself is not to be had.")
    ] = None,
) -> None:
    """Estimate memory, storage traffic, pods, GPU-hours and cost of a run."""
    from components.common.errors import SettingsError
    from pipeline.plan import make_plan
    from pipeline.settings import load
    from pipeline.shape import read_config, read_shape

    settings = load(file, overrides or [])
    made = make_plan(settings, read_config(config) if config else read_shape(settings.model))
    for line in lines_of(made, settings.iterations):
        print(line)
    if made.problems:
        raise SettingsError("; ".join(made.problems))


def lines_of(made: Any, iterations: int) -> list[str]:
    """The plan as text."""
    gib, traffic = 1 << 30, made.traffic
    found = [f"model      {made.shape.parameters / 1e9:.3f} billion parameters ({made.shape.kind})"]
    for name, memory in (("update", made.update), ("rollout", made.rollout)):
        parts = ", ".join(f"{part} {size / gib:.2f}" for part, size in memory.parts.items())
        parts += f"; before that the reference, {memory.reference / gib:.2f}" if memory.reference else ""
        there = "unknown: set gpu_memory or gpu_type" if memory.available is None else f"{memory.available / gib:.1f}"
        verdict = {None: "?", True: "fits", False: "DOES NOT FIT"}[memory.fits]
        found.append(f"{name:<10} {memory.total / gib:.2f} GiB a process ({parts}); there: {there}; {verdict}")
    if made.concurrent is not None:
        found.append(f"{'':<10} {made.concurrent} of the longest samples at once")
    found.append(
        f"storage    up {traffic.up_delta / gib:.2f} GiB an iteration with patches, {traffic.up_full / gib:.2f} else "
        f"(policy {traffic.policy / gib:.2f}, patch {traffic.patch / gib:.3f}, optimizer "
        f"{traffic.optimizer / gib:.2f}, completions {traffic.completions / gib:.3f}); down {traffic.down / gib:.2f}"
    )
    found.append(f"pods       {made.pods} in {made.tasks} tasks a run, {made.runs} run{'s' if made.runs > 1 else ''}")
    if made.hours is None:
        found.append("GPU-hours  unknown: set cluster.rollout.gpu_type and cluster.update.gpu_type to known GPUs")
        return found
    hours = made.hours
    total = (hours.rollout + hours.update) * iterations
    found.append(
        f"GPU-hours  {hours.rollout:.2f} rollout and {hours.update:.2f} update an iteration, {total:.1f} in all"
    )
    cost = "unknown: cluster.prices lacks a gpu_type" if hours.cost is None else f"{hours.cost * iterations:.2f} in all"
    return [*found, f"cost       {cost}"]


@app.command()
@connected
def doctor(
    file: Annotated[Path | None, typer.Argument(help="Settings file (TOML).", metavar="[FILE]")] = None,
    overrides: Overrides = None,
    *,
    connection: Any,
) -> None:
    """Check what a run on the cluster needs; each problem with the command that mends it."""
    from pipeline.doctor import examine
    from pipeline.settings import load

    failed = False
    for finding in examine(load(file, overrides or []) if file else None, connection):
        print(finding.line(), flush=True)
        failed = failed or finding.state == "failure"
    if failed:
        raise typer.Exit(1)
