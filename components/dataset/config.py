"""Settings of the dataset stage: where prompts come from, what they become, which are held out."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from components.common.settings import Settings

PROMPT_MARK = "{prompt}"


class DatasetSettings(Settings):
    """Settings of the dataset stage."""

    source: str = Field(min_length=1)
    """A preset (`gsm8k`, `math500`), a hub id (`openai/gsm8k`), a JSONL or Parquet file, a folder in the hub's or in
    `save_to_disk`'s format, or `s3://bucket/key` of such a file, or folder when it ends with `/`."""
    preset: Literal["gsm8k", "math500"] | None = None
    """Reads rows as those of a known data set, from wherever `source` has them; implied when `source` is its name."""
    subset: str | None = None
    """Configuration of a hub data set, as `main`."""
    revision: str | None = None
    """Commit or tag of a hub data set; pin it and the same prompts come back."""
    train_split: str | None = None
    """Split that is trained on, in a plain folder the file of that name; the preset's, or `train`, when absent."""
    eval_split: str | None = None
    """Split that is held out; the preset's when absent, and without one `num_eval` prompts of the train split."""
    eval_source: str | None = None
    """Where the held-out rows are, when not in `source`."""
    num_train: int | None = Field(default=None, ge=1)
    """Train prompts to keep, the first ones; all when absent."""
    num_eval: int | None = Field(default=None, ge=1)
    """Held-out prompts to keep; all of an eval split when absent, 128 of a train split without one."""
    split_seed: int = 0
    """Which prompts are held out; leave it as it is, so that no policy was trained on what it is judged by."""
    prompt_column: str = "prompt"
    """Column of the prompts: text, or lists of chat messages."""
    id_column: str | None = None
    """Column that names a row; a digest of the row's content when absent."""
    columns: tuple[str, ...] | None = None
    """Columns that travel on to the reward functions; all when absent."""
    system_prompt: str | None = None
    """System message before each prompt; needs a chat template."""
    prompt_template: str = PROMPT_MARK
    """Text around a prompt: `{prompt}` stands for it."""
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template; otherwise they are taken as plain text."""
    chat_template_arguments: dict[str, Any] = {}
    """Further arguments of the chat template, as `{enable_thinking = false}`."""
    max_prompt_length: int | None = Field(default=512, ge=1)
    """Longest prompt, in tokens."""
    max_completion_length: int | None = Field(default=None, ge=1)
    """Tokens of the model's context kept free for the completion; the rollout's own setting when absent."""
    long_prompts: Literal["drop", "error"] = "drop"
    """What becomes of prompts that are too long: dropped and counted, or refused."""
    empty_prompts: Literal["error", "drop"] = "error"
    """What becomes of rows whose prompt is empty: refused, or dropped and counted."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if PROMPT_MARK not in self.prompt_template:
            raise ValueError(f"prompt_template must contain {PROMPT_MARK}, got {self.prompt_template!r}")
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError(
                "system_prompt needs chat_template = true; without one, write it into prompt_template instead"
            )
        if self.chat_template_arguments and not self.chat_template:
            raise ValueError("chat_template_arguments needs chat_template = true")
        return self
