"""Several nodes of one update: each uploads its own ranks' optimizer state, the first one publishes.

Node and number come from torchrun's `PET_*` variables, as Kubeflow Trainer sets them. What the first node has to know
of the others goes through the store, under `parts/`, until the manifests are written. It bears the attempt's name: an
attempt that was killed may have left the state of other weights under the same work's key.
"""

import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from components.common import artifacts
from components.common.errors import ArtifactNotFound, StageError
from components.common.gc import TASK
from components.common.manifest import File
from components.common.stage import Stage
from components.update.config import UpdateSettings

WAIT_SECONDS = 1800.0
"""How long a node waits for another's upload: an optimizer state of 100 GB over a slow link."""
POLL_SECONDS = 0.5
ATTEMPT_FILE = "attempt"
"""File of a node's work folder with the name of this attempt, the same on all nodes."""


def count() -> int:
    """Nodes of this update."""
    return int(os.environ.get("PET_NNODES", "1").partition(":")[0])


def rank() -> int:
    """Number of this node, from 0."""
    return int(os.environ.get("PET_NODE_RANK", "0")) if count() > 1 else 0


def name_attempt(folder: Path, device: str) -> None:
    """Draws a name and leaves it on every node; all processes of the update call it together."""
    import torch

    drawn = torch.tensor([secrets.randbits(62)], device=device)
    torch.distributed.broadcast(drawn, src=0)
    if os.environ["LOCAL_RANK"] == "0":
        (folder / ATTEMPT_FILE).write_text(f"{int(drawn):016x}")


def hand_over(stage: Stage[UpdateSettings], state: Mapping[str, Path]) -> None:
    """Uploads this node's part of the optimizer state, tells the first node, waits until that has published."""
    files = artifacts.upload(stage.store, state)
    stage.store.put_bytes(json.dumps([file.model_dump() for file in files]).encode(), _key(stage, rank()))
    deadline = time.monotonic() + WAIT_SECONDS
    while not stage.adopt():
        _pause(deadline, "the first node has not published")


def collect(stage: Stage[UpdateSettings]) -> list[File]:
    """The other nodes' parts of the optimizer state."""
    deadline, files = time.monotonic() + WAIT_SECONDS, []
    for number in range(1, count()):
        while True:
            try:
                entries = json.loads(stage.store.get_bytes(_key(stage, number)))
            except ArtifactNotFound:
                _pause(deadline, f"node {number} has not uploaded its optimizer state")
            else:
                files += [File.model_validate(entry) for entry in entries]
                break
    return files


def clear(stage: Stage[UpdateSettings]) -> None:
    """Removes what was told, in earlier attempts too; the manifests hold it now."""
    told = [stat.key for stat in stage.store.list(f"{place(stage)}/") if not stat.key.endswith(TASK)]
    for key in told:
        stage.store.delete(key)


def place(stage: Stage[UpdateSettings]) -> str:
    """Where in the store the nodes of this work leave things for each other; the same work has the same place."""
    return f"parts/{stage.producer.key.rpartition(':')[2]}"


def _key(stage: Stage[UpdateSettings], number: int) -> str:
    return f"{place(stage)}/{(stage.work_dir / ATTEMPT_FILE).read_text()}-{number:05d}.json"


def _pause(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise StageError(f"update: {problem} within {WAIT_SECONDS:.0f} s; look at that node's log")
    time.sleep(POLL_SECONDS)
