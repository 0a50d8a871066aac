"""The settings of `prepare`, the stacks of a model, and the report of what preparing did to each.

Nothing here imports torch: the command line, the model card and the plug-in read the same settings.

To add a setting, add a field to `Settings` and its type to `SettingsKeywords`. `prepare`,
`prepare_checkpoint`, `plan`, the command line, the saved config and the model card take it from
there.
"""

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, Self, TypedDict, TypeVar

from qrefta.choices import (
    AUTO_BITS,
    AUTO_RANK,
    BITS,
    BLOCK_SIZES,
    CODES,
    FACTOR_DTYPES,
    FITTED,
    METHOD_NAMES,
    MIXED_TYPES,
    QUANT_TYPES,
    SCALES,
    TRANSFORMS,
    Bits,
    Codes,
    FactorDtype,
    Method,
    QuantType,
    Scales,
    Transform,
    bits_of,
)

FORMAT_VERSION = 3
BANK = "qrefta_factors"  # name of the factor bank at the root of a model
EXPERTS_SUFFIX = "_adapted"  # of the list of linear layers that replaces a fused parameter
OLD_RANK_SETTINGS = (
    "ranks",
    "trained_params",
    "budget_mb",
    "error_ratio",
)  # of qrefta 0.1, with rank="auto"
_LARGEST_COUNT = 1 << 40  # the largest size or count that a config may state
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_RESTORE = "config.json is damaged: restore it from the folder that save_pretrained wrote."


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
            ratio = _positive("RankBudget error_ratio", self.error_ratio)
            if ratio > 1:
                raise ValueError(
                    f"RankBudget error_ratio is {ratio!r}; it is a share of the error of "
                    "quantizing unsplit weights and must be at most 1"
                )
            object.__setattr__(self, "error_ratio", ratio)
        if self.trainable_parameters is not None:
            count = _whole("RankBudget trainable_parameters", self.trainable_parameters, 1)
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


def parse_bits(text: str) -> int | str:
    """The bits from the command line: a number, or a word that `Settings` takes or refuses."""
    return int(text) if text.isdecimal() else text


def parse_bytes(name: str, size: int | str) -> int:
    """Bytes from a whole number or from text such as "8MB" (10^6) or "8MiB" (2^20).

    Raises:
        ValueError: for any other value, naming the setting.
    """
    count = _bytes_of_text(size) if isinstance(size, str) else size
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(
            f'{name} is {size!r}; give a positive number of bytes, or text like "8MB" or "8MiB"'
        )
    return int(count)


def _bytes_of_text(text: str) -> int | None:
    """Bytes of a number with or without a unit; None for other text."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMG]I?B)?\s*", text, flags=re.IGNORECASE)
    try:
        return None if match is None else int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    except ValueError:  # "1.2.3"
        return None


def with_new_rank(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords with one `rank` for the five settings that chose it in qrefta 0.1, where refta was
    the default method.

    Raises:
        ValueError: if the old settings contradict each other.
    """
    kept = {name: value for name, value in keywords.items() if name not in OLD_RANK_SETTINGS}
    old = {name: keywords.get(name) for name in OLD_RANK_SETTINGS}
    rank = kept.get("rank", AUTO_RANK)
    given = {name: value for name, value in old.items() if value is not None}
    if not given:
        return kept
    if len(given) != 1:
        raise ValueError(
            f"rank came with {given}; of ranks, trained_params, budget_mb and error_ratio only one "
            "can be given. A RankBudget as rank replaces all of them."
        )
    ((name, value),) = given.items()
    if name in ("budget_mb", "error_ratio") and rank != AUTO_RANK:
        raise ValueError(
            f'budget_mb and error_ratio go with rank="auto"; rank is {rank!r} with {name}={value!r}'
        )
    return {"method": "refta"} | kept | {"rank": _rank_from_old(name, value)}


