"""Bad input and bad health: refused with a message that mends, and nothing is published."""

import shutil

import pytest
import torch
from engine_case import PATIENCE
from safetensors.torch import load_file, save_file

from components.common.errors import ArtifactNotFound, DataError, HealthError, SettingsError
from components.common.manifest import Manifest
from components.common.settings import validate
from components.update.config import UpdateSettings


@pytest.fixture
def started(case, engine_model):
    """Case, inputs, and nothing published by an update."""
    return case, case.start(engine_model)


def published(case):
    """Manifests in the store that an update wrote."""
    keys = [entry.key for entry in case.store.list("manifests/")]
    return [key for key in keys if key.endswith(("/policy.json", "/optimizer.json"))]


def test_completions_of_another_policy_are_refused(started, engine_model):
    case, inputs = started
    scored = case.scored("scored", engine_model, inputs["policy"], policy_digest=["blake3:" + "0" * 64] * 12)
    with pytest.raises(DataError, match=r"100% of the completions were sampled by policy blake3:000.*staleness = 1"):
        case.update(inputs, scored)
    assert published(case) == []


def test_a_stale_sampler_is_allowed_one_update_behind(started, engine_model):
    case, inputs = started
    first = case.scored("first", engine_model, inputs["policy"])
    updated = case.update(inputs, first)
    stale = case.scored("stale", engine_model, inputs["policy"], seed=3)  # of the policy before
    with pytest.raises(DataError, match="sampled by policy"):
        case.update(updated.inputs, stale, iteration=1)
    case.staleness = 1
    outcome = case.update(updated.inputs, stale, iteration=1)
    assert outcome.metrics["sampling/sampling_logp_difference/mean"] > 1e-3  # corrected for, and reported
    assert outcome.metrics["sampling/importance_sampling_ratio/max"] <= 2.0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"logprobs": None}, "completions have no column logprobs; sample the iteration again"),
        ({"logprobs": [[-1.0]] * 12}, "not one log-probability a token: prompt 'p0' sample 1 has 9 tokens and 1"),
        ({"completion_ids": [[48]] * 12, "logprobs": [[-1.0]] * 12}, "has token 48, the policy's vocabulary has 48"),
        ({"prompt_ids": [[]] * 12}, "prompt 'p0' has no tokens"),
    ],
    ids=["missing column", "wrong length", "vocabulary", "empty prompt"],
)
def test_unusable_rollouts_are_refused(started, engine_model, columns, message):
    case, inputs = started
    scored = case.scored("scored", engine_model, inputs["policy"], **columns)
    with pytest.raises(DataError, match=message):
        case.update(inputs, scored)
    assert published(case) == []


def test_without_a_kl_term_the_reference_is_never_fetched(started, engine_model, tmp_path):
    from engine_case import save_tiny_model

    case, inputs = started
    scored = case.scored("scored", engine_model, inputs["policy"])
    other = save_tiny_model(tmp_path / "other", seed=5)
    inputs["reference"] = case.publish("other", "policy", {path.name: path for path in other.iterdir()})
    weights = next(file for file in Manifest.load(inputs["reference"]).files if file.name == "model.safetensors")
    case.store.delete(weights.key)
    case.update(inputs, scored)
    case.run_name = "with-kl"
    with pytest.raises(ArtifactNotFound):
        case.update(inputs, scored, beta=0.1)


def test_a_batch_without_any_signal_leaves_the_policy_as_it_is(started, engine_model):
    case, inputs = started
    scored = case.scored("scored", engine_model, inputs["policy"], reward=[1.0] * 12)
    outcome = case.update(inputs, scored)
    assert outcome.policy.digest == Manifest.load(inputs["policy"]).digest
    assert outcome.metrics["frac_reward_zero_std"] == 1.0
    assert outcome.metrics["num_groups_dropped"] == 4
    assert "loss" not in outcome.metrics


def test_dropped_groups_count_in_the_normaliser_and_cost_no_tokens(started, engine_model):
    case, inputs = started
    rewards = [1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 2.0, None]
    scored = case.scored("scored", engine_model, inputs["policy"], reward=rewards, lengths=[3, 5, 7] * 4)
    outcome = case.update(inputs, scored)
    assert outcome.metrics["num_groups_dropped"] == 2
    assert outcome.metrics["num_completions_trained"] == 5
    prompts = prompt_lengths(case, scored)
    tokens = sum(prompts[row] + [3, 5, 7][row % 3] - 1 for row in (0, 1, 2, 9, 10))
    assert outcome.metrics["num_tokens"] == tokens


