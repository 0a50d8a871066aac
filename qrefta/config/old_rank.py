"""The five settings that chose the rank in qrefta 0.1, as one `rank`."""

from typing import Any

from qrefta.choices import AUTO_RANK
from qrefta.config.checks import positive
from qrefta.config.rank import RankBudget, RankSetting

OLD_RANK_SETTINGS = (
    "ranks",
    "trained_params",
    "budget_mb",
    "error_ratio",
)  # of qrefta 0.1, with rank="auto"


def with_new_rank(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords with one `rank` for the five settings that chose it in qrefta 0.1, where refta was
    the default method.

    Raises:
        ValueError: if the old settings contradict each other.
    """
    kept = {name: value for name, value in keywords.items() if name not in OLD_RANK_SETTINGS}
    old = {name: keywords.get(name) for name in OLD_RANK_SETTINGS}
    rank = kept.get("rank", AUTO_RANK)
    given = {name: value for name, value in old.items() if value is not None}
    if not given:
        return kept
    if len(given) != 1:
        raise ValueError(
            f"rank came with {given}; of ranks, trained_params, budget_mb and error_ratio only one "
            "can be given. A RankBudget as rank replaces all of them."
        )
    ((name, value),) = given.items()
    if name in ("budget_mb", "error_ratio") and rank != AUTO_RANK:
        raise ValueError(
            f'budget_mb and error_ratio go with rank="auto"; rank is {rank!r} with {name}={value!r}'
        )
    return {"method": "refta"} | kept | {"rank": _rank_from_old(name, value)}


def _rank_from_old(name: str, value: Any) -> RankSetting:
    if name == "ranks":
        if not isinstance(value, list | tuple):
            raise ValueError(f"ranks is {value!r}; give the three ranks of CRAFT")
        return tuple(value)
    if name == "trained_params":
        return RankBudget(trainable_parameters=value)
    if name == "error_ratio":
        return RankBudget(error_ratio=value)
    return RankBudget(bytes=max(round(positive(name, value) * 1e6), 1))
