"""What the curriculum and pipelined rollouts do to learning: the arithmetic recipe's task, all in one process.

    python recipes/arithmetic/prepare.py
    python benchmarks/choosing_prompts.py [--seeds 0 1 2] [--iterations 8] [--problems 1024]

The recipe's model, problems, sampling and update (dapo loss, group-normalised advantages, AdamW, learning rate 1e-3
with 8 steps of warm-up, 8 minibatches), with the rollout stage's own sampler and choice of prompts, and no stage
around them: processes and artifacts cost time here and change no number. Ways, on the same seeds:

    plain        every prompt once an epoch
    curriculum   prompts whose last group was all alike are drawn a quarter as often
    stale-MODE   plain, but each rollout samples from the policy one update behind; `update.correction` is MODE

`--problems` keeps the train set small, so that prompts come again (an epoch is two iterations by default): on a first
epoch a curriculum knows nothing. Printed: pass@1 on held-out sums after every other iteration, and the share of groups
without a signal over the later half.
"""

import argparse
import copy
import json
import os
import re
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from components.rollout.config import RolloutSettings
from components.rollout.curriculum import Turns
from components.rollout.prompts import prompt_keys
from components.rollout.sampler import SampleRequest, Sampling, sample_seed, stop_tokens
from components.rollout.text import open_tokenizer
from components.rollout.transformers_sampler import TransformersSampler
from components.update.config import CorrectionMode
from components.update.correction import off_policy_correction
from components.update.losses import BatchTotals, policy_loss, sequence_weights

# P prompts, G completions a prompt, B sequences, T tokens, N completion tokens
PROMPTS, GROUP_SIZE, MAX_TOKENS = 512, 16, 8
MINIBATCHES, LEARNING_RATE, WARMUP_STEPS, CLIP_NORM = 8, 1e-3, 8, 1.0
WAYS = ["plain", "curriculum", "stale-none", "stale-token_truncate", "stale-sequence_truncate"]
EPSILON_LOW, EPSILON_HIGH, CORRECTION_CAP = 0.2, 0.28, 2.0


class Task:
    """The recipe's problems and their reward: the completion's last number is the sum."""

    def __init__(self, folder: Path, num_problems: int) -> None:
        from tokenizers import Tokenizer

        self.policy = folder / "model"
        self.decode = open_tokenizer(self.policy)
        tokenizer = Tokenizer.from_file(str(self.policy / "tokenizer.json"))
        self.sampling = Sampling(temperature=1.0, max_tokens=MAX_TOKENS, stop_token_ids=stop_tokens(self.policy))
        rows = [
            [json.loads(line) for line in (folder / f"problems/{split}.jsonl").open()] for split in ("train", "eval")
        ]
        self.train, self.eval = rows[0][:num_problems], rows[1]
        for row in self.train + self.eval:
            row["ids"] = tuple(tokenizer.encode(row["prompt"]).ids)

    def requests(self, rows: list[dict], size: int, seed: int, split: str, iteration: int) -> list[SampleRequest]:
        """`size` samples a row."""
        return [
            SampleRequest(
                row["prompt"], n, row["ids"], sample_seed(seed, split, iteration, row["prompt"], n), self.sampling
            )
            for row in rows for n in range(size)
        ]  # fmt: skip

    def draw(self, sampler: TransformersSampler, rows: list[dict], size: int, *where) -> tuple[list, np.ndarray]:
        """Completions in the order of rows and samples, and their rewards (P, G)."""
        wanted = self.requests(rows, size, *where)
        found = {id(c.request): c for batch in sampler.sample(wanted) for c in batch}
        completions = [found[id(request)] for request in wanted]
        texts = self.decode([c.completion_ids for c in completions])
        answers = [row["answer"] for row in rows for _ in range(size)]
        right = [re.findall(r"\d+", text)[-1:] == [answer] for text, answer in zip(texts, answers, strict=True)]
        return completions, np.array(right, dtype=float).reshape(len(rows), size)


