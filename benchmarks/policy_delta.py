"""How much of a policy changes in an iteration, what the patch weighs, and how fast it is made and applied.

    python benchmarks/policy_delta.py                        # trains an 84 M-parameter model at 1e-6 and 1e-5
    python benchmarks/policy_delta.py --store runs/store     # patches between the policies of real runs
    python benchmarks/policy_delta.py --codec                # the codec alone, at given shares of changed values

The model (Qwen3 shape, random weights) is trained by policy gradient on completions sampled from itself: groups of 4,
advantages normalised in the group, AdamW (0.9, 0.999) on float32 master weights, gradient norm held at 1. Policies are
published in bf16. The first steps, where Adam's moments are still forming and more values change, are not counted.
Speeds are GB of model a CPU second of one thread, from the codec alone, without disks or hashing, the best of five.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

WARM_STEPS = 16
CODEC_SHARES = (0.001, 0.01, 0.1, 0.37)
CODEC_VALUES = 67_000_000
"""bf16 values of the codec's own measurement: 134 MB."""
LEARNING_RATES = (1e-6, 1e-5)
SHAPES = {
    84: {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 12, "vocab_size": 32_000},
    8: {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 8_000},
}
"""Millions of parameters → model."""


def make_model(millions: int) -> Any:
    """A causal language model with tied embeddings and random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = dict(SHAPES[millions])
    heads = shape["hidden_size"] // 64
    return Qwen3ForCausalLM(
        Qwen3Config(
            **shape, num_attention_heads=heads, num_key_value_heads=heads, head_dim=64, tie_word_embeddings=True
        )
    )


def train(model: Any, learning_rate: float, steps: int, tokens: int) -> Iterator[int]:
    """Policy-gradient steps; yields after each."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        prompts_B8 = torch.randint(0, model.config.vocab_size, (1, 8), generator=random).repeat(4, 1)
        with torch.no_grad():
            ids_BT = model.generate(
                prompts_B8, max_new_tokens=tokens, do_sample=True, pad_token_id=0, eos_token_id=None
            )
        rewards_B = (ids_BT[:, 8:] % 7 == 0).float().mean(dim=1)
        advantages_B = (rewards_B - rewards_B.mean()) / (rewards_B.std() + 1e-4)
        logits_BTV = model(ids_BT[:, :-1]).logits[:, 7:]
        logp_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 8:, None]).squeeze(-1)
        loss = -(advantages_B[:, None] * logp_BT).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step


def save(model: Any, path: Path) -> Path:
    """The published form: bf16, tied weights once."""
    import torch
    from safetensors.torch import save_file

    state = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.named_parameters()}
    save_file(state, path, metadata={"format": "pt"})
    return path


def measure(base: Path, new: Path, folder: Path) -> list[str]:
    """Changed share, ratio, bytes, speeds of the codec."""
    from components.common import delta, delta_block
    from components.common.manifest import file_digest
    from components.common.safetensors_layout import Layout, cut_blocks

    digests = {"base_digest": file_digest(base), "new_digest": file_digest(new)}
    report = delta.encode(base, new, folder / "patch", **digests)
    assert report
    delta.decode(base, [folder / "patch"], folder / "again", **digests)
    assert (folder / "again").read_bytes() == new.read_bytes()
    old_bytes, new_bytes = memoryview(base.read_bytes()), memoryview(new.read_bytes())
    blocks = cut_blocks(Layout.read(new))

    def encode() -> list[tuple[int, list[bytes]]]:
        return [delta_block.encode(old_bytes[a:b], new_bytes[a:b], width) for a, b, width in blocks]

    def decode() -> None:
        for (a, b, width), (changed, frames) in zip(blocks, encoded, strict=True):
            if changed:
                block = delta_block.Block(old_bytes[a:b], width)
                block.apply(changed, [memoryview(frame) for frame in frames])

    encoded = encode()
    encoding, decoding = quickest(encode), quickest(decode)
    size = new.stat().st_size
    return [
        f"{report.changed / report.elements:.2%}", f"{size / report.size:.0f}x", f"{report.size / 1e6:.2f} MB",
        f"{8 * report.size / max(1, report.changed):.1f}", f"{size / 1e9 / encoding:.1f}",
        f"{size / 1e9 / decoding:.1f}",
    ]  # fmt: skip


