"""Set up for all tests."""

import gc

import pytest


def pytest_collection_finish() -> None:
    """Exclude the imported libraries from garbage collection, which every Trainer asks for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory):
    """A tiny Llama in a GGUF file, with its tokenizer."""
    from tests.language import write_gguf

    return write_gguf(tmp_path_factory.mktemp("gguf"))
