"""What was done to a model: the settings of `prepare` and a row for every stack, as saved in config.json."""

from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qrefta.methods import METHODS
from qrefta.quantize import QuantFormat
from qrefta.tensor import TRANSFORMS

FORMAT_VERSION = 1
FACTOR_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class StackRow:
    """One stack of a prepared model, and what preparing it did; the rows of `quant_report`.

    Attributes:
        stack: module path with `*` for the layer number.
        modules: the K module paths in layer order.
        transposed: the modules were `Conv1D`.
        layers, shape: K and (out, in).
        rank: R, 0 for a stack that is quantized only.
        slice_ranks: components of each transformed slice; they sum to `rank`.
        transform, quant_type: as given to `prepare`; quant_type is None with 16 bits.
        baseline_error: ||W - Q(W)||_F^2 over the stack: the whole weight is quantized (a Gaussian-zero start).
        residual_error: ||W_res - Q(W_res)||_F^2 over the stack, as stored; 0 with 16 bits.
        ratio: residual_error / baseline_error; 1 where there is no error to remove.
        principal_energy: ||principal part||_F^2 / ||W||_F^2.
        bytes: packed weights, scales, and factors with trained numbers at `factor_dtype`.
        bits_per_weight: 8 bytes / (K out in).
    """

    stack: str
    modules: list[str]
    transposed: bool
    layers: int
    shape: list[int]
    rank: int
    slice_ranks: list[int]
    transform: str | None
    quant_type: str | None
    baseline_error: float
    residual_error: float
    ratio: float
    principal_energy: float
    bytes: int
    bits_per_weight: float

    def report(self) -> dict[str, Any]:
        """The row as `quant_report` shows it: without what only loading needs."""
        return {key: value for key, value in asdict(self).items() if key not in ("modules", "transposed")}


@register_quantization_config("qrefta")
class QReftaConfig(QuantizationConfigMixin):
    """Settings and rows of a prepared model; the `quantization_config` of its config.json.

    Args:
        method, transform, rank, bits, quant_type, block_size, double_quant, refine, seed, factor_dtype,
            target_modules, modules_to_save: as in `qrefta.prepare`.
        stacks: a `StackRow` (or its dict) for every stack; empty before the model is prepared.
        format_version: of the checkpoint; a newer one than this package writes is refused.

    Raises:
        ValueError: for a value that is not allowed, an unknown setting, or a newer or damaged format.
    """

    def __init__(
        self,
        method: str = "refta",
        transform: str = "lsm3",
        rank: int = 16,
        bits: int = 4,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        refine: int = 0,
        seed: int = 0,
        factor_dtype: str = "bfloat16",
        target_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
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
            raise ValueError(f"Unknown qrefta settings {sorted(unknown)}; the config is damaged or from elsewhere.")
        _one_of("method", method, METHODS)
        _one_of("transform", transform, TRANSFORMS)
        _one_of("bits", bits, (4, 16))
        _one_of("factor_dtype", factor_dtype, FACTOR_DTYPES)
        QuantFormat(quant_type, block_size, double_quant)
        self.quant_method = quant_method
        self.format_version = format_version
        self.method = method
        self.transform = transform
        self.rank = _at_least("rank", rank, 1)
        self.bits = bits
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        self.refine = _at_least("refine", refine, 0)
        self.seed = _at_least("seed", seed, 0)
        self.factor_dtype = factor_dtype
        self.target_modules = target_modules
        self.modules_to_save = list(modules_to_save or [])
        self.stacks = [_row(stack) for stack in stacks or []]

    @property
    def format(self) -> QuantFormat | None:
        """The 4-bit format, or None with 16 bits."""
        return QuantFormat(self.quant_type, self.block_size, self.double_quant) if self.bits == 4 else None

    @property
    def torch_factor_dtype(self) -> torch.dtype:
        return FACTOR_DTYPES[self.factor_dtype]

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"stacks": [asdict(row) for row in self.stacks]}


def _row(stack: StackRow | dict[str, Any]) -> StackRow:
    if isinstance(stack, StackRow):
        return stack
    names = {field.name for field in fields(StackRow)}
    if not isinstance(stack, dict) or set(stack) != names:
        raise ValueError(
            f"A stack of the qrefta config is {stack!r}; needed are the keys {sorted(names)}. "
            "config.json is damaged: restore it from the folder that save_pretrained wrote."
        )
    return StackRow(**stack)


def _one_of(name: str, value: Any, allowed: Any) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")


def _at_least(name: str, value: Any, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {smallest} or more")
    return int(value)
