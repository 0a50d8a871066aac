"""`StackReport`: what preparing did to one stack, as measured, printed, saved and read again."""

from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Real
from typing import Any, Self

from qrefta.choices import QUANT_TYPES, QuantType, Transform
from qrefta.config.checks import RESTORE
from qrefta.config.stack import LayerStack

_LARGEST_COUNT = 1 << 40  # the largest size or count that a config may state


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
                f"A stack of the qrefta config has {wrong} {value!r}, which no stack has. {RESTORE}"
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
            f"{RESTORE}"
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
            f"{RESTORE}"
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
            f"{RESTORE}"
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
