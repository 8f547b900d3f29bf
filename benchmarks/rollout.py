"""Sampling: ours against bare vLLM and against transformers' `generate`, and how long an engine takes to start.

    python benchmarks/rollout.py [--vllm-python .venv-vllm/bin/python] [--model tiny] [--prompts 64] [--repeats 5]

Same weights (random, Qwen3 shape), same prompts (16 to 48 tokens, G = 8 samples each), same sampling and length.

- `vllm`: `LLM.generate` on the same engine object with the same arguments, against our sampler with what the stage
  does beside it (collecting samples). The two take turns, in one process; the median is shown, without their start.
- `transformers`: `generate` on the padded batch, against our decode loop, likewise. Ends of completions are drawn:
  both sides count the tokens they kept.
- start: a process of its own each time, from before its first heavy import to the engine being ready; the first start
  with an empty cache of compiled graphs, then again. On CPU nothing is compiled unless `--compile` is given.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = {  # vocabulary, hidden, layers, intermediate, heads, key-value heads, head size
    "demo": (32, 64, 2, 128, 2, 1, 32),
    "tiny": (2_048, 128, 4, 384, 4, 2, 32),
    "small": (32_000, 512, 8, 1536, 8, 4, 64),
    "qwen3-0.6b": (151_936, 1024, 28, 3072, 16, 8, 128),
}
GROUP_SIZE, END, FIRST_TOKENS = 8, 1, 9


def write_model(folder: Path, name: str, dtype: str) -> None:
    """A random policy of that shape."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vocabulary, hidden, layers, intermediate, heads, kv_heads, head = MODELS[name]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head, tie_word_embeddings=True,
        eos_token_id=END, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def make_groups(arguments: argparse.Namespace) -> list:
    """Groups as the stage plans them."""
    from components.rollout.plan import Group, in_drawing_order
    from components.rollout.sampler import SampleRequest, Sampling, sample_seed

    sampling = Sampling(temperature=1.0, max_tokens=arguments.tokens, stop_token_ids=(END,))
    vocabulary, groups = MODELS[arguments.model][0], []
    for number in range(arguments.prompts):
        ids = tuple(random.Random(number).choices(range(2, vocabulary), k=16 + number % 33))
        groups.append(Group("train", number, tuple(
            SampleRequest(str(number), index, ids, sample_seed(0, "train", 0, str(number), index), sampling)
            for index in range(GROUP_SIZE)
        )))  # fmt: skip
    return in_drawing_order(groups)


def ours(sampler, groups: list) -> tuple[int, float]:
    """Tokens and seconds of our sampler and the collecting around it."""
    from components.rollout.collect import Collection, draw_all
    from components.rollout.config import RolloutSettings

    collection = Collection(groups, {}, saved=None)
    started = time.perf_counter()
    draw_all(collection, sampler, RolloutSettings(save_every_seconds=1e9), lambda *_, **__: None)
    return collection.num_tokens, time.perf_counter() - started


def bare_vllm(sampler, groups: list) -> tuple[int, float]:
    """Tokens and seconds of `LLM.generate`."""
    from vllm import SamplingParams

    requests = [request for group in groups for request in group.requests]
    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
    started = time.perf_counter()
    parameters = [
        SamplingParams(
            temperature=1.0, max_tokens=request.sampling.max_tokens, seed=request.seed, logprobs=0,
            stop_token_ids=[END], detokenize=False,
        )
        for request in requests
    ]  # fmt: skip
    outputs = sampler.llm.generate(prompts, parameters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs), time.perf_counter() - started


