"""One update on the same completions: ours against TRL's GRPOTrainer, tokens a second and peak memory.

    python benchmarks/update_vs_trl.py [--models tiny small] [--steps 6] [--sequences 16] [--longest 480]

Same weights (random, Qwen3 shape), same prompts and completions (lengths log-normal, the longest ten times the
shortest), same loss (`dapo`), AdamW, learning rate and clipping, one process, one optimizer step a batch, no reference
model, no log-probabilities of an old policy on either side. Each side runs in a process of its own; TRL twice, with
gradient checkpointing (its default) and without. Times are from the prepared batch to the end of the optimizer step;
the first step is left out, of the others the median counts. CPU seconds are printed beside: on a machine shared with
others they say more. TRL's micro-batch is `--rows` padded sequences, ours as many tokens as those have cells.
A token counts where it is real: prompt or completion, no padding.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl import GRPOConfig

    from components.update.batching import Batch
    from components.update.config import UpdateSettings
    from components.update.job import Job

MODELS = {  # vocabulary, hidden, layers, intermediate, heads, key-value heads, head size, tied
    "tiny": (2_048, 128, 4, 384, 4, 2, 32, True),
    "small": (151_936, 512, 8, 1536, 8, 4, 64, True),
    "qwen3-0.6b": (151_936, 1024, 28, 3072, 16, 8, 128, True),
    "qwen3-1.7b": (151_936, 2048, 28, 6144, 16, 8, 128, True),
}
GROUP_SIZE, LEARNING_RATE, CLIP_NORM = 8, 1e-6, 1.0


def write_model(folder: Path, name: str) -> None:
    """A random policy of that shape with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary, hidden, layers, intermediate, heads, kv_heads, head, tied = MODELS[name]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head, tie_word_embeddings=tied,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)