def quickest(act: Callable[[], object]) -> float:
    """CPU seconds of this thread, the least of five times."""
    seconds = []
    for _ in range(5):
        started = time.thread_time()
        act()
        seconds.append(time.thread_time() - started)
    return min(seconds)


def trained_rows(millions: int, steps: Sequence[int], tokens: int, folder: Path) -> Iterator[list[str]]:
    """A row for each learning rate and number of optimizer steps an iteration."""
    for learning_rate in LEARNING_RATES:
        model = make_model(millions)
        base = folder / "base"
        for step in train(model, learning_rate, WARM_STEPS + max(steps), tokens):
            done = step + 1 - WARM_STEPS
            if done == 0:
                save(model, base)
            if done in steps:
                row = measure(base, save(model, folder / "new"), folder)
                yield [f"{learning_rate:g}", str(done), *row]


def stored_rows(url: str, folder: Path) -> Iterator[list[str]]:
    """A row for each policy of a store and the one it came from."""
    from components.common import artifacts
    from components.common.lineage import history
    from components.common.store import open_store

    store = open_store(url if "://" in url else Path(url).resolve().as_uri())
    policies = [one for one in history(store) if one.manifest.kind == "policy" and one.manifest.iteration is not None]
    for before, after in pairwise(policies):
        old, new = before.manifest.digest, after.manifest.digest
        if after.manifest.parents.get("policy") != old or new == old:
            continue
        names = [name for name in after.manifest.names & before.manifest.names if name.endswith(".safetensors")]
        for name in names:
            paths = [folder / one.manifest.digest[7:19] for one in (before, after)]
            for one, path in zip((before, after), paths, strict=True):
                artifacts.fetch(store, one.manifest, path, [name])
            yield [after.name, name, *measure(paths[0] / name, paths[1] / name, folder)]


def codec_rows(count: int, folder: Path) -> Iterator[list[str]]:
    """A row for each share of values that moved by one unit in the last place, of weights like a model's."""
    import numpy as np

    from components.common import delta_block

    random = np.random.default_rng(0)
    weights = ((random.standard_normal(count, dtype=np.float32) * 0.02).view(np.uint32) >> 16).astype(np.uint16)
    base = save_bits(weights, folder / "base")
    for share in CODEC_SHARES:
        later = weights.copy()
        where = random.random(count, dtype=np.float32) < share
        steps = random.integers(0, 2, int(where.sum()), dtype=np.int16) * 2 - 1
        later[where] = delta_block._move(weights[where], steps)
        yield measure(base, save_bits(later, folder / "new"), folder)


def save_bits(values: Any, path: Path) -> Path:
    """A safetensors file of one bf16 tensor, from its bits: numpy has no bf16. The head's length is a multiple of 8, as
    the library makes it: values at odd addresses take a quarter longer."""
    head = json.dumps({"w": {"dtype": "BF16", "shape": [len(values)], "data_offsets": [0, values.nbytes]}}).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + values.tobytes())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=84, choices=list(SHAPES))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 16], help="optimizer steps an iteration")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of a completion")
    parser.add_argument("--store", help="measure the policies of this store instead of training")
    parser.add_argument("--codec", action="store_true", help="measure the codec on made-up steps instead of training")
    parser.add_argument("--values", type=int, default=CODEC_VALUES, help="bf16 values that --codec takes")
    options = parser.parse_args()
    first = ["policy", "file"] if options.store else [] if options.codec else ["learning rate", "steps"]
    header = [*first, "changed", "smaller", "patch", "bits a change", "encode, GB/s a core", "decode, GB/s a core"]
    what = options.store or (
        f"{2 * options.values / 1e6:.0f} MB of bf16" if options.codec else f"{options.millions} M parameters"
    )
    print(f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, {what}\n")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.store:
            rows = stored_rows(options.store, folder)
        elif options.codec:
            rows = codec_rows(options.values, folder)
        else:
            rows = trained_rows(options.millions, options.steps, options.tokens, folder)
        for row in rows:
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
