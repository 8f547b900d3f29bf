"""The transformers engine against a plain forward pass, `generate`, itself in other batches, and broken models."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from components.common.errors import DataError
from components.rollout.config import RolloutSettings
from components.rollout.draw import processed_logprobs
from components.rollout.sampler import SampleRequest, Sampling, sample_seed
from components.rollout.transformers_sampler import TransformersSampler

END = 1


def requests(sampling: Sampling, *, num_prompts: int = 24, group_size: int = 4) -> list[SampleRequest]:
    """Prompts of 1 to 13 tokens, so that batches are padded."""
    found = []
    for number in range(num_prompts):
        ids = tuple(random.Random(number).choices(range(2, 32), k=1 + number % 13))
        found += [
            SampleRequest(str(number), index, ids, sample_seed(0, "train", 0, str(number), index), sampling)
            for index in range(group_size)
        ]
    return found


def start(policy: Path, **settings) -> TransformersSampler:
    settings = {"num_threads": 1} | settings  # at this size a second thread only waits for the first
    return TransformersSampler(policy, RolloutSettings(**settings), decode=lambda ids: "".join(map(chr, ids)))


def drawn(sampler: TransformersSampler, wanted: list[SampleRequest]) -> list:
    """Completions in the order of their requests."""
    found = {id(c.request): c for batch in sampler.sample(wanted) for c in batch}
    return [found[id(request)] for request in wanted]


def rescored(model, completion, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of a completion by one forward pass over prompt and completion, unpadded."""
    prompt, ids = list(completion.request.prompt_ids), completion.completion_ids
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return processed_logprobs(logits, sampling).gather(1, torch.tensor(ids)[:, None])[:, 0]


SAMPLINGS = [
    Sampling(temperature=1.0, max_tokens=20, stop_token_ids=(END,)),
    Sampling(temperature=0.6, max_tokens=20, stop_token_ids=(END,)),
    Sampling(temperature=1.0, max_tokens=20, stop_token_ids=(END,), top_k=5),
    Sampling(temperature=1.3, max_tokens=20, stop_token_ids=(END,), top_k=9, top_p=0.8),
    Sampling(temperature=0.0, max_tokens=20, stop_token_ids=(END,)),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_logprobs_are_those_of_an_unpadded_forward_pass(policy_dir, sampling):
    sampler = start(policy_dir)
    completions = drawn(sampler, requests(sampling))
    assert len({len(c.completion_ids) for c in completions}) > 3  # rows left the batch at different times
    for completion in completions:
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), rescored(sampler.model, completion, sampling), atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_sample_is_the_same_in_every_batch(policy_dir, sampling):
    wanted = requests(sampling)
    whole = drawn(start(policy_dir), wanted)
    parts = drawn(start(policy_dir, batch_size=5), wanted[::-1])[::-1]  # other neighbours, other padding
    assert [c.completion_ids for c in whole] == [c.completion_ids for c in parts]
    assert [c.finish_reason for c in whole] == [c.finish_reason for c in parts]


def test_likeliest_tokens_are_those_of_generate(policy_dir):
    sampler = start(policy_dir)
    completions = drawn(sampler, requests(SAMPLINGS[-1], group_size=1))
    for completion in completions:
        prompt = torch.tensor([completion.request.prompt_ids])
        expected = sampler.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20
        )
        assert completion.completion_ids == expected[0, prompt.shape[1] :].tolist()


def test_a_completion_ends_with_the_end_token_or_at_its_limit(policy_dir):
    completions = drawn(start(policy_dir), requests(SAMPLINGS[0]))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        assert END not in completion.completion_ids[:-1]
        assert (completion.completion_ids[-1] == END) == (completion.finish_reason == "stop")
        assert len(completion.completion_ids) == 20 or completion.finish_reason == "stop"


def test_a_stop_text_ends_a_completion_with_the_token_that_completes_it(policy_dir):
    plain = Sampling(temperature=1.0, max_tokens=30)
    texts = ["".join(map(chr, c.completion_ids)) for c in drawn(start(policy_dir), requests(plain))]
    ((pair, _),) = Counter(a + b for text in texts for a, b in pairwise(text) if a != b).most_common(1)
    cut = drawn(start(policy_dir), requests(replace(plain, stop=(pair,))))
    assert 3 < sum(pair in text for text in texts) < len(texts)
    for text, completion in zip(texts, cut, strict=True):
        expected = text[: text.index(pair) + 2] if pair in text else text
        assert "".join(map(chr, completion.completion_ids)) == expected
        assert completion.finish_reason == ("stop" if pair in text else "length")


def test_nan_weights_give_failed_samples(policy_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in policy_dir.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    completions = drawn(start(broken), requests(SAMPLINGS[0]))
    assert {c.finish_reason for c in completions} == {"error"}
    assert completions[0].error == "the policy's logits are NaN or infinite"
    assert completions[0].completion_ids == []


def test_bfloat16_weights_are_sampled_in_bfloat16_and_scored_alike(bf16_dir):
    sampler = start(bf16_dir)
    assert sampler.model.dtype == torch.bfloat16
    completions = drawn(sampler, requests(SAMPLINGS[0]))
    differences = torch.cat(
        [torch.tensor(c.logprobs) - rescored(sampler.model, c, SAMPLINGS[0]) for c in completions]
    ).abs()
    assert differences.mean() < 0.02  # bfloat16 keeps 8 bits: logits of size 4 are 0.016 apart
    assert differences.max() < 0.3


@pytest.mark.parametrize("size", [0, 5, 200, 20_000])
def test_cut_weights_are_refused_with_a_reason(policy_dir, tmp_path, size):
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in policy_dir.iterdir():
        (cut / path.name).write_bytes(path.read_bytes())
    whole = (policy_dir / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(DataError, match=r"is not a whole safetensors file|is empty"):
        start(cut)


def test_a_folder_without_weights_is_refused(policy_dir, tmp_path):
    (tmp_path / "config.json").write_bytes((policy_dir / "config.json").read_bytes())
    with pytest.raises(DataError, match=r"has no \*.safetensors file"):
        start(tmp_path)


def test_a_stop_text_of_many_bytes_is_seen(policy_dir):
    """Of byte-level tokens each character of this text takes three."""
    sampler = start(policy_dir)
    sampler.decode = lambda ids: bytes(ids).decode(errors="replace")
    ids = list("x 終わりです".encode())
    seen = [sampler._stops(ids[:count], ("終わりです",)) for count in range(1, len(ids) + 1)]
    assert seen == [False] * (len(ids) - 1) + [True]
