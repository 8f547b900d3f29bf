"""Held-out prompts: as many as asked, the same ones each time, never trained on."""

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from hypothesis import given, settings

from components.common.errors import DataError
from components.dataset.prompts import Prompts, content_id
from components.dataset.split import comparable, dataset_digest, hold_out, thin, without_eval


def prompts(texts, split="train"):
    """Prompts of these texts, each with its own id."""
    ids = [f"{split}-{row}" for row in range(len(texts))]
    columns = pa.table({"answer": pa.array(range(len(texts)), pa.int64())})
    return Prompts(split, ids, list(texts), [[1, 2] for _ in texts], columns, len(texts))


texts = st.lists(st.text("ab \n", max_size=4), min_size=2, max_size=40)


@settings(deadline=None, max_examples=100)
@given(texts=texts, count=st.integers(1, 10), seed=st.integers(0, 3))
def test_a_text_is_on_one_side_only(texts, count, seed):
    distinct = {comparable(text) for text in texts}
    if len(distinct) <= count:
        with pytest.raises(DataError, match=r"lower dataset\.num_eval"):
            hold_out(prompts(texts), count, seed)
        return
    train, held_out = hold_out(prompts(texts), count, seed)
    ours, theirs = [{comparable(text) for text in side.texts} for side in (train, held_out)]
    assert len(held_out.ids) == count
    assert ours | theirs == distinct
    assert not ours & theirs


@settings(deadline=None, max_examples=50)
@given(order=st.permutations([f"prompt {n}" for n in range(12)]), seed=st.integers(0, 3))
def test_which_are_held_out_does_not_depend_on_their_order(order, seed):
    first = hold_out(prompts(sorted(order)), 4, seed)[1]
    assert set(hold_out(prompts(order), 4, seed)[1].texts) == set(first.texts)


def test_most_stay_held_out_when_the_data_set_grows():
    small = set(hold_out(prompts([f"prompt {n}" for n in range(100)]), 20, 0)[1].texts)
    large = set(hold_out(prompts([f"prompt {n}" for n in range(110)]), 20, 0)[1].texts)
    assert len(small & large) >= 16  # each of ten newcomers displaces one with a chance of about 20 in 110


def test_another_seed_holds_out_others():
    names = [f"prompt {n}" for n in range(100)]
    assert set(hold_out(prompts(names), 20, 0)[1].texts) != set(hold_out(prompts(names), 20, 1)[1].texts)


def test_eval_prompts_are_thinned_in_their_order():
    names = [f"prompt {n}" for n in range(50)]
    kept = thin(prompts(names, "eval"), 7, 0)
    assert len(kept.texts) == 7
    assert kept.texts == [name for name in names if name in set(kept.texts)]
    assert kept.dropped["beyond num_eval"] == 43
    assert thin(prompts(names, "eval"), 50, 0).texts == names


def test_train_loses_every_row_whose_text_is_in_eval():
    train = without_eval(prompts(["a b", "c", "a  b", "d"]), prompts(["a b ", "x"], "eval"))
    assert train.texts == ["c", "d"]
    assert train.columns.column("answer").to_pylist() == [1, 3]
    assert train.dropped["also in eval"] == 2


def test_ids_are_digests_of_content():
    assert content_id("1+1=", {"answer": 2}) == content_id("1+1=", {"answer": 2})
    assert content_id("1+1=", {"a": 1, "b": 2}) == content_id("1+1=", {"b": 2, "a": 1})
    assert content_id("1+1=", {"answer": 2}) != content_id("1+1=", {"answer": 3})
    assert len(content_id("1+1=", {})) == 16


def test_the_digest_sees_every_part():
    base = [prompts(["a", "b"])]
    changed = prompts(["a", "b"])
    changed.tokens_PT[1] = [1, 3]
    assert dataset_digest(base) == dataset_digest([prompts(["a", "b"])])
    assert dataset_digest(base) != dataset_digest([changed])
    assert dataset_digest(base) != dataset_digest([prompts(["a", "c"])])
    assert dataset_digest(base) != dataset_digest([prompts(["a", "b"], "eval")])
