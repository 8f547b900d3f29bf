"""Command-line face: `python -m components.rollout`."""

from components.common.command import main
from components.rollout.stage import run

if __name__ == "__main__":
    main(run)
