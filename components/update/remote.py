"""An update that other machines carry out: its task goes to them through the store.

Each node runs `python -m components.update.remote`, which is the update stage with its inputs taken from the task. The
manifests it publishes are the result.
"""

import json
import tempfile
from pathlib import Path

from components.common.command import main
from components.common.gc import TASK
from components.common.settings import dump_stage
from components.common.stage import Stage
from components.common.store import open_store
from components.update.config import UpdateSettings
from components.update.nodes import place

INPUTS = ("policy", "optimizer", "reference", "scored")


def task_key(stage: Stage[UpdateSettings]) -> str:
    """Where the task lies while it is worked on; the same work has the same key."""
    return place(stage) + TASK


def leave(stage: Stage[UpdateSettings]) -> str:
    """Puts the task into the store; gives its key."""
    task = {
        "settings": dump_stage(stage.context, stage.settings),
        "iteration": (stage.iteration or 0) - stage.context.first_iteration,
        "inputs": {role: stage.manifest(role).model_dump(mode="json") for role in INPUTS},
    }
    key = task_key(stage)
    stage.store.put_bytes(json.dumps(task).encode(), key)
    return key


def run(store: str, task: str) -> None:
    """Carries out one node's part of an update.

    store: URL of the store. task: key of the task in it.
    """
    from components.update import stage

    values = json.loads(open_store(store).get_bytes(task))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = {}
        for role, manifest in values["inputs"].items():
            inputs[role] = folder / f"{role}.json"
            inputs[role].write_text(json.dumps(manifest))
        outputs = {role: folder / f"{role}.json" for role in ("next_policy", "next_optimizer")}
        stage.run(settings=values["settings"], iteration=values["iteration"], **inputs, **outputs)


if __name__ == "__main__":
    main(run)
