"""One contract for every stage folder: the same files, one signature, help that answers at once."""

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = sorted(path.parent.name for path in (ROOT / "components").glob("*/stage.py") if path.parent.name != "common")
FACES = {"reward": ("reward", "reward_shards")}
HEAVY = ("torch", "vllm", "deepspeed", "mlflow", "transformers")


def test_all_seven_stages_are_there():
    assert STAGES == ["configure", "dataset", "evaluate", "publish", "reward", "rollout", "update"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_folder_holds_the_same_files(stage):
    names = {path.name for path in (ROOT / "components" / stage).iterdir()}
    assert {"README.md", "__init__.py", "__main__.py", "component.py", "config.py", "stage.py"} <= names


ARTIFACTS = {f"system.{kind}@0.0.1" for kind in ("Artifact", "HTML", "Markdown")}
KINDS = {
    str: {"String"}, int: {"Integer"}, float: {"Float"}, bool: {"Boolean"}, list: {"List"}, dict: {"Dict"},
    Path: ARTIFACTS, list[Path]: ARTIFACTS,
}  # fmt: skip
"""Type of a parameter of `run` → its types in Kubeflow: a manifest travels as an artifact."""
BY_FILE = {("rollout", "settings"): ARTIFACTS}
"""Text that may be long comes as a file of it: `run` takes either."""


def wanted_parameters(stage):
    """Parameters of a stage's `run` as its component must have them: name → Kubeflow's types, default."""
    run = import_module(f"components.{stage}.stage").run
    parameters = dict(inspect.signature(run).parameters)
    wanted = {name: (KINDS[part.annotation], part.default) for name, part in parameters.items()}
    wanted |= {name: (kinds, wanted[name][1]) for (of, name), kinds in BY_FILE.items() if of == stage}
    if stage == "configure":  # `parameters` and `pods` are spread over one input a field, settings texts are outputs
        from components.configure.config import RunSettings
        from components.configure.form import form_fields
        from components.configure.pods import pod_fields

        del wanted["parameters"], wanted["pods"]
        texts = {name for name in wanted if name.endswith("_settings")}
        wanted |= {name: (ARTIFACTS | {"String"}, wanted[name][1]) for name in texts}
        wanted |= {field.name: (KINDS[field.kind], inspect.Parameter.empty) for field in form_fields(RunSettings)}
        wanted |= {field.name: (KINDS[field.kind], field.kind()) for field in pod_fields()}
    return wanted


@pytest.mark.parametrize(("stage", "face"), [(stage, face) for stage in STAGES for face in FACES.get(stage, (stage,))])
def test_the_component_has_the_signature_of_run(stage, face):
    spec = getattr(import_module(f"components.{stage}.component"), face).component_spec
    inputs, outputs = spec.inputs or {}, spec.outputs or {}
    wanted = wanted_parameters(stage)
    assert {*inputs, *outputs} - {"metrics", "Output"} == set(wanted)  # what only Kubeflow sees is extra
    for name, (kinds, default) in wanted.items():
        assert (inputs | outputs)[name].type in kinds, name
        if name in inputs:
            without = default is inspect.Parameter.empty
            assert (inputs[name].optional, inputs[name].default) == (not without, None if without else default), name


@pytest.mark.parametrize("stage", STAGES)
def test_what_run_gives_back_is_the_components_output(stage):
    given = inspect.signature(import_module(f"components.{stage}.stage").run).return_annotation
    found = getattr(import_module(f"components.{stage}.component"), stage).component_spec.outputs.get("Output")
    assert (given is None) == (found is None)
    assert given is None or found.type in KINDS[given]


@pytest.mark.parametrize("stage", STAGES)
def test_help_answers_at_once_without_heavy_imports(stage):
    code = (
        "import runpy, sys, json\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('components.{stage}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
        "import time; print(time.process_time())\n"  # its own: children of the tests before may end meanwhile
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    *help_lines, heavy, cpu_seconds = result.stdout.strip().splitlines()
    assert json.loads(heavy) == []
    assert "--settings" in "\n".join(help_lines)
    assert float(cpu_seconds) < 1.0


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_imports_only_the_standard_library_kfp_and_ours(stage):
    code = (
        f"import sys; before = set(sys.modules); import components.{stage}.component\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_stages_do_not_import_each_other():
    for stage in STAGES:
        for path in (ROOT / "components" / stage).rglob("*.py"):
            lines = [line.strip() for line in path.read_text().splitlines()]
            ours = [line for line in lines if line.startswith(("from components.", "import components."))]
            imported = {line.split(".")[1].split()[0] for line in ours}
            allowed = {stage, "common"} | (set(STAGES) if stage == "configure" and path.name == "config.py" else set())
            assert imported <= allowed, f"{path} imports {sorted(imported - allowed)}"
