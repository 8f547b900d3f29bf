"""A tiny policy with its tokenizer, prompts, and both published in a store, as the stages before would leave them."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.common import artifacts
from components.common.manifest import Manifest, Producer
from components.common.records import prompt_fields, write_table
from components.common.settings import RunContext, dump_stage
from components.common.store import open_store
from components.rollout.config import RolloutSettings

ROOT = Path(__file__).parents[2]
END, PAD, VOCABULARY, CONTEXT = 1, 0, 32, 128
LETTERS = "0123456789+-=abcdefghijklmnopq"


def make_policy(folder: Path, dtype: str = "float32", seed: int = 0) -> Path:
    """Saves a random Qwen3-shaped model of 2 layers in Hugging Face format, with a tokenizer of single characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        eos_token_id=END, pad_token_id=PAD, bos_token_id=None, initializer_range=0.4,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    vocabulary = {"<pad>": PAD, "<end>": END} | {letter: place + 2 for place, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def bf16_dir(tmp_path_factory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy16"), "bfloat16")


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """Interpreter that has vLLM: `$GRPO_VLLM_PYTHON`, or the environment `make test` installs."""
    found = os.environ.get("GRPO_VLLM_PYTHON") or str(ROOT / ".venv-vllm/bin/python")
    if not os.access(found, os.X_OK):
        pytest.skip(f"no interpreter with vLLM at {found}: `make test` installs it; or set GRPO_VLLM_PYTHON")
    return found


@dataclass
class Job:
    """Files of one rollout job: what `run` takes."""

    folder: Path
    context: RunContext
    policy: Path
    prompts: Path

    def settings(self, **changes) -> str:
        """Settings of the job as JSON."""
        values = {"engine": "transformers", "num_prompts": 12, "group_size": 3, "max_completion_length": 10}
        values["num_threads"] = 1
        return dump_stage(self.context, RolloutSettings.model_validate(values | {"eval_group_size": 2} | changes))

    def arguments(self, *, iteration: int = 0, shard: int = 0, out: str = "completions", **changes) -> dict:
        """Arguments of `run`."""
        return {
            "settings": self.settings(**changes), "iteration": iteration, "shard": shard, "policy": self.policy,
            "prompts": self.prompts, "completions": self.folder / f"{out}.json",
        }  # fmt: skip

    def run(self, **changes) -> Manifest:
        """Runs the stage in this process."""
        from components.rollout.stage import run

        arguments = self.arguments(**changes)
        run(**arguments)
        return Manifest.load(arguments["completions"])

    def table(self, manifest: Manifest, split: str):
        """One of a rollout's tables."""
        from components.common.records import completion_fields, read_table

        folder = artifacts.fetch(open_store(self.context.store), manifest, self.folder / "fetched")
        return read_table(folder / f"{split}.parquet", completion_fields())


def stops_at_part(count: int) -> str:
    """Code of the stage's process, which goes no further once it has saved that many parts: to be killed before."""
    return f"""
import runpy, time
from components.rollout.resume import Saved
save = Saved.save
Saved.save = lambda self, groups: time.sleep(3600) if self.count == {count} else save(self, groups)
runpy.run_module("components.rollout", run_name="__main__", alter_sys=True)
"""


def _prompts(folder: Path, count: int, name: str) -> Path:
    import pyarrow as pa

    rows = []
    for number in range(count):
        ids = random.Random(f"{name}{number}").choices(range(2, VOCABULARY), k=3 + number % 6)
        text = "".join(LETTERS[token - 2] for token in ids)
        rows.append({"prompt_id": f"{name}-{number}", "prompt": text, "prompt_ids": ids, "answer": str(number)})
    return write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", prompt_fields())


@pytest.fixture
def make_job(tmp_path, policy_dir):
    """Publishes a policy folder and prompts into a fresh store."""

    def make(policy: Path = policy_dir, *, name: str = "job", num_train=40, num_eval=7, iteration=0, **context) -> Job:
        folder = tmp_path / name
        folder.mkdir()
        run = RunContext(
            fine_tune="tune", run="run", store=f"file://{folder}/store", **{"seed": 3, "iterations": 4} | context
        )
        store, made = open_store(run.store), Producer(stage="test", key="k", settings_digest="s", code_version="v")
        sources = {p.relative_to(policy).as_posix(): p for p in policy.rglob("*") if p.is_file()}
        tables = {
            path.name: path for path in (_prompts(folder, num_train, "train"), _prompts(folder, num_eval, "eval"))
        }
        manifests = {
            "policy": artifacts.publish(
                store, run, name="policy", kind="policy", files=sources, producer=made, iteration=iteration
            ),
            "prompts": artifacts.publish(store, run, name="prompts", kind="prompts", files=tables, producer=made),
        }
        for role, manifest in manifests.items():
            (folder / f"{role}.json").write_bytes(manifest.dump())
        return Job(folder, run, folder / "policy.json", folder / "prompts.json")

    return make
