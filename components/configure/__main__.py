"""Command line: `python -m components.configure --help`."""

from components.common.command import main
from components.configure.stage import run

if __name__ == "__main__":
    main(run)
