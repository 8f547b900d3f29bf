"""A fine-tune in small: a real store with policies and scored samples, and the real evaluate stage run on them."""

import json
from pathlib import Path

import pyarrow as pa

from components.common.artifacts import publish
from components.common.manifest import Manifest, Producer
from components.common.records import completion_fields, reward_fields, write_table
from components.common.settings import RunContext, TrackingSettings, dump_stage
from components.common.store import open_store
from components.evaluate import stage as evaluate_stage
from components.evaluate.config import EvaluateSettings

TRUTH = {"a": "12", "b": "7"}


def sample(
    completion: str, right: bool | None = None, *, finish: str = "stop", error: str | None = None, extra: float = 0.0
):
    """One sample: what the model wrote and how it was scored (`right` None: no reward)."""
    return {"completion": completion, "right": right, "finish": finish, "error": error, "extra": extra}


class Story:
    """Makes artifacts below `folder` and runs evaluate on them."""

    def __init__(self, folder: Path, *, run: str = "run-1", tracking_uri: str = "", enabled: bool = False) -> None:
        self.folder = folder
        self.digests: dict[int, str] = {}
        self.store = open_store((folder / "store").as_uri())
        self.context = RunContext(
            fine_tune="sums", run=run, store=self.store.url, seed=3, iterations=2,
            tracking=TrackingSettings(uri=tracking_uri, enabled=enabled),
        )  # fmt: skip

    def artifact(
        self, name, kind, files=None, *, iteration=0, stage="update", metrics=None, metadata=None, parents=None
    ):
        """Publishes files under a name; gives the path of the manifest file."""
        producer = Producer(stage=stage, key=f"{name}-{iteration}", settings_digest="s", code_version="test")
        manifest = publish(
            self.store, self.context, name=name, kind=kind, files=files or {}, producer=producer, iteration=iteration,
            metrics=metrics, metadata=metadata, parents=parents,
        )  # fmt: skip
        path = self.folder / f"{self.context.run}-{iteration}-{name}.manifest.json"
        path.write_bytes(manifest.dump())
        if kind == "policy":
            self.digests[iteration] = manifest.digest
        return path

    def policy(self, iteration: int, text: str | None = None, **options) -> Path:
        """A policy of one text file: what is in it does not matter here."""
        path = self.folder / f"policy-{iteration}.txt"
        path.write_text(text or f"weights {iteration}")
        return self.artifact("policy", "policy", {"weights.txt": path}, iteration=iteration, **options)

    def scored(self, iteration: int, metrics: dict | None = None, **splits) -> Path:
        """Scored samples of the policy made last for that iteration: `eval={"a": [sample, ...]}`, `train={...}`.

        The reward functions are match and bonus.
        """
        completions, rewards = {}, {}
        for split, prompts in splits.items():
            rows = [(prompt, i, one) for prompt, group in prompts.items() for i, one in enumerate(group)]
            completions[f"{split}.parquet"] = self._completions(split, rows, self.digests[iteration])
            rewards[f"{split}_rewards.parquet"] = self._rewards(split, rows)
        rollout = self.artifact(
            "completions-00", "rollout", completions, iteration=iteration, stage="rollout",
            metadata={"seconds": 4.0},
        )  # fmt: skip
        parent = Manifest.load(rollout).digest
        return self.artifact(
            "scored", "scored", completions | rewards, iteration=iteration, stage="reward",
            metrics={"reward": 0.5} | (metrics or {}), metadata={"seconds": 1.0}, parents={"completions": parent},
        )  # fmt: skip

    def _completions(self, split, rows, digest):
        table = pa.table({
            "prompt_id": [prompt for prompt, _, _ in rows],
            "prompt": [f"question {prompt}" for prompt, _, _ in rows],
            "prompt_ids": [[1, 2] for _ in rows],
            "sample_index": [i for _, i, _ in rows],
            "completion": [one["completion"] for _, _, one in rows],
            "completion_ids": [list(range(len(one["completion"]))) for _, _, one in rows],
            "logprobs": [[-0.5] * len(one["completion"]) for _, _, one in rows],
            "finish_reason": [one["finish"] for _, _, one in rows],
            "seed": [0 for _ in rows],
            "policy_digest": [digest for _ in rows],
            "answer": [TRUTH.get(prompt, "0") for prompt, _, _ in rows],
        })  # fmt: skip
        return write_table(table, self.folder / f"{split}.parquet", completion_fields())

    def _rewards(self, split, rows):
        match = [None if one["right"] is None else float(one["right"]) for _, _, one in rows]
        extras = [one["extra"] for _, _, one in rows]
        totals = [None if value is None else value + extra for value, extra in zip(match, extras, strict=True)]
        table = pa.table({
            "prompt_id": [prompt for prompt, _, _ in rows],
            "sample_index": [i for _, i, _ in rows],
            "reward": totals,
            "rewards/match": match,
            "rewards/bonus": extras,
            "error": [one["error"] for _, _, one in rows],
        })  # fmt: skip
        return write_table(table, self.folder / f"{split}_rewards.parquet", reward_fields(["match", "bonus"]))

    def evaluate(
        self, iteration: int, policy: Path, scored: Path, history: Path | None = None, **settings
    ) -> "Evaluated":
        """Runs the stage; gives what it wrote."""
        if history is None:
            history = self.artifact(
                "history", "evaluation", stage="configure", metadata={"settings": {"update": {"learning_rate": 1e-6}}}
            )
        out = self.folder / f"{self.context.run}-{iteration}-out"
        chosen = EvaluateSettings(**{"k_values": (1, 2), "bootstrap_samples": 200} | settings)
        paths = {"evaluation": out / "evaluation", "report": out / "report.html", "summary": out / "summary.md"}
        evaluate_stage.run(
            settings=dump_stage(self.context, chosen), iteration=iteration, policy=policy, scored=scored,
            history=history, **paths,
        )  # fmt: skip
        return Evaluated(self, **paths)


class Evaluated:
    """What evaluate wrote, read back."""

    def __init__(self, story: Story, evaluation: Path, report: Path, summary: Path) -> None:
        self.path, self.manifest = evaluation, Manifest.load(evaluation)
        self.report, self.summary = report.read_text(), summary.read_text()
        self.report_path = report
        self.files = {file.name: story.store.get_bytes(file.key).decode() for file in self.manifest.files}

    def json(self, name):
        """A JSON file of the artifact."""
        return json.loads(self.files[name])
