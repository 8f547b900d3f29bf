"""The compiled pipeline: needs no ML library, holds the budget, places every stage, asks for every setting."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from components.common.errors import SettingsError
from components.common.settings import validate
from components.configure.config import RunSettings
from components.configure.form import form_fields, overlay
from components.configure.pods import pod_fields
from pipeline.cli import app
from pipeline.compiling import LOADER, compile_to, iterations_that_fit, task_count
from pipeline.scaffold import write_start
from pipeline.settings import PipelineSettings, load
from pipeline.submitting import split

ROOT = Path(__file__).parents[2]
STAGES = ("configure", "dataset", "rollout", "reward", "update", "evaluate", "publish")
VALUES = {
    "fine_tune": "f", "model": "m", "store": "s3://bucket", "iterations": 2, "dataset": {"source": "gsm8k"},
    "reward": {"functions": [{"name": "numeric_match"}]},
    "cluster": {
        "preset": "gke", "queue": "team-a",
        "rollout": {"gpus": 2, "gpu_type": "nvidia-l4", "spot": True}, "update": {"gpus": 8, "shm": "32Gi"},
        **{stage: {"image": "registry.example/cpu@sha256:" + "0" * 64}
           for stage in ("configure", "dataset", "reward", "evaluate", "publish")},
    },
}  # fmt: skip
for _stage in ("rollout", "update"):
    VALUES["cluster"][_stage]["image"] = f"registry.example/{_stage}@sha256:" + "1" * 64


def settings(**changes):
    return validate(PipelineSettings, VALUES | changes)


def compiled(tmp_path, **changes):
    compile_to(settings(**changes), tmp_path / "pipeline.yaml")
    ir, *platform = yaml.load_all((tmp_path / "pipeline.yaml").read_text(), LOADER)
    pods = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
    return with_defaults(ir, pods)


def with_defaults(ir, pods):
    """The same with each parameter of a pod in its place, as KFP's driver puts it when the form is left as it is."""
    defaults = {name: spec.get("defaultValue") for name, spec in ir["root"]["inputDefinitions"]["parameters"].items()}
    for executor in ir["deploymentSpec"]["executors"].values():
        container = executor["container"]
        resources = container["resources"]
        for place in (container, resources, resources.get("accelerator", {})):
            for name, value in place.items():
                found = re.fullmatch(r"\{\{\$\.inputs\.parameters\['pipelinechannel--(.+)'\]\}\}", str(value))
                place[name] = defaults[found[1]] if found else value
    for pod in pods.values():
        if "nodeSelectorJson" in pod.get("nodeSelector", {}):
            source = pod["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"]
            pod["nodeSelector"] = {"labels": defaults[source.removeprefix("pipelinechannel--")]}
        for toleration in [each for each in pod.get("tolerations", []) if "tolerationJson" in each]:
            source = toleration["tolerationJson"]["componentInputParameter"].removeprefix("pipelinechannel--")
            pod["tolerations"].remove(toleration)
            pod["tolerations"] += defaults[source]
    return ir, pods


@pytest.fixture(scope="module")
def two_iterations(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("ir"))


def stage_of(executor):
    return executor.removeprefix("exec-").rstrip("-0123456789").replace("-shards", "")


def test_compiles_without_any_ml_library(tmp_path):
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('torch', 'vllm', 'deepspeed', 'mlflow', 'transformers', 'datasets'):\n"
        "            raise ImportError(name + ' must not be imported')\n"
        "sys.meta_path.insert(0, Block())\n"
        "import json\n"
        "from pathlib import Path\n"
        "from components.common.settings import validate\n"
        "from pipeline.settings import PipelineSettings\n"
        "from pipeline.compiling import compile_to\n"
        f"compile_to(validate(PipelineSettings, json.loads(sys.argv[1])), Path({str(tmp_path / 'p.yaml')!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(VALUES)], check=True, cwd=ROOT)
    assert (tmp_path / "p.yaml").stat().st_size > 10_000


