"""Pins what a requirements file asks for, with all it needs, at the versions installed in this interpreter.

    .venv/bin/python scripts/lock.py requirements/local.in > requirements/local.txt

The list is complete, so `scripts/install.sh` installs it without resolving anything. Torch, and what only its CUDA
builds bring, stay out: torch is installed apart.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LEFT_OUT = ("torch", "pip", "setuptools", "triton", "grpo-pipeline")


def closure(requirements: list[str]) -> dict[str, str]:
    """Name → version of all packages the requirements lead to in this environment."""
    pins: dict[str, str] = {}
    pending = [Requirement(line) for line in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        wanted = pending.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen or name in LEFT_OUT or name.startswith("nvidia-"):
            continue
        seen.add((name, frozenset(wanted.extras)))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            print(f"left out, since it is not installed here: {wanted}", file=sys.stderr)
            continue
        pins[name] = found.version.partition("+")[0]
        for line in found.requires or []:
            inner = Requirement(line)
            extras = wanted.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                pending.append(inner)
    return pins


def main() -> None:
    """Prints the pins of the files named on the command line, less those of files after `--less`."""
    files, _, less = " ".join(sys.argv[1:]).partition(" --less ")
    pins, left_out = closure(_lines(files)), closure(_lines(less))
    print(f"# made by scripts/lock.py from {files}")
    print("\n".join(f"{name}=={version}" for name, version in sorted(pins.items()) if name not in left_out))


def _lines(files: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for file in files.split() for line in Path(file).read_text().splitlines()]
    return [line for line in lines if line]


if __name__ == "__main__":
    main()
