"""The plan: parameter counts against the models themselves, memory and traffic against numbers worked out by hand."""

import json

import pytest

from components.common.errors import DataError
from components.common.settings import validate
from pipeline.cli_checks import lines_of
from pipeline.gpus import find_gpu
from pipeline.memory import GIB, HEAD_BUFFER, RUNTIME, update_parts
from pipeline.plan import delta_factor, make_plan
from pipeline.resources import quantity
from pipeline.settings import PipelineSettings
from pipeline.shape import ModelShape, read_config, read_shape

SMALL = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
QWEN_HALF_BILLION = {
    "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False, "attention_bias": True}),
        ("Qwen2", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Mistral", {"head_dim": 8}),
        ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    ],
)
def test_parameters_are_those_of_the_model(name, changes):
    """Each architecture is built by transformers, without memory, and counted."""
    import torch
    import transformers

    config = getattr(transformers, f"{name}Config")(**(SMALL | changes))
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        model.tie_weights()
    shape = ModelShape.of(json.loads(config.to_json_string()), where=name)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_of_models_people_know():
    """As their model cards' safetensors say: Qwen2.5-0.5B and Llama-3.1-8B."""
    assert ModelShape.of(QWEN_HALF_BILLION, where="q").parameters == 494_032_768
    assert ModelShape.of(LLAMA_8B, where="l").parameters == 8_030_261_248


def test_adapters_are_counted_as_peft_makes_them():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SMALL, head_dim=16)
    with torch.device("meta"):
        model = get_peft_model(Qwen3ForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert ModelShape.of(json.loads(config.to_json_string()), where="q").lora(4) == trained


def settings(**sections):
    values = {
        "fine_tune": "f", "model": "org/model", "store": "s3://bucket", "iterations": 2,
        "dataset": {"source": "gsm8k"},
    }  # fmt: skip
    return validate(PipelineSettings, values | sections)


class Billions:
    """A shape of 7.5 billion parameters, the example of the ZeRO paper."""

    parameters = active = 7_500_000_000
    vocabulary, layers, hidden, layer_values, kv_values = 100_000, 32, 4096, 0, 0

    def lora(self, rank):
        return 0


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 15e9, 30e9, 12 * 7.5e9 / 64), (2, 15e9, 30e9 / 64, 90e9 / 64), (3, 15e9 / 64, 30e9 / 64, 90e9 / 64)],
)
def test_zero_divides_what_it_says(stage, weights, gradients, optimizer):
    """2 bytes of weights, 4 of gradients (float32 sums), 12 of master weights and moments; 64 processes."""
    update = settings(update={"zero_stage": stage}).update
    parts = update_parts(update, Billions(), on_gpu=True, processes=64)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (weights, gradients, optimizer)
    assert parts["logits"] == HEAD_BUFFER and parts["runtime"] == RUNTIME and parts["buckets"] == 1e9


def test_float32_without_zero_is_sixteen_bytes_a_parameter():
    parts = update_parts(settings(update={"zero_stage": 0}).update, Billions(), on_gpu=False, processes=1)
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * 7.5e9 and "runtime" not in parts


def test_ppo_holds_two_models_and_adapters_train_little():
    shape = ModelShape.of(LLAMA_8B, where="l")
    ppo = update_parts(settings(update={"algorithm": "ppo"}).update, shape, on_gpu=True, processes=1)
    grpo = update_parts(settings().update, shape, on_gpu=True, processes=1)
    lora = update_parts(settings(update={"lora": {"rank": 16}}).update, shape, on_gpu=True, processes=1)
    assert ppo["optimizer"] == 2 * grpo["optimizer"] and lora["optimizer"] < grpo["optimizer"] / 100
    checkpointed = update_parts(
        settings(update={"gradient_checkpointing": True}).update, shape, on_gpu=True, processes=1
    )
    assert checkpointed["activations"] < grpo["activations"] / 10