def test_every_iteration_is_four_tasks_on_one_shard(two_iterations):
    ir, _ = two_iterations
    tasks = ir["root"]["dag"]["tasks"]
    assert len(tasks) == 2 + 2 * 4 + 3 + 1 == task_count(settings())
    names = [task["taskInfo"]["name"].split()[0] for task in tasks.values()]
    assert {name: names.count(name) for name in STAGES} == {
        "configure": 1, "dataset": 1, "rollout": 3, "reward": 3, "update": 2, "evaluate": 3, "publish": 1,
    }  # fmt: skip


def test_evaluation_runs_beside_the_update(two_iterations):
    tasks = two_iterations[0]["root"]["dag"]["tasks"]
    by_name = {task["taskInfo"]["name"]: task for task in tasks.values()}
    keys = {task["taskInfo"]["name"]: key for key, task in tasks.items()}
    assert keys["update 0"] not in by_name["evaluate 0"]["dependentTasks"]
    assert keys["evaluate 0"] not in by_name["update 0"]["dependentTasks"]


def test_shards_are_a_loop(tmp_path):
    ir, _ = compiled(tmp_path, shards=3)
    loops = [task for task in ir["root"]["dag"]["tasks"].values() if "parameterIterator" in task]
    assert len(loops) == 3  # two iterations and the final evaluation
    assert all(yaml.safe_load(loop["parameterIterator"]["items"]["raw"]) == [0, 1, 2] for loop in loops)


def test_staleness_lets_the_next_rollout_run_beside_the_update(tmp_path):
    for staleness, waits in ((0, True), (1, False)):
        tasks = compiled(tmp_path, staleness=staleness)[0]["root"]["dag"]["tasks"]
        keys = {task["taskInfo"]["name"]: key for key, task in tasks.items()}
        rollout = tasks[keys["rollout 1"]]
        assert (keys["update 0"] in rollout["dependentTasks"]) is waits


def source_of(tasks, name, role):
    """The task an input artifact comes from."""
    return tasks[name]["inputs"]["artifacts"][role]["taskOutputArtifact"]["producerTask"]


@pytest.mark.parametrize(("iterations", "staleness"), [(1, 0), (4, 0), (1, 1), (2, 1), (4, 1)])
def test_every_policy_is_evaluated_once_on_its_own_samples(tmp_path, iterations, staleness):
    tasks = compiled(tmp_path, iterations=iterations, staleness=staleness)[0]["root"]["dag"]["tasks"]
    assert len(tasks) == task_count(settings(iterations=iterations, staleness=staleness))
    names = {task["taskInfo"]["name"]: key for key, task in tasks.items()}
    makers = [names["configure"], *(names[f"update {number}"] for number in range(iterations))]
    for number, maker in enumerate(makers):
        judged = names[f"evaluate {number}"]
        sampled = source_of(tasks, source_of(tasks, judged, "scored"), "completions")
        assert source_of(tasks, judged, "policy") == source_of(tasks, sampled, "policy") == maker
        runtime = tasks[judged]["inputs"]["parameters"]["iteration"]["runtimeValue"]["constant"]
        assert runtime == number
    assert f"evaluate {iterations + 1}" not in names
    rollouts = [key for name, key in names.items() if name.startswith("rollout")]
    last = names[f"rollout {iterations + staleness}"]
    assert len(rollouts) == iterations + 1 + (staleness if iterations > 1 else 0)
    if staleness and iterations > 1:  # the last policy but one is judged beside the last update
        assert makers[-1] not in tasks[names[f"rollout {iterations}"]]["dependentTasks"]
    assert makers[-1] in tasks[last]["dependentTasks"]


def test_every_setting_is_a_parameter_with_its_value_as_default(two_iterations):
    parameters = two_iterations[0]["root"]["inputDefinitions"]["parameters"]
    fields = {"run"} | {field.name for field in form_fields(RunSettings)}
    assert set(parameters) == fields | {field.name for field in pod_fields()}
    assert parameters["update_learning_rate"]["defaultValue"] == settings().update.learning_rate
    assert parameters["update_loss_type"]["literals"] == list(
        next(field.choices for field in form_fields(RunSettings) if field.name == "update_loss_type")
    )
    assert all(parameter.get("description") for parameter in parameters.values())


