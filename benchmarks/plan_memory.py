"""What `grpo plan` says an update needs, against what the worker process really held.

    python benchmarks/plan_memory.py [--hidden 512] [--layers 6] [--tokens 2048]

On a CPU the peak is the resident set's; what a model of no size needs (interpreter, torch, DeepSpeed) is measured first
and taken off. Each case is a run of the whole stage in processes of its own, on random completions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES: tuple[dict, ...] = (
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 0, "gradient_checkpointing": True},
    {"zero_stage": 2, "num_processes": 2},
)
NOTHING = {"hidden": 64, "layers": 2, "inner": 64}


def measure(folder: Path, shape: dict[str, int], tokens: int, changes: dict) -> tuple[float, float]:
    """Bytes (planned, measured) of one update."""
    from engine_case import Case, save_tiny_model

    from components.common.settings import validate
    from components.update.config import UpdateSettings
    from pipeline.memory import update_parts
    from pipeline.shape import read_config

    model = save_tiny_model(
        folder / "model", hidden_size=shape["hidden"], intermediate_size=shape["inner"], head_dim=64,
        num_hidden_layers=shape["layers"], num_attention_heads=shape["hidden"] // 32, num_key_value_heads=2,
        max_position_embeddings=1024, initializer_range=0.02,
    )  # fmt: skip
    settings = {"max_tokens_per_microbatch": tokens, "num_threads": 1, "device": "cpu", **changes}
    case = Case(folder / "case", settings=settings)
    inputs = case.start(model)
    lengths = [250] * (4 * tokens // 256 + 1)
    scored = case.scored(
        "scored", model, inputs["policy"], num_prompts=len(lengths) // 4 + 1, group_size=4,
        lengths=[250] * (4 * (len(lengths) // 4 + 1)),
    )  # fmt: skip
    found = case.update(inputs, scored)
    checked = validate(UpdateSettings, settings)
    parts = update_parts(
        checked, read_config(model / "config.json"), on_gpu=False, processes=changes.get("num_processes", 1)
    )
    return sum(parts.values()), found.metrics["peak_memory_bytes"]


def main() -> None:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "update")]
        shape, changes = json.loads(given.one)
        with tempfile.TemporaryDirectory() as folder:
            print("found", *measure(Path(folder), shape, given.tokens, changes))
        return
    shape = {"hidden": given.hidden, "layers": given.layers, "inner": 4 * given.hidden}
    for changes in CASES:
        (planned, peak), (small, base) = (_apart(size, changes, given.tokens) for size in (shape, NOTHING))
        wanted, held = (planned - small) / 2**20, (peak - base) / 2**20
        print(
            f"{json.dumps(changes):<52} planned {wanted:7.0f} MiB, held {held:7.0f} MiB: {wanted / held - 1:+.0%}",
            flush=True,
        )


def _apart(shape: dict[str, int], changes: dict, tokens: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--one", json.dumps([shape, changes]), "--tokens", str(tokens)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    planned, peak = next(line.split()[1:] for line in output.splitlines() if line.startswith("found"))
    return float(planned), float(peak)


if __name__ == "__main__":
    main()
