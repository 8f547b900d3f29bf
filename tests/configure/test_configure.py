"""The configure stage: where a run starts, and what it refuses before anything is published."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from components.common import champion
from components.common.champion import Champion
from components.common.errors import AlreadyPublished, ArtifactNotFound, DataError, SettingsError
from components.common.events import RUN_DIR_VARIABLE
from components.common.manifest import Manifest, content_digest, manifest_key
from components.common.settings import load_stage
from components.common.stage import Stage
from components.common.store import open_store
from components.configure.config import STAGE_SECTIONS
from components.configure.pods import pod_fields
from components.configure.stage import run
from components.publish.config import PublishSettings
from components.rollout.config import RolloutSettings

OUTPUTS = ("policy", "optimizer", "reference", "history")


@pytest.fixture
def configure(tmp_path, tiny_model):
    def call(parameters=None, *, name="run-1", pods=None, **changes):
        settings = {
            "fine_tune": "f", "model": str(tiny_model), "store": (tmp_path / "store").as_uri(),
            "dataset": {"source": "gsm8k", "max_prompt_length": 16},
            "rollout": {"max_completion_length": 16},
        } | changes  # fmt: skip
        paths = {role: tmp_path / name / f"{role}.json" for role in OUTPUTS}
        texts = {f"{section}_settings": tmp_path / name / section for section in (*STAGE_SECTIONS, "run")}
        run(
            settings=json.dumps(settings),
            parameters=json.dumps(parameters or {}),
            run=name,
            job_id="x",
            pods=json.dumps(pods or {}),
            **paths,
            **texts,
        )
        return paths, texts

    return call


@pytest.fixture
def run_dir(monkeypatch, tmp_path):
    """Directory of a local run."""
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    (tmp_path / "run" / "logs").mkdir(parents=True)


def test_a_fresh_start_publishes_the_base_model(configure, tiny_model):
    paths, texts = configure({"rollout.temperature": 0.7})
    policy = Manifest.load(paths["policy"])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= policy.names
    assert policy.iteration == 0 and policy.metadata["vocab_size"] == 47
    assert Manifest.load(paths["reference"]).digest == policy.digest
    assert Manifest.load(paths["optimizer"]).files == Manifest.load(paths["history"]).files == ()
    context, rollout = load_stage(RolloutSettings, str(texts["rollout_settings"]))
    assert (context.run, context.first_iteration, rollout.temperature) == ("run-1", 0, 0.7)


def test_the_same_configuration_again_changes_nothing(configure):
    paths, _ = configure()
    first = {role: path.read_bytes() for role, path in paths.items()}
    again, _ = configure()
    assert {role: path.read_bytes() for role, path in again.items()} == first


def test_all_problems_come_at_once_and_nothing_is_published(configure, tmp_path):
    with pytest.raises(SettingsError) as error:
        configure({"update.learning_rate": -1, "rollout.group_size": 1, "fine_tune": "No Spaces"})
    text = str(error.value)
    assert "learning_rate" in text and "group_size" in text and "fine_tune" in text
    assert not (tmp_path / "store").exists()


def test_prompt_and_completion_must_fit_the_context(configure):
    with pytest.raises(SettingsError, match="exceed the model's context of 64 tokens; lower one of them by 36"):
        configure({"rollout.max_completion_length": 84})


def test_a_cut_distribution_in_training_warns(configure, monkeypatch):
    lines = []
    monkeypatch.setattr("components.configure.stage.log.warning", lambda text, *values: lines.append(text % values))
    configure()
    assert lines == []
    configure({"rollout.top_p": 0.9}, name="run-2")
    assert [line[:40] for line in lines] == ["rollout.top_p = 0.9, top_k = None: log-p"]


def test_what_is_right_is_said_by_a_reward_function_there_is(configure):
    with pytest.raises(SettingsError, match=r"correct_reward: want one of the reward functions \(\w+\), got 'mach'"):
        configure(evaluate={"correct_reward": "mach"})


def test_more_shards_than_prompts(configure):
    with pytest.raises(SettingsError, match=r"lower shards to 3 or raise rollout\.num_prompts"):
        configure({"rollout.num_prompts": 3}, shards=4)


def test_the_stretch_of_over_length_punishment_lies_within_the_limit(configure):
    with pytest.raises(SettingsError, match=r"overlong_buffer.*within rollout.max_completion_length = 16, got 17"):
        configure({"update.overlong_buffer": 17})


def test_over_length_is_punished_once(configure):
    arguments = {"max_length": 16, "cache_length": 4}
    functions = [{"name": "numeric_match"}, {"name": "soft_overlong", "arguments": arguments}]
    with pytest.raises(SettingsError, match="soft_overlong both punish long completions: remove one"):
        configure({"update.overlong_buffer": 4}, reward={"functions": functions})


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer")],
)
def test_a_model_folder_that_lacks_something(configure, tiny_model, tmp_path, missing, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / missing).unlink()
    with pytest.raises(DataError, match=message):
        configure(model=str(folder))


def test_a_model_folder_that_is_not_there(configure, tmp_path):
    with pytest.raises(DataError, match="no folder"):
        configure(model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_config_that_is_not_json(configure, tiny_model, tmp_path, text):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"config\.json (is not JSON|holds a list).* save the model anew"):
        configure(model=str(folder))


def test_a_shard_that_the_index_names_and_the_folder_lacks(configure, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    shards = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(DataError, match=r"index\.json names model-00002-of-00002\.safetensors, and the folder has no"):
        configure(model=str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"publish": {"metric": "eval/pas@1"}}, r"metric: no evaluation has eval/pas@1; did you mean eval/pass@1\?"),
        ({"publish": {"metric": "eval/maj@2"}}, "no evaluation has eval/maj@2; did you mean eval/maj@4"),
        (
            {"publish": {"metric": "eval/pass@8"}, "rollout": {"eval_group_size": 1}},
            r"has eval/pass@8; raise rollout\.eval_group_size from 1 to 8$",
        ),
        (
            {"publish": {"metric": "eval/maj@6"}},
            r"has eval/maj@6; add 6 to evaluate\.k_values and raise rollout\.eval_group_size from 4 to 6$",
        ),
        ({"store": "http://x"}, "store: want s3://bucket/prefix, file:///folder or a local path, got 'http://x'"),
        ({"store": "s3:///prefix"}, "store: want s3://bucket/prefix"),
        ({"store": "file://folder"}, "store: want s3://bucket/prefix, file:///folder"),
    ],
)  # fmt: skip
def test_what_would_fail_after_all_training_fails_first(configure, tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        configure(**changes)
    assert not (tmp_path / "store").exists()


def test_an_export_that_could_not_be_written_is_refused_first(configure, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for export_dir, message in [("home", "is no earlier export"), ("home/thesis.txt/x", "nothing can be written to")]:
        with pytest.raises(SettingsError, match=message):
            configure({"publish.export_dir": str(tmp_path / export_dir)})
    assert not (tmp_path / "store").exists()


def test_problems_across_sections_are_counted(configure):
    with pytest.raises(SettingsError) as error:
        configure({"rollout.num_prompts": 3}, shards=4, evaluate={"correct_reward": "x"}, publish={"metric": "loss"})
    head, *problems = str(error.value).splitlines()
    assert head == "settings: 3 problems" and len(problems) == 3


def test_the_readme_shows_what_is_printed(configure):
    with pytest.raises(SettingsError) as error:
        configure({"update.learning_rte": 1e-6, "rollout.group_size": 1})
    assert f"```\n{error.value}\n```" in (Path(__file__).parents[2] / "components/configure/README.md").read_text()


def test_going_on_where_nothing_was(configure):
    with pytest.raises(ArtifactNotFound, match="no checkpoint"):
        configure(start_from="latest")


def test_the_champion_is_the_base_until_there_is_one(configure):
    base, _ = configure(name="run-1")
    paths, _ = configure(name="run-2", start_from="champion")
    assert Manifest.load(paths["policy"]).digest == Manifest.load(base["policy"]).digest


def test_a_chain_goes_on_from_its_own_run_though_another_published_meanwhile(configure, tmp_path):
    """Run chain-1 ended at iteration 7; a nightly run of the same fine-tune published its iteration 2 later."""
    paths, _ = configure(name="chain-1")
    policy = Manifest.load(paths["policy"])
    for name, iteration, minutes in (("chain-1", 7, 1), ("nightly", 2, 2)):
        folder = tmp_path / "store" / "manifests" / "f" / name / f"{iteration:04d}"
        folder.mkdir(parents=True)
        changes = {"run": name, "iteration": iteration, "created": policy.created + timedelta(minutes=minutes)}
        (folder / "policy.json").write_bytes(policy.model_copy(update=changes).dump())
    begun = {}
    for name, start_run in (("whichever", None), ("chain-2", "chain-1")):
        paths, _ = configure(name=name, start_from="latest", start_run=start_run)
        begun[name] = Manifest.load(paths["policy"]).iteration
    assert begun == {"chain-2": 7, "whichever": 2}
    with pytest.raises(ArtifactNotFound, match="run none of fine-tune f has no checkpoint"):
        configure(name="chain-3", start_from="latest", start_run="none")


def test_going_on_from_the_latest_checkpoint(configure, tmp_path):
    paths, _ = configure(name="run-1")
    first = Manifest.load(paths["policy"])
    later = first.model_copy(update={"iteration": 5})
    folder = tmp_path / "store" / "manifests" / "f" / "run-1" / "0005"
    folder.mkdir()
    (folder / "policy.json").write_bytes(later.dump())
    paths, texts = configure(name="run-2", start_from="latest")
    policy = Manifest.load(paths["policy"])
    assert policy.iteration == 5 and policy.run == "run-2" and policy.digest == first.digest
    context, _ = load_stage(RolloutSettings, str(texts["rollout_settings"]))
    assert context.first_iteration == 5


def move_champion(tmp_path, policy):
    """Says that `policy` was accepted."""
    key = manifest_key("f", policy.run, policy.iteration, "policy")
    store = open_store((tmp_path / "store").as_uri())
    store.put_bytes(policy.dump(), key)
    told = {"evaluation": "e", "evaluation_digest": "e", "metric": "m", "value": 1.0, "accepted": "now"}
    champion.write(
        store, "f", Champion(manifest=key, digest=policy.digest, run=policy.run, iteration=policy.iteration, **told)
    )


@pytest.mark.parametrize("run", ["run-1", "run-9"])
def test_a_resumed_run_keeps_its_start_whoever_became_champion_since(configure, tmp_path, run):
    paths, texts = configure(start_from="champion")
    first = {role: path.read_bytes() for role, path in (paths | texts).items()}
    move_champion(tmp_path, Manifest.load(paths["policy"]).model_copy(update={"iteration": 1, "run": run}))
    paths, texts = configure(start_from="champion")
    assert {role: path.read_bytes() for role, path in (paths | texts).items()} == first


def test_the_history_outlives_a_run_that_ended_before_its_first_evaluation(configure, tmp_path):
    """run-1 judged its start; run-2 took that over and failed in its first rollout; run-3 goes on from run-2."""
    paths, _ = configure(name="run-1")
    told = {"baseline": {"eval/reward": 0.25}}
    begun = Manifest.load(paths["history"])
    evaluation = begun.model_copy(update={"metadata": begun.metadata | told})
    open_store((tmp_path / "store").as_uri()).put_bytes(evaluation.dump(), manifest_key("f", "run-1", 0, "evaluation"))
    for name, start_run in (("run-2", "run-1"), ("run-3", "run-2")):
        paths, _ = configure(name=name, start_from="latest", start_run=start_run)
        assert Manifest.load(paths["history"]).metadata["baseline"] == told["baseline"]


def test_a_name_that_another_run_has_is_refused_with_other_settings(configure):
    """The form's `run` given twice: the first may still go on, and its history says what it reports as params."""
    paths, _ = configure()
    first = paths["history"].read_bytes()
    with pytest.raises(AlreadyPublished, match="run run-1 of fine-tune f was started with other settings: give"):
        configure({"update.learning_rate": 3e-5})
    paths, _ = configure()
    assert paths["history"].read_bytes() == first


