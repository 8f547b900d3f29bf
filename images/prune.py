"""Remove from an image's environment what no stage reads: test suites, headers, service models, modelling code.

Run with the environment's own interpreter, while the image is built. Prints what went and how large it was.
Kept: compiled bytecode (a read-only root cannot write it later) and package metadata (versions, licences).
"""

import shutil
import sysconfig
from pathlib import Path

TEST_PACKAGES = ("pyarrow", "numpy", "pandas", "sympy", "mpmath", "torch")
"""Packages whose `tests` folders are large; nothing outside them imports these."""

HEADERS = ("pyarrow/include", "pyarrow/src", "numpy/_core/include", "numpy/core/include")
"""Only compiling an extension reads these."""

AWS_SERVICES = {"s3", "sts", "sso", "sso-oidc", "signin"}
"""What the object store and its credential providers call; botocore carries a model of each of some 400 services."""

ARROW_SERVER = ("libarrow_flight.so*", "libarrow_python_flight.so*", "_flight.*.so")
"""Arrow's network server; Parquet and datasets load without it."""


TWICE = ("pyarrow/libarrow_python.so", "pyarrow/libarrow_python.so.*.*", "zstandard/_cffi.*.so")
"""Copies of one library under the names a linker would want, and the slower of two bindings to zstd."""

SOURCES = ("*.pyi", "*.pyx", "*.pxd", "*.pxi", "*.a")
"""For type checkers and compilers."""

NEEDS_TORCH = ("modeling_*.py", "modular_*.py", "image_processing_*.py", "video_processing_*.py", "convert_*.py")
"""Of transformers: dead without torch, which leaves tokenizers and configurations. `models/auto` stays whole: its
modelling modules are tables that the tokenizers' read."""


def unwanted(site: Path) -> list[Path]:
    """Paths below a site-packages folder that no stage reads."""
    found = [path for name in TEST_PACKAGES for path in (site / name).rglob("tests") if path.is_dir()]
    found += [site / name for name in HEADERS]
    found += [path for pattern in ARROW_SERVER for path in (site / "pyarrow").glob(pattern)]
    found += [path for path in (site / "botocore/data").glob("*/") if path.name not in AWS_SERVICES]
    found += [path for pattern in TWICE for path in site.glob(pattern)]
    found += [path for pattern in SOURCES for path in site.rglob(pattern)]
    if not (site / "torch").exists():
        models = [path for path in (site / "transformers/models").glob("*/") if path.name != "auto"]
        found += [path for pattern in NEEDS_TORCH for folder in models for path in folder.rglob(pattern)]
    return sorted({path for path in found if path.exists()})


def size(path: Path) -> int:
    """Bytes of a file or a whole folder; a link counts nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def main() -> None:
    """Prune the environment of the running interpreter."""
    total = 0
    for path in unwanted(Path(sysconfig.get_paths()["purelib"])):
        if not path.exists():  # its folder went before it
            continue
        total += size(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    print(f"removed {total / 1e6:.0f} MB that no stage reads")


if __name__ == "__main__":
    main()
