"""Models to fine-tune, by the name of their method.

A method is a name with options:

    head-only      the task's head (in BERT-like models with the pooler) on frozen weights;
                   all methods train it; language models have no head and are not trained
    full           all weights
    lora r=8       PEFT on unquantized weights; likewise pissa r=8, vera r=256
    loretta r=5    tensor trains of rank r on unquantized weights
    qlora r=8      PEFT on NF4 weights; likewise rslora, dora, qpissa, loftq, qera, and ia3 without
                   r. qlora, loftq and qera take fewer bits: quant_type=nf2, with scales in 8 bits
    refta R=48     qrefta.prepare with its defaults; its options may follow
                   (bits=16 transform=identity quant_type=int4 refine=0), and `calibrated`
    craft R=48     likewise every method of qrefta.methods, and every form of eval.peers.forms;
                   alternatives to R=48 are
                   ranks=6/48/48 (craft) and trained_params=41000
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import qrefta
from eval.peers.baselines import Split, ia3, lora, qlora, train_head_only, vera
from eval.peers.forms import FORMS
from eval.peers.loretta import loretta
from eval.peers.splits import NF4, LowRank, loftq, pissa, qera
from eval.tasks.task import Task
from qrefta.choices import QUANT_TYPES, bits_of
from qrefta.config.rank import RankBudget, RankSetting
from qrefta.config.settings import SETTING_NAMES
from qrefta.methods import METHODS
from qrefta.model.stacks import find_stacks
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import QuantFormat
from qrefta.split.calibrate import gather_moments
from qrefta.split.moments import shared_metric

CORE = [
    "head-only",
    "full",
    "lora r=1",
    "lora r=8",
    "pissa r=8",
    "qlora r=8",
    "qpissa r=8",
    "refta R=15 bits=16",
    "refta R=48 bits=16",
    "refta R=48 bits=16 transform=identity",
    "refta R=48 refine=0",
    "refta R=48",
    "refta R=48 calibrated",
]
CALIBRATION_ROWS = 256
FLAGS = ("calibrated", "double_quant")
SIZES = {"R": int, "ranks": tuple, "trained_params": int}
BY_THE_STUDY = {"method", "rank", "seed", "target_modules", "modules_to_save"}
OPTIONS = {*SETTING_NAMES, "calibrated"} - BY_THE_STUDY
WITHOUT_RANK = ("head-only", "full", "ia3")
WITH_RANK = ("lora", "pissa", "vera", "loretta", "rslora", "dora", "qpissa")
WITH_FORMAT = ("qlora", "loftq", "qera")
PEERS = (*WITHOUT_RANK, *WITH_RANK, *WITH_FORMAT)


def parse(method: str) -> tuple[str, dict[str, Any]]:
    """A method's name and options.

    Raises:
        ValueError: if the method is unknown, or an option is missing or unknown.
    """
    name, *words = method.split() or [""]
    options = {
        key: _value(text) if sign else True
        for key, sign, text in (word.partition("=") for word in words)
    }
    if name in PEERS:
        _check_peer(method, name, options)
    elif name in METHODS or name in FORMS:
        unclear = [
            key
            for key, value in options.items()
            if value == "" or (value is True and key not in FLAGS)
        ]
        sizes = [key for key in SIZES if type(options.get(key)) is SIZES[key]]
        if len(sizes) != 1 or unclear or not set(options) <= {*sizes, *OPTIONS}:
            raise ValueError(
                f"{method!r}: {name} takes R=48, ranks=6/48/48 or trained_params=41000, and any of "
                f"{', '.join(sorted(OPTIONS))}; only {' and '.join(FLAGS)} may have no value."
            )
    else:
        raise ValueError(
            f"There is no method {name!r}; the methods are {', '.join([*PEERS, *METHODS, *FORMS])}."
        )
    return name, options


def _check_peer(method: str, name: str, options: dict[str, Any]) -> None:
    """Refuse options that a peer does not take.

    Raises:
        ValueError: if an option is missing, unknown, or has a value that is not allowed.
    """
    given = dict(options)
    if name in WITH_FORMAT and given.pop("quant_type", "nf4") not in QUANT_TYPES:
        raise ValueError(f"{method!r}: quant_type must be one of {', '.join(QUANT_TYPES)}.")
    allowed = set() if name in WITHOUT_RANK else {"r"}
    if set(given) != allowed or not all(
        type(value) is int and value > 0 for value in given.values()
    ):
        more = " and, if it is not nf4, quant_type=nf2" if name in WITH_FORMAT else ""
        raise ValueError(
            f"{method!r}: {name} takes {f'r=8, for example{more}' if allowed else 'no options'}."
        )


def _rank(options: dict[str, Any]) -> RankSetting:
    """The rank of a method's options, which are taken out."""
    if "trained_params" in options:
        return RankBudget(trainable_parameters=options.pop("trained_params"))
    return options.pop("ranks") if "ranks" in options else options.pop("R")


