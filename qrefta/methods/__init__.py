"""Tensor methods by the name that `prepare(method=...)` takes: one final `Factors` class a file."""

from qrefta.choices import Method
from qrefta.config import Settings
from qrefta.methods.craft import CRAFT
from qrefta.methods.lorta import LoRTA
from qrefta.methods.lotr import LoTR
from qrefta.methods.refta import ReFTA
from qrefta.methods.tera import TeRA
from qrefta.nn.factors import Factors

METHODS: dict[Method, type[Factors]] = {
    "refta": ReFTA,
    "craft": CRAFT,
    "tera": TeRA,
    "lotr": LoTR,
    "lorta": LoRTA,
}


def check_method(settings: Settings) -> None:
    """Refuse a transform that the method cannot take.

    Raises:
        ValueError: naming the transforms that it takes.
    """
    method = METHODS[settings.method]
    if method.fits and settings.transform not in method.transforms:
        allowed = ", ".join(method.transforms)
        raise ValueError(
            f"transform (with method {settings.method}) is {settings.transform!r}; it must be one of {allowed}"
        )
