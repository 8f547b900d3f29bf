"""Rewards for the form of a completion, whatever it says."""

import re


def regex_format(completions: list[str], pattern: str, anywhere: bool = False) -> list[float]:
    """1 when `pattern`, a regular expression whose dot matches line ends, fits the whole completion, else 0.

    `anywhere`: fitting some part of it is enough.
    """
    compiled = re.compile(pattern, re.DOTALL)
    fits = compiled.search if anywhere else compiled.fullmatch
    return [float(fits(completion) is not None) for completion in completions]


def think_format(completions: list[str], opened: bool = False) -> list[float]:
    """1 for `<think>reasoning</think>answer`, each tag once and neither part empty, else 0.

    `opened`: the prompt ends with `<think>` already, as some chat templates have it.
    """
    return [float(_thinks("<think>" + text if opened else text)) for text in completions]


def _thinks(text: str) -> bool:
    text = text.strip()
    if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.startswith("<think>"):
        return False
    reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
    return bool(reasoning.strip() and answer.strip())
