"""The whole training step of a chat model: TRL with PEFT's QLoRA, and `qrefta.finetune`.

SmolLM2-135M-Instruct learns conversations of 16 to 512 tokens (whole docstrings of Python's
library), or windows of one length. Time goes from the start of a step to its end: forward pass,
loss, backward pass and optimizer; tokens are counted without padding. TRL runs with its defaults
(batch 8, gradient checkpointing) on bitsandbytes' NF4 with double quantization, as TRL's and
PEFT's documents say; qrefta with its own, and the same batch and checkpointing.

Every method is a process. The processes take turns, one step each, so that all have the same
machine; while one computes, the others wait. The peak of torch's tensors comes from a further
process for each method, because counting allocations takes time.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import typer
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

import qrefta
from eval.memory import TensorPeak
from eval.rows import append
from eval.studies.step_profile import DATA, KINDS, StepProfile
from eval.tasks.questions import docstring_chats
from eval.tasks.smollm2 import NAME, cache_folder, smollm2_folder
from qrefta.cli import guarded, quiet_libraries

BOUNDS = (16, 512)  # tokens of a conversation
METHODS = ("trl qlora r=16", "trl qlora r=8", "qrefta R=60", "qrefta R=64")
REFERENCE = METHODS[0]
SIGN = "whole_step: "  # begins the lines of a process that the study reads
GO = "go\n"
# Fields that the row of a profile shares with the row of its method.
PROFILE_FIELDS = (
    "study", "model", "method", "rows", "batch_size", "dtype", "checkpointing", "steps",
)  # fmt: skip
console = Console()


class Run(NamedTuple):
    """The settings that the processes of all methods share."""

    model: str
    rows: int
    batch_size: int
    length: int
    bf16: bool
    checkpointing: bool
    threads: int


def run(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = ",".join(METHODS),
    model: Annotated[str | None, typer.Option(help=f"Folder; default: {NAME}.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps a method; the first is left out.")] = 13,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    length: Annotated[
        int, typer.Option(help="Tokens of every row; 0: conversations of mixed length.")
    ] = 0,
    bf16: Annotated[bool, typer.Option(help="Compute under bf16 autocast.")] = False,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    memory: Annotated[bool, typer.Option(help="Measure peaks of memory too.")] = True,
    profiled: Annotated[
        bool, typer.Option("--profile", help="Add a row a method: seconds by part of the model.")
    ] = False,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
    watched: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure the whole step of every method."""
    source = model or str(smollm2_folder(cache_folder()))
    settings = Run(source, steps * batch_size, batch_size, length, bf16, checkpointing, threads)
    if child:
        _train(child, settings, watched)
        return
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        parse(name)
    times = _take_turns(names, settings)
    peaks = _take_turns(names, settings, "--watched", "memory") if memory else {}
    profiles = _take_turns(names, settings, "--watched", "profile") if profiled else {}
    found = []
    for name in names:
        seconds = [step["seconds"] for step in times[name][1:]]
        tokens = [step["tokens"] for step in times[name][1:]]
        row: dict[str, Any] = {
            "study": "whole_step",
            "model": model or NAME,
            "method": name,
            "rows": f"{length} tokens" if length else f"{BOUNDS[0]} to {BOUNDS[1]} tokens",
            "batch_size": batch_size,
            "dtype": "bfloat16" if bf16 else "float32",
            "checkpointing": checkpointing,
            "steps": len(seconds),
            "tokens": sum(tokens),
            "trained_parameters": times[name][0]["trained_parameters"],
            "median_step_s": median(seconds),
            "tokens_per_s": sum(tokens) / sum(seconds),
        }
        if peaks:
            row["peak_bytes"] = max(step["peak_bytes"] for step in peaks[name])
        found.append(row)
    for row in found:
        for key in ("tokens_per_s", "peak_bytes"):
            reference = next((one.get(key) for one in found if one["method"] == REFERENCE), None)
            if reference and key in row:
                row[f"{key}_of_qlora"] = row[key] / reference
        shown = {key: round(row[key], 3) for key in row if type(row[key]) is float}
        console.print(shown, row["method"])
    if rows is not None:
        append(rows, [*found, *profile_rows(found, profiles)], seed=0)


