"""A folder, hub name or GGUF file as transformers reads it, and its tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_gguf_available

from qrefta._compat.hub import commit_hash
from qrefta._compat.transformers import dequantized_gguf
from qrefta.files.code import check_trusted, is_trusted
from qrefta.files.companions import COMPANIONS, has_vocabulary, module_patterns
from qrefta.files.json_file import read_json
from qrefta.files.layout import INDEX, SINGLE, read_index, weight_files


def is_gguf(source: str | Path) -> bool:
    """Whether a source of a model is a GGUF file, by its name."""
    return Path(source).suffix == ".gguf"


def pretrained_source(source: str | Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The arguments of `from_pretrained` that name a folder, a hub name, or a GGUF file.

    transformers dequantizes a GGUF file to a dense float32 model. It does not ask on the terminal
    whether it may run code that comes with the model.

    Raises:
        ValueError: if the path does not exist, or the model in a folder needs code that is not
            trusted.
        ImportError: for a GGUF file, if the package gguf is not installed.
    """
    if not is_gguf(source):
        check_source(source)
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


def check_source(source: str | Path) -> None:
    """Refuse a missing path, which the hub would take for a name, and an empty name.

    Raises:
        ValueError: naming it.
    """
    if not str(source).strip():
        raise ValueError(
            "The name of the model is empty; give a folder or a hub name. Is a variable unset?"
        )
    path = Path(source)
    is_path = path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2
    if is_path and not path.exists():
        raise ValueError(f"There is no file or folder {source}.")


def dense_bytes(source: str | Path) -> int:
    """Bytes of the dense weights of a folder, hub name or GGUF file once they are loaded."""
    if not is_gguf(source):
        return sum(file.stat().st_size for file in weight_files(resolve_folder(source)))
    pretrained_source(source)  # the file and the package are there
    from gguf import GGUFReader

    return sum(4 * int(tensor.n_elements) for tensor in GGUFReader(source).tensors)


def resolve_folder(source: str | Path, weights: bool = True, revision: str | None = None) -> Path:
    """A local folder as it is; for a hub name its snapshot, downloaded with or without weights.

    Args:
        source: a folder or hub name.
        weights: whether to download the weights too: the single file, or the files of the index.
        revision: of a hub name: branch, tag or commit; default: the newest.

    Raises:
        ValueError: if `source` is neither, or empty.
    """
    check_source(source)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download  # takes a fifth of a second

    try:
        small = [*COMPANIONS, "config.json", INDEX, "*.py"]
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=small))
        # The snapshot's name is its commit, in case the branch moves in between.
        if modules := module_patterns(folder):
            snapshot_download(str(source), revision=folder.name, allow_patterns=modules)
        if weights:
            indexed = read_index(folder).values() if (folder / INDEX).is_file() else []
            files = sorted({SINGLE, *indexed})
            snapshot_download(str(source), revision=folder.name, allow_patterns=files)
    except Exception as error:
        raise ValueError(
            f"{source} is neither a local folder nor a model that the hub gave ({error})."
        ) from error
    return folder


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
    source: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, hub name or GGUF file; None if a folder has no vocabulary.

    Args:
        source: folder, hub name or GGUF file.
        trust_remote_code: whether to run code that comes with the tokenizer.
        revision: of a hub name: branch, tag or commit; default: the newest.

    Raises:
        ValueError: if there is no such source, or its tokenizer cannot be loaded: a file is
            damaged, a package is missing, or its code is not trusted.
        ImportError: for a GGUF file, if the package gguf is not installed.
    """
    if is_gguf(source):
        return AutoTokenizer.from_pretrained(**pretrained_source(source))
    folder = resolve_folder(source, weights=False, revision=revision)
    has_config = (folder / "tokenizer_config.json").is_file()
    if not has_config and not has_vocabulary(folder):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(
            f"The tokenizer of {source} cannot be loaded ({type(error).__name__}: {error}). Copy "
            "its files again, install the package that is missing, or give another tokenizer."
        ) from error
    # Without the files of its vocabulary transformers makes an empty one. Some read no files.
    files = tokenizer.vocab_files_names.values()
    found = has_vocabulary(folder) or any((folder / file).is_file() for file in files)
    return tokenizer if found or not files else None


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies with a model's weights, of the same commit; None for a model made in
    this process, or without a tokenizer.

    Raises:
        ValueError, ImportError: as `load_tokenizer`.
    """
    name = loaded_from(model)
    if not name:
        return None
    return load_tokenizer(name, is_trusted(model), commit_hash(model.config))


def save_tokenizer(source: str | Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder.

    Raises:
        ValueError: if the file does not exist.
        ImportError: if the package gguf is not installed.
    """
    AutoTokenizer.from_pretrained(**pretrained_source(source)).save_pretrained(folder)