def _value(text: str) -> int | float | bool | str | tuple[int, ...]:
    parts = text.split("/")
    if all(part.isdigit() for part in parts):
        return tuple(map(int, parts)) if len(parts) > 1 else int(text)
    if text.replace(".", "", 1).isdigit():
        return float(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def build(method: str, task: Task, seed: int) -> nn.Module:
    """The model of a method, ready to train; its random numbers depend on `seed` only."""
    name, options = parse(method)
    model = task.model(seed)
    heads = task.heads
    rank = options.get("r", 0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        match name:
            case "head-only":
                return train_head_only(model, heads)
            case "full":
                return model
            case "lora":
                return lora(model, rank, alpha=2 * rank, heads=heads)
            case "pissa":
                return lora(model, rank, alpha=rank, heads=heads, start="pissa")
            case "vera":
                return vera(model, rank, heads=heads)
            case "loretta":
                return loretta(model, rank, heads=heads)
            case "rslora" | "dora":
                return qlora(model, rank, alpha=2 * rank, heads=heads, variant=name)
            case "ia3":
                return ia3(model, heads=heads)
            case "qlora":
                fmt = _format(options)
                return qlora(model, rank, alpha=2 * rank, heads=heads, fmt=fmt)
            case "qpissa" | "loftq" | "qera":
                fmt = _format(options)
                split = _split(name, model, task, rank, fmt)
                return qlora(model, rank, alpha=rank, heads=heads, split=split, fmt=fmt)
        if options.pop("calibrated", False):
            options["calibration"] = list(calibration(task))
        options["rank"] = _rank(options)
        if name in FORMS:
            METHODS[name] = FORMS[name]  # pyright: ignore[reportArgumentType]
        return qrefta.prepare(
            model, method=name, modules_to_save=heads, seed=seed, progress=False, **options
        )


def _format(options: dict[str, Any]) -> QuantFormat:
    """The format of a peer's weights: scales in 8 bits with fewer than four bits."""
    kind = options.get("quant_type", NF4.quant_type)
    return QuantFormat(kind, double_quant=bits_of(kind) < 4)


def _split(name: str, model: PreTrainedModel, task: Task, rank: int, fmt: QuantFormat) -> Split:
    """How a peer divides the weight of a layer."""
    if name == "qpissa":
        return lambda path, weight: pissa(weight, rank)
    if name == "loftq":
        return lambda path, weight: loftq(weight, rank, fmt=fmt)
    stacks = find_stacks(model)
    moments = gather_moments(model, stacks, list(calibration(task)), progress=False)
    metrics = {
        path: shared_metric(moments, replace(stack, modules=(path,)))
        for stack in stacks
        for path in stack.modules
    }

    def with_qera(path: str, weight: Tensor) -> LowRank:
        up, down = qera(weight - rounded(weight, fmt), rank, metrics[path])
        return LowRank(up, down, weight)

    return with_qera


def calibration(task: Task) -> Iterator[dict[str, Tensor]]:
    """Batches of training rows without labels."""
    rows = task.train.select(range(min(CALIBRATION_ROWS, len(task.train))))
    for start in range(0, len(rows), 32):
        batch = dict(task.collate([rows[at] for at in range(start, min(start + 32, len(rows)))]))
        batch.pop("labels", None)
        yield batch
