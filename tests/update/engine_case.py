"""A tiny fine-tune to update: policy, scored rollouts and the stage run on them, as the pipeline would."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from components.common import artifacts
from components.common.manifest import Manifest, Producer
from components.common.records import completion_fields, reward_fields, write_table
from components.common.settings import RunContext, dump_stage, validate
from components.common.store import open_store
from components.update.config import UpdateSettings

VOCABULARY = 48
PRODUCER = Producer(stage="test", key="sha256:test", settings_digest="sha256:test", code_version="test")
ROOT = Path(__file__).parents[2]
PATIENCE = 600
"""Seconds after which a process of the stage hangs: alone it takes ten, beside ten times the work minutes."""


def save_tiny_model(folder: Path, *, seed: int = 0, tied: bool = True, dtype: str = "float32", **changes: Any) -> Path:
    """A Qwen3-shaped model of some 15,000 parameters with large random weights, so that probabilities are uneven."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": tied,
        "initializer_range": 0.15, "attn_implementation": "eager",
    }  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**(shape | changes))).to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def plain_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Any:
    """Log-probabilities of a completion's tokens, the plain way: full logits of one unpadded sequence."""
    import torch

    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


@dataclass
class Case:
    """One fine-tune's store and what the stage is called with."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    staleness: int = 0
    run_name: str = "run"
    iterations: int = 4

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = open_store(f"file://{self.folder}/store")

    @property
    def context(self) -> RunContext:
        return validate(RunContext, {
            "fine_tune": "case", "run": self.run_name, "store": self.store.url, "seed": 7,
            "iterations": self.iterations, "staleness": self.staleness,
        })  # fmt: skip

    def settings_text(self, **changes: Any) -> str:
        return dump_stage(self.context, validate(UpdateSettings, self.settings | changes))

    def publish(self, name: str, kind: str, files: dict[str, Path], **more: Any) -> Path:
        """Publishes an artifact as an earlier stage would; gives its manifest file."""
        manifest = artifacts.publish(
            self.store, self.context, name=name, kind=kind, files=files, producer=PRODUCER, **more
        )
        return self.dump(name, manifest)

    def dump(self, name: str, manifest: Manifest) -> Path:
        path = self.folder / f"{name}.json"
        path.write_bytes(manifest.dump())
        return path

    def start(self, model: Path) -> dict[str, Path]:
        """The start policy, an empty optimizer state, the reference."""
        files = {path.name: path for path in model.iterdir()}
        policy = self.publish("start", "policy", files, iteration=0, metadata={"architecture": "tiny"})
        return {"policy": policy, "optimizer": self.publish("empty", "optimizer", {}), "reference": policy}

    def scored(
        self, name: str, model_folder: Path, policy: Path, *, seed: int = 0, lengths: list[int] | None = None,
        num_prompts: int = 4, group_size: int = 3, temperature: float = 0.8, noise: float = 0.0, scores: bool = True,
        **columns: Any,
    ) -> Path:  # fmt: skip
        """Random completions with the policy's own log-probabilities, and random rewards; `columns` replace columns.

        Without `scores` the log-probabilities are -1.
        """
        import pyarrow as pa
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)  # a process with a thread pool cannot be forked
        random = np.random.default_rng(seed)
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        rows: dict[str, list[Any]] = {key: [] for key in completion_fields()}
        digest = Manifest.load(policy).digest
        count = iter(range(num_prompts * group_size))
        for prompt_number in range(num_prompts):
            prompt = random.integers(0, VOCABULARY, random.integers(2, 7)).tolist()
            for sample in range(group_size):
                number = next(count)
                length = lengths[number] if lengths else int(random.integers(1, 12))
                completion = random.integers(0, VOCABULARY, length).tolist()
                logprobs = -np.ones(length)
                if scores:
                    with torch.no_grad():
                        logprobs = plain_logprobs(model, prompt, completion, temperature).numpy()
                row = {
                    "prompt_id": f"p{prompt_number}", "prompt": "?", "prompt_ids": prompt, "sample_index": sample,
                    "completion": "!", "completion_ids": completion, "finish_reason": "stop", "seed": number,
                    "logprobs": (logprobs + noise * random.standard_normal(length)).tolist(), "policy_digest": digest,
                }  # fmt: skip
                for key, value in row.items():
                    rows[key].append(value)
        rewards = columns.pop("reward", random.standard_normal(num_prompts * group_size).round(3).tolist())
        rows |= columns
        rows = {key: value for key, value in rows.items() if value is not None}
        folder = self.folder / name
        folder.mkdir()
        fields = {key: kind for key, kind in completion_fields().items() if key in rows}
        completions = write_table(pa.table(rows), folder / "train.parquet", fields)
        keys = {"prompt_id": rows["prompt_id"], "sample_index": rows["sample_index"]}
        table = pa.table(keys | {"reward": rewards, "error": pa.array([None] * len(rewards), pa.string())})
        scores = write_table(table, folder / "train_rewards.parquet", reward_fields([]))
        metadata = {"sampling": {"temperature": temperature, "max_completion_length": 12}}
        return self.publish(
            name, "scored", {"train.parquet": completions, "train_rewards.parquet": scores}, metadata=metadata
        )

    def arguments(self, inputs: dict[str, Path], scored: Path, *, iteration: int = 0, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of `run`."""
        names = ("next_policy", "next_optimizer")
        outputs = {name: self.folder / f"{self.run_name}-{name}-{iteration}.json" for name in names}
        return {
            "settings": self.settings_text(**changes), "iteration": iteration, **inputs, "scored": scored, **outputs
        }  # fmt: skip

    def update(self, inputs: dict[str, Path], scored: Path, *, iteration: int = 0, **changes: Any) -> "Outcome":
        """Runs the stage in this process."""
        from components.update.stage import run

        arguments = self.arguments(inputs, scored, iteration=iteration, **changes)
        run(**arguments)
        return Outcome(self, arguments["next_policy"], arguments["next_optimizer"], inputs["reference"])

    def command(
        self, inputs: dict[str, Path], scored: Path, *, variables: dict[str, str] | None = None, **changes: Any
    ) -> "subprocess.Popen[str]":
        """Starts the stage as its own process."""
        values = self.arguments(inputs, scored, **changes)
        options = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (variables or {})
        return subprocess.Popen(
            [sys.executable, "-m", "components.update", *options], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


@dataclass
class Outcome:
    """What an update published."""

    case: Case
    policy_path: Path
    optimizer_path: Path
    reference_path: Path

    @property
    def policy(self) -> Manifest:
        return Manifest.load(self.policy_path)

    @property
    def optimizer(self) -> Manifest:
        return Manifest.load(self.optimizer_path)

    @property
    def metrics(self) -> dict[str, float]:
        return self.policy.metrics

    @property
    def inputs(self) -> dict[str, Path]:
        """Inputs of the next update."""
        return {"policy": self.policy_path, "optimizer": self.optimizer_path, "reference": self.reference_path}

    def folder(self, name: str = "fetched") -> Path:
        """The policy's files."""
        target = self.case.folder / f"{name}-{self.policy_path.stem}-{self.policy.digest[-8:]}"
        return artifacts.fetch(self.case.store, self.policy, target)

    def weights(self) -> dict[str, Any]:
        """The policy's weights by name."""
        from safetensors.torch import load_file

        found: dict[str, Any] = {}
        for path in sorted(self.folder().glob("*.safetensors")):
            found |= load_file(path)
        return found

    def state(self) -> dict[str, Any]:
        """The optimizer's state by `<kind>/<parameter>`, put together from all ranks' pieces."""
        import torch
        from safetensors.torch import load_file

        folder = artifacts.fetch(self.case.store, self.optimizer, self.case.folder / f"o{self.optimizer.digest[-12:]}")
        pieces: dict[str, list[tuple[int, Any]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for key, tensor in load_file(path).items():
                name, _, start = key.rpartition("@")
                pieces.setdefault(name, []).append((int(start), tensor))
        ordered = {name: sorted(found, key=lambda piece: piece[0]) for name, found in pieces.items()}
        return {name: torch.cat([tensor for _, tensor in found]) for name, found in ordered.items()}
