"""The first words of the report: which base, which method and which rank, from the rows."""

from eval.peers.bases import Base
from eval.report import kept
from eval.report.comparison import STUDIES, Compared, gained, study_of
from eval.report.findings import Row
from eval.report.scores import Score, difference, shown
from eval.tasks.task import METRICS

OURS = "qrefta"  # the default method, in the short table of bases


def summary(files: dict[str, list[Row]]) -> list[str]:
    """Sentences that the rows allow: of bases, of training, of ranks."""
    groups = kept.groups(files.get("kld", []), "language")
    accuracy = files.get("accuracy", [])
    told = [_base(groups[0])] if groups else []
    told += [_method(compared, accuracy) for compared in STUDIES if compared.main]
    told += [_rank_of_base(groups[0])] if groups else []
    return [sentence for sentence in told if sentence]


def _bases(group: kept.Group) -> dict[str, Row]:
    """The bases of the short table by name."""
    found = {Base.of(row): row for row in group.rows}
    return {name: found[base] for name, base in kept.SELECTED.items() if base in found}


def _base(group: kept.Group) -> str:
    bases = _bases(group)
    others = [name for name in bases if not name.startswith(OURS)]
    if OURS not in bases or not others:
        return ""
    text = group.measured[0]
    nearest = min(others, key=lambda name: kept.divergence(bases[name], text))
    smaller = [f"{OURS}, double quantization"]
    named = [name for name in [*smaller, nearest, "bitsandbytes NF4"] if name in bases]
    return (
        f"Base: {_distance(OURS, bases, text)} away from the 16-bit {group.model} (KL divergence "
        f"on {text} in nats, lower is better); "
        f"{', '.join(_distance(name, bases, text) for name in dict.fromkeys(named))}."
    )


def _rank_of_base(group: kept.Group) -> str:
    bases = _bases(group)
    split = [name for name in bases if name.startswith(f"{OURS}, `method")]
    if not split or OURS not in bases:
        return ""
    text = group.measured[0]
    listed = ", ".join(_distance(name, bases, text) for name in split)
    return (
        f"Rank of the components that a base keeps outside of its 4 bits: "
        f"{_distance(OURS, bases, text)} without, {listed}."
    )


def _distance(name: str, bases: dict[str, Row], text: str) -> str:
    row = bases[name]
    value = kept.divergence(row, text)
    return f"{name.replace('`', '')} {value:.3f} ({row['bits_per_weight']:.2f} bits a weight)"


def _method(compared: Compared, accuracy: list[Row]) -> str:
    """The default method and the rival in all sizes that were trained."""
    found = study_of(compared, accuracy)
    if found is None:
        return ""
    _, methods = found
    rival = methods[compared.rival]
    more = METRICS[rival.metric].more_is_better
    scores = {name: methods[key] for name, key in compared.methods.items() if key in methods}
    ours = [name for name in scores if name.startswith(f"{OURS}, R")]
    if not ours:
        return ""
    pair = difference(scores[ours[0]], rival, None)
    verdict = "" if pair is None else f", better than the first by {gained(pair)}"
    rivals = [_score(name, scores[name]) for name in scores if not name.startswith(OURS)]
    return (
        f"Method: {compared.caption}, {rival.metric} ({'higher' if more else 'lower'} is better): "
        f"{'; '.join(rivals)}; {_score(ours[0], scores[ours[0]])}{verdict}."
    )


def _score(name: str, score: Score) -> str:
    return f"{name}: {shown(score)} ({score.adapter:,} trainable parameters)"
