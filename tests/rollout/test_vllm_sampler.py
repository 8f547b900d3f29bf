"""vLLM against transformers and a plain forward pass, on one tiny policy in float32 and bfloat16, with an adapter too.

One process of the environment with vLLM draws everything; what it drew is judged here. The log-probabilities both
engines report are those of the processed distribution: after temperature, top-k and top-p.
"""

import json
import os
import random
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.common.manifest import file_digest
from components.rollout.config import RolloutSettings
from components.rollout.draw import processed_logprobs
from components.rollout.sampler import Completion, SampleRequest, Sampling, sample_seed
from components.rollout.transformers_sampler import TransformersSampler

ROOT = Path(__file__).parents[2]
END = 1
ENDS = {"max_tokens": 16, "stop_token_ids": (END,)}
SAMPLINGS = {
    "plain": Sampling(temperature=1.0, **ENDS),
    "cool": Sampling(temperature=0.6, **ENDS),
    "top-p": Sampling(temperature=1.0, top_p=0.8, **ENDS),
    "top-k": Sampling(temperature=1.0, top_k=5, **ENDS),
    "all": Sampling(temperature=1.3, top_k=9, top_p=0.8, **ENDS),
    "greedy": Sampling(temperature=0.0, **ENDS),
}
MANY = Sampling(temperature=0.8, max_tokens=1, top_p=0.95)


def requests(sampling: Sampling, num_prompts: int = 16, group_size: int = 4) -> list[SampleRequest]:
    """Prompts of 1 to 12 tokens."""
    return [
        SampleRequest(
            str(number), index, tuple(random.Random(number).choices(range(2, 32), k=1 + number % 12)),
            sample_seed(0, "train", 0, str(number), index), sampling,
        )
        for number in range(num_prompts) for index in range(group_size)
    ]  # fmt: skip


ROUNDS = {name: requests(sampling) for name, sampling in SAMPLINGS.items()}
ROUNDS["again, fewer"] = ROUNDS["plain"][20:33]  # as a resumed rollout asks
ROUNDS["many"] = requests(MANY, num_prompts=1, group_size=2000)
# more prompt tokens than an engine step takes, where vLLM would cut a prompt in two
ROUNDS["wide"] = [
    replace(request, prompt_ids=tuple(random.Random(request.prompt_id).choices(range(2, 32), k=43)))
    for request in requests(SAMPLINGS["plain"], num_prompts=120, group_size=1)
]


ALL_ROUNDS = dict.fromkeys(("float32", "bfloat16", "adapted", "cut", "greedy for memory"), ROUNDS)
STOPS = ("7", "ab")
STOPPED = Sampling(temperature=1.0, stop=STOPS, **ENDS)


