"""The GSM8K recipe, cut to the size of this machine: its ids loaded from a hub, through every stage."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from components.common.artifacts import fetch
from components.common.manifest import Manifest
from components.common.store import open_store
from pipeline.compiling import iterations_that_fit
from pipeline.settings import load

from .hub_server import serve

SETTINGS = Path(__file__).parents[2] / "recipes" / "gsm8k" / "settings.toml"
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# Grade School Math
"""
CHATML = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALLER = {
    "iterations": 1, "shards": 1, "rollout.engine": "transformers", "rollout.num_prompts": 6, "rollout.group_size": 4,
    "rollout.max_completion_length": 12, "update.num_minibatches": 1, "update.learning_rate": 1e-3,
    "update.warmup_steps": 0, "update.dtype": "float32", "publish.min_improvement": -1.0,
}  # fmt: skip
REWARDS = (  # a model of random weights solves nothing: the first letter gives it something to learn
    "reward.functions=[{name='numeric_match'}, {name='regex_format', weight=0.1, arguments={pattern='^[a-m]', "
    "anywhere=true}}]"
)
PATIENCE_SECONDS = 1200


def question(number, rng):
    """A row as openai/gsm8k has them: calculator marks in the solution, the number behind `####`."""
    first, second = rng.randrange(2, 50), rng.randrange(1000, 2000)
    return {
        "question": f"Tom has {first} hats and gets {second} more in month {number}. How many hats has he?",
        "answer": f"He has {first}+{second}=<<{first}+{second}={first + second}>>{first + second}\n#### "
        f"{first + second:,}",
    }


def save_dataset(folder):
    """Twelve train and four test rows in the folder layout of openai/gsm8k."""
    import pyarrow as pa

    rng = random.Random(0)
    for config, split, count in (("main", "train", 12), ("main", "test", 4), ("socratic", "train", 3)):
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([question(number, rng) for number in range(count)]), path)
    (folder / "README.md").write_text(CARD)


def save_model(folder):
    """A Qwen2 of two layers with a byte-level BPE tokenizer, ChatML template and two end tokens, like the real one."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rng = random.Random(1)
    texts = [" ".join(question(number, rng).values()) for number in range(40)]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=2, pad_token_id=0,
        )
    ).to(torch.bfloat16)  # fmt: skip
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 0], pad_token_id=0, do_sample=True, temperature=0.7, top_p=0.8, top_k=20
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The recipe's settings with its own ids, run to the end beside a hub that holds small things of those names."""
    folder = tmp_path_factory.mktemp("gsm8k")
    save_model(folder / "hub/models/Qwen/Qwen2.5-0.5B-Instruct")
    save_dataset(folder / "hub/datasets/openai/gsm8k")
    store = (folder / "store").as_uri()
    overrides = [f"{name}={value}" for name, value in SMALLER.items()] + [f"store={store}", REWARDS]
    command = [sys.executable, "-m", "pipeline.cli", "run", str(SETTINGS), *(f"--set={text}" for text in overrides)]
    with serve(folder / "hub") as hub:
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(SETTINGS.parents[2]),
        }  # fmt: skip
        environment.pop("HF_HUB_OFFLINE", None)
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("runs/*/run-*/logs/*.log"))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    return Run(folder, open_store(store), hub.asked)


class Run:
    """A finished run: its artifacts, and what the hub was asked."""

    def __init__(self, folder, store, asked):
        self.folder, self.store, self.asked = folder, store, asked

    def manifest(self, name, iteration="run"):
        (key,) = [
            stat.key
            for stat in self.store.list("manifests/gsm8k-qwen2.5-0.5b/")
            if stat.key.endswith(f"/{iteration}/{name}.json")
        ]
        return Manifest.parse(self.store.get_bytes(key), where=key)

    def table(self, manifest, name):
        return pq.read_table(fetch(self.store, manifest, self.folder / manifest.digest, names=[name]) / name)


@pytest.mark.slow
def test_model_and_problems_come_from_the_hub_by_their_ids(finished):
    asked = "\n".join(finished.asked)
    assert "/Qwen/Qwen2.5-0.5B-Instruct/resolve/" in asked and "model.safetensors" in asked
    assert "/datasets/openai/gsm8k/resolve/" in asked and "main/test-00000-of-00001.parquet" in asked
    assert "socratic" not in asked


@pytest.mark.slow
def test_prompts_are_in_the_chat_format_of_the_model(finished):
    prompts = finished.table(finished.manifest("prompts"), "eval.parquet").to_pylist()
    assert len(prompts) == 4
    assert prompts[0]["prompt"].startswith("<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nTom has ")
    assert prompts[0]["prompt"].endswith("Write the final number after ####.<|im_end|>\n<|im_start|>assistant\n")
    assert prompts[0]["prompt_ids"][0] == 1  # <|im_start|> as one token, not as text
    truth = [question(number, rng)["answer"].rpartition("#### ")[2] for rng in [after_train()] for number in range(4)]
    assert sorted(row["answer"] for row in prompts) == sorted(text.replace(",", "") for text in truth)


def after_train():
    """The generator where the test rows begin."""
    rng = random.Random(0)
    for number in range(12):
        question(number, rng)
    return rng


@pytest.mark.slow
def test_the_run_ends_in_a_policy_of_the_same_architecture(finished):
    before, after = finished.manifest("policy", "0000"), finished.manifest("policy", "0001")
    assert after.digest != before.digest and after.names == before.names
    assert after.names >= {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    folder = fetch(finished.store, after, finished.folder / "after")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["dtype"] == "bfloat16"


@pytest.mark.slow
def test_sampling_takes_its_parameters_from_the_settings_alone(finished):
    """The model's generation config asks for temperature 0.7, top_p 0.8 and top_k 20, as Qwen's does."""
    completions = finished.manifest("completions-00", "0000")
    assert completions.metadata["sampling"]["temperature"] == 1.0 and completions.metadata["sampling"]["top_p"] == 1.0
    assert completions.metadata["sampling"]["top_k"] is None
    assert finished.table(completions, "train.parquet").num_rows == 6 * 4


def test_the_settings_are_for_one_node_of_eight_gpus():
    settings = load(SETTINGS)
    assert settings.shards * settings.cluster.rollout.gpus <= settings.cluster.update.gpus == 8
    assert settings.cluster.rollout.gpu_type == settings.cluster.update.gpu_type
    assert settings.rollout.num_prompts % (settings.shards * settings.update.num_minibatches) == 0
    assert settings.iterations % iterations_that_fit(settings) == 0  # a chain of runs of one length
