"""Output of the command line: one console, quiet libraries, errors without a traceback."""

import logging
import warnings
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.text import Text

console = Console(markup=False)  # names of files may hold brackets


def quiet_libraries(data: bool = True) -> None:
    """Keep the libraries' loading bars and notices out of the output; Trainer's bar stays.

    Args:
        data: quiet `datasets` too, which takes a second to import.
    """
    # bitsandbytes warns of an optional package when it is imported, PEFT and TRL use an old name
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if data:
        import datasets

        datasets.disable_progress_bars()


def guarded(command: Callable[[], object]) -> None:
    """Run a command; an expected failure is one line on stderr and exit code 2, not a traceback."""
    try:
        command()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _fail(str(error), error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which takes long to import
            raise
        _fail(
            f"{error}\nThe device has too little memory. `qrefta plan` counts the memory of a run "
            "before it starts; smaller batches (--batch-size, --gradient-accumulation) and "
            "--gradient-checkpointing need less.",
            error,
        )


def _fail(message: str, error: Exception) -> NoReturn:
    told = Text.assemble(("Error:", "bold red"), " ", message)
    Console(stderr=True).print(told, highlight=False)
    raise SystemExit(2) from error


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
