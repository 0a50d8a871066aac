"""Names of lm-evaluation-harness that are not documented, all in release 0.4.10 or earlier."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval import evaluator
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.models.huggingface import HFLM

__all__ = ["ModelOfFolder", "without_git"]


_HFLM: Any = HFLM  # its decorator hides its type


class ModelOfFolder(_HFLM):
    """The harness' model of a folder or hub name, prepared or not.

    The harness passes the quantization_config of the folder's config.json on as an argument, and
    transformers warns that it is there twice. If `_create_model` goes: `model="hf"`, with the
    warning.
    """

    def _create_model(self, *args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            super()._create_model(*args, **options)


@contextmanager
def without_git() -> Iterator[None]:
    """Within this context `simple_evaluate` reads the commit of the current folder from its files.

    Otherwise it starts git, which prints "fatal: not a git repository" elsewhere. If it goes: let
    git print.
    """
    original = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: get_commit_from_path(os.getcwd())
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = original
