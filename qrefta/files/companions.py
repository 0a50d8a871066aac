"""The files that accompany a model's weights: tokenizer, processor, chat templates, generation
settings, licence, the modules that sentence-transformers puts around it, and the code of its
classes.

They are known by their names. Training data, notes and credentials may lie in the same folder, and
are not copied to where the model is published.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

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
_AROUND = (  # of sentence-transformers
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)
COMPANIONS = (
    *VOCABULARIES,
    *_TOKENIZER,
    *_PROCESSOR,
    *_TEMPLATES,
    *_LICENCES,
    *_AROUND,
    "generation_config.json",
    "custom_generate/*.py",
)
_WITH_CODE = ("config.json", "tokenizer_config.json", *_PROCESSOR)  # may have an auto_map


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary."""
    return any(_matching(folder, VOCABULARIES))


def companion_files(folder: Path) -> list[Path]:
    """The files that accompany the weights in a model's folder, without config, index and
    checksums.

    Code is among them only where the config of a class or pipeline names it, with the files that it
    imports, or where `generate` looks for it.
    """
    patterns = [*COMPANIONS, *module_patterns(folder)]
    return sorted({*_matching(folder, patterns), *_code_files(folder)})


def module_patterns(folder: Path) -> list[str]:
    """Patterns of the files of the modules that follow the model in sentence-transformers, such as
    pooling: each has a folder, which modules.json names.
    """
    modules = _settings(folder / "modules.json")
    rows = modules if isinstance(modules, list) else []
    paths = [row.get("path") for row in rows if isinstance(row, dict)]
    # a path with more parts, or none, is the model's, or outside the folder
    names = [path for path in paths if isinstance(path, str) and path == Path(path).name != ""]
    return [f"{escape(name)}/[!.]*" for name in names]


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
    """The .py files that auto_map or custom_pipelines names, and the files that they import
    relatively.
    """
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
    """The classes that auto_map and custom_pipelines name: module.Class, one or a few for each
    entry.
    """
    settings = _settings(file)
    if not isinstance(settings, dict):
        return
    auto_map = settings.get("auto_map")
    pipelines = settings.get("custom_pipelines")
    named = list(auto_map.values()) if isinstance(auto_map, dict) else []
    for pipeline in pipelines.values() if isinstance(pipelines, dict) else ():
        named.append(pipeline.get("impl") if isinstance(pipeline, dict) else None)
    for reference in named:
        several = reference if isinstance(reference, list) else [reference]
        yield from (one for one in several if isinstance(one, str))


def _settings(file: Path) -> Any:
    """The contents of a JSON file; None if it is missing or damaged, which its loader will say."""
    if file.is_file():
        with suppress(ValueError):
            return read_json(file)
    return None
