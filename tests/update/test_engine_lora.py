"""LoRA through the stage: base weights stored once, the adapter beside them, the last policy merged."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from components.common.manifest import Manifest

LORA = {"rank": 4, "alpha": 8.0}


def test_a_round_of_adapters_ends_in_a_merged_policy(case, engine_model):
    case.iterations = 3
    inputs = case.start(engine_model)
    start = {file.name: file.digest for file in Manifest.load(inputs["policy"]).files}
    model, sizes = engine_model, []
    for iteration in range(3):
        scored = case.scored(f"scored-{iteration}", model, inputs["policy"], seed=iteration)
        outcome = case.update(inputs, scored, iteration=iteration, lora=LORA, beta=0.05, learning_rate=1e-2)
        files = {file.name: file for file in outcome.policy.files}
        # the policy the sampler loads is the one the update trained
        assert outcome.metrics["sampling/sampling_logp_difference/max"] < 2e-5
        assert (outcome.metrics["kl"] > 1e-6) == (iteration > 0)  # adapter off is the start policy
        if iteration < 2:
            assert files["model.safetensors"].digest == start["model.safetensors"]
            sizes.append(files["adapter/adapter_model.safetensors"].size)
            merged = merge(outcome.folder(), case.folder / f"merged-{iteration}")
            inputs, model = outcome.inputs, merged
    assert "adapter/adapter_model.safetensors" not in files
    assert set(files) == set(start)
    assert files["model.safetensors"].digest != start["model.safetensors"]
    assert sizes[0] == sizes[1] < files["model.safetensors"].size

    # the run's last policy is the adapter of its optimizer state on the base weights
    state = outcome.optimizer
    assert "adapter/adapter_model.safetensors" in state.names
    # and the next run goes on with that adapter, not with a fresh one on merged weights
    case.run_name, case.iterations = "next-run", 5
    scored = case.scored("scored-3", outcome.folder(), outcome.policy_path, seed=3)
    after = case.update(outcome.inputs, scored, iteration=3, lora=LORA, beta=0.05, learning_rate=1e-2)
    assert after.metrics["sampling/sampling_logp_difference/max"] < 2e-5
    base = {file.name: file.digest for file in after.policy.files}
    assert base["model.safetensors"] == start["model.safetensors"]


def merge(folder, target):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")
    model.merge_and_unload().save_pretrained(target)
    return target


def test_merged_policies_are_those_of_the_adapter(case, engine_model):
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    case.iterations = 9
    adapter = case.update(inputs, scored, lora=LORA)
    case.run_name = "merged"
    merged = case.update(inputs, scored, lora=LORA | {"publish": "merged"})
    wanted = AutoModelForCausalLM.from_pretrained(merge(adapter.folder(), case.folder / "m")).state_dict()
    for name, weight in merged.weights().items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-6)


def test_an_adapter_of_another_rank_is_refused(case, engine_model):
    from components.common.errors import DataError

    inputs = case.start(engine_model)
    first = case.update(inputs, case.scored("scored", engine_model, inputs["policy"]), lora=LORA)
    scored = case.scored("next", merge(first.folder(), case.folder / "m"), first.policy_path)
    with pytest.raises(DataError, match=r"adapter has r = 4, settings want 8; keep lora.rank"):
        case.update(first.inputs, scored, iteration=1, lora={"rank": 8, "alpha": 8.0})
