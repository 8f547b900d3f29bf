"""Parity with TRL's GRPOTrainer: its own loss code, on its own forward pass, on the same batch.

Nothing is shared between the two sides but the weights and the batch: TRL runs the padded model and its fused head,
ours takes hidden states of each completion run alone, unpadded, through our head. Absolute losses and gradients are
compared (a common wrong factor would show), with uneven lengths, a temperature, ratios beyond both clips, KL, and two
gradient accumulation steps of unlike token counts. Float32; tolerances beside the assertions.
"""

import copy

import numpy as np
import pytest
import torch

from components.update.advantages import group_advantages
from components.update.head import fused_head_loss, linear_logprobs
from components.update.kl import kl_estimate
from components.update.losses import BatchTotals, combine, policy_loss, sequence_weights

trl = pytest.importorskip("trl", reason="trl is a test-only dependency")

VOCABULARY, PROMPT_LENGTH, MAX_LENGTH = 61, 4, 9
TEMPERATURE, LOW, HIGH, DELTA, BETA = 0.8, 0.2, 0.28, 1.7, 0.05
LENGTHS = np.array([9, 2, 5, 1, 7, 3, 4, 8])  # two accumulation steps of four: 17 and 22 tokens
REWARDS = np.array([1.0, 0.0, 0.5, 0.0, 3.0, -1.0, 2.0, 2.5])
GROUPS = np.repeat([0, 1], 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers, 32 wide; from a folder, since TRL loads its reference model from there."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch():
    """Prompts left-padded, completions right-padded, as TRL has them; old and reference log-probabilities drawn."""
    generator = torch.Generator().manual_seed(1)
    size = len(LENGTHS)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    prompt_lengths = draw(1, PROMPT_LENGTH + 1, size)
    prompt_mask = (torch.arange(PROMPT_LENGTH) >= PROMPT_LENGTH - prompt_lengths[:, None]).long()
    completion_mask = (torch.arange(MAX_LENGTH) < torch.as_tensor(LENGTHS)[:, None]).long()
    return {
        "prompt_ids": draw(2, VOCABULARY, size, PROMPT_LENGTH) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": draw(2, VOCABULARY, size, MAX_LENGTH) * completion_mask,
        "completion_mask": completion_mask,
        "noise": torch.randn(2, size, MAX_LENGTH, generator=generator) * 0.4,
        "advantages": torch.as_tensor(group_advantages(REWARDS, GROUPS).advantages_S, dtype=torch.float32),
    }


def make_trainer(model, tmp_path, loss_type, kl_ratio=True):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
    config = GRPOConfig(
        output_dir=str(tmp_path), loss_type=loss_type, temperature=TEMPERATURE, epsilon=LOW, epsilon_high=HIGH,
        delta=DELTA, beta=BETA, use_bias_correction_kl=kl_ratio, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, num_generations=4, max_completion_length=MAX_LENGTH,
        bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[],
    )  # fmt: skip
    return GRPOTrainer(
        model=copy.deepcopy(model), args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * 8}), reward_funcs=lambda completions, **_: [0.0] * 8,
    )  # fmt: skip


