"""Loss, gradient and weights of the real worker against a plain float64 computation of a two-prompt batch."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from components.common.manifest import Manifest
from components.common.records import completion_fields, read_table

LEARNING_RATE, EPSILON, BETA1, BETA2 = 1e-2, 1e-2, 0.9, 0.999
MAX_COMPLETION_LENGTH = 12
"""What the scored rollout says of its sampling."""
REWARDS = [1.0, 0.0, 0.5, -1.0, 2.0, 0.25]


def rows_of(case, manifest_path):
    """The scored rollout's rows, as plain lists."""
    key = next(file.key for file in Manifest.load(manifest_path).files if file.name == "train.parquet")
    path = case.folder / "rows.parquet"
    case.store.get_file(key, path)
    return read_table(path, completion_fields()).to_pylist()


def group_advantages(rewards, size):
    """(r - mean) / (std + 1e-4), standard deviation with n - 1 below, a group after another."""
    advantages = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        mean = sum(group) / size
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (size - 1))
        advantages += [(reward - mean) / (deviation + 1e-4) for reward in group]
    return advantages


def token_logprobs(model, row, temperature):
    """Log-probability of each completion token, one token after another."""
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / temperature
    return [
        logits[len(prompt) - 1 + t, token] - logits[len(prompt) - 1 + t].logsumexp(-1)
        for t, token in enumerate(completion)
    ]


def batch_loss(loss_type, logprobs, old, reference, advantages, beta):
    """The loss of the batch, token by token."""
    total, num_tokens = torch.zeros((), dtype=torch.float64), sum(len(tokens) for tokens in logprobs)
    for tokens, before, base, advantage in zip(logprobs, old, reference, advantages, strict=True):
        ratios = [torch.exp(new - past) for new, past in zip(tokens, before, strict=True)]
        low, high = 0.2, 0.28 if loss_type == "dapo" else 0.2
        if loss_type == "gspo":
            mean = sum(new - past for new, past in zip(tokens, before, strict=True)) / len(tokens)
            ratios, low, high = [torch.exp(mean)] * len(tokens), 3e-4, 4e-4
        weight = 1 / num_tokens if loss_type in ("dapo", "cispo") else 1 / (len(logprobs) * len(tokens))
        if loss_type == "dr_grpo":
            weight = 1 / (len(logprobs) * MAX_COMPLETION_LENGTH)
        for ratio, new, start in zip(ratios, tokens, base, strict=True):
            clipped = min(max(ratio.item(), 1 - low), 1 + high)
            objective = ratio * advantage if ratio.item() * advantage <= clipped * advantage else clipped * advantage
            if loss_type == "cispo":
                objective = min(ratio.item(), 5.0) * advantage * new
            divergence = torch.exp(start - new) - (start - new) - 1
            total = total + weight * (-objective + beta * divergence)
    return total