def h100(**update):
    pod = {"gpus": 1, "gpu_type": "nvidia-h100-80gb"}
    return settings(cluster={"rollout": pod, "update": pod, "prices": {"nvidia-h100-80gb": 4.0}}, update=update)


def test_a_half_billion_model_fits_and_eight_billion_do_not():
    small = ModelShape.of(QWEN_HALF_BILLION, where="q")
    checkpointed = h100(gradient_checkpointing=True)
    assert make_plan(checkpointed, small).problems == []
    (problem,) = make_plan(checkpointed, ModelShape.of(LLAMA_8B, where="l")).problems
    assert problem.startswith("update needs") and "zero_stage = 3" in problem and "79.0 are there" in problem
    small_gpu = settings(cluster={"rollout": {"gpu_type": "nvidia-l4"}, "update": {"gpu_type": "nvidia-l4"}})
    (problem,) = make_plan(small_gpu, small).problems
    assert "gradient_checkpointing = true" in problem


LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip


def test_the_reference_is_divided_as_the_policy_is():
    """70.55 billion parameters in 2 bytes are 131.4 GiB, beside 79: a 64th of it and 10^9 values put together fit."""
    shape = ModelShape.of(LLAMA_70B, where="l")
    assert shape.parameters == 70_553_706_496
    pod = {"gpus": 8, "gpu_type": "nvidia-h100-80gb"}

    def planned(**update):
        common = {"zero_stage": 3, "nodes": 8, "gradient_checkpointing": True}
        return make_plan(settings(cluster={"rollout": pod, "update": pod}, update=common | update), shape)

    assert planned(beta=0).update.fits and planned(beta=0).update.reference == 0
    assert planned(beta=0).update.parts["gathered"] == 2e9
    divided = planned(beta=0.04).update
    assert divided.fits and 2 * shape.parameters / 64 + 2e9 < divided.reference < 16 * GIB
    made = planned(beta=0.04, zero_stage=2)
    assert made.update.reference > 2 * shape.parameters and not made.update.fits
    lora = {"lora": {"rank": 16}, "zero_stage": 2}
    assert planned(beta=0.04, **lora).update.reference == 0
    assert planned(beta=0.04, **lora, reference_every=2).update.reference > 2 * shape.parameters
    whole = 2 * shape.parameters
    assert planned(beta=0.04).traffic.down - planned(beta=0).traffic.down == pytest.approx(8 * whole)


def test_the_critic_is_in_memory_storage_and_hours():
    """A second graph in memory; 12 bytes a parameter in the store: float32 weights and two moments."""
    shape = ModelShape.of(QWEN_HALF_BILLION, where="q")
    grpo, ppo = (make_plan(h100(algorithm=name), shape) for name in ("grpo", "ppo"))
    assert ppo.update.parts["activations"] == 2 * grpo.update.parts["activations"]
    assert ppo.traffic.optimizer - grpo.traffic.optimizer == 12 * shape.parameters
    assert ppo.hours.update > 1.9 * grpo.hours.update


def test_gpus_that_nothing_uses_are_paid_for():
    """Eight GPUs, one of which samples: eight times the GPU-hours of one; the same with one process that trains."""
    shape, pod = ModelShape.of(QWEN_HALF_BILLION, where="q"), {"gpu_type": "nvidia-h100-80gb"}

    def hours(gpus, **sections):
        both = dict.fromkeys(("rollout", "update"), pod | {"gpus": gpus})
        return make_plan(settings(cluster=both, **sections), shape).hours

    one = {"rollout": {"vllm": {"tensor_parallel_size": 1}}, "update": {"num_processes": 1}}
    assert hours(8, **one).rollout == pytest.approx(8 * hours(1, **one).rollout)
    assert hours(8, **one).update == pytest.approx(8 * hours(1, **one).update)
    assert hours(8).update == pytest.approx(hours(1).update), "all of them work, for an eighth of the time"


