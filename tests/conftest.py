"""Set up for all tests."""

import gc


def pytest_collection_finish() -> None:
    """Exclude the imported libraries from garbage collection, which every Trainer asks for."""
    gc.collect()
    gc.freeze()