def by_hand(folder, rows, *, loss_type, steps, beta, temperature, rewards=REWARDS):
    """Losses, first gradient and final weights of full-batch AdamW steps in float64.

    Rows that hit the length limit are left out of the loss; their rewards count in their groups.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    names = dict(model.named_parameters())
    with torch.no_grad():
        start = [[value.item() for value in token_logprobs(model, row, temperature)] for row in rows]
    advantages = group_advantages(rewards, 3)
    counted = [number for number, row in enumerate(rows) if row["finish_reason"] != "length"]
    rows, start, advantages = ([column[number] for number in counted] for column in (rows, start, advantages))
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in names.items()}
    losses, first = [], None
    for step in range(1, steps + 1):
        model.zero_grad()
        logprobs = [token_logprobs(model, row, temperature) for row in rows]
        loss = batch_loss(loss_type, logprobs, start, start, advantages, beta)
        loss.backward()
        losses.append(loss.item())
        gradients = {name: weight.grad.clone() for name, weight in names.items()}
        first = first or gradients
        with torch.no_grad():
            for name, weight in names.items():
                mean, square = moments[name]
                mean.mul_(BETA1).add_((1 - BETA1) * gradients[name])
                square.mul_(BETA2).add_((1 - BETA2) * gradients[name] ** 2)
                root = (square / (1 - BETA2**step)).sqrt() + EPSILON
                weight -= LEARNING_RATE * mean / (1 - BETA1**step) / root
    norm = math.sqrt(sum((gradient**2).sum().item() for gradient in first.values()))
    return losses, first, norm, {name: weight.detach() for name, weight in names.items()}


@pytest.mark.parametrize(
    ("loss_type", "epochs", "beta"),
    [("dapo", 1, 0.0), ("dapo", 3, 0.2), ("gspo", 2, 0.0), ("grpo", 1, 0.0), ("dr_grpo", 2, 0.0), ("cispo", 2, 0.0)],
)
def test_the_worker_agrees_with_float64(case, engine_model, loss_type, epochs, beta):
    inputs = case.start(engine_model)
    scored = case.scored(
        "scored", engine_model, inputs["policy"], num_prompts=2, group_size=3, reward=REWARDS, temperature=0.8
    )
    losses, gradient, norm, weights = by_hand(
        engine_model, rows_of(case, scored), loss_type=loss_type, steps=epochs, beta=beta, temperature=0.8
    )
    outcome = case.update(
        inputs, scored, loss_type=loss_type, num_epochs=epochs, beta=beta, max_grad_norm=0.0, correction="none",
        max_tokens_per_microbatch=25,
    )  # fmt: skip
    assert outcome.metrics["loss"] == pytest.approx(sum(losses) / epochs, abs=2e-6)
    found = outcome.weights()
    assert set(found) == set(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=0, atol=2e-6)
    if epochs == 1:
        assert outcome.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        state = outcome.state()
        for name, wanted in gradient.items():  # after one step the first moment is a tenth of the gradient
            torch.testing.assert_close(
                state[f"exp_avg/{name}"].double() / (1 - BETA1), wanted.flatten(), rtol=0, atol=2e-6
            )


def test_a_long_gradient_is_cut_to_the_norm(case, engine_model):
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"], num_prompts=2, group_size=3, reward=REWARDS)
    free = case.update(inputs, scored, max_grad_norm=0.0)
    case.run_name = "clipped"
    clipped = case.update(inputs, scored, max_grad_norm=0.5)
    assert free.metrics["grad_norm"] == pytest.approx(clipped.metrics["grad_norm"], rel=1e-6)
    assert free.metrics["grad_norm"] > 0.5
    share = 0.5 / free.metrics["grad_norm"]
    whole, cut = free.state(), clipped.state()
    for name in [name for name in whole if name.startswith("exp_avg/")]:
        torch.testing.assert_close(cut[name], whole[name] * share, rtol=1e-4, atol=1e-9)


def test_the_penalty_in_the_reward_is_of_masked_completions_too(case, engine_model, tmp_path):
    """A completion cut at the length limit is not trained on; its penalised reward is in its group's mean."""
    from engine_case import save_tiny_model

    inputs, beta = case.start(engine_model), 0.3
    other = save_tiny_model(tmp_path / "other", seed=5)
    inputs["reference"] = case.publish("other", "policy", {path.name: path for path in other.iterdir()})
    scored = case.scored(
        "scored", engine_model, inputs["policy"], num_prompts=2, group_size=3, reward=REWARDS,
        finish_reason=["length", "stop", "stop", "stop", "stop", "length"],
    )  # fmt: skip
    rows, penalised = rows_of(case, scored), []
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (engine_model, other)]
    for row, reward in zip(rows, REWARDS, strict=True):
        with torch.no_grad():
            policy, reference = (sum(token_logprobs(model, row, 0.8)).item() for model in models)
        penalised.append(reward - beta * (policy - reference))
    _, _, norm, weights = by_hand(
        engine_model, rows, loss_type="dapo", steps=1, beta=0.0, temperature=0.8, rewards=penalised
    )
    outcome = case.update(
        inputs, scored, max_grad_norm=0.0, correction="none", beta=beta, kl_in="reward", kl_estimator="k1",
        mask_truncated=True,
    )  # fmt: skip
    assert outcome.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(outcome.weights()[name].double(), weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask"])
def test_figures_of_the_sampler_s_mismatch(case, engine_model, correction):
    """TRL's names, token by token."""
    inputs = case.start(engine_model)
    scored = case.scored(
        "scored", engine_model, inputs["policy"], num_prompts=2, group_size=3, reward=REWARDS, noise=0.1
    )
    model, differences, ratios = AutoModelForCausalLM.from_pretrained(engine_model, dtype=torch.float64), [], []
    signed: list[float] = []
    for row in rows_of(case, scored):
        with torch.no_grad():
            tokens = [value.item() for value in token_logprobs(model, row, 0.8)]
        gaps = [ours - theirs for ours, theirs in zip(tokens, row["logprobs"], strict=True)]
        signed += gaps
        differences += [abs(gap) for gap in gaps]
        if correction == "sequence_mask":
            product = math.prod(math.exp(gap) for gap in gaps)
            ratios.append(product if product <= 1.1 else 0.0)
        else:
            ratios += [min(math.exp(gap), 1.1) for gap in gaps]
    found = case.update(inputs, scored, correction=correction, correction_cap=1.1).metrics
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(
        sum(differences) / len(differences), abs=2e-6
    )
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(max(differences), abs=2e-6)
    k3 = [math.exp(gap) - 1 - gap for gap in signed]
    assert found["sampling/kl_k3"] == pytest.approx(sum(k3) / len(k3), abs=2e-6)
    assert found["sampling/importance_sampling_ratio/min"] == pytest.approx(min(ratios), abs=2e-6)
    assert found["sampling/importance_sampling_ratio/mean"] == pytest.approx(sum(ratios) / len(ratios), abs=2e-6)
    assert found["sampling/importance_sampling_ratio/max"] == pytest.approx(max(ratios), abs=2e-6)
