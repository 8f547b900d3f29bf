"""Weights do not depend on how the batch is cut, how many processes share it, or what DeepSpeed divides.

AdamW's step here is nearly linear in the gradient (its epsilon is 1e-2), so equal weights mean equal gradients.
"""

from functools import partial

import pytest
import torch

VARIANTS = {
    "7 micro-batches": {"max_tokens_per_microbatch": 24},
    "padded": {"layout": "padded"},
    "padded, several micro-batches": {"layout": "padded", "max_tokens_per_microbatch": 40},
    "checkpointing": {"gradient_checkpointing": True},
    "2 processes": {"num_processes": 2, "max_tokens_per_microbatch": 24},
    "ZeRO 1, 2 processes": {"zero_stage": 1, "num_processes": 2},
    "ZeRO 2, 2 processes, 7 micro-batches": {"zero_stage": 2, "num_processes": 2, "max_tokens_per_microbatch": 24},
    "ZeRO 3, 2 processes": {"zero_stage": 3, "num_processes": 2, "max_tokens_per_microbatch": 24},
    "ZeRO 2, offload": {"zero_stage": 2, "offload_optimizer": True},
    "ZeRO 3, 3 processes, idle ones": {"zero_stage": 3, "num_processes": 3, "max_tokens_per_microbatch": 60},
}
LENGTHS = [12, 1, 7, 3, 9, 2, 11, 5, 4, 8, 6, 10]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, engine_model):
    """One process, one micro-batch, ZeRO 0; two optimizer steps with a KL term."""
    from engine_case import Case

    case = Case(
        tmp_path_factory.mktemp("baseline"),
        settings={
            "zero_stage": 0, "num_threads": 1, "learning_rate": 1e-2, "adam_epsilon": 1e-2, "num_epochs": 2,
            "beta": 0.05, "weight_decay": 0.1,
        },
    )  # fmt: skip
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"], lengths=LENGTHS, noise=0.05)
    return case, inputs, scored, case.update(inputs, scored)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_weights(baseline, name):
    case, inputs, scored, wanted = baseline
    case.run_name = f"variant-{list(VARIANTS).index(name)}"
    found = case.update(inputs, scored, **VARIANTS[name])
    start, end = wanted.weights(), found.weights()
    assert set(start) == set(end)
    for weight_name, weight in start.items():
        torch.testing.assert_close(end[weight_name], weight, rtol=0, atol=1e-6)
    for figure in ("loss", "entropy", "kl", "grad_norm", "clip_ratio/region_mean", "num_tokens", "learning_rate"):
        assert found.metrics[figure] == pytest.approx(wanted.metrics[figure], rel=2e-5, abs=2e-6), figure
    before, after = wanted.state(), found.state()
    assert set(before) == set(after)
    for state_name, state in before.items():
        torch.testing.assert_close(after[state_name], state, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_sequence_may_lie_in_two_chunks_of_the_head(baseline, monkeypatch, correction, steps):
    """At a large vocabulary the head works on a few hundred tokens at a time; here on 64 of 78."""
    from components.update import model

    case, inputs, scored, _ = baseline
    settings = {"correction": correction, "correction_cap": 1.05, "correction_floor": 0.95, "num_epochs": steps}
    case.run_name = f"whole-{correction}-{steps}"
    whole = case.update(inputs, scored, **settings)
    small = {name: partial(getattr(model, name), chunk_bytes=1) for name in ("fused_head_loss", "linear_logprobs")}
    for name, function in small.items():
        monkeypatch.setattr(model, name, function)
    case.run_name = f"chunks-{correction}-{steps}"
    chunks = case.update(inputs, scored, **settings)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(chunks.weights()[name], weight, rtol=0, atol=1e-6)
    for figure in ("loss", "grad_norm", "sampling/importance_sampling_ratio/mean"):
        assert chunks.metrics[figure] == pytest.approx(whole.metrics[figure], rel=2e-5, abs=2e-6), figure


def test_a_ratio_of_whole_sequences_under_zero_3_and_offload(baseline):
    case, inputs, scored, _ = baseline
    settings = {"loss_type": "gspo", "correction": "sequence_mask", "epsilon_low": 0.1, "epsilon_high": 0.1}
    case.run_name = "gspo"
    wanted = case.update(inputs, scored, **settings)
    case.run_name = "gspo-divided"
    offload = {"offload_optimizer": True, "offload_parameters": True}
    found = case.update(
        inputs, scored, zero_stage=3, num_processes=2, max_tokens_per_microbatch=24, **offload, **settings
    )
    for name, weight in wanted.weights().items():
        torch.testing.assert_close(found.weights()[name], weight, rtol=0, atol=1e-6)


def test_ranks_without_a_sequence_keep_in_step(case, engine_model):
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"], num_prompts=1, group_size=2, reward=[0.0, 1.0])
    alone = case.update(inputs, scored)
    for zero_stage in (2, 3):
        case.run_name = f"three-{zero_stage}"
        three = case.update(inputs, scored, zero_stage=zero_stage, num_processes=3)
        assert three.metrics["num_tokens"] == alone.metrics["num_tokens"]
        assert three.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-6)
        for name, weight in alone.weights().items():
            torch.testing.assert_close(three.weights()[name], weight, rtol=0, atol=1e-6)


def test_uneven_sequences_are_packed_without_padding(baseline):
    case, inputs, scored, wanted = baseline
    case.run_name = "padding"
    padded = case.update(inputs, scored, layout="padded")
    assert wanted.metrics["padding_share"] == 0.0
    lengths = padded.metrics["num_tokens"]
    assert padded.metrics["padding_share"] > 0.1
    assert lengths == wanted.metrics["num_tokens"]


def test_bfloat16_trains_on_float32_masters(case, tmp_path):
    """Steps too small for bfloat16 to show one by one add up in the masters that travel with the optimizer state."""
    from engine_case import save_tiny_model

    model = save_tiny_model(tmp_path / "half", dtype="bfloat16")
    inputs = case.start(model)
    settings = {"zero_stage": 1, "dtype": "bfloat16", "learning_rate": 2e-5, "adam_epsilon": 1e-8}
    scored = case.scored("scored", model, inputs["policy"])
    kept = case.update(inputs, scored, **settings)
    assert {str(weight.dtype) for weight in kept.weights().values()} == {"torch.bfloat16"}
    masters = {name: value for name, value in kept.state().items() if name.startswith("master/")}
    start = {name: weight.float() for name, weight in load(model).items()}
    moved = torch.cat([(masters[f"master/{name}"] - start[name].flatten()).abs() for name in start])
    assert moved.median() == pytest.approx(2e-5, rel=0.2)  # Adam's first step is the learning rate
    changed = torch.cat([(kept.weights()[name] != load(model)[name]).flatten() for name in start]).float().mean()
    assert changed < 0.5  # most of it is below what bfloat16 shows


def load(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
