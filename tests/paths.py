"""Where the project and the tiny checkpoint lie, and fresh copies of the checkpoint."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A tiny NV-Embed checkpoint, its tokenizer and its golden vectors.
GOLDEN = ROOT / "tests" / "golden" / "nvembed-tiny"


def copy_checkpoint(folder: Path) -> Path:
    """Copy the tiny checkpoint; its fingerprint is that of no other folder."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(GOLDEN / name, folder / name)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tiny"', f'"{folder.as_posix()}"'))
    return folder
