"""Tensor methods by the name that `prepare(method=...)` takes: one final `Factors` class a file."""

from qrefta.choices import Method
from qrefta.methods.craft import CRAFT
from qrefta.methods.lorta import LoRTA
from qrefta.methods.lotr import LoTR
from qrefta.methods.refta import ReFTA
from qrefta.methods.tera import TeRA
from qrefta.methods.windows import Windows
from qrefta.nn.factors import Factors

METHODS: dict[Method, type[Factors]] = {
    "refta": ReFTA,
    "craft": CRAFT,
    "tera": TeRA,
    "lotr": LoTR,
    "lorta": LoRTA,
    "windows": Windows,
}