@pytest.mark.usefixtures("run_dir")
def test_mended_settings_of_other_stages_keep_the_start(configure):
    paths, _ = configure(publish={"metric": "eval/reward"})
    first = {role: Manifest.load(path) for role, path in paths.items()}
    paths, texts = configure(publish={"metric": "eval/pass@1"}, seed=3)
    assert all(Manifest.load(paths[role]) == first[role] for role in ("policy", "optimizer", "reference"))
    assert Manifest.load(paths["history"]).metadata["settings"]["publish"]["metric"] == "eval/pass@1"
    context, _ = load_stage(RolloutSettings, str(texts["rollout_settings"]))
    assert context.seed == 3
    publish = Stage("publish", PublishSettings, str(texts["publish_settings"]), inputs={}, outputs={})
    assert publish.run_settings() == Manifest.load(paths["history"]).metadata["settings"]


def test_mended_settings_must_fit_the_context_too(configure):
    configure()
    with pytest.raises(SettingsError, match="exceed the model's context"):
        configure({"rollout.max_completion_length": 84})


def test_the_reference_is_the_start_of_the_whole_fine_tune(configure, tmp_path, tiny_model):
    paths, _ = configure(name="run-1")
    base = Manifest.load(paths["policy"])
    kept = tuple(file for file in base.files if file.name != "generation_config.json")  # stands for other weights
    trained = base.model_copy(update={"iteration": 5, "files": kept, "digest": content_digest("policy", kept)})
    open_store((tmp_path / "store").as_uri()).put_bytes(trained.dump(), manifest_key("f", "run-1", 5, "policy"))
    paths, _ = configure(name="run-2", start_from="latest")
    assert Manifest.load(paths["policy"]).digest == trained.digest != base.digest
    assert Manifest.load(paths["reference"]).digest == base.digest


