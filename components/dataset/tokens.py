"""Prompts as the policy reads them: rendered, then tokenised, once, with its own tokenizer.

# P prompts, T tokens of a prompt
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.errors import DataError
from components.dataset.config import PROMPT_MARK, DatasetSettings

log = logging.getLogger("grpo")

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
PROMPTS_A_CALL = 1000

Prompt = str | list[dict[str, Any]]
"""Text, or chat messages."""


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        DataError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders of vocabularies raise whatever they meet, bare Exception included
        raise DataError(f"the policy's tokenizer cannot be loaded: {type(error).__name__}: {error}") from None


def context_length(folder: Path) -> int | None:
    """Tokens of the model's context, as its config.json says; None where it does not."""
    path = folder / "config.json"
    if not path.exists():
        return None
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config") or {}):
        for name in CONTEXT_NAMES:
            if part.get(name):
                return int(part[name])
    return None


def render(prompts_P: Sequence[Prompt], tokenizer: Any, settings: DatasetSettings) -> list[str]:
    """The very text whose tokens the model continues.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses a prompt, or messages meet no template.
    """
    if not settings.chat_template:
        for row, prompt in enumerate(prompts_P):
            if not isinstance(prompt, str):
                raise DataError(f"row {row} has chat messages for a prompt: set dataset.chat_template = true")
        return [_around(prompt, settings) for prompt in prompts_P if isinstance(prompt, str)]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the policy's tokenizer has no chat template: set dataset.chat_template = false to take prompts as plain "
            "text, or save a template with the tokenizer"
        )
    return [_render_chat(prompt, tokenizer, settings) for prompt in prompts_P]


def _render_chat(prompt: Prompt, tokenizer: Any, settings: DatasetSettings) -> str:
    from jinja2 import TemplateError

    messages = messages_of(prompt, settings)
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **settings.chat_template_arguments
        )
    except (TemplateError, TypeError, KeyError) as error:
        shown = str(messages)[:200]
        raise DataError(
            f"the chat template refuses a prompt: {type(error).__name__}: {error}; it was {shown}"
        ) from None


def messages_of(prompt: Prompt, settings: DatasetSettings) -> list[dict[str, Any]]:
    """The chat messages a prompt stands for, with the system prompt and the template around its question."""
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": _around(prompt, settings)}]
    else:
        messages = [dict(message) for message in prompt]
        asked = [message for message in messages if message["role"] == "user" and isinstance(message["content"], str)]
        if asked:
            asked[-1]["content"] = _around(asked[-1]["content"], settings)
    if settings.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": settings.system_prompt})
    return messages


def _around(text: str, settings: DatasetSettings) -> str:
    return settings.prompt_template.replace(PROMPT_MARK, text)


def tokenise(texts_P: Sequence[str], tokenizer: Any, *, rendered: bool) -> list[list[int]]:
    """Token ids of each text.

    A chat template has written the special tokens itself. Plain text gets the tokenizer's own, but no end token: the
    model is to go on.
    """
    ids_PT: list[list[int]] = []
    for start in range(0, len(texts_P), PROMPTS_A_CALL):
        texts = list(texts_P[start : start + PROMPTS_A_CALL])
        ids_PT += tokenizer(texts, add_special_tokens=not rendered)["input_ids"]
    end, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    if not rendered and end is not None and tokenizer.bos_token_id != end:
        ids_PT = [
            ids_T[:-1] if ids_T and ids_T[-1] == end and not text.endswith(tokenizer.eos_token) else ids_T
            for ids_T, text in zip(ids_PT, texts_P, strict=True)
        ]
    if unknown is not None and (count := sum(unknown in ids_T for ids_T in ids_PT)):
        log.warning("%d of %d prompts have parts the tokenizer does not know", count, len(ids_PT))
    return ids_PT
