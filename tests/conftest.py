"""What all tests share."""

import gc


def pytest_collection_finish() -> None:
    """Imported libraries are never garbage, and a Trainer looks for garbage among all there is at the end of a run."""
    gc.collect()
    gc.freeze()
