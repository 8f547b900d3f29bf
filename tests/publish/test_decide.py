"""The rule, worked out by hand."""

from dataclasses import replace

import pytest

from components.publish.decide import Contender, Rule, decide

RULE = Rule(metric="eval/pass@1", min_improvement=0.0, require_significance=False, resamples=400, seed=0)


def contender(role, value, digest=None, per_prompt=None):
    return Contender(role=role, digest=digest or role, iteration=1, run="r", value=value, per_prompt=per_prompt)


@pytest.mark.parametrize(
    ("candidate", "rival", "least", "accepted"),
    [
        (0.6, 0.5, 0.0, True),
        (0.5, 0.5, 0.0, False),
        (0.4, 0.5, 0.0, False),
        (0.6, 0.5, 0.2, False),
        (0.45, 0.5, -0.1, True),
    ],
)
def test_more_than_the_least_improvement_is_asked(candidate, rival, least, accepted):
    decision = decide(
        contender("candidate", candidate), contender("champion", rival), replace(RULE, min_improvement=least)
    )
    assert decision.accepted is accepted
    assert decision.difference.value == pytest.approx(candidate - rival)
    assert "measured on other prompts" in decision.reason


def test_pairs_count_when_there_are_any():
    after = {"a": 1.0, "b": 0.5, "new": 0.0}
    before = {"a": 0.5, "b": 0.0, "old": 1.0}
    decision = decide(
        contender("candidate", 0.5, per_prompt=after), contender("champion", 0.5, per_prompt=before), RULE
    )
    assert decision.accepted
    assert (decision.difference.value, decision.difference.low, decision.difference.high) == (0.5, 0.5, 0.5)
    assert decision.difference.paired_prompts == 2
    assert decision.reason == (
        "eval/pass@1 is +0.5000 against the champion over 2 shared prompts (95 % interval +0.5000 to +0.5000); "
        "it is above +0.0000."
    )


def test_significance_looks_at_the_lower_end():
    before = {str(i): 0.5 for i in range(10)}
    after = before | {"0": 1.0, "1": 1.0, "2": 0.0}  # +0.05 on the mean, surely not significant
    strict = replace(RULE, require_significance=True)
    pair = (contender("candidate", 0.55, per_prompt=after), contender("champion", 0.5, per_prompt=before))
    assert decide(*pair, RULE).accepted
    assert not decide(*pair, strict).accepted
    assert "its interval lies not above" in decide(*pair, strict).reason
    unpaired = decide(contender("candidate", 0.9), contender("champion", 0.1), strict)
    assert not unpaired.accepted
    assert "require_significance asks for shared prompts" in unpaired.reason


def test_a_policy_does_not_replace_itself():
    decision = decide(contender("candidate", 0.6, "d"), contender("baseline", 0.5, "d"), RULE)
    assert not decision.accepted
    assert decision.reason == "The policy is the baseline itself."


def test_without_a_rival_the_first_is_accepted():
    assert decide(contender("candidate", 0.1), None, RULE).accepted