def test_storage_is_counted_by_hand():
    """Qwen2.5-0.5B in bfloat16: 2 and 12 bytes a parameter; 512 samples of 256 + 0.7 x 512 tokens at 5.6 bytes."""
    made = make_plan(settings(), ModelShape.of(QWEN_HALF_BILLION, where="q")).traffic
    parameters, tokens = 494_032_768, 512 * (256 + 0.7 * 512)
    assert made.policy == 2 * parameters and made.optimizer == 12 * parameters
    assert made.completions == pytest.approx(5.6 * tokens) and made.patch == made.policy / 121
    assert made.up_full == pytest.approx(14 * parameters + 5.6 * tokens)
    assert made.down == pytest.approx(2 * 2 * parameters + 12 * parameters + 3 * 5.6 * tokens)


def test_patches_are_as_small_as_the_next_measured_case():
    assert [delta_factor(1e-6, 1), delta_factor(1e-6, 2), delta_factor(5e-6, 1)] == [121, 30, 21]
    assert delta_factor(1e-6, 99) == 1 and delta_factor(1e-3, 1) == 1


def test_tasks_and_pods_are_those_of_the_compiled_pipeline():
    from pipeline.compiling import task_count

    made = make_plan(h100(), ModelShape.of(QWEN_HALF_BILLION, where="q"))
    assert made.tasks == task_count(h100()) == 14 and made.pods == 28 and made.runs == 1
    several = h100(nodes=3)
    assert make_plan(several, ModelShape.of(QWEN_HALF_BILLION, where="q")).pods == 28 + 2 * 3


def test_hours_and_cost():
    """Training: 6 x 494 M x 314,572.8 tokens / (989e12 x 0.35 a second)."""
    made = make_plan(h100(), ModelShape.of(QWEN_HALF_BILLION, where="q")).hours
    tokens = 512 * (256 + 0.7 * 512)
    assert made.update == pytest.approx(6 * 494_032_768 * tokens / (989e12 * 0.35) / 3600)
    assert made.cost == pytest.approx(4.0 * (made.rollout + made.update)) and made.rollout > 0
    assert make_plan(settings(), ModelShape.of(QWEN_HALF_BILLION, where="q")).hours is None


def test_gpus_are_found_by_their_labels():
    names = {
        "nvidia-h100-80gb": "h100", "NVIDIA-A100-SXM4-40GB": "a100-40", "nvidia-a100-80gb": "a100", "l4": "l4",
        "NVIDIA-L40S": "l40s", "nvidia-tesla-t4": "t4", "NVIDIA-H200": "h200", "a10g": "a10",
    }  # fmt: skip
    assert {name: find_gpu(name).name for name in names} == names
    assert find_gpu("mystery") is None and find_gpu(None) is None


def test_the_automatic_micro_batch_is_the_updates_own():
    from components.update import inputs
    from pipeline import memory

    assert memory.AUTOMATIC_TOKENS is inputs.AUTOMATIC_TOKENS


def test_quantities():
    assert [quantity(text) for text in ("64Gi", "500m", "2", "1.5G")] == [64 * GIB, 0.5, 2, 1.5e9]
    large = {"1Pi": 2**50, "2Ei": 2**61, "3P": 3e15, "1E": 1e18, "12e6": 12e6, "12E6": 12e6, "5e-1": 0.5}
    assert {text: quantity(text) for text in large} == large


def test_what_cannot_be_planned_says_so(tmp_path):
    with pytest.raises(DataError, match="--config"):
        read_shape("s3://bucket/model")
    with pytest.raises(DataError, match=r"no readable config\.json"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(DataError, match="num_attention_heads"):
        read_config(tmp_path / "config.json")


def test_the_lines_name_what_is_unknown():
    made = make_plan(settings(), ModelShape.of(QWEN_HALF_BILLION, where="q"))
    text = "\n".join(lines_of(made, 2))
    assert "0.494 billion" in text and "set gpu_memory or gpu_type" in text and "gpu_type to known GPUs" in text
    text = "\n".join(lines_of(make_plan(h100(), ModelShape.of(LLAMA_8B, where="l")), 2))
    assert "DOES NOT FIT" in text and "cost" in text
