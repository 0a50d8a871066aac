"""QReftaConfig: settings and rows of a prepared model, as transformers' quantization config.

`qrefta.hf_quantizer` registers it. This module is imported while transformers imports its models
(see `qrefta._plugin`). So nothing here may import `transformers.modeling_utils`, nor bitsandbytes,
which takes seconds.
"""

from collections.abc import Sequence
from dataclasses import asdict
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from qrefta.choices import (
    BITS,
    BLOCK_SIZES,
    FACTOR_DTYPES,
    FITTED,
    METHOD_NAMES,
    QUANT_TYPES,
    TRANSFORMS,
    FactorDtype,
    Method,
    QuantType,
    Transform,
)
from qrefta.config import FORMAT_VERSION, StackRow, is_texts, read_row

if TYPE_CHECKING:
    from qrefta.nn.quantized import QuantFormat


class QReftaConfig(QuantizationConfigMixin):
    """Settings and rows of a prepared model; the `quantization_config` of its config.json.

    Args:
        method, transform, rank, ranks, trained_params, bits, quant_type, block_size, double_quant,
        refine, seed,
            factor_dtype, target_modules, modules_to_save, budget_mb, error_ratio: as in
                `qrefta.prepare`.
        calibrated: whether second moments of the inputs weighted the split.
        base_model: folder or hub name of the dense model that was prepared; None where it had none.
        stacks: a `StackRow` (or its dict) for every stack; empty before the model is prepared.
        format_version: of the checkpoint; a newer one than this package writes is refused.

    Raises:
        ValueError: for a value that is not allowed, an unknown setting, or a newer or damaged
            format.
    """

    def __init__(
        self,
        method: Method = "refta",
        transform: Transform = "lsm3",
        rank: int | str = 16,
        ranks: Sequence[int] | None = None,
        trained_params: int | None = None,
        bits: int = 4,
        quant_type: QuantType = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        refine: int = 5,
        seed: int = 0,
        factor_dtype: FactorDtype = "bfloat16",
        target_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
        budget_mb: float | None = None,
        error_ratio: float | None = None,
        calibrated: bool = False,
        base_model: str | None = None,
        stacks: list[StackRow] | list[dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = "qrefta",
        **unknown: Any,
    ) -> None:
        if not isinstance(format_version, int) or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has qrefta format version {format_version!r}; this package reads "
                f"1 to {FORMAT_VERSION}. Update it: pip install -U qrefta"
            )
        if unknown:
            raise ValueError(
                f"Unknown qrefta settings {sorted(unknown)}; the config is damaged or from "
                "elsewhere."
            )
        _one_of("method", method, METHOD_NAMES)
        _one_of("transform", transform, TRANSFORMS)
        if method in FITTED:
            _one_of(f"transform (with method {method})", transform, FITTED[method])
        _one_of("bits", bits, BITS)
        _one_of("factor_dtype", factor_dtype, FACTOR_DTYPES)
        _one_of("quant_type", quant_type, QUANT_TYPES)
        _one_of("block_size", block_size, BLOCK_SIZES)
        _one_of("double_quant", double_quant, (False, True))
        self.quant_method = quant_method
        self.format_version = format_version
        self.method = method
        self.transform = transform
        self.rank = rank if rank == "auto" else _at_least("rank", rank, 1)
        if not isinstance(ranks, Sequence | None) or isinstance(ranks, str):
            raise ValueError(f"ranks is {ranks!r}; it must be a list of whole numbers")
        self.ranks = (
            None if ranks is None else [_at_least("each of ranks", one, 1) for one in ranks]
        )
        self.trained_params = (
            None if trained_params is None else _at_least("trained_params", trained_params, 1)
        )
        if self.ranks is not None and self.trained_params is not None:
            raise ValueError(
                "ranks and trained_params are both given; trained_params chooses the ranks: give "
                "one."
            )
        self.budget_mb = _positive("budget_mb", budget_mb)
        self.error_ratio = _positive("error_ratio", error_ratio)
        _check_need(self.rank, self.budget_mb, self.error_ratio, bits)
        if self.rank == "auto" and (method != "refta" or self.ranks or self.trained_params):
            raise ValueError(
                'rank="auto" weighs ReFTA\'s components; it goes neither with another method, nor '
                "with ranks or trained_params."
            )
        self.calibrated = calibrated
        self.base_model = base_model
        self.bits = bits
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        self.refine = _at_least("refine", refine, 0)
        self.seed = _at_least("seed", seed, 0)
        self.factor_dtype = factor_dtype
        self.target_modules = target_modules
        if not isinstance(modules_to_save, list | tuple | None) or not is_texts(
            list(modules_to_save or [])
        ):
            raise ValueError(
                f"modules_to_save is {modules_to_save!r}; it must be a list of module names"
            )
        self.modules_to_save = list(modules_to_save or [])
        if not isinstance(stacks, list | None):
            raise ValueError(
                f"stacks is {stacks!r}; it must be a list. config.json is damaged: restore it."
            )
        self.stacks = [read_row(stack) for stack in stacks or []]

    @property
    def format(self) -> "QuantFormat | None":
        """The 4-bit format, or None with 16 bits."""
        if self.bits == 16:
            return None
        from qrefta.nn.quantized import QuantFormat  # imports bitsandbytes

        return QuantFormat(self.quant_type, self.block_size, self.double_quant)

    @property
    def torch_factor_dtype(self) -> torch.dtype:
        return getattr(torch, self.factor_dtype)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"stacks": [asdict(row) for row in self.stacks]}


def _one_of(name: str, value: Any, allowed: Any) -> Any:
    if value not in tuple(allowed) or isinstance(value, float):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    return value


def _at_least(name: str, value: Any, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {smallest} or more")
    return int(value)


def _positive(name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < float(value) < float("inf"):
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return float(value)


def _check_need(
    rank: int | str, budget_mb: float | None, error_ratio: float | None, bits: int
) -> None:
    """Raise unless `rank` is a number alone, or "auto" with one of the two needs."""
    if rank != "auto" and (budget_mb is not None or error_ratio is not None):
        raise ValueError(f'budget_mb and error_ratio go with rank="auto"; rank is {rank!r}')
    if rank == "auto" and (budget_mb is None) == (error_ratio is None):
        raise ValueError(
            'rank="auto" needs either budget_mb (megabytes for all factors) or error_ratio (the '
            "squared error to reach)"
        )
    if error_ratio is not None and error_ratio > 1:
        raise ValueError(
            f"error_ratio is {error_ratio!r}; it is a share of the error of quantizing whole "
            "weights"
        )
    if rank == "auto" and bits == 16:
        raise ValueError(
            'rank="auto" weighs quantization error, and 16 bits have none; give a rank'
        )
