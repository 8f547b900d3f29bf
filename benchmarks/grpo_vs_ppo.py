"""What leaving the critic out saves: GRPO against PPO with a critic of the policy's size.

    python benchmarks/grpo_vs_ppo.py cost [--model small] [--sequences 16] [--longest 240] [--tokens 2048]
    python benchmarks/grpo_vs_ppo.py learn [--seeds 0 1 2] [--iterations 8] [--value-learning-rate 1e-3]

`cost`: one iteration's update (everything from the scored batch to the stepped weights: PPO's pass for old
log-probabilities and values included) on the same completions, each algorithm in a process of its own; median seconds
and CPU seconds, peak memory. The claim in the field is about half the memory and 30 % of the time.
`learn`: the arithmetic recipe with both algorithms from the same model, same prompts and group size; pass@1 after each
update beside the tokens sampled until then, and for both at the number of tokens that the one which sampled fewer came
to (a straight line between evaluations). GRPO's settings are the recipe's; PPO has them too, and a critic's learning
rate of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import accumulate, pairwise
from pathlib import Path

import update_vs_trl as shared

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = ("grpo", "ppo")


def measure(folder: Path, algorithm: str, arguments: argparse.Namespace) -> dict:
    """Seconds of each iteration's update but the first, and the process's peak memory."""
    import torch

    from components.update.metrics import peak_memory_bytes
    from components.update.train import Trainer

    torch.set_num_threads(arguments.threads)
    device = shared.lone_process_group()
    settings = shared.update_settings(arguments, algorithm=algorithm, num_minibatches=arguments.minibatches)
    job = shared.lone_job(arguments, settings, device)
    trainer = Trainer(folder, job)
    engine, seconds = trainer._engine(), []
    for number in range(arguments.steps):
        started = shared.clocks()
        trainer._score_before(engine)
        for step in trainer._plan():
            trainer._step(engine, step, number)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(shared.since(started))
    return {"seconds": seconds[1:], "bytes": peak_memory_bytes(torch.device(device))}


def cost(arguments: argparse.Namespace) -> None:
    """Prints what an iteration's update costs with either algorithm."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared.write_model(folder / "policy", arguments.model)
        shared.write_batch(folder / "batch.npz", arguments.model, arguments.sequences, arguments.longest)
        for algorithm in ALGORITHMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", algorithm, "--folder", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            wall, cpu = (statistics.median(column) for column in zip(*found["seconds"], strict=True))
            results[algorithm] = wall, cpu, found["bytes"]
            print(f"{algorithm}: {wall:.2f} s ({cpu:.2f} CPU-s), peak {found['bytes'] / 2**30:.2f} GiB", flush=True)
    wall, cpu, memory = (1 - ours / theirs for ours, theirs in zip(*results.values(), strict=True))
    print(f"GRPO saves {memory:.0%} of PPO's peak memory, {wall:.0%} of its time ({cpu:.0%} of its CPU time)")


def learn(arguments: argparse.Namespace) -> None:
    """Prints pass@1 of both algorithms by tokens sampled, and both at an equal number of tokens, a line a seed."""
    recipe = ROOT / "recipes" / "arithmetic"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in arguments.seeds:
            build = folder / f"{seed}"
            prepare = [sys.executable, str(recipe / "prepare.py"), "--seed", str(seed), "--folder", f"{build}/build"]
            subprocess.run(prepare, check=True, env=environment, stdout=subprocess.DEVNULL)
            (build / "settings.toml").write_text((recipe / "settings.toml").read_text())
            curves = {}
            for algorithm in arguments.algorithms:
                curves[algorithm] = fine_tune(build, algorithm, seed, arguments, environment)
                points = "  ".join(f"{tokens / 1e3:.0f}k {score:.1%}" for tokens, score in curves[algorithm])
                print(f"seed {seed}  {algorithm}: {points}", flush=True)
            tokens = min(curve[-1][0] for curve in curves.values())
            at_equal = ", ".join(f"{name} {score_at(curve, tokens):.1%}" for name, curve in curves.items())
            print(f"seed {seed}  after {tokens / 1e3:.0f}k sampled tokens: {at_equal}", flush=True)


def score_at(curve: list[tuple[float, float]], tokens: float) -> float:
    """pass@1 at a number of sampled tokens, on the straight line between two evaluations."""
    for (before, low), (after, high) in pairwise(curve):
        if before <= tokens <= after:
            return low + (high - low) * (tokens - before) / (after - before)
    return curve[-1][1]


def fine_tune(
    folder: Path, algorithm: str, seed: int, arguments: argparse.Namespace, environment: dict[str, str]
) -> list[tuple[float, float]]:
    """(tokens sampled for training until then, held-out pass@1) before and after each update of one run."""
    settings = {"fine_tune": algorithm, "seed": seed, "iterations": arguments.iterations, "update.algorithm": algorithm}
    if algorithm == "ppo":
        settings |= {"update.ppo.value_learning_rate": arguments.value_learning_rate}
        settings |= {"update.ppo.gae_lambda": arguments.gae_lambda}
    command = [sys.executable, "-m", "pipeline.cli", "run", "settings.toml"]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)

    def sums(name: str, figure: str) -> list[float]:
        """Of each iteration, over its shards."""
        found: dict[Path, float] = {}
        for path in sorted(folder.glob(f"runs/store/manifests/{algorithm}/run-*/[0-9]*/{name}.json")):
            value = json.loads(path.read_text())["metrics"].get(figure, 0.0)
            found[path.parent] = found.get(path.parent, 0.0) + value
        return list(found.values())

    scores = sums("evaluation", "eval/pass@1")
    sampled = [0.0, *accumulate(sums("completions-*", "rollout/num_tokens"))]
    return list(zip(sampled[: len(scores)], scores, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("cost")
    part.add_argument("--model", default="small", choices=shared.MODELS)
    part.add_argument("--steps", type=int, default=6, help="iterations; the first is not counted")
    part.add_argument("--sequences", type=int, default=16)
    part.add_argument("--longest", type=int, default=240, help="longest completion, tokens")
    part.add_argument("--tokens", type=int, default=2048, help="max_tokens_per_microbatch")
    part.add_argument("--minibatches", type=int, default=1, help="optimizer steps; with 1, GRPO scores nothing twice")
    part.add_argument("--threads", type=int, default=os.cpu_count())
    part.add_argument("--zero-stage", type=int, help="default: 0 on a CPU, 1 on a GPU")
    part.add_argument("--checkpointing", action="store_true")
    part.add_argument("--side", choices=ALGORITHMS, help=argparse.SUPPRESS)
    part.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    part = commands.add_parser("learn")
    part.add_argument("--seeds", type=int, nargs="+", default=[0])
    part.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    part.add_argument("--iterations", type=int, default=8)
    part.add_argument("--value-learning-rate", type=float, default=1e-3)
    part.add_argument("--gae-lambda", type=float, default=1.0)
    arguments = parser.parse_args()
    if arguments.command == "learn":
        learn(arguments)
    elif arguments.side:
        print(json.dumps(measure(arguments.folder, arguments.side, arguments)))
    else:
        cost(arguments)


if __name__ == "__main__":
    main()
