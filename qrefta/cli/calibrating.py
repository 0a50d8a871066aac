"""Text to calibrate a dense model with, as --calibration names it."""

from time import perf_counter
from typing import TYPE_CHECKING, Any

from qrefta.choices import GENERIC_TEXT
from qrefta.cli.console import console, megabytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qrefta.split.moments import Moments

NONE = "none"
KINDS = "a file (txt, csv, tsv, jsonl, parquet), text (generic text) or none"


def calibration_of(model: str, max_memory: str) -> str:
    """The text to calibrate on if none is named: the model is loaded for it, so it has to fit."""
    from qrefta.config.sizes import parse_bytes
    from qrefta.files.companions import has_vocabulary
    from qrefta.files.sources import dense_bytes, is_gguf, resolve_folder

    if not is_gguf(model) and not has_vocabulary(resolve_folder(model)):
        return NONE
    size = dense_bytes(model)
    if size <= parse_bytes("max_memory", max_memory):
        return GENERIC_TEXT
    if is_gguf(model):
        return NONE  # it is refused, for the same reason
    console.print(
        f"Not calibrated: the model takes {megabytes(size)}, more than --max-memory "
        f"{max_memory}. --calibration text loads it and keeps its outputs better."
    )
    return NONE


def load_dense(
    model: str,
    calibration: str,
    tokens: int | None,
    seed: int,
    max_memory: str,
    trust_remote_code: bool,
) -> tuple["PreTrainedModel", list[Any]]:
    """A dense model in memory, in a dtype that the processor computes fast if that fits, and
    batches of text to calibrate it with.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from qrefta.files.sources import is_gguf, pretrained_source, resolve_folder
    from qrefta.model.empty import model_class
    from qrefta.split.sources import calibration_batches

    source = pretrained_source(model, trust_remote_code)
    if is_gguf(model):
        kind = AutoModelForCausalLM  # the file names no class
    else:
        config = AutoConfig.from_pretrained(**source)
        kind = model_class(vars(config), resolve_folder(model), trust_remote_code)
    dtype = _dtype(model, source, max_memory)
    dense = kind.from_pretrained(**source, dtype=dtype, use_safetensors=True)
    return dense, list(calibration_batches(dense, calibration, seed=seed, tokens=tokens))


def _dtype(model: str, source: dict[str, Any], max_memory: str) -> Any:
    """The dtype to calibrate in; a line says so if the files' dtype is slow."""
    from qrefta.config.sizes import parse_bytes
    from qrefta.files.sources import dense_bytes
    from qrefta.model.dtype import loading_dtype

    chosen = loading_dtype(source, "cpu")
    if chosen == "auto":
        return chosen
    needed = 2 * dense_bytes(model)
    if needed <= parse_bytes("max_memory", max_memory):
        console.print(
            "Calibrating in float32: this processor computes bfloat16 many times slower. OUT keeps "
            "the files' dtype."
        )
        return chosen
    console.print(
        "Calibrating in the files' dtype, which this processor computes many times slower than "
        f"float32; with --max-memory {megabytes(needed).replace(' ', '')} it takes float32."
    )
    return "auto"


def prepare_calibrated(
    model: "PreTrainedModel", batches: list[Any], source: str, settings: dict[str, Any]
) -> None:
    """Prepare a dense model in place, calibrated on batches from `source`; prints the cost."""
    from qrefta._prepare import prepare

    start = perf_counter()
    prepare(model, calibration=batches, **settings)
    _tell_cost(batches, f"{source} and prepared", start)


def gather(model: "PreTrainedModel", batches: list[Any], source: str) -> "Moments":
    """Moments of a dense model's inputs on batches from `source`; prints the cost."""
    from qrefta._prepare import calibrate

    start = perf_counter()
    gathered = calibrate(model, batches)
    _tell_cost(batches, source, start)
    return gathered


def _tell_cost(batches: list[Any], done: str, start: float) -> None:
    from qrefta.split.batches import row_count

    console.print(
        f"Calibrated on {sum(map(row_count, batches)):,} rows of {done} in "
        f"{perf_counter() - start:.0f} s; --calibration none leaves calibration out."
    )