def write_batch(path: Path, name: str, sequences: int, longest: int) -> None:
    """Prompts of 16 to 48 tokens, completions of `longest` / 10 to `longest`, as the update's worker reads them."""
    import numpy as np

    from components.update.batching import Batch

    random = np.random.default_rng(0)
    spread = np.exp(random.normal(0.0, 1.0, sequences))
    spread = (spread - spread.min()) / (spread.max() - spread.min())
    completions = np.round(longest / 10 + spread * (longest - longest / 10)).astype(np.int64)
    prompts = np.repeat(random.integers(16, 49, sequences // GROUP_SIZE), GROUP_SIZE)
    group = np.repeat(np.arange(sequences // GROUP_SIZE), GROUP_SIZE)
    vocabulary = MODELS[name][0]

    def tokens(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flat = random.integers(2, vocabulary, int(lengths.sum()), dtype=np.int32)
        return flat, np.concatenate([[0], np.cumsum(lengths)])

    (prompt_ids, prompt_offsets), (completion_ids, completion_offsets) = tokens(prompts), tokens(completions)
    for number in range(sequences):  # one prompt a group
        start = prompt_offsets[number - number % GROUP_SIZE]
        prompt_ids[prompt_offsets[number] : prompt_offsets[number + 1]] = prompt_ids[start : start + prompts[number]]
    Batch(
        prompt_ids=prompt_ids, prompt_offsets=prompt_offsets, completion_ids=completion_ids,
        completion_offsets=completion_offsets, behaviour_logprobs=np.full(len(completion_ids), np.nan, np.float32),
        group=group, truncated=np.zeros(sequences, bool), rewards=random.normal(size=(sequences, 1)),
        advantages=random.normal(size=sequences), scored_lengths=completions, keep=np.ones(sequences, bool),
    ).save(path)  # fmt: skip


def lone_job(arguments: argparse.Namespace, settings: "UpdateSettings", device: str) -> "Job":
    """A job of one process that starts afresh and keeps nothing."""
    from components.update.job import Job

    dtype = "bfloat16" if device == "cuda" else "float32"
    return Job(
        settings=settings, seed=0, temperature=1.0, max_completion_length=arguments.longest, global_step=0,
        device=device, dtype=dtype, publish_dtype=dtype, restore="nothing", save_optimizer=False,
    )  # fmt: skip


def measure_ours(folder: Path, arguments: argparse.Namespace) -> dict:
    """Our worker's own optimizer step, in this process."""
    import torch

    from components.update.metrics import peak_memory_bytes
    from components.update.train import Trainer

    device = lone_process_group()
    settings = update_settings(arguments)
    job = lone_job(arguments, settings, device)
    trainer = Trainer(folder, job)
    (step,), engine, seconds = trainer._plan(), trainer._engine(), []
    for number in range(arguments.steps):
        started = clocks()
        trainer._step(engine, step, number)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(since(started))
    return {"seconds": seconds, "bytes": peak_memory_bytes(torch.device(device))}


def lone_process_group() -> str:
    """Makes this process the only rank; gives the device to use."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store, backend = torch.distributed.HashStore(), "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return device


def update_settings(arguments: argparse.Namespace, **more):
    """Settings of our update for these arguments; bfloat16, which a GPU trains in, needs ZeRO 1 for float32 sums."""
    import torch

    from components.update.config import UpdateSettings

    zero_stage = int(torch.cuda.is_available()) if arguments.zero_stage is None else arguments.zero_stage
    return UpdateSettings(
        learning_rate=LEARNING_RATE, max_grad_norm=CLIP_NORM, correction="none", zero_stage=zero_stage,
        max_tokens_per_microbatch=arguments.tokens, gradient_checkpointing=arguments.checkpointing, **more,
    )  # fmt: skip


def measure_trl(folder: Path, arguments: argparse.Namespace) -> dict:
    """TRL's trainer, given the completions by its `rollout_func`."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from components.update.batching import Batch
    from components.update.metrics import peak_memory_bytes

    on_gpu = torch.cuda.is_available()
    batch, seconds, started = Batch.load(folder / "batch.npz"), [], []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            prepared = super()._generate_and_score_completions(inputs)
            started.append(clocks())
            return prepared

    class Stopwatch(TrainerCallback):
        def on_step_end(self, *_, **__):
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(since(started[-1]))

    trainer = Timed(
        model=str(folder / "policy"), args=trl_config(folder, arguments, on_gpu=on_gpu),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * arguments.sequences}),
        rollout_func=lambda prompts, trainer: trl_rows(batch),
        reward_funcs=lambda completions, **_: batch.rewards[:, 0].tolist(), callbacks=[Stopwatch()],
    )  # fmt: skip
    trainer.train()
    return {"seconds": seconds, "bytes": peak_memory_bytes(torch.device("cuda" if on_gpu else "cpu"))}


def trl_config(folder: Path, arguments: argparse.Namespace, *, on_gpu: bool) -> "GRPOConfig":
    """TRL's settings for the same update."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(folder / "trl"), loss_type="dapo", beta=0.0, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", max_grad_norm=CLIP_NORM, max_steps=arguments.steps, num_generations=GROUP_SIZE,
        per_device_train_batch_size=arguments.rows, gradient_accumulation_steps=arguments.sequences // arguments.rows,
        max_completion_length=arguments.longest, gradient_checkpointing=arguments.checkpointing, use_cpu=not on_gpu,
        bf16=on_gpu, report_to=[], save_strategy="no", logging_steps=1000, disable_tqdm=True, temperature=1.0,
    )  # fmt: skip


def trl_rows(batch: "Batch") -> dict[str, list]:
    """The batch as a `rollout_func` gives it."""

    def rows(flat, offsets):
        return [flat[start:end].tolist() for start, end in pairwise(offsets)]

    completions = rows(batch.completion_ids, batch.completion_offsets)
    return {
        "prompt_ids": rows(batch.prompt_ids, batch.prompt_offsets), "completion_ids": completions,
        "logprobs": [[0.0] * len(tokens) for tokens in completions],
    }  # fmt: skip


def clocks() -> tuple[float, float]:
    """Wall clock and this process's CPU time, seconds."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> tuple[float, float]:
    return tuple(now - then for now, then in zip(clocks(), started, strict=True))


def run(side: str, folder: Path, extra: list[str]) -> dict:
    """One side in a fresh process; a peak is that process's own, whatever this one has held."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", str(folder), *extra]
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "small"], choices=MODELS)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps; the first is not counted")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--longest", type=int, default=480, help="longest completion, tokens")
    parser.add_argument("--rows", type=int, default=8, help="TRL's per_device_train_batch_size (8 is its default)")
    parser.add_argument("--tokens", type=int, default=0, help="our max_tokens_per_microbatch; 0: the cells of TRL's")
    parser.add_argument("--zero-stage", type=int, help="ours; default: 0 on a CPU, 1 on a GPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or arguments.rows * (arguments.longest + 48)
    if arguments.side:
        import torch

        torch.set_num_threads(arguments.threads)
        measure = measure_ours if arguments.side == "ours" else measure_trl
        print(json.dumps(measure(arguments.folder, arguments)))
        return
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as name:
            compare(Path(name), model, arguments)


def compare(folder: Path, model: str, arguments: argparse.Namespace) -> None:
    """Runs both sides on one model and prints the figures and their ratios."""
    import numpy as np

    write_model(folder / "policy", model)
    write_batch(folder / "batch.npz", model, arguments.sequences, arguments.longest)
    with np.load(folder / "batch.npz") as arrays:
        prompts, completions = np.diff(arrays["prompt_offsets"]), np.diff(arrays["completion_offsets"])
    tokens = int((prompts + completions).sum())
    cells = len(prompts) * int(prompts.max() + completions.max())
    print(
        f"{model}: {arguments.sequences} sequences, completions {completions.min()} to {completions.max()} "
        f"(mean {completions.mean():.0f}), {tokens} tokens, {cells} cells padded", flush=True,
    )  # fmt: skip
    results = {}
    for label, side, extra in (
        ("ours", "ours", []),
        ("ours, checkpointing", "ours", ["--checkpointing"]),
        ("TRL, checkpointing (its default)", "trl", ["--checkpointing"]),
        ("TRL", "trl", []),
    ):
        found = run(side, folder, extra)
        counted = found["seconds"][1:] or found["seconds"]
        wall, cpu = (statistics.median(column) for column in zip(*counted, strict=True))
        results[label] = {"rate": tokens / wall, "cpu_rate": tokens / cpu, "bytes": found["bytes"]}
        print(
            f"{label:>33}  {tokens / wall:8.1f} tokens/s   {tokens / cpu:8.1f} tokens/CPU-s   "
            f"peak {found['bytes'] / 2**30:5.2f} GiB   ({wall:.2f} s, {cpu:.2f} CPU-s a step)", flush=True,
        )  # fmt: skip
    for label, theirs in results.items():
        if label.startswith("TRL"):
            rate, cpu_rate, memory = (results["ours"][name] / theirs[name] for name in ("rate", "cpu_rate", "bytes"))
            print(
                f"ours against {label}: {rate:.2f}x the throughput ({cpu_rate:.2f}x a CPU second), "
                f"{memory:.2f} of the peak memory"
            )


if __name__ == "__main__":
    main()
