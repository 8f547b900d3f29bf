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


def test_weights_alone_are_not_taken_for_the_policy(case, engine_model):
    from components.common.errors import DataError

    inputs = case.start(engine_model)
    first = case.update(inputs, case.scored("scored", engine_model, inputs["policy"]), lora=LORA)
    scored = case.scored("next", merge(first.folder(), case.folder / "m"), first.policy_path)
    with pytest.raises(DataError, match=r"is an adapter on base weights and lora.rank is 0: set lora.rank"):
        case.update(first.inputs, scored, iteration=1)


@pytest.mark.parametrize("lora", [LORA, LORA | {"publish": "merged"}, {"rank": 0}], ids=["adapter", "merged", "none"])
def test_a_reference_that_moves_each_iteration_is_the_policy_before_its_update(case, engine_model, lora):
    inputs, model = case.start(engine_model), engine_model
    case.iterations = 9
    for iteration in range(3):
        scored = case.scored(f"scored-{iteration}", model, inputs["policy"], seed=iteration)
        outcome = case.update(inputs, scored, iteration=iteration, lora=lora, beta=0.05, reference_every=1)
        assert outcome.metrics["kl"] == pytest.approx(0.0, abs=1e-9)
        inputs, model = outcome.inputs, outcome.folder()
        if (model / "adapter").exists():
            model = merge(model, case.folder / f"merged-{iteration}")
    scored = case.scored("scored-3", model, inputs["policy"], seed=3)
    behind = case.update(inputs, scored, iteration=3, lora=lora, beta=0.05, reference_every=2)
    assert behind.metrics["kl"] > 1e-5  # the reference is the policy of iteration 2


def test_the_last_policy_is_merged_even_without_a_signal(case, engine_model):
    case.iterations = 2
    inputs = case.start(engine_model)
    names = set(Manifest.load(inputs["policy"]).names)
    first = case.update(inputs, case.scored("scored", engine_model, inputs["policy"]), lora=LORA)
    merged = merge(first.folder(), case.folder / "m")
    scored = case.scored("flat", merged, first.policy_path, reward=[1.0] * 12)
    last = case.update(first.inputs, scored, iteration=1, lora=LORA)
    assert set(last.policy.names) == names
    wanted = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    for name, weight in last.weights().items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-6)
    assert last.metrics["num_steps"] == 0 and last.optimizer.metadata["global_step"] == 1
    case.run_name, case.iterations = "next-run", 4
    scored = case.scored("more", last.folder(), last.policy_path, seed=3)
    after = case.update(last.inputs, scored, iteration=2, lora=LORA)  # with the adapter that was trained
    assert after.metrics["sampling/sampling_logp_difference/max"] < 2e-5


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_adapters_do_not_depend_on_the_processes(case, engine_model, zero_stage):
    from safetensors.torch import load_file

    case.iterations, case.staleness = 9, 1
    start, found = case.start(engine_model), []
    scored = case.scored("scored", engine_model, start["policy"])
    ways = [{"zero_stage": 0}] * 2, [{"zero_stage": zero_stage, "num_processes": 2}, {"zero_stage": 3 - zero_stage}]
    for number, way in enumerate(ways):
        case.run_name, inputs = f"way-{number}", start
        for iteration, settings in enumerate(way):  # the second one goes on with the first one's state
            outcome = case.update(inputs, scored, iteration=iteration, lora=LORA, **settings)
            inputs = outcome.inputs
        found.append(load_file(outcome.folder(f"way-{number}") / "adapter" / "adapter_model.safetensors"))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=1e-6)
