"""The KFP face of configure: one typed input a setting, generated from the settings models.

KFP reads a lightweight component's source, so the source is what is generated: a signature with every field of the
form, and a body that imports, calls and logs.
"""

import json
import linecache
from typing import Any

from kfp import dsl

from components.configure.config import STAGE_SECTIONS, RunSettings
from components.configure.form import FormField, form_fields
from components.configure.pods import pod_fields

_FILE = "<configure component>"
_MANIFESTS = ("policy", "optimizer", "reference", "history")


def _source(fields: list[FormField]) -> str:
    inputs = ["settings: str", "run: str", "job_id: str", *(f"{field.name}: {field.kind.__name__}" for field in fields)]
    outputs = [f"{name}: dsl.Output[dsl.Artifact]" for name in _MANIFESTS]
    outputs += [f"{name}_settings: {_settings_kind(name)}" for name in (*STAGE_SECTIONS, "run")]
    inputs_of_pods = [f"{field.name}: {field.kind.__name__} = {field.kind()!r}" for field in pod_fields()]
    parameters = ", ".join(f"{json.dumps(field.dotted)}: {field.name}" for field in fields)
    paths = [f"{name}={name}.path" for name in _MANIFESTS]
    paths += [f"{name}_settings={_settings_path(name)}" for name in (*STAGE_SECTIONS, "run")]
    return "\n".join([
        f"def configure({', '.join(inputs + outputs + inputs_of_pods)}):",
        '    """Checks the settings and resolves them a stage; publishes the start policy."""',
        "    import json",
        "    from components.configure.stage import run as configure_run",
        f"    parameters = {{{parameters}}}",
        f"    pods = dict({', '.join(f'{field.name}={field.name}' for field in pod_fields())})",
        "    configure_run(settings=settings, parameters=json.dumps(parameters), pods=json.dumps(pods), run=run,"
        " job_id=job_id,"
        f" {', '.join(paths)})",
        "",
    ])  # fmt: skip


def _settings_kind(section: str) -> str:
    """Settings are text parameters, which the UI shows; a file for rollout, whose task may stand in a loop."""
    return "dsl.Output[dsl.Artifact]" if section == "rollout" else "dsl.OutputPath(str)"


def _settings_path(section: str) -> str:
    return f"{section}_settings.path" if section == "rollout" else f"{section}_settings"


def _component() -> Any:
    source = _source(list(form_fields(RunSettings)))
    linecache.cache[_FILE] = (len(source), None, source.splitlines(keepends=True), _FILE)
    names: dict[str, Any] = {"dsl": dsl, "__name__": __name__}
    exec(compile(source, _FILE, "exec"), names)
    return dsl.component(names["configure"], base_image="grpo-pipeline/cpu-python", install_kfp_package=False)


configure = _component()
