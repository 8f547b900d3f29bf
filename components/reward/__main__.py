"""Command-line face: `python -m components.reward`."""

from components.common.command import main
from components.reward.stage import run

if __name__ == "__main__":
    main(run)