@pytest.mark.parametrize("shipped", ["recipes/gsm8k", "recipes/arithmetic", "template"])
def test_every_shipped_settings_file_compiles_and_the_form_gives_its_values_back(shipped, tmp_path):
    folder = ROOT / shipped
    if shipped == "template":
        write_start(folder := tmp_path / "mine")
    images = (f"cluster.{stage}.image=registry.example/cpu@sha256:{'0' * 64}" for stage in STAGES)
    given, remaining = split(load(folder / "settings.toml", ("store=s3://bucket", *images)))
    compile_to(given, tmp_path / "pipeline.yaml", remaining=remaining)
    ir, _ = yaml.load_all((tmp_path / "pipeline.yaml").read_text(), LOADER)
    parameters = ir["root"]["inputDefinitions"]["parameters"]
    form = {field.dotted: parameters[field.name]["defaultValue"] for field in form_fields(RunSettings)}
    values = given.model_dump(mode="json", exclude={"cluster"})
    assert validate(RunSettings, overlay(values, form, RunSettings)) == validate(RunSettings, values)


def test_every_drop_down_offers_its_own_default(two_iterations):
    parameters = two_iterations[0]["root"]["inputDefinitions"]["parameters"]
    drop_downs = {name: parameter for name, parameter in parameters.items() if "literals" in parameter}
    assert drop_downs["dataset_preset"]["literals"] == ["", "gsm8k", "math500"]
    for name, parameter in drop_downs.items():
        assert parameter["defaultValue"] in parameter["literals"], name


def test_what_a_pod_cannot_see_is_told_when_it_is_compiled(tmp_path):
    write_start(tmp_path / "mine")
    images = (f"cluster.{stage}.image=registry.example/cpu@sha256:{'0' * 64}" for stage in STAGES)
    options = [part for image in images for part in ("--set", image)]
    result = CliRunner().invoke(
        app, ["compile", str(tmp_path / "mine/settings.toml"), "-o", str(tmp_path / "p.yaml"), *options]
    )
    assert result.exit_code == 0 and (tmp_path / "p.yaml").exists()
    assert "warning: a pod cannot see" in result.stderr and "store = file://" in result.stderr


def test_an_update_on_several_nodes_is_a_small_pod_that_knows_what_its_nodes_get(tmp_path):
    cluster = VALUES["cluster"] | {"queue": None}
    ir, platform = compiled(tmp_path, update={"nodes": 2}, cluster=cluster)
    (name,) = {name for name in ir["deploymentSpec"]["executors"] if name == "exec-update"}
    container = ir["deploymentSpec"]["executors"][name]["container"]
    assert container["image"] == VALUES["cluster"]["configure"]["image"] and "accelerator" not in container["resources"]
    assert "nodeSelector" not in platform[name] and "tolerations" not in platform[name]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    nodes = json.loads(environment["GRPO_UPDATE_NODES"])
    assert (nodes["gpus"], nodes["image"], nodes["shm"]) == (8, VALUES["cluster"]["update"]["image"], "32Gi")
    assert {found["key"] for found in nodes["tolerations"]} == {"nvidia.com/gpu"}
    assert ir["deploymentSpec"]["executors"]["exec-rollout"]["container"]["resources"]["accelerator"]


def test_every_pod_has_requests_an_image_by_digest_and_is_not_root(two_iterations):
    ir, platform = two_iterations
    executors = ir["deploymentSpec"]["executors"]
    assert {stage_of(name) for name in executors} == set(STAGES)
    for name, executor in executors.items():
        container, pod = executor["container"], platform[name]
        assert "@sha256:" in container["image"]
        assert container["resources"]["resourceCpuRequest"] and container["resources"]["resourceMemoryRequest"]
        assert container["resources"]["resourceMemoryLimit"] == container["resources"]["resourceMemoryRequest"]
        assert pod["securityContext"]["runAsNonRoot"] and int(pod["securityContext"]["runAsUser"]) == 1000
        assert "pip install" not in " ".join(container["command"])
        labels = pod["podMetadata"]["labels"]
        assert labels["app.kubernetes.io/component"] == stage_of(name)
        assert labels["kueue.x-k8s.io/queue-name"] == "team-a"


