"""A language model learns to answer in the manner of docstrings, in 4 bits, next to PEFT's QLoRA.

The model is SmolLM2-135M-Instruct from a package of the Python index; the questions are about
Python's standard library, and the test questions about modules that no training question is about.
"""

import copy
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import DatasetDict
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import qrefta
from eval.peers.baselines import qlora
from eval.quickstart import Options
from eval.rows import append
from eval.tasks.questions import docstring_questions
from eval.tasks.smollm2 import NAME, cache_folder, smollm2_folder
from qrefta import FinetuneResult, TextComparison
from qrefta.files.layout import weights_bytes
from qrefta.model.modes import eval_mode
from qrefta.tables import new_table, results_table
from qrefta.train.arguments import training_arguments
from qrefta.train.calibration import task_batches
from qrefta.train.tasks import load_chat

SHOWN = 3  # questions whose answers are printed
ANSWER_TOKENS = 28
COMPARED_WINDOWS = 4  # of the text that tells how much of the model is kept
WINDOW = 256
console = Console()


class Numbers(NamedTuple):
    """The figures of a run that are not of a training run.

    Attributes:
        dense_bytes, prepared_bytes: of the model in float32 memory and in its files.
        prepare_s: seconds of calibrating and preparing.
        reload_difference: largest difference of the reloaded model's logits.
        merge_difference: relative difference of the merged model's logits.
        total_s: seconds of the whole run.
        peak_bytes: most memory that the process held.
    """

    dense_bytes: int
    prepared_bytes: int
    prepare_s: float
    reload_difference: float
    merge_difference: float
    total_s: float
    peak_bytes: int