def _rank_from_old(name: str, value: Any) -> RankSetting:
    if name == "ranks":
        if not isinstance(value, list | tuple):
            raise ValueError(f"ranks is {value!r}; give the three ranks of CRAFT")
        return tuple(value)
    if name == "trained_params":
        return RankBudget(trainable_parameters=value)
    if name == "error_ratio":
        return RankBudget(error_ratio=value)
    return RankBudget(bytes=max(round(_positive(name, value) * 1e6), 1))


def _one_of(allowed: Sequence[Any], text: str) -> dict[str, Any]:
    """Metadata of a field that takes one of some values, each of the type that it has here."""

    def check(name: str, value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in allowed):
            listed = ", ".join(str(one) for one in allowed if one is not None)
            raise ValueError(f"{name} is {value!r}; it must be one of {listed}")
        return value

    return {"help": text, "check": check, "allowed": tuple(allowed)}


def _at_least(smallest: int, text: str) -> dict[str, Any]:
    """Metadata of a field that takes a whole number."""
    return {"help": text, "check": lambda name, value: _whole(name, value, smallest)}


def _checked(check: Callable[[str, Any], Any], text: str) -> dict[str, Any]:
    """Metadata of a field with a check, which returns the value to keep."""
    return {"help": text, "check": check}


def _check_method(name: str, value: Any) -> Any:
    methods = sys.modules.get("qrefta.methods")  # which lists methods from outside the package too
    known = METHOD_NAMES if methods is None else tuple(methods.METHODS)
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    return str(value)


def _check_rank(name: str, value: Any) -> RankSetting:
    if isinstance(value, RankBudget) or value == AUTO_RANK:
        return value
    budgets = {budget.name for budget in fields(RankBudget)}
    if isinstance(value, dict) and value.keys() <= budgets:  # from a saved config
        return RankBudget(**value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_whole(f"each number of {name}", number, 1) for number in value)
    if isinstance(value, str):
        raise ValueError(
            f'{name} is {value!r}; it must be a whole number, 0 or more, "auto", three numbers for '
            "craft, or a RankBudget"
        )
    return _whole(name, value, 0)


def _check_targets(name: str, value: Any) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value
    return _names(name, value)


