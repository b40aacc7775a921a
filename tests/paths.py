"""Where the project and the tiny checkpoint lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A tiny NV-Embed checkpoint, its tokenizer and its golden vectors.
GOLDEN = ROOT / "tests" / "golden" / "nvembed-tiny"
