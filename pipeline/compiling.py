"""Compiling to KFP IR, and what the SDK cannot say: drop-downs for the enumerations."""

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from components.common.errors import SettingsError
from components.configure.config import RunSettings
from components.configure.form import form_fields
from pipeline.settings import PipelineSettings

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml where PyYAML has it: ten times quicker on an IR of 20 iterations."""


def compile_to(settings: PipelineSettings, output: Path, *, remaining: int = 0) -> int:
    """Writes the IR of these settings to `output`, whole or not at all; gives the number of tasks.

    With `remaining` iterations for later runs, the run's last task submits the next one.

    Raises:
        SettingsError: more tasks than one run holds; the message says how many iterations fit.
    """
    from google.protobuf.json_format import MessageToDict

    from pipeline.graph import build

    tasks = task_count(settings) + bool(remaining)
    if tasks > settings.cluster.max_tasks:
        raise SettingsError(_too_many(settings, tasks))
    graph = build(settings, on_cluster=True, remaining=remaining)
    # KFP's own writer puts every default into a comment at the top as it is, and a line break there ends the comment.
    documents = [MessageToDict(graph.pipeline_spec), MessageToDict(graph.platform_spec)]
    _add_choices(documents[0])
    if output.is_dir() or not output.resolve().parent.is_dir():
        what = "is a folder" if output.is_dir() else f"cannot be written: there is no folder {output.parent}"
        raise SettingsError(f"{output} {what}; name a file in a folder that is there")
    with tempfile.TemporaryDirectory(dir=output.resolve().parent) as folder:
        draft = Path(folder) / "pipeline.yaml"
        draft.write_text(yaml.dump_all(documents, Dumper=DUMPER))
        os.replace(draft, output)
    return tasks


def tasks_per_iteration(settings: PipelineSettings) -> int:
    """KFP tasks of one iteration: rollout (a loop and its members when sharded), reward, update, evaluate."""
    rollouts = 1 if settings.shards == 1 else settings.shards + 1
    return rollouts + 3


def task_count(settings: PipelineSettings) -> int:
    """KFP tasks of a run: configure, dataset, the iterations, the final rollout, reward and evaluate, publish.

    With staleness 1 and more than one iteration the last policy but one has a rollout and a reward of its own.
    """
    each = tasks_per_iteration(settings)
    own = (each - 2) * settings.staleness if settings.iterations > 1 else 0
    return 2 + settings.iterations * each + own + (each - 1) + 1


def iterations_that_fit(settings: PipelineSettings) -> int:
    """Most iterations one run of these settings holds."""
    each = tasks_per_iteration(settings)
    fixed = 4 + (each - 1) + (each - 2) * settings.staleness  # 4: configure, dataset, publish, submit next
    return max(1, (settings.cluster.max_tasks - fixed) // each)


def _too_many(settings: PipelineSettings, tasks: int) -> str:
    fit = iterations_that_fit(settings)
    limit = f"{tasks} tasks, and cluster.max_tasks is {settings.cluster.max_tasks}"
    if settings.iterations <= fit:
        return f"shards: an iteration of {settings.shards} makes a run of {limit}; lower shards and give each more GPUs"
    return (
        f"iterations: {settings.iterations} make {limit}; {fit} iterations fit, set that, or use `grpo submit`, which "
        "makes a chain of runs"
    )


def _add_choices(ir: dict[str, Any]) -> None:
    """Enumerations become drop-downs: the IR has `literals` for them, the SDK cannot write them."""
    parameters = ir["root"]["inputDefinitions"]["parameters"]
    for field in form_fields(RunSettings):
        if field.choices and field.name in parameters:
            parameters[field.name]["literals"] = list(field.choices)
