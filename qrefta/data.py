"""Names of qrefta 0.1 that moved to `qrefta.train.data`."""

from qrefta._deprecations import moved

__getattr__ = moved(
    __name__,
    {
        name: f"qrefta.train.data:{name}"
        for name in ("load_classification", "pick_splits", "read_splits", "with_test")
    },
)