def trl_inputs(batch, logprobs_BT, rows):
    inputs = {name: batch[name][rows] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    old_BT, reference_BT = (logprobs_BT + noise_BT for noise_BT in batch["noise"])
    inputs |= {"old_per_token_logps": old_BT[rows], "ref_per_token_logps": reference_BT[rows]}
    return inputs | {"advantages": batch["advantages"][rows], "num_items_in_batch": torch.tensor(LENGTHS.sum())}


def completion_hidden(model, batch, row):
    """Hidden states that predict each completion token, the sequence run by itself without padding."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    completion = batch["completion_ids"][row][: LENGTHS[row]]
    hidden = model.model(torch.cat([prompt, completion])[None]).last_hidden_state[0]
    return hidden[len(prompt) - 1 : -1], completion


def logprobs_padded(model, batch):
    """Present log-probabilities, (B, T), zeros in the padding: what the drawn noise is added to."""
    logprobs_BT = torch.zeros(batch["completion_ids"].shape)
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):
            hidden_nH, targets_n = completion_hidden(model, batch, row)
            logits_nV = model.lm_head(hidden_nH) / TEMPERATURE
            logprobs_BT[row, :length] = logits_nV.log_softmax(-1).gather(1, targets_n[:, None]).squeeze(1)
    return logprobs_BT


def our_loss(model, batch, logprobs_BT, loss_type, *, fused, kl_ratio=True):
    """Our loss of the whole batch at once, and each token's weighted share of it."""
    parts = [completion_hidden(model, batch, row) for row in range(len(LENGTHS))]
    hidden_NH, targets_N = (torch.cat(column) for column in zip(*parts, strict=True))
    sequence_N = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.as_tensor(LENGTHS))
    mask_BT = batch["completion_mask"].bool()
    old_N, reference_N = ((logprobs_BT + noise_BT)[mask_BT] for noise_BT in batch["noise"])
    weights_S = sequence_weights(loss_type, LENGTHS, BatchTotals.of(LENGTHS, MAX_LENGTH))
    weights_N = torch.as_tensor(weights_S, dtype=torch.float32)[sequence_N]

    def pieces(logprobs_n, n):
        policy = policy_loss(
            loss_type, logprobs_n, old_N[n], batch["advantages"][sequence_N[n]], sequence_N[n], len(LENGTHS),
            epsilon_low=LOW, epsilon_high=HIGH, dual_clip=DELTA,
        )  # fmt: skip
        return policy.loss_N, kl_estimate("k3", logprobs_n, reference_N[n], old_N[n] if kl_ratio else None)

    def token_loss(logprobs_n, _, n):
        loss_n, kl_n = pieces(logprobs_n, n)
        return weights_N[n] * (loss_n + BETA * kl_n)

    weight_VH = model.lm_head.weight
    if fused:
        return fused_head_loss(hidden_NH, weight_VH, targets_N, token_loss, temperature=TEMPERATURE).loss, None
    logprobs_N, _ = linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=TEMPERATURE)
    loss_N, kl_N = pieces(logprobs_N, slice(None))
    return combine(loss_N, weights_N, kl_N=kl_N, beta=BETA), token_loss(logprobs_N, None, slice(None)).detach()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl_ratio", [False, True])
def test_loss_and_gradient_equal_trl(model, batch, tmp_path, loss_type, kl_ratio):
    trainer = make_trainer(model, tmp_path, loss_type, kl_ratio)
    trainer.model.eval()  # no dropout in Qwen3; `train` only switches TRL's bookkeeping, set by hand below
    trainer.model.training = True
    trainer.current_gradient_accumulation_steps = 2
    logprobs_BT = logprobs_padded(model, batch)

    theirs = 0.0
    for rows in (slice(0, 4), slice(4, 8)):
        loss = trainer._compute_loss(trainer.model, trl_inputs(batch, logprobs_BT, rows))
        loss.backward()
        theirs += loss.item()
    metrics = {name: np.mean(values) for name, values in trainer._metrics["train"].items() if values}
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0  # the case reaches both clips

    expected = dict(trainer.model.named_parameters())
    for fused in (False, True):
        ours = copy.deepcopy(model)
        loss, _ = our_loss(ours, batch, logprobs_BT, loss_type, fused=fused, kl_ratio=kl_ratio)
        loss.backward()
        assert loss.item() == pytest.approx(theirs, abs=2e-6)
        for name, parameter in ours.named_parameters():
            error = (parameter.grad - expected[name].grad).abs().max() / expected[name].grad.abs().max()
            assert error < 2e-5, (name, error)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_each_token_equals_trl(model, batch, tmp_path, loss_type):
    """TRL asked for one token at a time (its tool mask leaves the others out of the loss, not out of attention)."""
    trainer = make_trainer(model, tmp_path, loss_type)
    trainer.model.training = True
    trainer.current_gradient_accumulation_steps = 1
    logprobs_BT = logprobs_padded(model, batch)
    with torch.no_grad():
        _, shares_N = our_loss(model, batch, logprobs_BT, loss_type, fused=False)
        inputs = trl_inputs(batch, logprobs_BT, slice(0, 8))
        inputs["num_items_in_batch"] = torch.tensor(2 * LENGTHS.sum())  # one of two steps per generation
        for share, (row, column) in zip(shares_N, batch["completion_mask"].nonzero().tolist(), strict=True):
            inputs["tool_mask"] = torch.zeros_like(batch["completion_mask"])
            inputs["tool_mask"][row, column] = 1
            token = trainer._compute_loss(trainer.model, inputs).item()
            # grpo divides by the tokens left in the mask: one instead of the sequence's length
            token = token / LENGTHS[row] if loss_type == "grpo" else token
            assert share.item() == pytest.approx(token, abs=1e-6), (row, column)
