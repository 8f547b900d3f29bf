"""Generated documents: the settings reference and the picture of the pipeline. `make docs` writes them.

python -m pipeline.reference [FOLDER]
"""

import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from components.common.settings import entry_model, field_paths, section_model
from pipeline.resources import STAGES
from pipeline.settings import PipelineSettings

HEAD = """# Configuration

Every setting, generated from the models that check them (`make docs`). A settings file is TOML with these sections;
`--set section.name=value` overrides one on the command line; in the Kubeflow form `section.name` is `section_name`.
An unknown name is refused. A text that starts with `./` or `../` is a path beside the settings file.
"""


def configuration() -> str:
    """docs/configuration.md."""
    sections: dict[tuple[str, ...], list[str]] = {}
    descriptions: dict[tuple[str, ...], str] = {(): "The run"}
    lists: set[tuple[str, ...]] = set()
    for path, field in field_paths(PipelineSettings).items():
        inner = section_model(field.annotation)
        if entry := entry_model(field.annotation):
            lists.add(path)
            descriptions[path] = _one_line(entry.__doc__)
        if inner:
            descriptions[path] = _one_line(field.description)
            sections.setdefault(path, [])
        else:
            row = f"| `{path[-1]}` | {_kind(field)} | {_default(field)} | {_one_line(field.description)} |"
            sections.setdefault(path[:-1], []).append(row)
    parts = [HEAD]
    for path, rows in sections.items():
        name = ".".join(path)
        title = "Top level" if not path else f"`[[{name}]]`" if path in lists else f"`[{name}]`"
        parts.append(f"## {title}\n\n{descriptions[path]}\n")
        if rows:
            parts.append("| setting | type | default | what it does |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _kind(field: FieldInfo) -> str:
    return _name(field.annotation).replace("|", "\\|")


def _name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _name(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join("unset" if part is type(None) else _name(part) for part in get_args(annotation))
    if origin is not None:
        inner = [part for part in get_args(annotation) if part is not Ellipsis]
        return f"{'list' if origin in (list, tuple) else origin.__name__} of {', '.join(_name(part) for part in inner)}"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if default is None or default is PydanticUndefined:
        return "unset"
    if isinstance(default, tuple | list):
        plain = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in default]
        return f"`{json.dumps(plain)}`"
    return f"`{json.dumps(default)}`" if isinstance(default, str | int | float | bool | dict) else f"`{default}`"


def picture() -> str:
    """docs/pipeline.svg, of two iterations on one shard."""
    from kfp import compiler

    from components.common.settings import validate
    from pipeline.graph import build
    from pipeline.picture import draw

    functions = [{"name": "numeric_match"}]
    settings = validate(
        PipelineSettings,
        {"fine_tune": "example", "model": "example", "store": "s3://bucket", "iterations": 2,
         "dataset": {"source": "gsm8k"}, "reward": {"functions": functions},
         "cluster": {stage: {"image": "example"} for stage in STAGES}},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(build(settings, on_cluster=True), str(path))
        return draw(next(yaml.safe_load_all(path.read_text())))


def documents() -> dict[str, str]:
    """File name → text of every generated document."""
    return {"configuration.md": configuration(), "pipeline.svg": picture()}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs")
    for name, text in documents().items():
        (folder / name).write_text(text)
        print(folder / name)
