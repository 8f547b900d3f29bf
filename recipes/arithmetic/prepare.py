"""Makes what the arithmetic recipe starts from: problems, a character tokenizer and a warm-started tiny model.

The problems are sums of two two-digit numbers. A completion writes the sum twice, lowest digit first, where carries
are easy (arXiv:2307.03381), then the usual way round: `17+58=` → `57→75`. The model is shown sums by a careless
teacher, who forgets four carries in five, so it imitates a third of right answers. What GRPO adds is the reward's.

    python recipes/arithmetic/prepare.py [--seed 0] [--folder recipes/arithmetic/build]

Left out: everything a library would add; about 80,000 parameters learn to imitate in some twenty seconds on one core.
A folder that is there already, made with the same constants and seed, is left as it is.
"""

# B sequences, T tokens, V vocabulary

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

LOWEST, HIGHEST = 10, 99
NUM_EVAL = 256
FORGOTTEN_CARRIES = 0.8
SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789+=→"
MAX_COMPLETION_LENGTH = 8  # tokens of `501→105` and the end token
WIDTH, NUM_LAYERS, NUM_HEADS, MLP_WIDTH = 64, 2, 4, 128
NUM_STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 900, 64, 5e-3, 20
FINAL_LEARNING_RATE_SHARE = 0.1
STAMP = "prepared.json"


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, prepares unless that is done, says where the result is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0, help="problems, weights and demonstrations derive from it")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "build", help="where to put it all")
    options = parser.parse_args(arguments)
    recipe = stamp(options.seed)
    found = read_stamp(options.folder)
    if found == recipe:
        print(f"{options.folder} is ready: model and problems of seed {options.seed}")
        return 0
    if options.folder.exists() and found is None:
        print(f"{options.folder} is not of this recipe's making; name another --folder or remove it", file=sys.stderr)
        return 1
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=existing_parent(options.folder)) as name:
        fresh = Path(name) / "build"
        score = prepare(fresh, options.seed)
        (fresh / STAMP).write_text(json.dumps(recipe, indent=1))
        if options.folder.exists():  # an earlier seed's
            shutil.rmtree(options.folder)
        fresh.rename(options.folder)
    print(f"{options.folder}: warm-started model, pass@1 {score:.1%} held out ({time.monotonic() - started:.0f} s)")
    return 0


def existing_parent(folder: Path) -> Path:
    """The parent of a folder, made if need be: on the same file system, so that a rename is atomic."""
    folder.resolve().parent.mkdir(parents=True, exist_ok=True)
    return folder.resolve().parent


def stamp(seed: int) -> dict[str, Any]:
    """All that the result depends on: the seed and this module's constants."""
    constants = {name: value for name, value in globals().items() if name.isupper() and name != "TYPE_CHECKING"}
    return json.loads(json.dumps({"seed": seed, **constants}))


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """What an earlier call left in the folder; none when the folder is not of our making."""
    try:
        return json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):  # no such file, or not JSON: the caller refuses the folder
        return None


def prepare(folder: Path, seed: int) -> float:
    """Writes problems and model into a new folder; returns the model's pass@1 on the held-out problems."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: a second thread only waits
    train, held_out = problems(seed)
    write_problems(folder / "problems", {"train": train, "eval": held_out})
    tokenizer, model = build_tokenizer(), build_model(seed)
    warm_start(model, tokenizer, train, seed)
    tokenizer.save_pretrained(folder / "model")
    save_model(model, folder / "model")
    return pass_at_1(model, tokenizer, held_out, seed)


def problems(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Train and held-out pairs of summands; a pair held out is not in train the other way round either."""
    numbers = range(LOWEST, HIGHEST + 1)
    pairs = [(left, right) for left in numbers for right in numbers if left <= right]
    shuffled = random.Random(seed)
    shuffled.shuffle(pairs)
    held_out = [pair if shuffled.random() < 0.5 else pair[::-1] for pair in pairs[:NUM_EVAL]]
    train = [way for pair in pairs[NUM_EVAL:] for way in sorted({pair, pair[::-1]})]
    shuffled.shuffle(train)
    return train, held_out


def write_problems(folder: Path, splits: dict[str, list[tuple[int, int]]]) -> None:
    """One JSONL file a split: prompt and answer."""
    folder.mkdir(parents=True)
    for name, pairs in splits.items():
        rows = ({"prompt": prompt(*pair), "answer": str(sum(pair))} for pair in pairs)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompt(left: int, right: int) -> str:
    """The problem as the model reads it."""
    return f"{left}+{right}="


