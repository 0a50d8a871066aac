"""A folder, hub name or GGUF file as transformers reads it, and its tokenizer."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_gguf_available

from qrefta._compat.transformers import dequantized_gguf
from qrefta.files.code import check_trusted
from qrefta.files.json_file import read_json
from qrefta.files.safetensors import resolve_folder, weights_bytes


def is_gguf(source: str | Path) -> bool:
    """Whether a source of a model is a GGUF file, by its name."""
    return Path(source).suffix == ".gguf"


def pretrained_source(source: str | Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The arguments of `from_pretrained` that name a folder, a hub name, or a GGUF file.

    transformers dequantizes a GGUF file to a dense float32 model. It does not ask on the terminal
    whether it may run code that comes with the model.

    Raises:
        ValueError: if the GGUF file does not exist, or the model in a folder needs code that is
            not trusted.
        ImportError: for a GGUF file, if the package gguf is not installed.
    """
    if not is_gguf(source):
        config = Path(source) / "config.json"
        if config.is_file() and isinstance(settings := read_json(config), dict):
            check_trusted(settings, source, trust_remote_code)
        return {
            "pretrained_model_name_or_path": str(source),
            "trust_remote_code": trust_remote_code,
        }
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"There is no file {source}.")
    if not is_gguf_available():
        raise ImportError(f"Reading {source} needs the package gguf: pip install gguf")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def dense_bytes(source: str | Path) -> int:
    """Bytes of the dense weights of a folder, hub name or GGUF file once they are loaded."""
    if not is_gguf(source):
        return weights_bytes(resolve_folder(source))
    pretrained_source(source)  # the file and the package are there
    from gguf import GGUFReader

    return sum(4 * int(tensor.n_elements) for tensor in GGUFReader(source).tensors)


def loaded_from(model: PreTrainedModel) -> str:
    """The folder, hub name or GGUF file that a model was loaded from; empty for a model made in
    this process.
    """
    name = model.name_or_path or ""
    file = dequantized_gguf(model)
    if file is not None and Path(name, file).is_file():
        return str(Path(name, file))
    return name


def load_tokenizer(
    source: str | Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, hub name or GGUF file; None if there is none.

    Raises:
        ValueError: if the GGUF file does not exist.
        ImportError: for a GGUF file, if the package gguf is not installed.
    """
    if is_gguf(source):
        return AutoTokenizer.from_pretrained(**pretrained_source(source))
    with suppress(ValueError, OSError, ImportError, KeyError):
        folder = resolve_folder(source, weights=False)
        if any(folder.glob("tokenizer*")):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return None


def save_tokenizer(source: str | Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder.

    Raises:
        ValueError: if the file does not exist.
        ImportError: if the package gguf is not installed.
    """
    AutoTokenizer.from_pretrained(**pretrained_source(source)).save_pretrained(folder)
