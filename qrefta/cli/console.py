"""Output of the command line: one console, quiet libraries, errors without a traceback."""

import logging
import warnings
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

console = Console()


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
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from error


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