def prompt_lengths(case, scored):
    from components.common.records import completion_fields, read_table

    key = next(file.key for file in Manifest.load(scored).files if file.name == "train.parquet")
    case.store.get_file(key, case.folder / "look.parquet")
    table = read_table(case.folder / "look.parquet", completion_fields())
    return [len(ids) for ids in table.column("prompt_ids").to_pylist()]


@pytest.mark.parametrize(
    ("health", "message"),
    [
        ({"min_entropy": 5.0}, r"entropy is 3\.\d+ \(health.min_entropy = 5\); sampling has collapsed"),
        ({"max_logp_difference": 0.01}, r"sampler and trainer disagree"),
        (
            {"max_sampling_kl": 0.001},
            r"sampling/kl_k3 is 0\.0\d+ \(health.max_sampling_kl = 0.001\); sampler and trainer",
        ),
        ({"max_zero_std_share": 0.1}, r"25% of the groups have equal rewards \(health.max_zero_std_share = 0.1\)"),
    ],
    ids=["entropy", "mismatch", "divergence", "zero variance"],
)
def test_a_crossed_limit_fails_the_iteration(started, engine_model, health, message):
    case, inputs = started
    rewards = [1.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.25, 0.0, 0.5, 1.0, 0.0, 0.0]
    scored = case.scored("scored", engine_model, inputs["policy"], noise=0.2, reward=rewards)
    with pytest.raises(HealthError, match=message):
        case.update(inputs, scored, health=health)
    assert published(case) == []


def test_samples_of_another_distribution_fail_the_iteration_by_default(started, engine_model):
    case, inputs = started
    scored = case.scored("scored", engine_model, inputs["policy"], noise=3.0)
    with pytest.raises(HealthError, match=r"difference/mean is \d\.\d+ \(health.max_logp_difference = 1\)"):
        case.update(inputs, scored)
    assert published(case) == []


def test_a_policy_that_left_its_reference_fails_the_iteration(started, engine_model, tmp_path):
    from engine_case import save_tiny_model

    case, inputs = started
    other = save_tiny_model(tmp_path / "other", seed=5)
    inputs["reference"] = case.publish("other", "policy", {path.name: path for path in other.iterdir()})
    scored = case.scored("scored", engine_model, inputs["policy"])
    with pytest.raises(HealthError, match=r"kl is \d.*health.max_kl = 0.1.*raise beta or lower learning_rate"):
        case.update(inputs, scored, beta=1e-6, health={"max_kl": 0.1})
    assert published(case) == []


