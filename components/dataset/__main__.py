"""Command-line face: `python -m components.dataset`."""

from components.common.command import main
from components.dataset.stage import run

if __name__ == "__main__":
    main(run)