def completion(total: int) -> str:
    """The answer as a completion writes it: lowest digit first, then the usual way round."""
    return f"{str(total)[::-1]}→{total}"


def careless_sum(left: int, right: int, chance: random.Random) -> int:
    """The sum as a teacher writes it who forgets a carry with probability `FORGOTTEN_CARRIES`."""

    def carried(column: int) -> int:
        return int(column >= 10 and chance.random() >= FORGOTTEN_CARRIES)

    ones = left % 10 + right % 10
    tens = left // 10 + right // 10 + carried(ones)
    return 100 * carried(tens) + 10 * (tens % 10) + ones % 10


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=64,
    )  # fmt: skip


def build_model(seed: int) -> "Qwen3ForCausalLM":
    """A Qwen3 of two layers, 83,400 parameters, random weights."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(SPECIAL) + len(CHARACTERS), hidden_size=WIDTH, intermediate_size=MLP_WIDTH,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_HEADS,
        head_dim=WIDTH // NUM_HEADS, max_position_embeddings=64, initializer_range=0.05, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True)
    return model


def save_model(model: "Qwen3ForCausalLM", folder: Path) -> None:
    """Config and weights as `save_pretrained` writes them, which would import DeepSpeed first, for seconds."""
    from safetensors.torch import save_file

    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def demonstrations(
    tokenizer: "PreTrainedTokenizerFast", pairs: Iterable[tuple[int, int]], seed: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Token ids [B, T] of prompt and the teacher's completion, padded on the right, and what the loss counts [B, T]."""
    import torch

    chance = random.Random(seed)
    ids, counted = [], []
    for pair in pairs:
        question = tokenizer.encode(prompt(*pair))
        answer = [*tokenizer.encode(completion(careless_sum(*pair, chance))), tokenizer.eos_token_id]
        padding = MAX_COMPLETION_LENGTH - len(answer)
        ids.append(question + answer + [tokenizer.pad_token_id] * padding)
        counted.append([0.0] * len(question) + [1.0] * len(answer) + [0.0] * padding)
    return torch.tensor(ids), torch.tensor(counted)


def warm_start(
    model: "Qwen3ForCausalLM", tokenizer: "PreTrainedTokenizerFast", pairs: Iterable[tuple[int, int]], seed: int
) -> None:
    """Supervised training on the teacher's sums: AdamW, learning rate warmed up, then falling linearly."""
    import torch

    torch.set_num_threads(1)
    ids, counted = demonstrations(tokenizer, pairs, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def share(step: int) -> float:
        falling = FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * (1 - step / NUM_STEPS)
        return min(1.0, (step + 1) / WARMUP_STEPS) * falling

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    chance = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(NUM_STEPS):
        rows = torch.randint(len(ids), (BATCH_SIZE,), generator=chance)
        loss = imitation_loss(model, ids[rows], counted[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def imitation_loss(model: "Qwen3ForCausalLM", ids_BT: "torch.Tensor", counted_BT: "torch.Tensor") -> "torch.Tensor":
    """Mean negative log-likelihood a counted token, in nats. Padding is behind, so causal attention never sees it."""
    import torch

    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    surprise_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return (surprise_BT * counted_BT[:, 1:]).sum() / counted_BT[:, 1:].sum()


def pass_at_1(
    model: "Qwen3ForCausalLM", tokenizer: "PreTrainedTokenizerFast", pairs: list[tuple[int, int]], seed: int
) -> float:
    """Share of right answers, one sample a problem at temperature 1."""
    import torch

    ids_BT = torch.tensor([tokenizer.encode(prompt(*pair)) for pair in pairs])
    width, chance = ids_BT.shape[1], torch.Generator().manual_seed(seed)
    for _ in range(MAX_COMPLETION_LENGTH):
        with torch.inference_mode():
            probabilities_BV = model(input_ids=ids_BT).logits[:, -1].softmax(-1)
        ids_BT = torch.cat([ids_BT, torch.multinomial(probabilities_BV, 1, generator=chance)], dim=1)
    texts = (text.partition("<eos>")[0] for text in tokenizer.batch_decode(ids_BT[:, width:]))
    right = [text.rpartition("→")[2] == str(sum(pair)) for text, pair in zip(texts, pairs, strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    sys.exit(main())