def _check_modules(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else _names(name, value)


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise ValueError(f"{name} is {value!r}; it must be a list of module names")
    names = tuple(value)
    if not all(isinstance(text, str) for text in names):
        raise ValueError(f"{name} is {value!r}; it must be a list of module names")
    return names


def _whole(name: str, value: Any, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {smallest} or more")
    return int(value)


def _positive(name: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not 0 < float(value) < float("inf")
    ):
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return float(value)


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a model is prepared.

    Attributes:
        bits: 4, 3 or 2; or 16 to keep the residual in 16 bits (an ablation without quantization
            error). "auto" gives every stack 2, 3 or 4 bits, with the least error within
            `target_bits` (`qrefta.split.formats`); the stacks' reports hold the choice.
        target_bits: with bits="auto" the largest mean of bits a weight over all quantized weights,
            with scales and factors, as the report of `prepare` states it.
        rank: R, the number of components that every target stack keeps over all its layers
            together; a stack has R (in + out) trainable parameters. "auto": twice the number of
            its layers, and in shallow models 48, but at most eight a layer. 0 quantizes only.
            A tuple (layers, outputs, inputs) for method craft, each capped at the stack's size. A
            `RankBudget` chooses the ranks.
        method: windows, an update from zero whose components neighbouring layers share; refta,
            which trains the principal part of the weights and quantizes the rest; craft, which
            trains three small square matrices a stack; or tera, lotr or lorta, also from zero.
        transform: mode-3 transform: lsm3 (from the data), dct, or identity (each layer by itself).
            craft takes lsm3; methods that start from zero use none.
        quant_type: format of these bits. Default: nf4, nf3 or nf2, which bits="auto" always takes.
        block_size: weights that share a scale.
        double_quant: store the scales in 8 bits, as QLoRA does. Default: with bits other than 4.
        scales: searched: the scale of every block is the best of twelve, of both signs, weighted by
            the second moments of the inputs; without moments the best of six for NF4, which
            change the largest magnitude little. absmax: the largest magnitude.
        rounding: feedback: with moments, the columns of a residual are rounded one after the other
            and take in the errors of the columns before (GPTQ, arXiv 2210.17323); without moments
            it is nearest. nearest: the nearest level.
        target_modules: linear layers that get factors. None: all in the repeated blocks. A list:
            module paths that end in one of the names ("q_proj", "self_attn.q_proj"). A string: a
            regular expression that matches whole paths. All other linear layers of the blocks are
            only quantized. Fused experts are named by their parameters ("experts.down_proj"); such
            a stack has one slice for each expert of each layer, and the cost of the transform grows
            with the square of that number.
        modules_to_save: path ends of further modules to train in full, such as a new "pooler". A
            task head outside the base model trains without being named, unless it is a
            language-model head.
        refine: rounds that refit the factors of refta or craft and the quantized residual to each
            other. None: 5, or 1 if error feedback follows, since more rounds do not change the
            model's outputs then.
        seed: seed of random starts.
        factor_dtype: dtype that the factors are rounded to; float32 does not round.

    Raises:
        ValueError: for a value that is not allowed, or a combination that has no meaning.
    """

    bits: Bits = field(
        default=4,
        metadata=_one_of(
            BITS,
            "Bits of a weight; 16 leaves the residual unquantized (ablation); auto chooses for "
            "every stack, within --target-bits.",
        ),
    )
    target_bits: float | None = field(
        default=None,
        metadata=_checked(
            lambda name, value: None if value is None else _positive(name, value),
            "With bits auto: the largest mean of bits a weight, with scales and factors.",
        ),
    )
    rank: RankSetting = field(
        default=AUTO_RANK,
        metadata=_checked(
            _check_rank,
            "Components of every stack over all its layers; auto: by their number; or 24,100,100 "
            "for craft; or a budget: bytes=8MB, error=0.5, parameters=300000.",
        ),
    )
    method: Method = field(default="windows", metadata=_checked(_check_method, "Tensor method."))
    transform: Transform = field(default="lsm3", metadata=_one_of(TRANSFORMS, "Mode-3 transform."))
    quant_type: QuantType | None = field(
        default=None,
        metadata=_one_of((None, *QUANT_TYPES), "Format of the weights; default: nf4, nf3 or nf2."),
    )
    block_size: int = field(
        default=64, metadata=_one_of(BLOCK_SIZES, "Weights that share a scale.")
    )
    double_quant: bool | None = field(
        default=None,
        metadata=_one_of(
            (None, False, True), "Store the scales in 8 bits; default: with bits other than 4."
        ),
    )
    scales: Scales = field(
        default="searched",
        metadata=_one_of(SCALES, "Choice of every block's scale; absmax: the largest magnitude."),
    )
    rounding: Codes = field(
        default="feedback",
        metadata=_one_of(CODES, "Rounding to levels: with error feedback if calibrated, or not."),
    )
    target_modules: str | Sequence[str] | None = field(
        default=None,
        metadata=_checked(
            _check_targets, "Path end of linear layers that get factors; repeat for more."
        ),
    )
    modules_to_save: Sequence[str] = field(
        default=(),
        metadata=_checked(
            _check_modules, "Path end of a module to train in full; repeat for more."
        ),
    )
    refine: int | None = field(
        default=None,
        metadata=_checked(
            lambda name, value: None if value is None else _whole(name, value, 0),
            "Rounds that refit factors and residual to each other; default: 5, calibrated 1.",
        ),
    )
    seed: int = field(default=0, metadata=_at_least(0, "Seed of everything random."))
    factor_dtype: FactorDtype = field(
        default="bfloat16", metadata=_one_of(FACTOR_DTYPES, "Dtype of the factors.")
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = setting.metadata["check"](setting.name, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
        if self.bits == AUTO_BITS or self.target_bits is not None:
            self._check_target_bits()
        if self.bits != 16 and self.double_quant is None:
            object.__setattr__(self, "double_quant", self.bits != 4)
        if self.bits not in (16, AUTO_BITS):
            if self.quant_type is None:
                object.__setattr__(self, "quant_type", f"nf{self.bits}")
            self._check_quant_type()
        transforms = FITTED.get(self.method, TRANSFORMS)
        if self.transform not in transforms:
            raise ValueError(
                f"transform (with method {self.method}) is {self.transform!r}; it must be one of "
                f"{', '.join(transforms)}"
            )
        if self.weighs_error and self.bits == 16:
            raise ValueError(
                "A RankBudget of bytes or error_ratio weighs quantization error, and 16 bits have "
                "none; give a number as rank"
            )
        of_error = isinstance(self.rank, RankBudget) and self.rank.error_ratio is not None
        if of_error and self.method != "refta":
            raise ValueError(
                f"A RankBudget of error_ratio needs method refta, and method is {self.method!r}, "
                'whose rank does not change the error; give method="refta", a number as rank, or '
                "a RankBudget of bytes or trainable_parameters"
            )

    def _check_quant_type(self) -> None:
        fitting = [name for name in QUANT_TYPES if bits_of(name) == self.bits]
        if self.quant_type not in fitting:
            raise ValueError(
                f"quant_type is {self.quant_type!r} and bits is {self.bits}; with bits="
                f"{self.bits} it must be one of {', '.join(fitting)}"
            )

    def _check_target_bits(self) -> None:
        if self.bits != AUTO_BITS:
            raise ValueError(
                f"target_bits is {self.target_bits} and bits is {self.bits}; a target goes with "
                'bits="auto": give that, or leave target_bits out'
            )
        if self.target_bits is None:
            raise ValueError(
                'bits is "auto" and target_bits is missing; give the largest mean of bits a '
                "weight, such as target_bits=3.3"
            )
        if self.quant_type is not None:
            raise ValueError(
                f'quant_type is {self.quant_type!r} and bits is "auto", which chooses among '
                f"{', '.join(MIXED_TYPES)}; leave quant_type out, or give its bits"
            )
        if self.weighs_error:
            raise ValueError(
                f'rank is {self.rank} and bits is "auto"; ranks that are chosen by the error need '
                "the bits first: give a number as rank, or RankBudget(trainable_parameters=...)"
            )

    def of_stack(self, quant_type: QuantType | None) -> Self:
        """The settings of one stack: these, or with bits="auto" the same with the stack's bits.

        Args:
            quant_type: the format of the stack, as its report holds it.

        Raises:
            ValueError: if bits is "auto" and it chooses no such format.
        """
        if self.bits != AUTO_BITS:
            return self
        if quant_type not in MIXED_TYPES:
            raise ValueError(
                f'A stack of the qrefta config has quant_type {quant_type!r}; with bits="auto" it '
                f"must be one of {', '.join(MIXED_TYPES)}. {_RESTORE}"
            )
        return replace(self, bits=bits_of(quant_type), quant_type=quant_type, target_bits=None)

    @property
    def format_name(self) -> str:
        """The format of the weights in words: "NF4", "mixed bits" or "16 bits"."""
        if self.bits == AUTO_BITS:
            return "mixed bits"
        return "16 bits" if self.quant_type is None or self.bits == 16 else self.quant_type.upper()

    @property
    def weighs_error(self) -> bool:
        """Whether the ranks depend on the weights: the components of ReFTA that remove most error
        within a budget.
        """
        return (
            self.method == "refta"
            and isinstance(self.rank, RankBudget)
            and self.rank.trainable_parameters is None
        )

    def searches_scales(self, calibrated: bool) -> bool:
        """Whether scales are searched; without moments only NF4's are.

        On SmolLM2 an unweighted search raises FP4's output error by 4 % and INT4's KL divergence by
        7 %.
        """
        return self.scales == "searched" and (calibrated or self.quant_type == "nf4")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        found = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        if isinstance(self.rank, RankBudget):
            found["rank"] = self.rank.to_dict()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
        }


SETTING_NAMES = frozenset(setting.name for setting in fields(Settings))

_Function = TypeVar("_Function", bound=Callable[..., Any])


class SettingsKeywords(TypedDict, total=False):
    """The keywords of `Settings` besides `bits` and `rank`, for type checkers and editors."""

    target_bits: float | None
    method: Method
    transform: Transform
    quant_type: QuantType | None
    block_size: int
    double_quant: bool | None
    scales: Scales
    rounding: Codes
    target_modules: str | Sequence[str] | None
    modules_to_save: Sequence[str]
    refine: int | None
    seed: int
    factor_dtype: FactorDtype


def shows_settings(function: _Function) -> _Function:
    """Show the settings that a function takes as `**settings` in its signature, with types and
    defaults.
    """
    signature = inspect.signature(function, eval_str=True)
    listed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    known = {parameter.name for parameter in listed}
    types = inspect.get_annotations(Settings, eval_str=True)
    listed += [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=setting.default,
            annotation=types[setting.name],
        )
        for setting in fields(Settings)
        if setting.name not in known
    ]
    function.__signature__ = signature.replace(parameters=listed)  # type: ignore[attr-defined]
    return function


def settings_of_call(function: str, keywords: dict[str, Any]) -> Settings:
    """Checked settings from the keywords of a call; the rank settings of qrefta 0.1 are taken with
    a warning.

    Args:
        function: name of the public function, which calls this directly.
        keywords: its keywords.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: for a value that is not allowed.
    """
    unknown = sorted(keywords.keys() - SETTING_NAMES - set(OLD_RANK_SETTINGS))
    if unknown:
        listed = ", ".join(sorted(SETTING_NAMES))
        raise TypeError(
            f"{function}() got an unexpected keyword {unknown[0]!r}; the settings are {listed}"
        )
    old = sorted(keywords.keys() & set(OLD_RANK_SETTINGS))
    if old:
        warnings.warn(
            f"{', '.join(old)} is deprecated; give a tuple or a qrefta.RankBudget as rank.",
            DeprecationWarning,
            stacklevel=3,
        )
    settings = Settings(**with_new_rank(keywords))
    warn_of_idle(keywords, stacklevel=4)
    return settings


def warn_of_idle(keywords: dict[str, Any], stacklevel: int) -> None:
    """Warn of a transform or rounds of refinement that the method of a call leaves unused.

    `stacklevel` names the warning's line, as in `warnings.warn`.
    """
    method = keywords.get("method", Settings.method)
    if method in FITTED or method not in METHOD_NAMES:
        return
    for name in ("transform", "refine"):
        if keywords.get(name) not in (None, 0, Settings.transform):
            warnings.warn(
                f"{name}={keywords[name]!r} has no effect with method {method}, which starts from "
                f"zero. Methods that split the weights use it: {', '.join(FITTED)}.",
                stacklevel=stacklevel,
            )


@dataclass(frozen=True)
class LayerStack:
    """The K linear layers of one role and one shape.

    Attributes:
        name: module path with `*` for the layer number, e.g.
            `encoder.layer.*.attention.self.query`.
        modules: module paths in layer order; of experts the paths of their fused parameters, one a
            block.
        out_features, in_features: shape of every weight, always read as (out, in).
        transposed: weights are stored as (in, out): by `Conv1D` (GPT-2), and in some fused
            parameters.
        experts: slices of every fused parameter, which follow one another among the K; 0 for linear
            layers.
    """

    name: str
    modules: tuple[str, ...]
    out_features: int
    in_features: int
    transposed: bool = False
    experts: int = 0

    @property
    def layers(self) -> int:
        """K."""
        return len(self.modules) * max(self.experts, 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, out, in)."""
        return self.layers, self.out_features, self.in_features

    @property
    def adapted(self) -> tuple[str, ...]:
        """Module paths of the K adapted linear layers, once the model is prepared."""
        if not self.experts:
            return self.modules
        return tuple(
            expert_path(path, expert) for path in self.modules for expert in range(self.experts)
        )

    def place(self, index: int) -> tuple[str, int]:
        """The entry of `modules` that holds weight number `index`, and its expert (0 for a linear
        layer).
        """
        module, expert = divmod(index, max(self.experts, 1))
        return self.modules[module], expert


def expert_path(path: str, expert: int) -> str:
    """Module path of one expert's adapted linear layer, by the path of the fused parameter."""
    return f"{path}{EXPERTS_SUFFIX}.{expert}"


@dataclass(frozen=True)
class StackReport:
    """The result of preparing one stack; the rows of `quant_report`.

    Errors are squared Frobenius norms over all layers of the stack.

    Attributes:
        stack: the linear layers.
        rank: R, or the several ranks of a method; 0 for a stack that is only quantized.
        slice_ranks: components of each transformed slice, which sum to `rank`; empty for methods
            without.
        transform: mode-3 transform; None if the factors are not fitted to the weights.
        quant_type: format of the weights; None with 16 bits.
        baseline_error: ||W - Q(W)||_F^2, the error of quantizing unsplit weights (a Gaussian-zero
            start).
        residual_error: ||W_res - Q(W_res)||_F^2, as stored; 0 with 16 bits.
        principal_energy: ||principal part||_F^2 / ||W||_F^2.
        bytes: bytes of packed weights, scales, and factors stored at `factor_dtype`.
        output_error: sum over layers of E||x (W_l - stored W_l)^T||^2 on the calibration inputs;
            None without calibration. Experts of a block share the inputs of the block.
        output_baseline: the same for quantized unsplit weights.
        rows: of a model whose blocks were removed or reordered after `prepare`: the numbers that
            its layers have among those prepared, which the factors and the errors belong to; empty
            for 0 .. K - 1.
        prepared_layers: K when the stack was prepared; None if it is K.
    """

    stack: LayerStack
    rank: int | tuple[int, ...]
    slice_ranks: tuple[int, ...]
    transform: Transform | None
    quant_type: QuantType | None
    baseline_error: float
    residual_error: float
    principal_energy: float
    bytes: int
    output_error: float | None = None
    output_baseline: float | None = None
    rows: tuple[int, ...] = ()
    prepared_layers: int | None = None

    @property
    def factor_layers(self) -> int:
        """Number of layers of the factors."""
        return self.stack.layers if self.prepared_layers is None else self.prepared_layers

    def row(self, index: int) -> int:
        """The number among the factors' layers that layer number `index` of the stack has."""
        return self.rows[index] if self.rows else index

    @property
    def ratio(self) -> float:
        """residual_error / baseline_error; 1 if there is no error to remove."""
        return self.residual_error / self.baseline_error if self.baseline_error else 1.0

    @property
    def output_ratio(self) -> float | None:
        """output_error / output_baseline; 1 if there is no error to remove, None without
        calibration.
        """
        if self.output_error is None or self.output_baseline is None:
            return None
        return self.output_error / self.output_baseline if self.output_baseline else 1.0

    @property
    def weights(self) -> int:
        """Weights of the stack."""
        layers, out_features, in_features = self.stack.shape
        return layers * out_features * in_features

    @property
    def bits_per_weight(self) -> float:
        """8 bytes / (K out in)."""
        return 8 * self.bytes / self.weights

    def report(self) -> dict[str, Any]:
        """The row of `quant_report`, for JSON or a data frame."""
        return {
            "stack": self.stack.name,
            "layers": self.stack.layers,
            "shape": [self.stack.out_features, self.stack.in_features],
            "experts": self.stack.experts,
            "rank": list(self.rank) if isinstance(self.rank, tuple) else self.rank,
            "slice_ranks": list(self.slice_ranks),
            "transform": self.transform,
            "quant_type": self.quant_type,
            "baseline_error": self.baseline_error,
            "residual_error": self.residual_error,
            "ratio": self.ratio,
            "principal_energy": self.principal_energy,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "output_error": self.output_error,
            "output_ratio": self.output_ratio,
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as config.json holds it; without rows, which older versions do not know, if
        there are none.
        """
        report = asdict(self)
        if not self.rows:
            del report["rows"]
            del report["prepared_layers"]
        return report

    @classmethod
    def from_dict(cls, saved: Any) -> Self:
        """The report that config.json holds, of format 2 or 1.

        Raises:
            ValueError: if it holds values that no stack has.
        """
        if isinstance(saved, dict) and not isinstance(saved.get("stack"), dict):
            saved = _from_format_1(saved)
        _check_keys(cls, saved)
        _check_keys(LayerStack, saved["stack"])
        stack = LayerStack(**{**saved["stack"], "modules": _tuple(saved["stack"]["modules"])})
        report = cls(
            **{
                **saved,
                "stack": stack,
                "rank": _tuple(saved["rank"]),
                "slice_ranks": _tuple(saved["slice_ranks"]),
                "rows": _tuple(saved.get("rows", ())),
            }
        )
        wrong = next((name for name, fits in _fitting(report).items() if not fits), None)
        if wrong is not None:
            value = getattr(report, wrong, getattr(stack, wrong, None))
            raise ValueError(
                f"A stack of the qrefta config has {wrong} {value!r}, which no stack has. "
                f"{_RESTORE}"
            )
        return report


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _from_format_1(row: dict[str, Any]) -> dict[str, Any]:
    """A flat row of format 1, with structure and measurement apart."""
    needed = {"stack", "modules", "transposed", "layers", "shape", "rank", "slice_ranks"}
    shape = row.get("shape")
    if not needed <= row.keys() or not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(
            f"A stack of the qrefta config is {row!r}; needed are the keys {sorted(needed)}. "
            f"{_RESTORE}"
        )
    structure = {
        "name": row["stack"],
        "modules": row["modules"],
        "out_features": shape[0],
        "in_features": shape[1],
        "transposed": row["transposed"],
        "experts": row.get("experts", 0),
    }
    names = {entry.name for entry in fields(StackReport)} & row.keys()
    report = {name: row[name] for name in names} | {"stack": structure}
    count = (
        len(row["modules"]) * max(structure["experts"], 1)
        if _is_count(structure["experts"])
        else None
    )
    if row["layers"] != count:
        raise ValueError(
            f"A stack of the qrefta config has {row['layers']!r} layers for its {count} weights. "
            f"{_RESTORE}"
        )
    error, ratio = row.get("output_error"), row.get("output_ratio")
    if error is not None:
        report["output_baseline"] = error / ratio if ratio else error
    return report


def _check_keys(kind: type, saved: Any) -> None:
    names = {entry.name for entry in fields(kind)}
    needed = {entry.name for entry in fields(kind) if entry.default is MISSING}
    if not isinstance(saved, dict) or not needed <= saved.keys() <= names:
        raise ValueError(
            f"A stack of the qrefta config is {saved!r}; needed are the keys {sorted(needed)}. "
            f"{_RESTORE}"
        )


def _fitting(report: StackReport) -> dict[str, bool]:
    """Whether the values that a model is built from are ones that `prepare` writes, by
    attribute.
    """
    stack = report.stack
    ranks = report.rank if isinstance(report.rank, tuple) and report.rank else (report.rank,)
    measured = (
        "baseline_error",
        "residual_error",
        "principal_energy",
        "bytes",
        "output_error",
        "output_baseline",
    )
    return {
        "name": isinstance(stack.name, str),
        "modules": _are_names(stack.modules),
        "transposed": isinstance(stack.transposed, bool),
        "experts": _is_count(stack.experts),
        "out_features": _is_count(stack.out_features) and stack.out_features > 0,
        "in_features": _is_count(stack.in_features) and stack.in_features > 0,
        "rank": all(map(_is_count, ranks)),
        "quant_type": report.quant_type in (None, *QUANT_TYPES),
        "slice_ranks": isinstance(report.slice_ranks, tuple)
        and all(map(_is_count, report.slice_ranks)),
        **{name: _is_real(getattr(report, name)) for name in measured},
        "rows": _are_rows(report),
    }


def _are_rows(report: StackReport) -> bool:
    """Whether a report has no rows, or one row of the prepared layers for each of its layers."""
    rows, prepared = report.rows, report.prepared_layers
    if rows == () and prepared is None:
        return True
    if not isinstance(rows, tuple) or prepared is None or not _is_count(prepared):
        return False
    if not all(map(_is_count, rows)):
        return False
    return len(rows) == report.stack.layers and all(row < prepared for row in rows)


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(text, str) for text in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_COUNT


def _is_real(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))
