"""Arguments that several `grpo` commands share."""

from pathlib import Path
from typing import Annotated

import typer

SettingsFile = Annotated[Path, typer.Argument(help="Settings file (TOML); `grpo init DIR` writes one.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Override a setting: `update.learning_rate=2e-6`; repeatable."),
]
