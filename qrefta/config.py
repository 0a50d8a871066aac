"""What was done to a model: the settings of `prepare` and a row for every stack, as saved in config.json."""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qrefta.linalg.tsvd import TRANSFORMS
from qrefta.methods import METHODS
from qrefta.model.stacks import LayerStack
from qrefta.nn.quantized import QuantFormat

FORMAT_VERSION = 1
_LARGEST = 1 << 40  # that a size or a count may be
_MEASURED = (
    "baseline_error",
    "residual_error",
    "ratio",
    "principal_energy",
    "bytes",
    "bits_per_weight",
)
FACTOR_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class StackRow:
    """One stack of a prepared model, and what preparing it did; the rows of `quant_report`.

    Attributes:
        stack: module path with `*` for the layer number.
        modules, transposed, experts: as in `qrefta.model.stacks.LayerStack`.
        layers, shape: K and (out, in).
        rank: R, or a method's several ranks; 0 for a stack that is quantized only.
        slice_ranks: ReFTA's components of each transformed slice, which sum to `rank`; empty for other methods.
        transform, quant_type: as given to `prepare`; transform is None where the factors are not fitted to the weights,
            quant_type with 16 bits.
        baseline_error: ||W - Q(W)||_F^2 over the stack: the whole weight is quantized (a Gaussian-zero start).
        residual_error: ||W_res - Q(W_res)||_F^2 over the stack, as stored; 0 with 16 bits.
        ratio: residual_error / baseline_error; 1 where there is no error to remove.
        principal_energy: ||principal part||_F^2 / ||W||_F^2.
        bytes: packed weights, scales, and factors with trained numbers at `factor_dtype`.
        bits_per_weight: 8 bytes / (K out in).
        output_error: sum_l E||x (W_l - stored W_l)^T||^2 over the inputs of the calibration, of an expert those of all
            experts in its block; None without one.
        output_ratio: output_error / that of quantizing the whole weight.
    """

    stack: str
    modules: list[str]
    transposed: bool
    layers: int
    shape: list[int]
    rank: int | list[int]
    slice_ranks: list[int]
    transform: str | None
    quant_type: str | None
    baseline_error: float
    residual_error: float
    ratio: float
    principal_energy: float
    bytes: int
    bits_per_weight: float
    output_error: float | None = None
    output_ratio: float | None = None
    experts: int = 0

    @property
    def layer_stack(self) -> LayerStack:
        """The stack that the row is of."""
        return LayerStack(
            self.stack, tuple(self.modules), *self.shape, self.transposed, self.experts
        )

    def report(self) -> dict[str, Any]:
        """The row as `quant_report` shows it: without what only loading needs."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("modules", "transposed")
        }


@register_quantization_config("qrefta")
class QReftaConfig(QuantizationConfigMixin):
    """Settings and rows of a prepared model; the `quantization_config` of its config.json.

    Args:
        method, transform, rank, ranks, trained_params, bits, quant_type, block_size, double_quant, refine, seed,
            factor_dtype, target_modules, modules_to_save, budget_mb, error_ratio: as in `qrefta.prepare`.
        calibrated: whether second moments of the inputs weighted the split.
        base_model: folder or hub name of the dense model that was prepared; None where it had none.
        stacks: a `StackRow` (or its dict) for every stack; empty before the model is prepared.
        format_version: of the checkpoint; a newer one than this package writes is refused.

    Raises:
        ValueError: for a value that is not allowed, an unknown setting, or a newer or damaged format.
    """

    def __init__(
        self,
        method: str = "refta",
        transform: str = "lsm3",
        rank: int | str = 16,
        ranks: Sequence[int] | None = None,
        trained_params: int | None = None,
        bits: int = 4,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        refine: int = 5,
        seed: int = 0,
        factor_dtype: str = "bfloat16",
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
                f"The checkpoint has qrefta format version {format_version!r}; this package reads 1 to "
                f"{FORMAT_VERSION}. Update it: pip install -U qrefta"
            )
        if unknown:
            raise ValueError(
                f"Unknown qrefta settings {sorted(unknown)}; the config is damaged or from elsewhere."
            )
        _one_of("method", method, METHODS)
        _one_of("transform", transform, TRANSFORMS)
        if METHODS[method].fits:
            _one_of(f"transform (with method {method})", transform, METHODS[method].transforms)
        _one_of("bits", bits, (4, 16))
        _one_of("factor_dtype", factor_dtype, FACTOR_DTYPES)
        QuantFormat(quant_type, block_size, _one_of("double_quant", double_quant, (False, True)))
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
                "ranks and trained_params are both given; trained_params chooses the ranks: give one."
            )
        self.budget_mb = _positive("budget_mb", budget_mb)
        self.error_ratio = _positive("error_ratio", error_ratio)
        _check_need(self.rank, self.budget_mb, self.error_ratio, bits)
        if self.rank == "auto" and (method != "refta" or self.ranks or self.trained_params):
            raise ValueError(
                'rank="auto" weighs ReFTA\'s components; with another method, ranks or trained_params it does not go.'
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
        if not isinstance(modules_to_save, list | tuple | None) or not _texts(
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
        self.stacks = [_row(stack) for stack in stacks or []]

    @property
    def format(self) -> QuantFormat | None:
        """The 4-bit format, or None with 16 bits."""
        return (
            QuantFormat(self.quant_type, self.block_size, self.double_quant)
            if self.bits == 4
            else None
        )

    @property
    def torch_factor_dtype(self) -> torch.dtype:
        return FACTOR_DTYPES[self.factor_dtype]

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"stacks": [asdict(row) for row in self.stacks]}


def _row(stack: StackRow | dict[str, Any]) -> StackRow:
    if isinstance(stack, StackRow):
        return stack
    names = {field.name for field in fields(StackRow)}
    needed = {field.name for field in fields(StackRow) if field.default is MISSING}
    if not isinstance(stack, dict) or not needed <= set(stack) <= names:
        raise ValueError(
            f"A stack of the qrefta config is {stack!r}; needed are the keys {sorted(needed)}. "
            "config.json is damaged: restore it from the folder that save_pretrained wrote."
        )
    row = StackRow(**stack)
    wrong = next((name for name, fits in _fitting(row).items() if not fits), None)
    if wrong is not None:
        raise ValueError(
            f"A stack of the qrefta config has {wrong} {getattr(row, wrong)!r}, which no stack has. config.json is "
            "damaged: restore it from the folder that save_pretrained wrote."
        )
    return row


def _fitting(row: StackRow) -> dict[str, bool]:
    """Whether what the model is built from is what `prepare` writes, by attribute."""
    count = isinstance(row.experts, int) and 0 <= row.experts < _LARGEST
    whole = row.rank if isinstance(row.rank, list) and row.rank else [row.rank]
    return {
        "stack": isinstance(row.stack, str),
        "modules": bool(row.modules) and _texts(row.modules),
        "transposed": isinstance(row.transposed, bool),
        "experts": count,
        "layers": _counts(row.layers),
        "shape": isinstance(row.shape, list)
        and len(row.shape) == 2
        and all(_counts(n) and n > 0 for n in row.shape),
        "rank": all(map(_counts, whole)),
        "slice_ranks": isinstance(row.slice_ranks, list) and all(map(_counts, row.slice_ranks)),
    } | {name: _is_real(getattr(row, name)) for name in _MEASURED}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _counts(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_real(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def _one_of(name: str, value: Any, allowed: Any) -> Any:
    if value not in tuple(allowed):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    return value


def _at_least(name: str, value: Any, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {smallest} or more")
    return int(value)


def _positive(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < float("inf"):
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
            'rank="auto" needs either budget_mb (megabytes for all factors) or error_ratio (to reach)'
        )
    if error_ratio is not None and error_ratio > 1:
        raise ValueError(
            f"error_ratio is {error_ratio!r}; it is a share of the error of quantizing whole weights"
        )
    if rank == "auto" and bits == 16:
        raise ValueError(
            'rank="auto" weighs quantization error, and 16 bits have none; give a rank'
        )
