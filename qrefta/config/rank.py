"""The rank of `prepare`: a number, the numbers of CRAFT, "auto", or a budget that chooses ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from qrefta.choices import AUTO_RANK
from qrefta.config.checks import positive, whole
from qrefta.config.sizes import parse_bytes


@dataclass(frozen=True)
class RankBudget:
    """A rule that chooses the ranks of all stacks; give exactly one of the three.

    Attributes:
        bytes: the largest rank, equal for all stacks, whose factors take at most this many bytes in
            all; with method refta the ranks that remove the most quantization error. An int, or
            text such as "8MB" (10^6 bytes) or "8MiB".
        error_ratio: with method refta the smallest ranks with at most this squared error, relative
            to quantizing unsplit weights; of the outputs, if the split is calibrated.
        trainable_parameters: the largest rank, equal for all stacks, with at most this many
            trainable parameters in all factors.

    Raises:
        ValueError: if none or several are given, or a value is not allowed.
    """

    bytes: int | str | None = None
    error_ratio: float | None = None
    trainable_parameters: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"RankBudget got {given or 'nothing'}; give exactly one of bytes, error_ratio and "
                "trainable_parameters"
            )
        if self.bytes is not None:
            object.__setattr__(self, "bytes", parse_bytes("RankBudget bytes", self.bytes))
        if self.error_ratio is not None:
            ratio = positive("RankBudget error_ratio", self.error_ratio)
            if ratio > 1:
                raise ValueError(
                    f"RankBudget error_ratio is {ratio!r}; it is a share of the error of "
                    "quantizing unsplit weights and must be at most 1"
                )
            object.__setattr__(self, "error_ratio", ratio)
        if self.trainable_parameters is not None:
            count = whole("RankBudget trainable_parameters", self.trainable_parameters, 1)
            object.__setattr__(self, "trainable_parameters", count)

    def to_dict(self) -> dict[str, Any]:
        """The one value that is given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


Rank = int | tuple[int, ...]  # of one stack, as its method takes it
RankSetting = int | Sequence[int] | RankBudget | Literal["auto"]


def parse_rank(text: str) -> RankSetting:
    """A rank from the command line: `auto`, `16`, `24,100,100`, `bytes=8MB`, `error=0.5` or
    `parameters=300000`.

    Raises:
        ValueError: for any other text.
    """
    name, equals, value = text.partition("=")
    try:
        if text == AUTO_RANK:
            return AUTO_RANK
        if not equals:
            numbers = tuple(int(part) for part in text.split(","))
            return numbers[0] if len(numbers) == 1 else numbers
        if name == "bytes":
            return RankBudget(bytes=value)
        if name == "error":
            return RankBudget(error_ratio=float(value))
        if name == "parameters":
            return RankBudget(trainable_parameters=int(value))
    except ValueError as error:
        if "RankBudget" in str(error):
            raise
    raise ValueError(
        f"rank is {text!r}; it must be auto, a whole number (16), three for craft (24,100,100), "
        "or a budget: bytes=8MB, error=0.5 or parameters=300000"
    )


def check_rank(name: str, value: Any) -> RankSetting:
    """The rank to keep of a call or of a saved config.

    Raises:
        ValueError: for a value that is not allowed.
    """
    if isinstance(value, RankBudget) or value == AUTO_RANK:
        return value
    budgets = {budget.name for budget in fields(RankBudget)}
    if isinstance(value, dict) and value.keys() <= budgets:  # from a saved config
        return RankBudget(**value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(whole(f"each number of {name}", number, 1) for number in value)
    if isinstance(value, str):
        raise ValueError(
            f'{name} is {value!r}; it must be a whole number, 0 or more, "auto", three numbers for '
            "craft, or a RankBudget"
        )
    return whole(name, value, 0)
