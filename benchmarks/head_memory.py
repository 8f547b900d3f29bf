"""Peak memory and time of loss and backward over the language-model head: ours against full logits.

    python benchmarks/head_memory.py [--tokens 8192] [--vocabulary 151936] [--hidden 512] [--threads 1]

Each way runs in a process of its own; on a CPU the peak is the resident set's (less what was there before), on
a GPU the allocator's. `plain` is the least a plain implementation needs: logits, log_softmax, gather.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("plain", "recomputed", "fused")


def measure(way: str, tokens: int, vocabulary: int, hidden: int, dtype: str) -> dict[str, float]:
    """Peak bytes above the inputs, seconds, and the gradients' norms (equal for every way)."""
    import torch

    from components.update.head import fused_head_loss, linear_logprobs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    options = {"dtype": getattr(torch, dtype), "device": device}
    hidden_NH = torch.randn(tokens, hidden, **options).requires_grad_()
    weight_VH = torch.randn(vocabulary, hidden, **options).mul_(0.05).requires_grad_()
    targets_N = torch.randint(0, vocabulary, (tokens,), device=device)
    weights_N = torch.randn(tokens, device=device)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = resident(device), (time.perf_counter(), time.process_time())
    if way == "plain":
        logprobs_NV = torch.log_softmax(hidden_NH @ weight_VH.t(), dim=-1)
        loss = (logprobs_NV.gather(1, targets_N[:, None]).squeeze(1) * weights_N).sum()
    elif way == "recomputed":
        loss = (linear_logprobs(hidden_NH, weight_VH, targets_N)[0] * weights_N).sum()
    else:
        loss = fused_head_loss(hidden_NH, weight_VH, targets_N, lambda logp_n, _, n: logp_n * weights_N[n]).loss
    loss.backward()
    norms = [x.grad.float().norm().item() for x in (hidden_NH, weight_VH)]
    wall, cpu = (now - then for now, then in zip((time.perf_counter(), time.process_time()), start, strict=True))
    return {"bytes": resident(device) - before, "seconds": wall, "cpu_seconds": cpu, "norms": norms}


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def available_bytes() -> int:
    """Memory the system can hand out without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def resident(device: str) -> int:
    """Highest memory use so far, bytes; of this process, whatever the one that started it has held."""
    import torch

    from components.update.metrics import peak_memory_bytes

    return peak_memory_bytes(torch.device(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--way", choices=WAYS, help="measure this one in this process and print JSON")
    arguments = parser.parse_args()
    sizes = arguments.tokens, arguments.vocabulary, arguments.hidden, arguments.dtype
    if arguments.way:
        import torch

        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(arguments.way, *sizes)))
        return
    wanted = 3.3 * arguments.tokens * arguments.vocabulary * (4 if arguments.dtype == "float32" else 2)
    if not on_gpu() and (free := available_bytes()) < wanted:
        sys.exit(f"the plain way needs {wanted / 2**30:.0f} GiB, {free / 2**30:.0f} are free: lower --tokens")
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
        results[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"{arguments.tokens} tokens, vocabulary {arguments.vocabulary}, hidden {arguments.hidden}, {arguments.dtype}")
    for way, result in results.items():
        memory, cpu = (results["plain"][name] / result[name] for name in ("bytes", "cpu_seconds"))
        norms = ", ".join(f"{norm:.6g}" for norm in result["norms"])
        seconds = f"{result['seconds']:6.1f} s, {result['cpu_seconds']:6.1f} CPU-s ({cpu:4.2f}x faster)"
        print(
            f"{way:>10}  peak {result['bytes'] / 2**30:6.2f} GiB ({memory:4.1f}x smaller)   "
            f"{seconds}   gradient norms {norms}"
        )


if __name__ == "__main__":
    main()
