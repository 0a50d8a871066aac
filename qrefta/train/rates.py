"""The learning rate of a run, by what trains.

The rates are the best of the training studies (`eval/rows/accuracy.jsonl`): for each method the
rate of the grid nearest to the geometric mean of its best rates on SST-2 and CIFAR-10. A principal
start (refta, craft) wants less than a start from zero. The factors of a calibrated refta correct a
quantization error, which is small, and take the rate of a start from zero.
"""

import warnings
from math import inf

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qrefta.choices import AUTO_RATE, Method, Task
from qrefta.config.checks import positive
from qrefta.model.prepared import is_prepared, prepared_config

RATES: dict[Method, float] = {
    "refta": 1e-3,
    "craft": 1e-3,
    "tera": 1e-2,
    "lotr": 1e-2,
    "lorta": 3e-3,
    "windows": 3e-3,
}
CALIBRATED_RATE = 3e-3  # of refta before error feedback
LORA_RATE = 3e-3
FULL_RATE = 1e-4  # of a model whose own weights train
OTHER_RATE = 1e-3  # of methods from outside the package
PREFERENCE_SHARE = 1 / 20  # of these rates for dpo and grpo: not measured, TRL's own proportion
_FAR_ABOVE = 10.0


def measured_rate(model: PreTrainedModel) -> tuple[float, str]:
    """The best measured peak learning rate for a model, and the words for what trains in it."""
    if is_prepared(model):
        config = prepared_config(model)
        method = config.settings.method
        if method == "refta" and config.calibrated and config.settings.may_feed_back:
            return CALIBRATED_RATE, "method refta, calibrated"
        return RATES.get(method, OTHER_RATE), f"method {method}"
    if hasattr(model, "peft_config"):
        return LORA_RATE, "LoRA"
    return FULL_RATE, "all weights"


def warn_of_rate(model: PreTrainedModel, rate: float, task: Task = "classify") -> None:
    """Warn of a learning rate that is ten times the best measured one, or more; for dpo and grpo
    ten times PREFERENCE_SHARE of it.

    The warning names the line that called the caller.
    """
    best, trained = measured_rate(model)
    share = _share(task)
    if rate >= _FAR_ABOVE * share * best:
        of = "" if share == 1 else f"{share:g} of "
        warnings.warn(
            f"The learning rate {rate:g} is {rate / (share * best):.0f} times {share * best:g}, "
            f"{of}the best measured rate for {trained}; training may diverge. Leave it out to take "
            "that rate.",
            stacklevel=3,
        )


def chosen_rate(
    model: PreTrainedModel, rate: float | None, show: bool, task: Task = "classify"
) -> float:
    """The given learning rate, or the measured one, which `show` prints.

    For dpo and grpo the rate is PREFERENCE_SHARE of the measured one.

    Raises:
        ValueError: if the given rate is not positive.
    """
    if rate is None:
        rate, trained = measured_rate(model)
        share = _share(task)
        rate *= share
        of = "" if share == 1 else f"{share:g} of "
        if show:
            tqdm.write(f"Learning rate {rate:g}, {of}the best measured for {trained}")
        return rate
    return positive("learning_rate", rate)


def parse_rate(text: str) -> float | None:
    """A learning rate from the command line; None for auto.

    Raises:
        ValueError: if it is neither a positive number nor auto.
    """
    if text == AUTO_RATE:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < inf:
        raise ValueError(f"--learning-rate is {text!r}; give a positive number, or {AUTO_RATE}")
    return rate


def _share(task: Task) -> float:
    """The share of the measured rate that a task takes."""
    return PREFERENCE_SHARE if task in ("dpo", "grpo") else 1.0
