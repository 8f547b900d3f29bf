"""A policy that is a tokenizer and a config, and a way to run the dataset stage on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.artifacts import publish
from components.common.manifest import Manifest, Producer
from components.common.settings import RunContext, dump_stage
from components.common.store import open_store
from components.dataset.config import DatasetSettings
from components.dataset.stage import run

ALPHABET = "0123456789+= abcdefghijklmnopqrstuvwxyz<>"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def save_tokenizer(folder: Path, *, template: str | None = None) -> Path:
    """One token a character, in the hub's format."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=template
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=TEMPLATE)


@pytest.fixture(scope="session")
def plain_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("plain-tokenizer"))


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> Callable[[str], Path]:
    """Saves the tokenizer with another chat template."""
    return lambda template: save_tokenizer(tmp_path / "tokenizer", template=template)


class Case:
    """Runs the stage in a store of its own and reads back what it made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = RunContext(
            fine_tune="test", run="one", store=(folder / "store").as_uri(), seed=0, iterations=1
        )  # fmt: skip
        self.store = open_store(self.context.store)

    def policy(self, tokenizer: Path, *, context: int = 64, without: tuple[str, ...] = ()) -> Path:
        """Publishes a policy with this tokenizer, and weights nobody can read."""
        config = self.folder / "config.json"
        config.write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": context}))
        weights = self.folder / "model.safetensors"
        weights.write_bytes(b"no weights")
        files = {path.name: path for path in [config, weights, *tokenizer.iterdir()] if path.name not in without}
        producer = Producer(stage="configure", key="k", settings_digest="s", code_version="v")
        manifest = publish(self.store, self.context, name="policy", kind="policy", files=files, producer=producer)
        self.store.delete(next(file.key for file in manifest.files if file.name == "model.safetensors"))
        (self.folder / "policy.json").write_bytes(manifest.dump())
        return self.folder / "policy.json"

    def run(self, policy: Path, **settings: Any) -> Manifest:
        """Runs the stage."""
        given = DatasetSettings(**{"chat_template": False} | settings)
        path = self.folder / "prompts.json"
        run(dump_stage(self.context, given), policy, path)
        self.manifest = Manifest.load(path)
        return self.manifest

    def table(self, split: str) -> pa.Table:
        """What the stage wrote."""
        (file,) = (file for file in self.manifest.files if file.name == f"{split}.parquet")
        self.store.get_file(file.key, self.folder / file.name)
        return pq.read_table(self.folder / file.name)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines and gives the file's path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
