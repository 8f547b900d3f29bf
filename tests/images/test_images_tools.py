"""The small programs around an image build: the lock file, pruning, the import check, the build script."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "ab" * 32


def load(name: str) -> ModuleType:
    """A program of images/ as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"images_{name}", ROOT / f"images/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lock(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "images/lock.py", path, *arguments], capture_output=True, text=True)


def test_lock_keeps_what_it_is_not_given(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    assert lock(path, f"cpu=registry.example.com/a/cpu@{DIGEST}", "update=localhost:5000/update:1").returncode == 0
    assert lock(path, "update=localhost:5000/update:2").returncode == 0
    assert json.loads(path.read_text()) == {
        "cpu": f"registry.example.com/a/cpu@{DIGEST}", "update": "localhost:5000/update:2",
    }  # fmt: skip
    assert [found.name for found in tmp_path.iterdir()] == ["lock.json"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("gpu=a/b:1", "no image is called 'gpu'; there are cpu, rollout, update, tracking"),
        ("cpu=registry.example.com/a", "must be registry/repository@sha256"),
        ("cpu=registry.example.com/a:latest", "not :latest"),
        ("cpu=registry.example.com/a@sha256:abc", "must be registry/repository@sha256"),
        ("cpu=", "must be registry/repository@sha256"),
    ],
)
def test_lock_refuses_what_names_no_fixed_image(tmp_path: Path, argument: str, said: str) -> None:
    done = lock(tmp_path / "lock.json", argument)
    assert done.returncode == 1 and said in done.stderr
    assert not (tmp_path / "lock.json").exists()


def test_the_pipeline_reads_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make images` writes is what a compiled pipeline runs."""
    from pipeline import images
    from pipeline.resources import ClusterSettings

    path = tmp_path / "lock.json"
    references = [f"{name}=registry.example.com/{name}@{DIGEST}" for name in ("cpu", "rollout", "update")]
    assert lock(path, *references).returncode == 0
    monkeypatch.setattr(images, "LOCK", path)
    found = {
        stage: images.image_of(stage, ClusterSettings()) for stage in ("configure", "rollout", "update", "publish")
    }
    assert found == {
        "configure": f"registry.example.com/cpu@{DIGEST}", "publish": f"registry.example.com/cpu@{DIGEST}",
        "rollout": f"registry.example.com/rollout@{DIGEST}", "update": f"registry.example.com/update@{DIGEST}",
    }  # fmt: skip


@pytest.mark.parametrize("torch", [False, True])
def test_pruning_takes_what_no_stage_reads_and_leaves_code(tmp_path: Path, torch: bool) -> None:
    """Modelling code goes only where torch is not there to run it."""
    kept = ["pyarrow/lib.so", "pyarrow/libarrow.so.2500", "pyarrow/libarrow_python.so.2500", "zstandard/backend_c.x.so",
            "botocore/data/s3/2006-03-01/service-2.json.gz", "botocore/data/endpoints.json", "sympy/core/add.py",
            "kfp/tests/helper.py", "transformers/models/qwen3/configuration_qwen3.py",
            "transformers/models/auto/modeling_auto.py"]  # fmt: skip
    gone = ["pyarrow/tests/test_a.py", "pyarrow/include/arrow/api.h", "pyarrow/libarrow_flight.so.2500",
            "pyarrow/lib.pxd",
            "pyarrow/libarrow_python.so", "pyarrow/libarrow_python.so.2500.1.0", "zstandard/_cffi.x.so", "x/libz.a",
            "botocore/data/ec2/2016-11-15/service-2.json.gz", "sympy/core/tests/test_add.py"]  # fmt: skip
    (kept if torch else gone).append("transformers/models/qwen3/modeling_qwen3.py")
    for name in kept + gone + (["torch/__init__.py"] if torch else []):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1234")
    prune = load("prune")
    found = prune.unwanted(tmp_path)
    covered = {name for name in kept + gone if any((tmp_path / name).is_relative_to(path) for path in found)}
    assert covered == set(gone)
    assert prune.size(tmp_path / "pyarrow/tests") == 4


def run_check(image: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "images/check.py", image, *arguments], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})  # fmt: skip


def test_check_refuses_torch_in_the_cpu_image() -> None:
    """The environment of the tests has everything `cpu` needs, and torch, which it must not have."""
    done = run_check("cpu")
    report = json.loads(done.stdout)
    expected = ["torch is in the image and must not be", "deepspeed is in the image and must not be"]
    assert done.returncode == 1
    assert [line for line in report["problems"] if "runs as root" not in line and "vllm" not in line] == expected
    assert report["versions"]["kfp"] == "2.17.0"


def test_check_names_what_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "boto3.py").write_text("raise ImportError('broken wheel')")
    done = run_check("tracking", "--libraries", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert "boto3 does not import: ImportError: broken wheel" in json.loads(done.stdout)["problems"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TAG": "1"}, "REGISTRY=registry.example.com/team"),
        ({"REGISTRY": "r.example.com"}, "TAG=0.1.0"),
        ({"REGISTRY": "r.example.com", "TAG": "latest"}, "TAG=latest would change"),
    ],
)
def test_build_script_says_what_it_lacks(environment: dict[str, str], said: str) -> None:
    done = subprocess.run([ROOT / "scripts/build_images.sh"], env={"PATH": os.environ["PATH"], **environment},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and said in done.stderr


def test_build_script_locks_the_digest_the_registry_gave(tmp_path: Path) -> None:
    """With a builder that records its calls: tracked files only in the context, arguments passed on, digest locked."""
    builder = tmp_path / "buildah"
    builder.write_text(f"""#!/bin/bash
echo "$*" >> {tmp_path}/calls
case "$1" in
build) for last; do :; done; (cd "$last" && find . -type f | sort) > {tmp_path}/context ;;
push) [ "$2" = --digestfile ] && printf '{DIGEST}' > "$3" ;;
esac
""")
    builder.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "BUILDER": "buildah", "TAG": "0.1.0",
                   "REGISTRY": "r.example.com/team", "ARGS_cpu": "BASE=mine:1 OTHER=2",
                   "LOCK": str(tmp_path / "lock.json")}  # fmt: skip
    subprocess.run([ROOT / "scripts/build_images.sh", "cpu"], env=environment, check=True, capture_output=True)
    assert json.loads((tmp_path / "lock.json").read_text()) == {"cpu": f"r.example.com/team/grpo-pipeline-cpu@{DIGEST}"}
    build, push = (tmp_path / "calls").read_text().splitlines()
    assert "--build-arg BASE=mine:1 --build-arg OTHER=2" in build and "--build-arg VERSION=0.1.0" in build
    assert push.endswith("r.example.com/team/grpo-pipeline-cpu:0.1.0")
    context = (tmp_path / "context").read_text().splitlines()
    assert "./images/cpu.Dockerfile" in context and "./components/common/store.py" in context
    assert not [name for name in context if "__pycache__" in name or name.startswith(("./.git", "./tests", "./runs"))]
