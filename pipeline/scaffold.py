"""`grpo init`: a folder with a commented settings file, a reward function and a few prompts."""

import shutil
import tempfile
from pathlib import Path

from components.common.errors import SettingsError

TEMPLATES = Path(__file__).parent / "templates"
FILES = {"settings.toml": "settings.toml", "reward.py": "reward.py.txt", "prompts.jsonl": "prompts.jsonl"}


def write_start(folder: Path) -> list[Path]:
    """Writes the files into a new or empty folder; gives their paths.

    Raises:
        SettingsError: the folder has files already; nothing is touched.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"{folder} is there already and not empty; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        for name, template in FILES.items():
            shutil.copyfile(TEMPLATES / template, Path(draft) / name)
        if folder.exists():
            folder.rmdir()
        Path(draft).chmod(0o755)
        shutil.copytree(draft, folder)
    return [folder / name for name in FILES]
