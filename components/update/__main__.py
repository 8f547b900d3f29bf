"""Command line: `python -m components.update --help`."""

from components.common.command import main
from components.update.stage import run

if __name__ == "__main__":
    main(run)
