"""The files that accompany a model's weights: tokenizer, processor, chat templates, generation
settings, licence, and the code of its classes.

They are known by their names. Training data, notes and credentials may lie in the same folder, and
are not copied to where the model is published.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from qrefta.files.json_file import read_json

# A tokenizer reads its vocabulary from one of these.
VOCABULARIES = (
    "tokenizer.json",
    "*.model",  # of SentencePiece
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "vocab-src.json",
    "vocab-tgt.json",
    "entity_vocab.json",
    "encoder.json",
    "dict.txt",
    "byte_maps.json",
    "prophetnet.tokenizer",
)
_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
    "target_vocab.json",
    "normalizer.json",
    "emoji.json",
    "word_shape.json",
    "word_pronunciation.json",
)
_PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
_LICENCES = tuple(
    name + ending for name in ("LICENSE", "NOTICE", "USE_POLICY") for ending in ("", ".md", ".txt")
)
COMPANIONS = (
    *VOCABULARIES,
    *_TOKENIZER,
    *_PROCESSOR,
    *_TEMPLATES,
    *_LICENCES,
    "generation_config.json",
)
_WITH_CODE = ("config.json", "tokenizer_config.json", *_PROCESSOR)  # may have an auto_map


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary."""
    return any(_matching(folder, VOCABULARIES))


def companion_files(folder: Path) -> list[Path]:
    """The files that accompany the weights in a model's folder, without config, index and
    checksums.

    Code is among them only where an auto_map names it, with the files that it imports.
    """
    return sorted({*_matching(folder, COMPANIONS), *_code_files(folder)})


def copy_companions(folder: Path, out: Path) -> None:
    """Copy the files that accompany a model's weights, such as the tokenizer."""
    for file in companion_files(folder):
        copy = out / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _matching(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from (path for path in folder.glob(pattern) if path.is_file())


def _code_files(folder: Path) -> set[Path]:
    """The .py files that auto_map names, and those that they import relatively."""
    modules = {
        reference.rpartition(".")[0]
        for name in _WITH_CODE
        for reference in _references(folder / name)
    }
    if not modules:
        return set()
    from transformers.dynamic_module_utils import get_relative_imports  # it takes a second

    found: set[Path] = set()
    while modules:
        # a name with a path or with -- is outside the folder
        files = {folder / f"{module}.py" for module in modules if Path(module).name == module}
        fresh = {file for file in files if file.is_file()} - found
        found |= fresh
        modules = {module for file in fresh for module in get_relative_imports(file)}
    return found


def _references(file: Path) -> Iterator[str]:
    """The classes that an auto_map names: module.Class, one or a few for each entry."""
    settings = None
    if file.is_file():
        with suppress(
            ValueError
        ):  # a damaged file names no code; its loader says that it is damaged
            settings = read_json(file)
    auto_map = settings.get("auto_map") if isinstance(settings, dict) else None
    for reference in auto_map.values() if isinstance(auto_map, dict) else ():
        several = reference if isinstance(reference, list) else [reference]
        yield from (one for one in several if isinstance(one, str))
