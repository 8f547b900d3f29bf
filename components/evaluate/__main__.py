"""Command line: `python -m components.evaluate --help`."""

from components.common.command import main
from components.evaluate.stage import run

if __name__ == "__main__":
    main(run)
