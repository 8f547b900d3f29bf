"""`grpo artifacts` on a store that a small fine-tune wrote."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from components.common import artifacts
from components.common.errors import SettingsError
from components.common.manifest import Kind, Manifest, Producer
from components.common.records import completion_fields, reward_fields, write_table
from components.common.settings import RunContext
from components.common.store import FileStore
from pipeline.cli_artifacts import app, human


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Manifest]:
    store = FileStore(tmp_path / "store")
    context = RunContext(fine_tune="tune", run="run-0001", store=store.url, seed=0, iterations=2)
    found: dict[str, Manifest] = {}
    plan: list[tuple[str, Kind, int | None, list[str]]] = [
        ("prompts", "prompts", None, []),
        ("policy0", "policy", 0, []),
        ("scored", "scored", 0, ["policy0", "prompts"]),
        ("policy1", "policy", 1, ["policy0", "scored"]),
    ]
    for name, kind, iteration, parents in plan:
        (tmp_path / name).write_text(f"content of {name}")
        found[name] = artifacts.publish(
            store, context, name=kind, kind=kind, files={"file.txt": tmp_path / name}, iteration=iteration,
            producer=Producer(stage="update", key=name, settings_digest="", code_version="1"),
            parents={found[parent].kind: found[parent].digest for parent in parents},
        )  # fmt: skip
    return found


def grpo(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*arguments, "--store", str(tmp_path / "store")])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_ls_names_every_artifact(tmp_path: Path, made: dict[str, Manifest]) -> None:
    _, text = grpo(tmp_path, "ls")
    rows = [line.split()[:3] for line in text.splitlines()[1:]]
    assert sorted(rows) == sorted(
        [f"tune/run-0001/{where}", one.kind, one.digest[7:19]]
        for where, one in (
            ("run/prompts", made["prompts"]), ("0000/policy", made["policy0"]), ("0000/scored", made["scored"]),
            ("0001/policy", made["policy1"]),
        )
    )  # fmt: skip
    assert grpo(tmp_path, "ls", "--kind", "policy")[1].count("\n") == 3
    assert grpo(tmp_path, "ls", "tune/run-0002")[1].count("\n") == 1


def test_show_prints_the_manifest(tmp_path: Path, made: dict[str, Manifest]) -> None:
    _, text = grpo(tmp_path, "show", "tune/run-0001/0001/policy")
    assert Manifest.parse(text.encode(), where="output") == made["policy1"]


def test_show_prints_what_an_artifact_holds_of_a_prompt(tmp_path: Path) -> None:
    completions = [
        {"prompt_id": name, "prompt": f"{name}?", "prompt_ids": [1], "sample_index": index, "completion_ids": [2],
         "completion": f"{name}{index}", "logprobs": [-1.0], "finish_reason": "stop", "seed": 0, "policy_digest": "d"}
        for name in "ab" for index in range(2)
    ]  # fmt: skip
    rewards = [
        {"prompt_id": name, "sample_index": index, "reward": index / 2, "rewards/exact": index / 2, "error": None}
        for name in "ab"
        for index in range(2)
    ]
    write_table(pa.Table.from_pylist(completions), tmp_path / "train.parquet", completion_fields())
    write_table(pa.Table.from_pylist(rewards), tmp_path / "train_rewards.parquet", reward_fields(["exact"]))
    artifacts.publish(
        FileStore(tmp_path / "store"), RunContext(fine_tune="tune", run="run-0001", store="", seed=0, iterations=2),
        name="scored", kind="scored", iteration=0,
        files={name: tmp_path / name for name in ("train.parquet", "train_rewards.parquet")},
        producer=Producer(stage="reward", key="k", settings_digest="", code_version="1"),
    )  # fmt: skip
    _, text = grpo(tmp_path, "show", "tune/run-0001/0000/scored", "--prompt", "b")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["split"], row["prompt"], row["completion"], row["rewards/exact"]) for row in rows] == [
        ("train", "b?", "b0", 0.0),
        ("train", "b?", "b1", 0.5),
    ]
    with pytest.raises(SettingsError, match="--prompt: no completions of 'c' in this scored artifact"):
        grpo(tmp_path, "show", "tune/run-0001/0000/scored", "--prompt", "c")


def test_lineage_draws_the_descent(tmp_path: Path, made: dict[str, Manifest]) -> None:
    _, text = grpo(tmp_path, "lineage", made["policy1"].digest[7:20])
    order = ["0001/policy", "policy: tune/run-0001/0000/policy", "scored: tune/run-0001/0000/scored", "prompts: "]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_fetch_brings_verified_files(tmp_path: Path, made: dict[str, Manifest]) -> None:
    _, text = grpo(tmp_path, "fetch", "tune/run-0001/0001/policy", str(tmp_path / "here"))
    assert (tmp_path / "here" / "file.txt").read_text() == "content of policy1"
    assert "verified" in text


def test_verify_finds_what_is_missing_and_what_changed(tmp_path: Path, made: dict[str, Manifest]) -> None:
    assert grpo(tmp_path, "verify") == (0, "4 objects, 71 B, 0 missing or changed; 0 collected\n")
    store = FileStore(tmp_path / "store")
    store.delete(made["scored"].files[0].key)
    place = store.path(made["policy1"].files[0].key)
    place.write_text("CONTENT of policy1")
    code, text = grpo(tmp_path, "verify", "--quick")
    assert code == 1 and "1 missing or changed" in text
    code, text = grpo(tmp_path, "verify")
    assert code == 1 and "2 missing or changed" in text
    assert f"{made['scored'].files[0].key}: missing" in text
    assert f"{made['policy1'].files[0].key} was changed or cut" in text


def test_gc_says_what_it_would_do_and_does_it(tmp_path: Path, made: dict[str, Manifest]) -> None:
    key = made["policy0"].files[0].key
    _, text = grpo(tmp_path, "gc", "--keep-last", "1", "--grace-hours", "-1", "--dry-run")
    assert key in text and "2 blobs to go" in text
    assert grpo(tmp_path, "verify")[0] == 0
    _, text = grpo(tmp_path, "gc", "--keep-last", "1", "--grace-hours", "-1")
    assert "freed 35 B" in text


def test_what_was_collected_is_no_loss_and_what_was_lost_is(tmp_path: Path, made: dict[str, Manifest]) -> None:
    grpo(tmp_path, "gc", "--keep-last", "1", "--grace-hours", "-1")
    code, text = grpo(tmp_path, "verify", "--keep-last", "1")
    assert code == 0 and "2 objects, 36 B, 0 missing or changed; 2 collected" in text
    assert f"{made['policy0'].files[0].key}: collected" in text
    stored = {line.split()[0]: line.split()[5:-2] for line in grpo(tmp_path, "ls")[1].splitlines()[1:]}
    assert stored == {
        "tune/run-0001/run/prompts": ["18", "B"], "tune/run-0001/0001/policy": ["18", "B"],
        "tune/run-0001/0000/policy": ["gone"], "tune/run-0001/0000/scored": ["gone"],
    }  # fmt: skip
    FileStore(tmp_path / "store").delete(made["policy1"].files[0].key)
    code, text = grpo(tmp_path, "verify", "--keep-last", "1")
    assert code == 1 and f"{made['policy1'].files[0].key}: missing" in text
    assert grpo(tmp_path, "verify", "tune/run-0002") == (0, "0 objects, 0 B, 0 missing or changed; 0 collected\n")


def test_a_wrong_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--store: no folder"):
        grpo(tmp_path, "ls")


def test_sizes_are_readable() -> None:
    assert [human(size) for size in (0, 999, 1000, 15_200_000_000, 2e12)] == [
        "0 B",
        "999 B",
        "1.0 KB",
        "15.2 GB",
        "2.0 TB",
    ]


def test_help_names_the_commands() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    assert all(name in text for name in ("ls", "show", "lineage", "fetch", "verify", "gc"))
