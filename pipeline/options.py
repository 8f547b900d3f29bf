"""Arguments that several `grpo` commands share."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.connection import Connection

SettingsFile = Annotated[Path, typer.Argument(help="Settings file (TOML); `grpo init DIR` writes one.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Override a setting: `update.learning_rate=2e-6`; repeatable."),
]

CONNECTION = {
    "host": Annotated[
        str | None,
        typer.Option(envvar="GRPO_HOST", help="Kubeflow Pipelines' address; unset: in-cluster, or the kubeconfig."),
    ],
    "namespace": Annotated[
        str | None, typer.Option(envvar="GRPO_NAMESPACE", help="Namespace of the runs; unset: kubeflow.")
    ],
    "token": Annotated[str | None, typer.Option(envvar="GRPO_TOKEN", help="Bearer token.")],
    "cookie": Annotated[str | None, typer.Option(envvar="GRPO_COOKIE", help="Dex session: authservice_session=…")],
    "ca_cert": Annotated[str | None, typer.Option(envvar="GRPO_CA_CERT", help="File of the certificate authority.")],
    "store_endpoint": Annotated[
        str | None,
        typer.Option(
            envvar="GRPO_STORE_ENDPOINT",
            help="Where the object store is reached from here, e.g. http://localhost:9000; unset: as the settings say.",
        ),
    ],
}


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes `connection` the options it is made of."""
    own = inspect.signature(command)
    kept = [parameter for name, parameter in own.parameters.items() if name != "connection"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in CONNECTION.items()
    ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        connection = Connection(**{name: values.pop(name) for name in CONNECTION})
        command(**values, connection=connection)

    wrapper.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    return wrapper
