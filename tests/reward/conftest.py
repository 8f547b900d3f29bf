"""Rollouts made by hand, and a way to run the reward stage on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from components.common.artifacts import publish
from components.common.manifest import Manifest, Producer
from components.common.records import completion_fields, write_table
from components.common.scored import read_scored
from components.common.settings import RunContext, dump_stage
from components.common.store import open_store
from components.reward.config import RewardSettings
from components.reward.stage import run

Row = dict[str, Any]


def sample(prompt_id: str, sample_index: int, completion: str, **other: Any) -> Row:
    """One row of a rollout; its completion has one token a character."""
    ids = [ord(character) for character in completion]
    row = {
        "prompt_id": prompt_id, "sample_index": sample_index, "prompt": f"prompt of {prompt_id}", "prompt_ids": [1, 2],
        "completion": completion, "completion_ids": ids, "logprobs": [-0.5] * len(ids), "finish_reason": "stop",
        "seed": 7, "policy_digest": "blake3:policy", "answer": "4",
    }  # fmt: skip
    return row | other


def group(prompt_id: str, completions: Sequence[str], **other: Any) -> list[Row]:
    """The samples of one prompt."""
    return [sample(prompt_id, index, text, **other) for index, text in enumerate(completions)]


class Case:
    """Publishes rollouts, scores them, reads back what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = RunContext(
            fine_tune="test", run="one", store=(folder / "store").as_uri(), seed=0, iterations=4, shards=1
        )  # fmt: skip
        self.store = open_store(self.context.store)
        self.runs = 0

    def rollout(self, name: str = "completions", *, iteration: int = 2, metadata=None, **splits: list[Row]) -> Path:
        """Publishes one shard; gives its manifest file."""
        files = {}
        for split, rows in splits.items():
            path = self.folder / f"{name}-{split}.parquet"
            files[f"{split}.parquet"] = write_table(pa.Table.from_pylist(rows), path, completion_fields())
        sampling = {"sampling": {"temperature": 1.0}} if metadata is None else metadata
        manifest = publish(
            self.store, self.context, name=name, kind="rollout", files=files, iteration=iteration, metadata=sampling,
            producer=Producer(stage="rollout", key=name, settings_digest="s", code_version="v"),
            metrics={"rollout/num_completions": float(sum(map(len, splits.values()))), "rollout/seconds": 2.0},
        )  # fmt: skip
        path = self.folder / f"{name}.json"
        path.write_bytes(manifest.dump())
        return path

    def run(self, *shards: Path, **settings: Any) -> Manifest:
        """Scores shards; each call is a run of its own."""
        self.runs += 1
        context = self.context.model_copy(update={"run": f"run-{self.runs}"})
        path = self.folder / "scored.json"
        run(dump_stage(context, RewardSettings(**{"num_workers": 1} | settings)), list(shards), path)
        self.manifest = Manifest.load(path)
        return self.manifest

    def score(self, rows: list[Row], **settings: Any) -> list[Row]:
        """Scores one shard of train rows and gives them with their rewards."""
        shard = self.rollout(f"completions-{self.runs}", train=rows)
        self.run(shard, **settings)
        return self.table("train").to_pylist()

    def table(self, split: str) -> pa.Table:
        """Completions with their rewards."""
        folder = self.folder / f"scored-{self.runs}"
        folder.mkdir(exist_ok=True)
        for file in self.manifest.files:
            self.store.get_file(file.key, folder / file.name)
        table = read_scored(folder, split)
        assert table is not None
        return table

    def write(self, source: str, name: str = "mine.py") -> str:
        """Saves a file of reward functions; gives its path."""
        path = self.folder / name
        path.write_text(source)
        return str(path)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def rows_of():
    """Builds the samples of one prompt."""
    return group
