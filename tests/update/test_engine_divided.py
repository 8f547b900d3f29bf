"""ZeRO 3 loads a model in parts: no process ever holds all of it."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from engine_case import save_tiny_model
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

NUM_RANKS = 2


def own_bytes() -> int:
    """Memory of this process alone: what a memory-mapped file adds can be taken back at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """Highest `own_bytes` while it is entered, above the first."""

    def __enter__(self):
        self.start, self.highest, self.done = own_bytes(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.is_set():
            self.highest = max(self.highest, own_bytes() - self.start)
            time.sleep(0.001)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def load(folder: Path, rank: int) -> None:
    """One rank: loads the policy as the worker does, leaves what it held at most, and sums of the weights."""
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401 (code is no part of what is measured)

    from components.update.config import UpdateSettings
    from components.update.engine import deepspeed_config, for_reading, import_deepspeed
    from components.update.model import ScoringModel, load_policy

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(NUM_RANKS), "LOCAL_SIZE": "1"}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), NUM_RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    deepspeed, settings = import_deepspeed(), UpdateSettings(zero_stage=3)
    with Peak() as peak:
        zero3 = deepspeed_config(settings, "float32")
        policy = load_policy(folder / "model", dtype=torch.float32, padded=False, zero3=zero3)
        for_reading(ScoringModel(policy), settings, dtype="float32", device=torch.device("cpu"))
    sums = {}
    for name, parameter in policy.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            sums[name] = parameter.double().square().sum().item()
    (folder / f"{rank}.json").write_text(json.dumps([peak.highest, sums]))


def test_no_process_holds_the_whole_model(tmp_path):
    """114 million parameters over two processes: half of it each, and no more than a few matrices beside."""
    save_tiny_model(
        tmp_path / "model", vocab_size=8192, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, head_dim=64,
        num_attention_heads=12, num_key_value_heads=4, initializer_range=0.02,
    )  # fmt: skip
    weights = load_file(tmp_path / "model" / "model.safetensors")
    size = sum(4 * weight.numel() for weight in weights.values())
    assert size > 400e6
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=load, args=(tmp_path, rank)) for rank in range(NUM_RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * NUM_RANKS
    for rank in range(NUM_RANKS):
        peak, sums = json.loads((tmp_path / f"{rank}.json").read_text())
        assert 0.45 * size < peak < 0.75 * size
        assert sums == pytest.approx({name: weight.double().square().sum().item() for name, weight in weights.items()})