def test_gpu_stages_ask_for_gpus_and_tolerate_and_select_their_pool(two_iterations):
    ir, platform = two_iterations
    for name, executor in ir["deploymentSpec"]["executors"].items():
        stage, pod = stage_of(name), platform[name]
        accelerator = executor["container"]["resources"].get("accelerator", {})
        taints = {toleration["key"] for toleration in pod.get("tolerations", [])}
        if stage in ("rollout", "update"):
            assert accelerator["resourceType"] == "nvidia.com/gpu"
            assert accelerator["resourceCount"] == {"rollout": "2", "update": "8"}[stage]
            assert "nvidia.com/gpu" in taints
        else:
            assert not accelerator and not taints and "nodeSelector" not in pod
    rollout = next(pod for name, pod in platform.items() if stage_of(name) == "rollout")
    assert rollout["nodeSelector"]["labels"] == {
        "cloud.google.com/gke-accelerator": "nvidia-l4", "cloud.google.com/gke-spot": "true",
    }  # fmt: skip


def test_what_a_form_may_vary_of_gpu_pods_are_parameters(two_iterations):
    """Text for KFP, JSON for what is none; what the settings come to as default, so that nothing is typed twice."""
    parameters = two_iterations[0]["root"]["inputDefinitions"]["parameters"]
    shown = {name: (spec["parameterType"], spec["defaultValue"]) for name, spec in parameters.items()
             if name.startswith("rollout_pod_")}  # fmt: skip
    assert shown == {
        "rollout_pod_image": ("STRING", VALUES["cluster"]["rollout"]["image"]), "rollout_pod_cpu": ("STRING", "8"),
        "rollout_pod_memory": ("STRING", "64Gi"), "rollout_pod_gpus": ("STRING", "2"),
        "rollout_pod_gpu_resource": ("STRING", "nvidia.com/gpu"),
        "rollout_pod_node_selector": ("STRUCT", {"cloud.google.com/gke-accelerator": "nvidia-l4",
                                                 "cloud.google.com/gke-spot": "true"}),
        "rollout_pod_tolerations": ("LIST", [{"key": "nvidia.com/gpu", "operator": "Exists"},
                                             {"key": "cloud.google.com/gke-spot", "operator": "Exists"}]),
    }  # fmt: skip


def pods_of(folder, **changes):
    """The compiled file as it is, without anything in its parameters' places."""
    compile_to(settings(**changes), folder / "pipeline.yaml")
    ir, platform = yaml.load_all((folder / "pipeline.yaml").read_text(), LOADER)
    return ir, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


SHARDED_SCHEDULE = {"shards": 2, "staleness": 1, "skip_unchanged_data": True}


@pytest.mark.parametrize("changes", [{}, {"shards": 3}, {"skip_unchanged_data": True}, SHARDED_SCHEDULE])
def test_parameters_of_pods_reach_every_task_through_loops_and_conditions(changes, tmp_path):
    """Whatever a task takes from its parent, the parent must have as an input, up to the pipeline's own."""
    ir, _ = pods_of(tmp_path, **changes)
    seen = set()

    def check(dag, available):
        for name, task in dag["tasks"].items():
            inputs = task.get("inputs", {}).get("parameters", {})
            taken = {
                value["componentInputParameter"] for value in inputs.values() if "componentInputParameter" in value
            }
            assert taken <= available, f"{name} takes {sorted(taken - available)}"
            seen.update(value.removeprefix("pipelinechannel--") for value in taken)
            component = ir["components"][task["componentRef"]["name"]]
            if "dag" in component:
                inner = set(component.get("inputDefinitions", {}).get("parameters", {}))
                given = set(inputs) | {task.get("parameterIterator", {}).get("itemInput")}
                assert inner <= given, f"{name} is not given {sorted(inner - given)}"
                check(component["dag"], inner)

    check(ir["root"]["dag"], set(ir["root"]["inputDefinitions"]["parameters"]))
    assert {field.name for field in pod_fields()} <= seen


