"""Command line: `python -m components.publish --help`."""

from components.common.command import main
from components.publish.stage import run

if __name__ == "__main__":
    main(run)
