"""Operations of a training step by hand, and which GPU is which."""

import pytest
import torch
from engine_case import save_tiny_model

from components.update import lora
from components.update.config import LoraSettings
from components.update.metrics import peak_flops, peak_memory_bytes, training_flops
from components.update.model import ScoringModel, load_policy

# Two layers, hidden 32, two heads of 16, one key-value head, inner 48, vocabulary 48. Matrix elements of a layer:
# q and o 32 x 32, k and v 32 x 16, three of 32 x 48: 7,680. Head 48 x 32 = 1,536. Two sequences of 5 and 7 tokens, 6 of
# them scored: 12 tokens, 5^2 + 7^2 = 74.
BODY, HEAD, LENGTHS, SCORED = 2 * 7_680, 1_536, [5, 7], 6
ATTENTION = 6 * 2 * 32 * 74


def flops(folder, *, tied=True, rank=0):
    save_tiny_model(folder, tied=tied)
    policy = load_policy(folder, dtype=torch.float32, padded=False)
    if rank:
        lora.attach(policy, LoraSettings(rank=rank), None)
    return training_flops(ScoringModel(policy), LENGTHS, SCORED)


@pytest.mark.parametrize("tied", [True, False])
def test_three_passes_of_what_trains_and_the_head_for_scored_tokens(tmp_path, tied):
    assert flops(tmp_path / "m", tied=tied) == 6 * BODY * 12 + 6 * HEAD * 6 + ATTENTION == 1_189_632


def test_two_passes_of_what_is_frozen(tmp_path):
    """Rank 4: 4 x (in + out) of each matrix, 1,856 a layer."""
    assert flops(tmp_path / "m", rank=4) == (4 * BODY + 6 * 2 * 1_856) * 12 + 4 * HEAD * 6 + ATTENTION == 1_069_824


def test_a_configuration_within_another_is_counted_by_nobody(tmp_path):
    from transformers import LlavaConfig

    save_tiny_model(tmp_path / "m", tied=True)
    model = ScoringModel(load_policy(tmp_path / "m", dtype=torch.float32, padded=False))
    model.policy.config = LlavaConfig(text_config=model.policy.config.to_dict())
    assert training_flops(model, LENGTHS, SCORED) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", None), ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None), ("NVIDIA GH200 480GB", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_name_is_matched_as_a_word(name, peak):
    assert peak_flops(name) == peak


def test_the_peak_is_of_this_process_alone():
    """A process started by a large one begins small."""
    import subprocess
    import sys

    held = bytearray(b"x") * (600 << 20)
    code = (
        "import torch; from components.update.metrics import peak_memory_bytes\n"
        "print(peak_memory_bytes(torch.device('cpu')))"
    )
    found = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert peak_memory_bytes(torch.device("cpu")) > len(held) > found