BLANK = {field.name: field.kind() for field in pod_fields()}


def test_pods_of_the_form_are_checked_with_the_settings_all_at_once(configure):
    """Before any of them is asked for; on this machine they are blank."""
    good = {
        "rollout_pod_image": "registry.example/a@sha256:1", "rollout_pod_cpu": "8", "rollout_pod_memory": "64Gi",
        "rollout_pod_gpus": "2", "rollout_pod_gpu_resource": "nvidia.com/gpu", "rollout_pod_node_selector": {"a": "b"},
        "rollout_pod_tolerations": [{"key": "k", "operator": "Exists", "effect": "NoSchedule"}],
    }  # fmt: skip
    configure(pods=BLANK)
    configure(pods=BLANK | good, name="run-2")
    bad = {"rollout_pod_memory": "lots", "rollout_pod_gpus": "2.5", "rollout_pod_image": "",
           "rollout_pod_tolerations": [{"key": "k", "effekt": "NoSchedule"}]}  # fmt: skip
    with pytest.raises(SettingsError) as caught:
        configure({"rollout.temperature": -1}, pods=BLANK | good | bad, name="run-3")
    for name in ("memory", "gpus", "image", "tolerations"):
        assert f"cluster.rollout.{name}" in str(caught.value)
    assert "rollout.temperature" in str(caught.value) and "cluster.update" not in str(caught.value)