class Trainer:
    """The recipe's update."""

    def __init__(self, model: torch.nn.Module, correction: CorrectionMode) -> None:
        self.model, self.correction = model, correction
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: min(1, (n + 1) / WARMUP_STEPS))

    def update(self, completions: list, rewards_PG: np.ndarray, seed: int) -> None:
        """One iteration: each group once, in `MINIBATCHES` steps; groups without a signal only count in the size."""
        spread_P1 = rewards_PG.std(axis=1, ddof=1, keepdims=True)
        advantages_B = ((rewards_PG - rewards_PG.mean(axis=1, keepdims=True)) / (spread_P1 + 1e-4)).reshape(-1)
        with torch.no_grad():
            parts = [self.logprobs(completions[b : b + 2048])[0] for b in range(0, len(completions), 2048)]
        old = torch.cat(parts).split([len(c.completion_ids) for c in completions])
        order = np.random.default_rng(seed).permutation(len(rewards_PG))
        for part in np.array_split(order, MINIBATCHES):
            members = (part[:, None] * GROUP_SIZE + np.arange(GROUP_SIZE)).reshape(-1)
            lengths = np.array([len(completions[b].completion_ids) for b in members])
            weights = sequence_weights("dapo", lengths, BatchTotals.of(lengths, MAX_TOKENS))
            signal = advantages_B[members] != 0
            kept = members[signal]
            old_N = torch.cat([old[b] for b in kept])
            self.step([completions[b] for b in kept], advantages_B[kept], weights[signal], old_N)

    def step(self, completions: list, advantages_B: np.ndarray, weights_B: np.ndarray, old_N: torch.Tensor) -> None:
        """One optimizer step on sequences with a signal."""
        logprobs_N, sequence_N = self.logprobs(completions)
        behaviour_N = torch.tensor([value for c in completions for value in c.logprobs])
        advantages_N = torch.tensor(advantages_B, dtype=torch.float32)[sequence_N]
        loss_N = policy_loss(
            "dapo", logprobs_N, old_N, advantages_N, sequence_N, len(completions),
            epsilon_low=EPSILON_LOW, epsilon_high=EPSILON_HIGH,
        ).loss_N  # fmt: skip
        correction = off_policy_correction(
            self.correction, old_N, behaviour_N, sequence_N, len(completions), cap=CORRECTION_CAP
        )
        (loss_N * correction.weights_N * torch.tensor(weights_B, dtype=torch.float32)[sequence_N]).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def logprobs(self, completions: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of every completion token (N,), and which sequence it belongs to."""
        width = max(len(c.request.prompt_ids) + len(c.completion_ids) for c in completions)
        ids_BT = torch.zeros(len(completions), width, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        scored_BT = torch.zeros_like(mask_BT)
        for b, c in enumerate(completions):
            start, end = len(c.request.prompt_ids), len(c.request.prompt_ids) + len(c.completion_ids)
            ids_BT[b, :end] = torch.tensor([*c.request.prompt_ids, *c.completion_ids])
            mask_BT[b, :end] = True
            scored_BT[b, start:end] = True
        logits = self.model(ids_BT, attention_mask=mask_BT.long()).logits[:, :-1].log_softmax(-1)
        logprobs = logits.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
        return logprobs[scored_BT[:, 1:]], scored_BT[:, 1:].nonzero()[:, 0]


def learn(task: Task, way: str, seed: int, iterations: int) -> tuple[list[float], list[float]]:
    """pass@1 before each iteration and at the end, and each iteration's share of groups without a signal."""
    settings = RolloutSettings(batch_size=2048, num_threads=1)
    sampler = TransformersSampler(task.policy, settings, lambda ids: task.decode([ids])[0])
    stale = way.startswith("stale-")
    trainer = Trainer(
        copy.deepcopy(sampler.model).requires_grad_(True), way.removeprefix("stale-") if stale else "none"
    )
    turns = Turns(prompt_keys([row["prompt"] for row in task.train]), np.zeros(len(task.train), dtype=np.int64), seed)
    everyone = np.ones(len(task.train), dtype=bool)
    policies = [copy.deepcopy(trainer.model.state_dict())]
    scores, silent = [], []
    for iteration in range(iterations + 1):
        sampler.model.load_state_dict(policies[-1])
        scores.append(float(task.draw(sampler, task.eval, 4, seed, "eval", iteration)[1].mean()))
        if iteration == iterations:
            return scores, silent
        rows = turns.draw(PROMPTS, everyone)
        sampler.model.load_state_dict(policies[-2 if stale and len(policies) > 1 else -1])
        completions, rewards_PG = task.draw(
            sampler, [task.train[r] for r in rows], GROUP_SIZE, seed, "train", iteration
        )
        alike_P = rewards_PG.min(axis=1) == rewards_PG.max(axis=1)
        silent.append(float(alike_P.mean()))
        if way == "curriculum":
            turns.postpone([row for row, alike in zip(rows, alike_P, strict=True) if alike], 0.25)
        trainer.update(completions, rewards_PG, seed + iteration)
        policies = [*policies[-1:], copy.deepcopy(trainer.model.state_dict())]
    raise AssertionError("unreachable")


def main() -> None:
    """Prints a line a run, then the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--problems", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "recipes/arithmetic/build")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(arguments.folder, arguments.problems)
    finals: dict[str, list[list[float]]] = {way: [] for way in arguments.ways}
    for seed in arguments.seeds:
        for way in arguments.ways:
            scores, silent = learn(task, way, seed, arguments.iterations)
            later = statistics.mean(silent[len(silent) // 2 :])
            finals[way].append([*scores[::2], later])
            print(f"seed {seed} {way:<23} pass@1 {' '.join(f'{s:.3f}' for s in scores[::2])}  "
                  f"without signal, later half {later:.2f}", flush=True)  # fmt: skip
    for way, runs in finals.items():
        means = [statistics.mean(column) for column in zip(*runs, strict=True)]
        ends = [run[-2] for run in runs]
        print(f"mean   {way:<23} pass@1 {' '.join(f'{s:.3f}' for s in means[:-1])}  "
              f"without signal, later half {means[-1]:.2f}  last: {min(ends):.3f} to {max(ends):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
