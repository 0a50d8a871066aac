"""One row for every stack of a prepared model, as saved in config.json."""

from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qrefta.model.stacks import LayerStack

FORMAT_VERSION = 2  # 1: without checksums in the files' headers
BANK = "qrefta_factors"  # name of the factor bank at a model's root
_LARGEST = 1 << 40  # size or count
_MEASURED = (
    "baseline_error",
    "residual_error",
    "ratio",
    "principal_energy",
    "bytes",
    "bits_per_weight",
)


@dataclass(frozen=True)
class StackRow:
    """One stack of a prepared model and its measurements; the rows of `quant_report`.

    Attributes:
        stack: module path with `*` for the layer number.
        modules, transposed, experts: as in `qrefta.model.stacks.LayerStack`.
        layers, shape: K and (out, in).
        rank: R, or a method's several ranks; 0 for a stack that is quantized only.
        slice_ranks: ReFTA's components of each transformed slice, which sum to `rank`; empty for
            other methods.
        transform, quant_type: as given to `prepare`; transform is None where the factors are not
            fitted to the weights, quant_type with 16 bits.
        baseline_error: ||W - Q(W)||_F^2 over the stack: the whole weight is quantized (a
            Gaussian-zero start).
        residual_error: ||W_res - Q(W_res)||_F^2 over the stack, as stored; 0 with 16 bits.
        ratio: residual_error / baseline_error; 1 where there is no error to remove.
        principal_energy: ||principal part||_F^2 / ||W||_F^2.
        bytes: packed weights, scales, and factors with trainable parameters at `factor_dtype`.
        bits_per_weight: 8 bytes / (K out in).
        output_error: sum_l E||x (W_l - stored W_l)^T||^2 over the inputs of the calibration, for
            an expert over the inputs of all experts in its block; None without a calibration.
        output_ratio: output_error / the same error with the whole weight quantized.
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
    def layer_stack(self) -> "LayerStack":
        """The stack that the row describes."""
        from qrefta.model.stacks import LayerStack  # imports torch

        out_features, in_features = self.shape
        modules = tuple(self.modules)
        return LayerStack(
            self.stack, modules, out_features, in_features, self.transposed, self.experts
        )

    def report(self) -> dict[str, Any]:
        """The row as `quant_report` shows it: without the attributes that only loading needs."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("modules", "transposed")
        }


def read_row(stack: StackRow | dict[str, Any]) -> StackRow:
    """A row, from the dict in config.json.

    Raises:
        ValueError: if it is damaged.
    """
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
            f"A stack of the qrefta config has {wrong} {getattr(row, wrong)!r}, which no stack "
            "has. config.json is damaged: restore it from the folder that save_pretrained wrote."
        )
    return row


def _fitting(row: StackRow) -> dict[str, bool]:
    """Whether each attribute that the model is built from is as `prepare` writes it."""
    count = isinstance(row.experts, int) and 0 <= row.experts < _LARGEST
    whole = row.rank if isinstance(row.rank, list) and row.rank else [row.rank]
    return {
        "stack": isinstance(row.stack, str),
        "modules": bool(row.modules) and is_texts(row.modules),
        "transposed": isinstance(row.transposed, bool),
        "experts": count,
        "layers": _counts(row.layers),
        "shape": isinstance(row.shape, list)
        and len(row.shape) == 2
        and all(_counts(n) and n > 0 for n in row.shape),
        "rank": all(map(_counts, whole)),
        "slice_ranks": isinstance(row.slice_ranks, list) and all(map(_counts, row.slice_ranks)),
    } | {name: _is_real(getattr(row, name)) for name in _MEASURED}


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _counts(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_real(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))
