"""Token ids back to text, with the policy's own tokenizer; only for people and reward functions to read."""

from collections.abc import Callable, Sequence
from pathlib import Path

from components.common.errors import DataError

Decode = Callable[[Sequence[Sequence[int]]], list[str]]


def open_tokenizer(policy: Path) -> Decode:
    """Decoder of many token lists at once; special tokens are left out.

    Raises:
        DataError: the policy has no tokenizer.
    """
    if (policy / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(policy / "tokenizer.json"))
        return lambda ids: tokenizer.decode_batch(ids, skip_special_tokens=True)
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(policy, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"the policy has no tokenizer: {error}; save one beside the weights") from None
    return lambda ids: slow.batch_decode(ids, skip_special_tokens=True)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop text."""
    ends = [position for mark in stop if (position := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text