def profile_rows(
    found: list[dict[str, Any]], profiles: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """One row a method: seconds by part of the model, over all steps but the first."""
    return [
        {name: row[name] for name in PROFILE_FIELDS}
        | {
            "kind": "profile",
            "seconds": {
                kind: sum(step["profile"][kind] for step in profiles[row["method"]][1:])
                for kind in KINDS
            },
        }
        for row in found
        if row["method"] in profiles
    ]


def parse(method: str) -> tuple[str, int]:
    """Kind and rank of a method.

    Raises:
        ValueError: if it is not "trl qlora r=16" or "qrefta R=64", with any rank.
    """
    for kind, sign in (("trl qlora", " r="), ("qrefta", " R=")):
        name, found, rank = method.partition(sign)
        if name == kind and found and rank.isdigit() and int(rank) > 0:
            return kind, int(rank)
    raise ValueError(
        f"{method!r} is not a method; give {METHODS[0]!r} or {METHODS[-1]!r}, any rank"
    )


def first_step(name: str, settings: Run) -> float:
    """Seconds from the start of a method's process to the end of its first step.

    Raises:
        RuntimeError: if the process ends before.
    """
    start = perf_counter()
    process = _start(name, settings)
    try:
        for _ in ("set up", "first step"):
            _say(process, GO)
            if _heard(process) is None:
                raise RuntimeError(f"{name} ended before its first step (see above)")
        return perf_counter() - start
    finally:
        process.kill()
        process.wait()


def _take_turns(names: list[str], settings: Run, *options: str) -> dict[str, list[dict[str, Any]]]:
    """The steps of every method, one process each, one step of each after the other."""
    processes = {name: _start(name, settings, *options) for name in names}
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for process in processes.values():  # each sets itself up alone
            _say(process, GO)
            _heard(process)
        while waiting := {name: one for name, one in processes.items() if one.poll() is None}:
            for name, process in waiting.items():
                _say(process, GO)
                step = _heard(process)
                if step is None:
                    process.wait()
                else:
                    steps[name].append(step)
    finally:
        for process in processes.values():
            process.kill()
    for name, taken in steps.items():
        if len(taken) < 2:
            raise RuntimeError(f"{name} stopped after {len(taken)} steps (see above)")
    return steps


def _start(name: str, settings: Run, *options: str) -> "subprocess.Popen[str]":
    arguments = [
        sys.executable, "-m", "eval", "whole_step", "--child", name, *options,
        "--model", settings.model,
        "--steps", str(settings.rows // settings.batch_size),
        "--batch-size", str(settings.batch_size),
        "--length", str(settings.length),
        "--threads", str(settings.threads),
        "--bf16" if settings.bf16 else "--no-bf16",
        "--checkpointing" if settings.checkpointing else "--no-checkpointing",
    ]  # fmt: skip
    return subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


def _say(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(text)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, which `_heard` sees


def _heard(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """The next report of a process; None at its end."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(SIGN):
            return json.loads(line.removeprefix(SIGN))
    return None


class Turns(TrainerCallback):
    """Waits before each step until it is this process's turn, and reports the step."""

    def __init__(self, watched: str) -> None:
        self.peak = TensorPeak("cpu") if watched == "memory" else None
        self.profile: StepProfile | None = None
        self.profiled = watched == "profile"
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Report that this process is set up."""
        if self.profiled:
            self.profile = StepProfile(others["model"])
        parameters = others["model"].parameters()
        self.trained = sum(one.numel() for one in parameters if one.requires_grad)
        _report({})
        self.left = perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the turn."""
        self.data_s = perf_counter() - self.left  # of the batch, which Trainer fetches before
        sys.stdin.readline()
        if self.peak is not None:
            self.peak.start()
        if self.profile is not None:
            self.profile.start()
        self.at = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step."""
        seconds = perf_counter() - self.at
        before, self.tokens = self.tokens, state.num_input_tokens_seen
        profiled = None if self.profile is None else self.profile.stop() | {DATA: self.data_s}
        _report(
            {
                "seconds": seconds,
                "tokens": self.tokens - before,
                "peak_bytes": None if self.peak is None else self.peak.stop(),
                "profile": profiled,
                "trained_parameters": self.trained,
            }
        )
        self.left = perf_counter()


def _report(values: dict[str, Any]) -> None:
    print(SIGN + json.dumps(values), flush=True)


def _train(method: str, settings: Run, watched: str) -> None:
    sys.stdin.readline()
    quiet_libraries()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    kind, rank = parse(method)
    data = data_of(settings, tokenizer)
    train = _ours if kind == "qrefta" else _theirs
    with TemporaryDirectory() as folder:
        turns = Turns(watched)
        train(rank, settings, tokenizer, data, turns, folder)


def data_of(settings: Run, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Conversations of mixed length, or longer ones than `settings.length`, to be cut there."""

    def tokens(messages: Any) -> int:
        return len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])

    data = docstring_chats(settings.rows, tokens, BOUNDS)
    if not settings.length:
        return data
    text = " ".join(messages[1]["content"] for messages in data["messages"])
    long = 10 * settings.length  # characters; a token has fewer than ten
    return data.map(
        lambda row, at: {
            "messages": [
                row["messages"][0],
                {"role": "assistant", "content": (text[97 * at :] + text)[:long]},
            ]
        },
        with_indices=True,
    )


def _ours(
    rank: int,
    settings: Run,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    turns: Turns,
    folder: str,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    qrefta.prepare(model, bits=4, rank=rank, refine=0, progress=False)
    qrefta.finetune(
        model,
        tokenizer,
        DatasetDict(train=data, test=data.select([0])),
        folder,
        task="sft",
        epochs=1,
        batch_size=settings.batch_size,
        max_length=settings.length or BOUNDS[1],
        gradient_checkpointing=settings.checkpointing,
        bf16=settings.bf16,
        callbacks=[turns],
        progress=False,
    )


def _theirs(
    rank: int,
    settings: Run,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    turns: Turns,
    folder: str,
) -> None:
    from trl import SFTConfig, SFTTrainer  # slow import

    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=dtype, quantization_config=quantization
    )
    SFTTrainer(
        model=model,
        args=SFTConfig(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            max_length=settings.length or BOUNDS[1],
            gradient_checkpointing=settings.checkpointing,
            bf16=settings.bf16,
            include_num_input_tokens_seen="non_padding",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[turns],
    ).train()


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