def bare_generate(sampler, groups: list) -> tuple[int, float]:
    """Tokens and seconds of transformers' `generate`, in batches of as many samples as ours."""
    import torch

    requests = [request for group in groups for request in group.requests]
    count, started = 0, time.perf_counter()
    for first in range(0, len(requests), sampler.batch_size):
        batch = requests[first : first + sampler.batch_size]
        width = max(len(request.prompt_ids) for request in batch)
        ids = torch.tensor([[0] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in batch])
        with torch.inference_mode():
            drawn = sampler.model.generate(
                ids, attention_mask=(ids != 0).long(), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=batch[0].sampling.max_tokens, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            scores = torch.stack(drawn.logits, 1).float().log_softmax(-1)  # ours come with log-probabilities too
            new = drawn.sequences[:, width:]
            scores.gather(-1, new[..., None]).squeeze(-1).tolist()
        ends = (new == END).long()
        count += int((ends.cumsum(-1) - ends == 0).sum())  # up to and including the first end token
    return count, time.perf_counter() - started


def first_token(sample, groups: list) -> float:
    """Seconds from the call to the first token of one prompt, alone: the median of several, each of its own prompt."""
    from dataclasses import replace

    request, seconds = groups[len(groups) // 2].requests[0], []
    for other in range(FIRST_TOKENS):
        ids = (*request.prompt_ids, 3 + other)  # no cache has seen it
        one = replace(request, sampling=replace(request.sampling, max_tokens=1), prompt_ids=ids)
        seconds.append(sample([replace(groups[0], requests=(one,))])[1])
    return statistics.median(seconds)


def compare(arguments: argparse.Namespace) -> dict:
    """Lets both sides take turns on one engine; medians."""
    from components.rollout.config import RolloutSettings

    policy, groups = Path(arguments.policy), make_groups(arguments)
    settings = RolloutSettings(batch_size=GROUP_SIZE * arguments.prompts)
    if arguments.side == "vllm":
        from components.rollout.vllm_sampler import VllmSampler

        sampler = VllmSampler(
            policy, settings, longest=50 + arguments.tokens, num_requests=GROUP_SIZE * arguments.prompts
        )
        bare = bare_vllm
    else:
        import torch

        from components.rollout.transformers_sampler import TransformersSampler

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
        sampler, bare = TransformersSampler(policy, settings, str), bare_generate
    sides = {"ours": lambda g: ours(sampler, g), "bare": lambda g: bare(sampler, g)}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    work: dict[str, list[float]] = {name: [] for name in sides}
    for sample in sides.values():
        sample(groups[:4])  # first calls set things up
    for turn in range(arguments.repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            if arguments.side == "vllm":
                sampler.llm.reset_prefix_cache()
            cpu = time.process_time()
            count, seconds = sides[name](groups)
            speeds[name].append(count / seconds)
            work[name].append(count / (time.process_time() - cpu))
    medians = {f"{name} tokens/s": statistics.median(values) for name, values in speeds.items()}
    firsts = {f"{name} first token, ms": 1000 * first_token(sample, groups) for name, sample in sides.items()}
    ratios = {
        "ratio": medians["ours tokens/s"] / medians["bare tokens/s"],
        "ratio by CPU time": statistics.median(work["ours"]) / statistics.median(work["bare"]),
    }
    return medians | ratios | firsts


def start(arguments: argparse.Namespace) -> dict:
    """Seconds from the process's first line to an engine that is ready."""
    from components.common.manifest import Manifest
    from components.rollout.config import RolloutSettings
    from components.rollout.engines import start_engine

    values = {"enforce_eager": False if arguments.compile else None, "cache_dir": arguments.cache}
    settings = RolloutSettings.model_validate({"vllm": values})
    size = {"longest": 50 + arguments.tokens, "num_requests": GROUP_SIZE * arguments.prompts}
    cpu = time.process_time()
    started = time.perf_counter()
    manifest: Manifest | None = None
    start_engine(arguments.side, settings, Path(arguments.policy), manifest, lambda ids: [""], **size)
    return {"wall s": time.perf_counter() - started, "CPU s": time.process_time() - cpu}


def child(python: str, what: str, side: str, policy: Path, arguments: argparse.Namespace, **more: str) -> dict:
    """Runs one measurement in a process of its own."""
    command = [python, __file__, "--child", what, "--side", side, "--policy", str(policy)]
    for name in ("model", "prompts", "tokens", "repeats"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--compile"] if arguments.compile else []
    for name, value in more.items():
        command += [f"--{name}", value]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} of {side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, values: dict[str, float]) -> None:
    """One line a measurement."""
    print(f"{title:<28}" + "  ".join(f"{name} {value:,.3g}" if value < 100 else f"{name} {value:,.0f}"
                                     for name, value in values.items()), flush=True)  # fmt: skip


def main() -> None:
    """Runs everything and prints a line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vllm-python", default=os.environ.get("GRPO_VLLM_PYTHON", str(ROOT / ".venv-vllm/bin/python"))
    )
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=64, help="prompts, 8 samples each")
    parser.add_argument("--tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile, and measure what its cache saves")
    for name in ("child", "side", "policy", "cache"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps({"compare": compare, "start": start}[arguments.child](arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy"
        write_model(policy, arguments.model, arguments.dtype)
        pythons = {"vllm": arguments.vllm_python, "transformers": sys.executable}
        for side, python in pythons.items():
            cache = str(Path(folder) / f"cache-{side}")
            for title in ("first start", "second start"):
                show(f"{side}, {title}", child(python, "start", side, policy, arguments, cache=cache))
        for side, python in pythons.items():
            show(f"{side}, sampling", child(python, "compare", side, policy, arguments))


if __name__ == "__main__":
    main()
