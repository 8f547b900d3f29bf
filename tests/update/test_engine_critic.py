"""PPO through the stage: the critic learns, travels with the optimizer state, and is independent of the layout."""

import json

import pytest
import torch

PPO = {"algorithm": "ppo", "ppo": {"value_learning_rate": 1e-2, "value_clip": 5.0}}


def test_the_critic_learns_the_returns(case, engine_model):
    """Every completion of a prompt has one reward, so the value of a prompt can be learnt from its tokens."""
    inputs = case.start(engine_model)
    rewards = [3.0] * 6 + [-1.0] * 6
    losses = []
    case.staleness = 1
    scored = case.scored("scored", engine_model, inputs["policy"], reward=rewards, num_prompts=2, group_size=6)
    outcome = case.update(inputs, scored, num_epochs=15, learning_rate=1e-6, adam_epsilon=1e-8, **PPO)
    first = outcome.metrics["critic/explained_variance"]
    assert any(name.startswith("critic-") for name in outcome.optimizer.names)
    assert "critic.head.weight" in {name.partition("/")[2] for name in outcome.state() if name.startswith("master/")}
    again = case.update(outcome.inputs, scored, iteration=1, learning_rate=1e-6, adam_epsilon=1e-8, **PPO)
    losses = [outcome.metrics["critic/loss"], again.metrics["critic/loss"]]
    assert first == pytest.approx(0.0, abs=1e-6)  # a head of zeros explains nothing
    assert again.metrics["critic/explained_variance"] > 0.5  # the critic came back as it was
    assert losses[1] < 0.5 * losses[0]


def test_ranks_and_micro_batches_change_nothing(case, engine_model):
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    settings = PPO | {"num_minibatches": 2, "beta": 0.1, "kl_in": "reward", "kl_estimator": "k1"}
    whole = case.update(inputs, scored, **settings)
    case.run_name = "cut"
    cut = case.update(inputs, scored, zero_stage=2, num_processes=2, max_tokens_per_microbatch=24, **settings)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(cut.weights()[name], weight, rtol=0, atol=1e-6)
    before, after = whole.state(), cut.state()
    for name in [name for name in before if name.startswith("master/critic")]:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=2e-6)
    for figure in ("critic/loss", "kl", "loss"):
        assert cut.metrics[figure] == pytest.approx(whole.metrics[figure], rel=1e-4, abs=1e-6)


def test_a_critic_comes_back_into_divided_weights(case, engine_model):
    """Its float32 weights are of the optimizer state; under ZeRO 3 they are put into parts of two processes."""
    start, states = case.start(engine_model), []
    first = case.scored("first", engine_model, start["policy"])
    for name, settings in (("whole", {}), ("divided", {"zero_stage": 3, "num_processes": 2})):
        case.run_name = name
        outcome = case.update(start, first, **PPO, **settings)
        second = case.scored(f"second-{name}", engine_model, outcome.policy_path)
        states.append(case.update(outcome.inputs, second, iteration=1, **PPO, **settings).state())
    assert set(states[0]) == set(states[1])
    for key in [key for key in states[0] if key.startswith("master/critic")]:
        torch.testing.assert_close(states[1][key], states[0][key], rtol=0, atol=2e-6)


def test_a_fine_tune_may_change_to_ppo_and_back(case, engine_model):
    """The critic starts anew, with its own count of steps; the policy's moments go on."""
    inputs = case.start(engine_model)
    case.iterations = 9
    scored = case.scored("scored", engine_model, inputs["policy"])
    outcome = case.update(inputs, scored, num_epochs=3)
    grpo = outcome.state()
    unlimited = {"max_logp_difference": None}  # all log-probabilities are the start policy's
    for iteration, steps in ((1, (4, 1)), (2, (5, 2))):
        scored = case.scored(f"scored-{iteration}", engine_model, outcome.policy_path)
        outcome = case.update(outcome.inputs, scored, iteration=iteration, health=unlimited, **PPO)
        index = json.loads(
            case.store.get_bytes(next(file.key for file in outcome.optimizer.files if file.name == "optimizer.json"))
        )
        assert (index["step"], index["critic_step"]) == steps
        if iteration == 1:
            assert outcome.metrics["critic/explained_variance"] == pytest.approx(0.0, abs=1e-6)
            moved = outcome.state()["exp_avg/model.norm.weight"] - 0.9 * grpo["exp_avg/model.norm.weight"]
            assert 0 < moved.abs().max() < 0.2 * outcome.metrics["grad_norm"]  # a tenth of one gradient
    scored = case.scored("back", engine_model, outcome.policy_path)
    back = case.update(outcome.inputs, scored, iteration=3, health=unlimited)
    assert not any(name.startswith("critic") for name in back.optimizer.names)


def test_a_state_that_counts_no_critic_steps_of_its_own_has_as_many_as_the_policys(tmp_path):
    from components.update.checkpoint import INDEX, Pieces

    (tmp_path / INDEX).write_text(json.dumps({"format": 1, "step": 7, "num_ranks": 1}))
    with Pieces(tmp_path) as pieces:
        assert pieces.steps == {"optimizer": 7, "critic": 7}


def test_grpo_loads_nothing_of_the_critic():
    import subprocess
    import sys

    code = (
        "import sys; from components.update import train, stage, inputs, launch\n"
        "assert not {'components.update.critic', 'components.update.ppo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