def run(options: Options) -> None:
    """Prepare, train, save, reload and merge; QLoRA trains on the same rows, order and steps."""
    seed = options.seed
    start = time.perf_counter()
    source = options.model or str(smollm2_folder(cache_folder()))
    tokenizer = AutoTokenizer.from_pretrained(source)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    data = conversations_of(options)
    name = NAME if options.model is None else options.model
    console.rule(f"{name}: {len(data['train'])} questions to train on, {len(data['test'])} to test")

    before_preparing = time.perf_counter()
    prepared = qrefta.prepare(
        copy.deepcopy(dense),
        bits=4,
        rank=options.rank,
        calibration=task_batches("sft", dense, tokenizer, data, seed=seed),
        seed=seed,
    )
    prepare_s = time.perf_counter() - before_preparing
    torch.manual_seed(seed)
    same_size = round(options.rank / prepared.config.num_hidden_layers)
    rival_rank = max(same_size, 1)
    rival = qlora(copy.deepcopy(dense), rival_rank, alpha=2 * rival_rank)
    rival_name = f"QLoRA r={rival_rank}"
    kept = how_much_is_kept(
        {"bitsandbytes NF4": rival, "qrefta": prepared}, dense, tokenizer, data, options.out
    )
    console.print(kept_table(kept))
    dense_bytes = sum(parameter.nbytes for parameter in dense.parameters())
    del dense

    shown = [row["messages"] for row in data["test"].select(range(SHOWN))]
    questions = [messages[:-1] for messages in shown]
    told = [
        {"question": messages[-2]["content"], "docstring": messages[-1]["content"]}
        for messages in shown
    ]
    for row, text in zip(told, answers(prepared, tokenizer, questions), strict=True):
        row["before"] = text
    results = trained({rival_name: rival, "qrefta": prepared}, tokenizer, data, options)
    for row, text in zip(told, answers(prepared, tokenizer, questions), strict=True):
        row["after"] = text
    console.print(results_table(results))
    console.print(answers_table(told))

    folder = options.out / "qrefta"
    reload_difference, merge_difference = check_files(prepared, tokenizer, questions, folder)
    numbers = Numbers(
        dense_bytes,
        weights_bytes(folder),
        prepare_s,
        reload_difference,
        merge_difference,
        time.perf_counter() - start,
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    show(numbers, folder)
    if options.rows is not None:
        append(options.rows, to_rows(kept, results, told, numbers), seed)


def conversations_of(options: Options) -> DatasetDict:
    """The rows to train on and to test, of the data set that is given or of Python's docstrings."""
    counts = {"train": options.train_rows, "test": options.test_rows}
    if options.dataset is None:
        return docstring_questions(*counts.values())
    data = load_chat(options.dataset, options.seed)
    return DatasetDict(
        {
            name: data[name].select(range(min(count, len(data[name]))))
            for name, count in counts.items()
        }
    )


def trained(
    models: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    options: Options,
) -> dict[str, FinetuneResult]:
    """Train each model in place on the same rows, in the same order and steps."""
    results = {}
    for name, model in models.items():
        console.print(f"\nTraining: {name}")
        args = training_arguments(
            "sft",
            options.out / name.replace(" ", "-"),
            learning_rate=3e-3,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            padding_free=False,
            save_steps=1.0,
            seed=options.seed,
        )
        results[name] = qrefta.finetune(model, tokenizer, data, task="sft", args=args)
    return results


def how_much_is_kept(
    models: Mapping[str, nn.Module],
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    out: Path,
) -> dict[str, TextComparison]:
    """Each model before training, compared with the dense one on the test conversations."""
    out.mkdir(parents=True, exist_ok=True)
    text = out / "test.txt"
    rendered = [
        tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in data["test"]
    ]
    text.write_text("\n".join(str(chat) for chat in rendered), encoding="utf-8")
    found = {}
    for name, model in models.items():
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        (found[name],) = qrefta.compare(
            base, dense, text, tokenizer=tokenizer, window=WINDOW, limit=COMPARED_WINDOWS
        )
    return found


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Any]
) -> list[str]:
    """The most likely answer to each question, a few words long."""
    tokenizer.padding_side = "left"
    batch: Any = tokenizer.apply_chat_template(
        questions, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    settings = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with eval_mode(model), torch.no_grad():
        made = model.generate(**batch.to(model.device), generation_config=settings)
    tokenizer.padding_side = "right"
    new = made[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.no_grad()
def check_files(
    trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Any], folder: Path
) -> tuple[float, float]:
    """Reload and merge the saved model.

    Returns:
        The largest difference of the reloaded model's logits, and the relative difference of the
        merged model's.
    """
    batch: Any = tokenizer.apply_chat_template(
        questions[0], return_tensors="pt", return_dict=True
    ).to(trained.device)
    reloaded = qrefta.load(folder).to(trained.device).eval()
    difference = (reloaded(**batch).logits - trained.eval()(**batch).logits).abs().max().item()
    merged = qrefta.merge(reloaded, out=folder.parent / "merged")
    return difference, merged.difference


def kept_table(kept: Mapping[str, TextComparison]) -> Table:
    """Divergence and perplexity of the 4-bit models before training."""
    first = next(iter(kept.values()))
    table = new_table(
        f"Before training: the 4-bit model on {first.tokens:,} tokens of the test conversations"
    )
    for name in ("base", "KL divergence to the dense model", "perplexity"):
        table.add_column(name, justify="left" if name == "base" else "right")
    table.add_row("dense", "0", f"{first.reference_perplexity:.1f}")
    for name, found in kept.items():
        shown = found.to_text()
        table.add_row(name, shown["KL divergence, mean"], f"{found.perplexity:.1f}")
    return table


def answers_table(told: list[dict[str, str]]) -> Table:
    """Answers side by side."""
    table = new_table("Answers of the 4-bit model")
    for name in ("question", "docstring", "before", "after"):
        table.add_column(name, overflow="fold", ratio=1)
    for row in told:
        table.add_row(row["question"], row["docstring"], row["before"], row["after"])
        table.add_section()
    return table


def show(numbers: Numbers, folder: Path) -> None:
    """Print sizes, times and differences."""
    gone = f"{numbers.dense_bytes / 1e6:.0f} MB in float32"
    console.print(f"files                {numbers.prepared_bytes / 1e6:.0f} MB, of {gone}")
    console.print(f"calibrate, prepare   {numbers.prepare_s:.0f} s")
    console.print(f"reloaded model       logits differ by {numbers.reload_difference:.1e}")
    console.print(f"merged to bf16       logits differ by {numbers.merge_difference:.1%}")
    console.print(
        f"whole run            {numbers.total_s:.0f} s, "
        f"{numbers.peak_bytes / 1e9:.1f} GB of memory at most"
    )
    console.print(
        f"\nThe trained model is in {folder}, the merged one in {folder.parent / 'merged'}.\n"
        f"Talk to it: qrefta chat {folder}"
    )


def to_rows(
    kept: Mapping[str, TextComparison],
    results: Mapping[str, FinetuneResult],
    told: list[dict[str, str]],
    numbers: Numbers,
) -> list[dict[str, Any]]:
    """All printed figures as rows for `eval.rows`."""
    study = {"study": "quickstart_chat"}
    bases = [
        {"kind": "base", "base": name}
        | found.to_dict()
        | {"model": Path(found.model).name, "reference": Path(str(found.reference)).name}
        for name, found in kept.items()
    ]
    runs = [
        {"kind": "training", "method": name} | result._asdict() for name, result in results.items()
    ]
    said = [{"kind": "answer"} | row for row in told]
    return [study | row for row in [*bases, *runs, *said, {"kind": "run"} | numbers._asdict()]]
