"""Tensor methods by the name that `prepare(method=...)` takes: one final `Factors` class a file."""

from qrefta.factors import Factors
from qrefta.methods.refta import ReFTA

METHODS: dict[str, type[Factors]] = {"refta": ReFTA}