def test_only_gpu_pods_of_one_node_have_parameters(tmp_path):
    """A TrainJob's nodes are written into a constant; a stage without GPUs has none to vary."""
    ir, _ = pods_of(tmp_path, update=settings().update.model_dump() | {"nodes": 2})
    assert not [name for name in ir["root"]["inputDefinitions"]["parameters"] if name.startswith("update_pod_")]
    cluster = VALUES["cluster"] | {"rollout": VALUES["cluster"]["rollout"] | {"gpus": 0, "spot": False}}
    ir, _ = pods_of(tmp_path, cluster=cluster)
    names = {name for name in ir["root"]["inputDefinitions"]["parameters"] if name.startswith("rollout_pod_")}
    assert names == {f"rollout_pod_{name}" for name in ("image", "cpu", "memory", "node_selector", "tolerations")}
    rollouts = [executor["container"]["resources"] for name, executor in ir["deploymentSpec"]["executors"].items()
                if "rollout" in name]  # fmt: skip
    assert rollouts and not [resources for resources in rollouts if "accelerator" in resources]


def test_a_schedule_ends_early_when_the_data_has_not_changed(tmp_path):
    tasks = compiled(tmp_path, skip_unchanged_data=True)[0]["root"]["dag"]["tasks"]
    (conditional,) = [task for task in tasks.values() if "triggerPolicy" in task]
    assert conditional["triggerPolicy"]["condition"].endswith("== 'new'")
    assert {task["taskInfo"]["name"] for task in tasks.values()} == {"configure", "dataset", "data has changed"}


def test_too_many_tasks_are_refused_with_the_number_that_fits(tmp_path):
    """2 before, 4 an iteration, 3 for the last evaluation, publish: 38 for 8 iterations, 42 for 9."""
    assert iterations_that_fit(settings()) == 8 and task_count(settings(iterations=8)) == 38
    with pytest.raises(SettingsError, match=r"9 make 42 tasks, and cluster.max_tasks is 40; 8 iterations fit"):
        compile_to(settings(iterations=9), tmp_path / "pipeline.yaml")
    assert not (tmp_path / "pipeline.yaml").exists()
    more = VALUES["cluster"] | {"max_tasks": 44}
    assert iterations_that_fit(settings(cluster=more)) == 9
    assert compile_to(settings(iterations=9, cluster=more), tmp_path / "pipeline.yaml") == 42


def test_the_default_budget_fits_into_etcd():
    """About 35 KB a task, 1.5 MiB for the object."""
    assert settings().cluster.max_tasks * 35e3 < 1.5 * 2**20


def test_shards_that_no_run_holds_are_refused_by_name(tmp_path):
    """2 + (15 + 1 + 3) + (15 + 1 + 2) + 1 = 40 tasks for 15 shards, 42 for 16."""
    assert task_count(settings(shards=15, iterations=1)) == 40
    with pytest.raises(SettingsError, match=r"^shards: an iteration of 16 makes a run of 42 tasks.*lower shards"):
        compile_to(settings(shards=16, iterations=1), tmp_path / "pipeline.yaml")


def test_a_file_that_cannot_be_written_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(SettingsError, match=r"there is no folder .*nowhere; name a file in a folder that is there"):
        compile_to(settings(), tmp_path / "nowhere" / "pipeline.yaml")
    with pytest.raises(SettingsError, match="is a folder; name a file"):
        compile_to(settings(), tmp_path)


def test_a_stage_without_an_image_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.images.LOCK", tmp_path / "none.json")
    cluster = {"reward": {}}
    with pytest.raises(SettingsError, match="make images"):
        compile_to(settings(cluster=cluster), tmp_path / "pipeline.yaml")