def with_weight(folder, model, name, row, value):
    """The model in another folder, with one value, or one row of values, of its weights put in."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][row] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(case, engine_model, tmp_path, zero_stage):
    broken = with_weight(tmp_path / "broken", engine_model, "model.norm.weight", 0, torch.inf)
    weights = load_file(broken / "model.safetensors")
    inputs = case.start(broken)
    scored = case.scored("scored", engine_model, inputs["policy"])
    with pytest.raises(HealthError, match=r"not finite in 1 optimizer steps in a row .health.max_skipped_steps = 0"):
        case.update(inputs, scored, zero_stage=zero_stage, health={"max_skipped_steps": 0})
    assert published(case) == []
    case.run_name = "lenient"
    outcome = case.update(inputs, scored, zero_stage=zero_stage, num_minibatches=2)
    assert outcome.metrics["skipped_steps"] == 2
    assert outcome.optimizer.metadata["global_step"] == 0
    for name, weight in outcome.weights().items():
        assert torch.equal(weight, weights[name]), name
    again = case.scored("again", engine_model, inputs["policy"])  # the weights are the same, and so is their digest
    with pytest.raises(HealthError, match="not finite in 4 optimizer steps in a row"):  # two of them an iteration ago
        case.update(outcome.inputs, again, iteration=1, zero_stage=zero_stage, num_minibatches=4)


def test_a_skipped_step_hides_no_limit(case, tmp_path):
    from engine_case import save_tiny_model

    model = with_weight(
        tmp_path / "broken", save_tiny_model(tmp_path / "model", tied=False), "model.embed_tokens.weight", 5, torch.nan
    )  # a token that makes everything NaN
    inputs = case.start(model)
    prompts = [[1, 2]] * 3 + [[5, 3]] * 3 + [[2, 4]] * 3 + [[3, 3]] * 3  # one in four has the token
    completions = [[1, 2, 3], [7, 8], [9, 4, 2, 1]] * 4
    columns = {"prompt_ids": prompts, "completion_ids": completions}
    logprobs = [[-1.0] * len(tokens) for tokens in completions]
    scored = case.scored("scored", model, inputs["policy"], logprobs=logprobs, scores=False, **columns)
    settings = {"num_minibatches": 4, "layout": "padded"}
    outcome = case.update(inputs, scored, health={"max_logp_difference": None}, **settings)
    assert outcome.metrics["skipped_steps"] == 1
    assert 0 < outcome.metrics["entropy"] < 4  # of the three steps that were taken
    case.run_name = "limited"
    with pytest.raises(HealthError, match=r"entropy is \d.*health.min_entropy = 5"):
        case.update(inputs, scored, health={"min_entropy": 5.0, "max_logp_difference": None}, **settings)


def test_a_figure_that_is_not_finite_crosses_its_limit(started, engine_model):
    case, inputs = started
    logprobs = [[-1.0] * (1 + row % 3) for row in range(12)]
    logprobs[0][0] = float("-inf")
    completions = [[1] * len(row) for row in logprobs]
    scored = case.scored("scored", engine_model, inputs["policy"], completion_ids=completions, logprobs=logprobs)
    with pytest.raises(HealthError, match=r"logp_difference/mean is inf \(health.max_logp_difference = 100\)"):
        case.update(inputs, scored, health={"max_logp_difference": 100.0})


def test_a_limit_without_a_figure_is_told(started, engine_model, capfd):
    case, inputs = started
    completions = [[1] * (1 + row % 3) for row in range(12)]
    unknown = [[float("nan")] * len(row) for row in completions]
    scored = case.scored("scored", engine_model, inputs["policy"], completion_ids=completions, logprobs=unknown)
    case.update(inputs, scored, health={"max_logp_difference": 100.0})
    assert "update-0000: nothing to check health.max_logp_difference with" in capfd.readouterr().out


def test_a_batch_that_is_all_truncated_says_why_nothing_is_trained(started, engine_model, capfd):
    case, inputs = started
    scored = case.scored("scored", engine_model, inputs["policy"], finish_reason=["length"] * 12)
    outcome = case.update(inputs, scored, mask_truncated=True)
    assert outcome.policy.digest == Manifest.load(inputs["policy"]).digest
    assert outcome.metrics["num_groups_dropped"] == 4 and outcome.metrics["frac_reward_zero_std"] == 0
    assert "mask_truncated leaves out 12 of 12 completions that hit the length limit" in capfd.readouterr().out


def test_an_infinite_reward_is_refused(started, engine_model):
    case, inputs = started
    scored = case.scored("scored", engine_model, inputs["policy"], reward=[1.0, float("inf")] * 6)
    with pytest.raises(DataError, match=r"a reward is infinite.*have the reward function return None"):
        case.update(inputs, scored)


def test_a_health_error_comes_without_a_traceback(started, engine_model):
    case, inputs = started
    scored = case.scored("scored", engine_model, inputs["policy"])
    process = case.command(inputs, scored, health={"min_entropy": 5.0})
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "sampling has collapsed" in output
    assert "Traceback" not in output and "ProcessExitedException" not in output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 0, "dtype": "bfloat16"}, "set zero_stage = 1"),
        ({"schedule": "cosine"}, "needs schedule_steps above warmup_steps"),
        ({"beta": 0.1, "kl_estimator": "k1"}, "set kl_ratio = true"),
        ({"health": {"max_kl": 1.0}}, "set beta above 0"),
        ({"algorithm": "ppo", "lora": {"rank": 4}}, "set lora.rank = 0"),
        ({"algorithm": "ppo", "optimizer_every": 2}, "keeps its critic beside the optimizer state"),
        ({"lora": {"rank": 4, "publish": "merged"}, "optimizer_every": 2}, "set optimizer_every = 1"),
        ({"offload_parameters": True}, "needs zero_stage = 3"),
        ({"loss_type": "cispo", "dual_clip": 3.0}, "remove dual_clip"),
        ({"correction": "none", "correction_cap": 5.0}, "correction_cap has no effect"),
        ({"algorithm": "ppo", "advantage_scale": "batch"}, 'algorithm = "ppo" has a critic'),
        ({"algorithm": "ppo", "advantage_baseline": "leave_one_out"}, 'algorithm = "ppo" has a critic'),
        ({"reward_combination": "normalize_then_sum", "advantage_scale": "none"}, "advantage_scale has no effect"),
        ({"beta": 0.1, "kl_in": "reward", "kl_ratio": True}, "kl_ratio is of the penalty in the loss"),
        ({"num_processes": 0}, 'must be "auto" or at least 1'),
        ({"max_grad_nrm": 1.0}, "did you mean max_grad_norm"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        validate(UpdateSettings, settings)
