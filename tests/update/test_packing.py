"""Which models may be packed: log-probabilities of packed sequences against each sequence alone, in the plain model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from engine_case import plain_logprobs
from transformers import AutoModelForCausalLM

from components.common.errors import DataError
from components.update import attention
from components.update.batching import Batch
from components.update.model import ScoringModel, check_packing, collate, load_policy, scoring

SHAPE = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CAPPED = {"final_logit_softcapping": None, "attn_logit_softcapping": 2.0, "sliding_window": 64}
RIGHT = {"Qwen2": {}, "Qwen3": {}, "Qwen3Moe": EXPERTS, "Llama": {}, "Mistral": {}, "Gemma3Text": {}, "Phi3": {}}
REFUSED = {
    "Qwen3_5Text": (LINEAR, "layers of type linear_attention"),
    "Qwen3Next": (LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16}, "layers of type linear_attention"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "GptOss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}, "has attention sinks"),
    "Gemma2": (CAPPED, "has soft-capped attention"),
    "Mistral": ({"sliding_window": 4}, "exceed the model's sliding window of 4"),
}  # fmt: skip


def saved(folder, family, changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def three_sequences():
    random, prompts, completions = np.random.default_rng(0), np.array([3, 2, 4]), np.array([5, 7, 3])
    return Batch(
        prompt_ids=random.integers(3, 48, 9).astype(np.int32), prompt_offsets=np.array([0, 3, 5, 9]),
        completion_ids=random.integers(3, 48, 15).astype(np.int32), completion_offsets=np.array([0, 5, 12, 15]),
        behaviour_logprobs=np.zeros(15, np.float32), group=np.zeros(3, int), truncated=np.zeros(3, bool),
        rewards=np.zeros((3, 1)), advantages=np.zeros(3), scored_lengths=completions, keep=np.ones(len(prompts), bool),
    )  # fmt: skip


def scored(folder, batch, *, padded):
    model = ScoringModel(load_policy(folder, dtype=torch.float32, padded=padded))
    if not padded:
        check_packing(model, batch, torch.device("cpu"))
    with scoring(model) as score:
        return score(collate(batch, np.arange(3), padded=padded, device=torch.device("cpu")), 1.0)[1]


def alone(folder, batch):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for row in range(3):
        prompt = batch.prompt_ids[slice(*batch.prompt_offsets[row : row + 2])].tolist()
        completion = batch.completion_ids[slice(*batch.completion_offsets[row : row + 2])].tolist()
        with torch.no_grad():
            found.append(plain_logprobs(model, prompt, completion))
    return torch.cat(found)


@pytest.mark.parametrize("family", RIGHT)
def test_packed_sequences_score_as_each_alone(tmp_path, family):
    batch, folder = three_sequences(), saved(tmp_path / family, family, RIGHT[family])
    torch.testing.assert_close(scored(folder, batch, padded=False), alone(folder, batch), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_packing_would_falsify_are_refused_and_right_when_padded(tmp_path, family):
    changes, message = REFUSED[family]
    batch, folder = three_sequences(), saved(tmp_path / family, family, changes)
    with pytest.raises(DataError, match=rf'{message}.*set layout = "padded"'):
        scored(folder, batch, padded=False)
    torch.testing.assert_close(scored(folder, batch, padded=True), alone(folder, batch), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["Qwen3_5Text", "Lfm2"])
def test_a_layer_that_nobody_names_is_noticed(tmp_path, monkeypatch, family):
    monkeypatch.setattr(attention, "check_layers", lambda config: None)
    folder = saved(tmp_path / family, family, REFUSED[family][0])
    with pytest.raises(DataError, match=r'layers that look across their boundaries; set layout = "padded"'):
        scored(folder, three_sequences(), padded=False)


def test_the_probe_of_a_batch_with_a_single_token(tmp_path):
    batch = replace(
        three_sequences(), prompt_ids=np.array([5], np.int32), completion_ids=np.array([], np.int32)
    )  # fmt: skip
    model = ScoringModel(load_policy(saved(tmp_path / "m", "Qwen3", {}), dtype=torch.float32, padded=False))
    check_packing(model, batch, torch.device("cpu"))
    assert model.policy.config._attn_implementation == attention.IMPLEMENTATION
