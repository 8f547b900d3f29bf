"""Which of a policy's files its tokenizer is, and their digest: prompts belong to the tokenizer they were made with."""

from collections.abc import Collection

from components.common.errors import DataError
from components.common.manifest import Manifest, text_digest

TOKENIZER_FILES = frozenset({
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json", "chat_template.jinja",
    "chat_template.json", "config.json",
})  # fmt: skip
VOCABULARIES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"}
)


def tokenizer_files(names: Collection[str]) -> list[str]:
    """Which of a policy's files the tokenizer and the length of the context are read from; never the weights.

    Raises:
        DataError: there is no tokenizer among them.
    """
    if not VOCABULARIES & set(names):
        raise DataError(
            f"the policy has no tokenizer: want tokenizer.json, it has {', '.join(sorted(names)) or 'no files'}; "
            "save one beside the weights: tokenizer.save_pretrained(folder)"
        )
    return sorted(name for name in names if name in TOKENIZER_FILES or name.startswith("additional_chat_templates/"))


def tokenizer_digest(policy: Manifest) -> str:
    """Digest of the files that make token ids of text, the model's own configuration left out."""
    names = set(tokenizer_files(policy.names)) - {"config.json"}
    return text_digest("\n".join(f"{file.name} {file.digest}" for file in policy.files if file.name in names))
