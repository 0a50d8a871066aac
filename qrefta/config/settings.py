"""`Settings`: everything that decides how a model is prepared.

To add a setting, add a field to `Settings` and its type to `SettingsKeywords`. `prepare`,
`prepare_checkpoint`, `plan`, the command line, the saved config and the model card take it from
there.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypedDict

from qrefta.choices import (
    AUTO_BITS,
    AUTO_RANK,
    AUTO_ROUNDING,
    BITS,
    BLOCK_SIZES,
    FACTOR_DTYPES,
    FITTED,
    METHOD_NAMES,
    MIXED_TYPES,
    QUANT_TYPES,
    ROUNDINGS,
    SCALES,
    TRANSFORMS,
    Bits,
    FactorDtype,
    Method,
    QuantType,
    RoundingName,
    Scales,
    Transform,
    bits_of,
)
from qrefta.config.checks import (
    RESTORE,
    checked,
    module_names,
    one_of,
    positive,
    seed_value,
    whole,
)
from qrefta.config.rank import RankBudget, RankSetting, check_rank


def _check_method(name: str, value: Any) -> Any:
    methods = sys.modules.get("qrefta.methods")  # which lists methods from outside the package too
    known = METHOD_NAMES if methods is None else tuple(methods.METHODS)
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    return str(value)


def _check_targets(name: str, value: Any) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value
    return module_names(name, value)


def _check_modules(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else module_names(name, value)


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
        block_size: weights that share a scale. Default: 64, and 32 below four bits, where smaller
            blocks keep more of a model than the same bytes elsewhere (docs/fewer-bits.md).
        double_quant: store the scales in 8 bits, as QLoRA does. Default: with bits other than 4.
        scales: searched: the scale of every block is the best of twelve, of both signs, weighted by
            the second moments of the inputs; without moments the best of six for NF4, which
            change the largest magnitude little. absmax: the largest magnitude.
        rounding: feedback: with moments, the columns of a residual are rounded one after the other
            and take in the errors of the columns before (GPTQ, arXiv 2210.17323); without moments
            it is nearest. sequential: the same, and the layers are rounded in the order in which
            they run, each for the inputs that the quantized layers before it give (QEP, arXiv
            2504.09629); it takes longer, and needs calibration text, the model in memory,
            and blocks that run one after the other (`qrefta.split.sequential`). nearest: the
            nearest level. auto: sequential where it is possible and pays, with fewer than four
            bits and with rank=0, which trains no factors; else feedback. With four bits and
            factors the models trained equally well, and feedback prepared three times as fast
            (docs/results.md). A prepared model holds the choice.
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
        metadata=one_of(
            BITS,
            "Bits of a weight; 16 leaves the residual unquantized (ablation); auto chooses for "
            "every stack, within --target-bits.",
        ),
    )
    target_bits: float | None = field(
        default=None,
        metadata=checked(
            lambda name, value: None if value is None else positive(name, value),
            "With bits auto: the largest mean of bits a weight, with scales and factors.",
        ),
    )
    rank: RankSetting = field(
        default=AUTO_RANK,
        metadata=checked(
            check_rank,
            "Components of every stack over all its layers; auto: by their number; or 24,100,100 "
            "for craft; or a budget: bytes=8MB, error=0.5, parameters=300000.",
        ),
    )
    method: Method = field(default="windows", metadata=checked(_check_method, "Tensor method."))
    transform: Transform = field(default="lsm3", metadata=one_of(TRANSFORMS, "Mode-3 transform."))
    quant_type: QuantType | None = field(
        default=None,
        metadata=one_of((None, *QUANT_TYPES), "Format of the weights; default: nf4, nf3 or nf2."),
    )
    block_size: int | None = field(
        default=None,
        metadata=one_of(
            (None, *BLOCK_SIZES), "Weights that share a scale; default: 64, below four bits 32."
        ),
    )
    double_quant: bool | None = field(
        default=None,
        metadata=one_of(
            (None, False, True), "Store the scales in 8 bits; default: with bits other than 4."
        ),
    )
    scales: Scales = field(
        default="searched",
        metadata=one_of(SCALES, "Choice of every block's scale; absmax: the largest magnitude."),
    )
    rounding: RoundingName = field(
        default=AUTO_ROUNDING,
        metadata=one_of(
            ROUNDINGS,
            "How weights are rounded. nearest: to the nearest level. feedback, if calibrated: "
            "columns correct errors of earlier columns. sequential: layers correct earlier layers, "
            "too. auto: sequential with fewer than four bits or rank 0, where possible; else "
            "feedback.",
        ),
    )
    target_modules: str | Sequence[str] | None = field(
        default=None,
        metadata=checked(
            _check_targets, "Path end of linear layers that get factors; repeat for more."
        ),
    )
    modules_to_save: Sequence[str] = field(
        default=(),
        metadata=checked(_check_modules, "Path end of a module to train in full; repeat for more."),
    )
    refine: int | None = field(
        default=None,
        metadata=checked(
            lambda name, value: None if value is None else whole(name, value, 0),
            "Rounds that refit factors of refta and craft to the residual; default: 5, "
            "calibrated 1.",
        ),
    )
    seed: int = field(default=0, metadata=checked(seed_value, "Seed of everything random."))
    factor_dtype: FactorDtype = field(
        default="bfloat16", metadata=one_of(FACTOR_DTYPES, "Dtype of the factors.")
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = setting.metadata["check"](setting.name, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
        if self.bits == AUTO_BITS or self.target_bits is not None:
            self._check_target_bits()
        if self.bits != 16 and self.block_size is None:
            object.__setattr__(self, "block_size", 64 if self.bits == 4 else 32)
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
                f"must be one of {', '.join(MIXED_TYPES)}. {RESTORE}"
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

    @property
    def may_round_in_order(self) -> bool:
        """Whether layers are rounded in the order in which they run, where that is possible.

        rounding="auto" does so where it pays: below four bits, and without factors.
        """
        if self.rounding == AUTO_ROUNDING:
            return self.bits != 16 and (self.bits != 4 or self.rank == 0)
        return self.must_round_in_order

    @property
    def must_round_in_order(self) -> bool:
        """Whether layers are rounded in the order in which they run, or the call is refused."""
        return self.rounding == "sequential" and self.bits != 16

    @property
    def may_feed_back(self) -> bool:
        """Whether rounding takes errors in, if the inputs of the layers are known."""
        return self.rounding != "nearest" and self.bits != 16

    def with_rounding(self, in_order: bool) -> Self:
        """The settings with the choice that rounding="auto" leaves open."""
        if self.rounding != AUTO_ROUNDING:
            return self
        return replace(self, rounding="sequential" if in_order else "feedback")

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


class SettingsKeywords(TypedDict, total=False):
    """The keywords of `Settings` besides `bits` and `rank`, for type checkers and editors."""

    target_bits: float | None
    method: Method
    transform: Transform
    quant_type: QuantType | None
    block_size: int | None
    double_quant: bool | None
    scales: Scales
    rounding: RoundingName
    target_modules: str | Sequence[str] | None
    modules_to_save: Sequence[str]
    refine: int | None
    seed: int
    factor_dtype: FactorDtype
