"""Write references of built images into the lock file that `grpo compile` and `grpo submit` read.

    python3 images/lock.py images/lock.json cpu=registry.example.com/grpo-pipeline-cpu@sha256:...

Names already in the file stay unless given again; the file is replaced whole or not at all.
"""

import json
import os
import re
import sys
from pathlib import Path

NAMES = ("cpu", "rollout", "update", "tracking")
REFERENCE = re.compile(r"[^\s:@]+(:\d+)?(/[^\s:@]+)+(:[\w.-]+|@sha256:[0-9a-f]{64})$")
"""A repository (its registry may have a port) with a tag or a digest."""


def parse(argument: str) -> tuple[str, str]:
    """Name and reference of `name=reference`.

    Raises:
        SystemExit: the name is none of ours, or the reference names no tag and no digest.
    """
    name, _, reference = argument.partition("=")
    if name not in NAMES:
        raise SystemExit(f"lock.py: no image is called {name!r}; there are {', '.join(NAMES)}")
    if not REFERENCE.match(reference) or reference.endswith(":latest"):
        raise SystemExit(
            f"lock.py: {reference!r} must be registry/repository@sha256:<64 digits> or registry/repository:tag,"
            " and not :latest, which changes under a running fine-tune"
        )
    return name, reference


def write(path: Path, references: dict[str, str]) -> dict[str, str]:
    """Merge references into the file and return its content."""
    merged = (json.loads(path.read_text()) if path.exists() else {}) | references
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dict(sorted(merged.items())), indent=2) + "\n")
    os.replace(temporary, path)
    return merged


def main() -> None:
    """Command line."""
    if len(sys.argv) < 3:
        raise SystemExit("usage: python3 images/lock.py FILE NAME=REFERENCE...")
    merged = write(Path(sys.argv[1]), dict(parse(argument) for argument in sys.argv[2:]))
    for name, reference in merged.items():
        print(f"{name}\t{reference}")


if __name__ == "__main__":
    main()