def make_adapter(policy: Path, folder: Path) -> Path:
    """The policy with a LoRA adapter beside it that changes its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    for path in policy.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(1)  # before the adapter is made: half of it is random from the start
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(policy), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "adapter")
    return folder


def silent_adapter(adapted: Path, path: Path) -> Path:
    """Weights of an adapter that changes nothing."""
    weights = load_file(adapted / "adapter/adapter_model.safetensors")
    save_file({name: torch.zeros_like(weight) for name, weight in weights.items()}, path)
    return path


def with_nan(policy: Path, folder: Path) -> Path:
    """The policy with one number of its last norm broken."""
    shutil.copytree(policy, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def adapted_dir(policy_dir, tmp_path_factory) -> Path:
    return make_adapter(policy_dir, tmp_path_factory.mktemp("adapted") / "policy")


@pytest.fixture(scope="module")
def probed(vllm_python, policy_dir, bf16_dir, adapted_dir, tmp_path_factory) -> dict[str, dict]:
    """What vLLM drew for each policy: completions by round."""
    folder = tmp_path_factory.mktemp("vllm")
    cut = folder / "cut"
    cut.mkdir()
    for path in policy_dir.iterdir():
        (cut / path.name).write_bytes(path.read_bytes()[: 20_000 if path.suffix == ".safetensors" else None])
    policies = {"float32": policy_dir, "bfloat16": bf16_dir, "adapted": adapted_dir, "cut": cut}
    policies["greedy for memory"] = policy_dir
    policies["moved"] = shutil.copytree(policy_dir, folder / "elsewhere" / policy_dir.name)
    policies["swapped"] = shutil.copytree(adapted_dir, folder / "swapped")
    policies["stopped"] = policy_dir
    policies["NaN"] = with_nan(policy_dir, folder / "nan")
    options: dict[str, dict] = {name: {} for name in policies}
    options["greedy for memory"]["settings"] = {"vllm": {"cpu_kv_cache_gib": 100_000}}
    options["swapped"]["swapped_adapter"] = str(silent_adapter(adapted_dir, folder / "silent.safetensors"))
    options["stopped"]["settings"] = {"stop": STOPS}
    rounds = ALL_ROUNDS | {
        "moved": {}, "swapped": {"greedy": ROUNDS["greedy"]}, "stopped": {"stops": requests(STOPPED)},
        "NaN": {"plain": ROUNDS["plain"][:8]},
    }  # fmt: skip
    plan = {"policies": [
        {"folder": str(path), "rounds": [[asdict(request) for request in wanted] for wanted in rounds[name].values()]}
        | options[name]
        for name, path in policies.items()
    ]}  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [vllm_python, str(Path(__file__).with_name("vllm_probe.py")), "plan.json", "out.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = dict(zip(policies, json.loads((folder / "out.json").read_text()), strict=True))
    for policy, outcome in outcomes.items():
        if outcome.get("rounds"):
            outcome["completions"] = {
                name: [Completion(request, *row) for request, row in zip(wanted, rows, strict=True)]
                for (name, wanted), rows in zip(rounds[policy].items(), outcome["rounds"], strict=True)
            }
    return outcomes


def rescored(model, completion: Completion) -> torch.Tensor:
    """Log-probabilities of a completion by one unpadded forward pass."""
    prompt, ids = list(completion.request.prompt_ids), completion.completion_ids
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return processed_logprobs(logits, completion.request.sampling).gather(1, torch.tensor(ids)[:, None])[:, 0]


def differences(model, completions: list[Completion]) -> torch.Tensor:
    """Absolute differences of vLLM's log-probabilities to the forward pass, a token each."""
    return torch.cat([torch.tensor(c.logprobs) - rescored(model, c) for c in completions]).abs()


@pytest.mark.parametrize("name", [*SAMPLINGS, "wide"])
@pytest.mark.parametrize("policy", ["float32", "adapted"])
def test_vllm_logprobs_in_float32_are_those_of_a_forward_pass(probed, policy, name, policy_dir, adapted_dir):
    model = TransformersSampler({"float32": policy_dir, "adapted": adapted_dir}[policy], RolloutSettings(), str).model
    found = differences(model, probed[policy]["completions"][name])
    assert found.max() < 1e-4
    assert found.mean() < 1e-5


@pytest.mark.parametrize("name", ["plain", "cool"])
def test_vllm_in_bfloat16_differs_from_transformers_by_no_more_than_rounding_does(probed, name, bf16_dir):
    """The measure is what bfloat16 itself costs: the same weights, rounded as the model runs or kept in float32."""
    rounded = TransformersSampler(bf16_dir, RolloutSettings(), str).model
    exact = TransformersSampler(bf16_dir, RolloutSettings(dtype="float32"), str).model
    completions = probed["bfloat16"]["completions"][name]
    rounding = torch.cat([rescored(rounded, c) - rescored(exact, c) for c in completions]).abs()
    found = differences(rounded, completions)
    assert found.mean() < 1.5 * rounding.mean()
    assert found.max() < 3 * rounding.max()


@pytest.mark.parametrize("name", ["top-p", "top-k", "all"])
def test_vllm_in_bfloat16_differs_by_rounding_where_tokens_are_cut_off(probed, name, bf16_dir):
    model = TransformersSampler(bf16_dir, RolloutSettings(), str).model
    found = differences(model, probed["bfloat16"]["completions"][name])
    # a token at the border of the cut may be kept by one engine and not by the other, which moves all of its step
    assert found.median() < 0.03
    assert (found > 0.4).float().mean() < 0.03


def test_likeliest_tokens_are_the_same_in_both_engines(probed, policy_dir):
    ours = TransformersSampler(policy_dir, RolloutSettings(), str)
    found = {id(c.request): c for batch in ours.sample(ROUNDS["greedy"]) for c in batch}
    for theirs, request in zip(probed["float32"]["completions"]["greedy"], ROUNDS["greedy"], strict=True):
        assert theirs.completion_ids == found[id(request)].completion_ids
        assert theirs.finish_reason == found[id(request)].finish_reason


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_vllm_draws_from_the_distribution_it_reports(probed, policy):
    """2,000 first tokens of one prompt: each token's share is its reported probability."""
    completions = probed[policy]["completions"]["many"]
    counts = Counter(c.completion_ids[0] for c in completions)
    reported = {c.completion_ids[0]: torch.tensor(c.logprobs[0]).exp().item() for c in completions}
    expected = {token: share * len(completions) for token, share in reported.items() if share * len(completions) >= 5}
    chi_squared = sum((counts[token] - count) ** 2 / count for token, count in expected.items())
    assert chi_squared < 2 * len(expected) + 15  # far beyond p = 0.001 for up to 32 tokens


