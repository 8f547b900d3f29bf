"""The command-line face of a stage: one option a parameter of `run`, help from its docstring.

`python -m components.<stage> --help` answers before anything heavy is imported.
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

from components.common.errors import GrpoError


def main(run: Callable[..., None], arguments: list[str] | None = None) -> None:
    """Parses the command line into `run`'s parameters and calls it; a user's error is one line and status 2."""
    parser = _parser(run)
    values = vars(parser.parse_args(arguments))
    try:
        run(**values)
    except GrpoError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser(run: Callable[..., None]) -> argparse.ArgumentParser:
    text = inspect.getdoc(run) or ""
    summary, _, details = text.partition("\n\n")
    stage = run.__module__.rpartition(".")[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m {stage}",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for parameter in inspect.signature(run).parameters.values():
        _add(parser, parameter)
    return parser


def _add(parser: argparse.ArgumentParser, parameter: inspect.Parameter) -> None:
    required = parameter.default is inspect.Parameter.empty
    options: dict[str, Any] = {"required": required, "dest": parameter.name}
    if not required:
        options["default"] = parameter.default
    kind = parameter.annotation
    if get_origin(kind) is list:
        options.update(nargs="+", type=get_args(kind)[0], metavar=get_args(kind)[0].__name__.upper())
    else:
        kind = next((part for part in get_args(kind) if part is not type(None)), kind)
        options.update(type=kind, metavar="FILE" if kind is Path else kind.__name__.upper())
    parser.add_argument("--" + parameter.name.replace("_", "-"), **options)