@pytest.mark.parametrize("policy", ["float32", "bfloat16", "adapted"])
def test_a_resumed_vllm_draws_the_same_samples(probed, policy):
    completions = probed[policy]["completions"]
    before, after = completions["plain"][20:33], completions["again, fewer"]
    assert [c.completion_ids for c in before] == [c.completion_ids for c in after]
    for one, other in zip(before, after, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5 if policy != "bfloat16" else 0.1)


def test_samples_of_a_group_differ_and_end_as_they_should(probed):
    completions = probed["float32"]["completions"]["plain"]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        assert END not in completion.completion_ids[:-1]
        assert (completion.completion_ids[-1] == END) == (completion.finish_reason == "stop")
    groups = [{tuple(c.completion_ids) for c in completions[start : start + 4]} for start in range(0, 64, 4)]
    assert sum(len(group) > 1 for group in groups) > 12


def test_the_adapter_changes_what_vllm_draws(probed):
    plain, adapted = (probed[policy]["completions"]["greedy"] for policy in ("float32", "adapted"))
    assert sum(a.completion_ids != b.completion_ids for a, b in zip(plain, adapted, strict=True)) > 16


def test_digests_are_those_of_the_files_that_were_loaded(probed, policy_dir, adapted_dir):
    assert probed["float32"]["digests"] == {"model.safetensors": file_digest(policy_dir / "model.safetensors")}
    names = ("model.safetensors", "adapter/adapter_model.safetensors")
    assert probed["adapted"]["digests"] == {name: file_digest(adapted_dir / name) for name in names}


def test_an_adapter_that_is_changed_after_the_start_is_not_the_one_that_samples(probed):
    swapped, adapted = (probed[policy]["completions"]["greedy"] for policy in ("swapped", "adapted"))
    assert [c.completion_ids for c in swapped] == [c.completion_ids for c in adapted]
    assert probed["swapped"]["digests"] == probed["adapted"]["digests"]


def test_a_stop_text_ends_a_sample_within_vllm(probed):
    """Letters are tokens from 2 on: "7" is 9, "a" and "b" are 15 and 16."""
    completions = probed["stopped"]["completions"]["stops"]
    ended = 0
    for completion in completions:
        ids = completion.completion_ids
        at_stop = 9 in ids or any(pair == (15, 16) for pair in pairwise(ids))
        assert at_stop == (ids[-1] == 9 or ids[-2:] == [15, 16])
        assert (completion.finish_reason == "stop") == (at_stop or ids[-1] == END)
        ended += at_stop
    assert 0 < ended < len(completions)


def test_nan_logits_within_vllm_are_failed_samples(probed):
    for completion in probed["NaN"]["completions"]["plain"]:
        assert completion.finish_reason == "error"
        assert completion.error == "the policy's logits are NaN or infinite"


def test_tokens_of_running_requests_are_counted(probed):
    """All 64 samples are in flight from the first step on, each a token further every step."""
    counts = probed["float32"]["in_flight"][0]
    assert 0 < counts[0] <= 64
    assert max(counts) > 128
    assert counts[-1] == 0


def test_cut_weights_do_not_start(probed):
    assert "is not a whole safetensors file" in probed["cut"]["error"]


def test_an_engine_that_gets_no_memory_names_the_setting(probed):
    error = probed["greedy for memory"]["error"]
    assert error.startswith("StageError: the vllm engine did not start: ")
    assert "it ran out of memory: lower rollout.vllm.gpu_memory_utilization" in error
    assert "rollout.vllm.cpu_kv_cache_gib" in error


def test_what_was_compiled_serves_a_policy_in_another_folder(probed):
    """Each iteration's policy lies in a work folder of its own; vLLM's cache of compiled graphs must not mind."""
    assert probed["moved"]["compile_key"] == probed["float32"]["compile_key"]
    assert probed["moved"]["compile_key"] != probed["bfloat16"]["compile_key"]
