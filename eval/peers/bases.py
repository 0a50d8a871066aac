"""Bases of a model in few bits, ours and the peers', as dense weights; and which are measured.

A base replaces the weights of all linear layers of the blocks. It is computed on a fresh dense
model and written back to it, dequantized and with its factors added: on a CPU a dense product is
several times as fast as dequantizing in every forward pass, and the numbers are the same up to
rounding. `qrefta.merge` does this for our models.

Peers' low-rank pairs stay in float32 and count as 16 bits: rounding them would change little.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

import qrefta
from eval.peers.gptq import gptq
from eval.peers.splits import loftq, pissa, qera
from qrefta.choices import QuantType
from qrefta.config.stack import LayerStack
from qrefta.linalg.metric import output_error
from qrefta.model.prepared import prepared_config
from qrefta.model.stacks import find_stacks
from qrefta.model.weights import read_slice
from qrefta.nn.quantize import quantize, rounded
from qrefta.nn.quantized import QuantFormat
from qrefta.split.batches import Batch
from qrefta.split.moments import Moments, shared_metric

PLAIN = QuantFormat("nf4")  # errors are relative to this format's plain rounding
TEXT = 32_768  # tokens to calibrate with
MUCH_TEXT = (65_536, 131_072)
HALF_TEXT = 16_384  # of `prepare` by default
LITTLE_TEXT = 4_096
R = 64  # of our bases with factors where one R is measured
RANKS = (16, 64, 128, 240)
PEER_RANKS = (64, 240)
TARGETS = (3.3, 3.5)  # mean bits a weight of bases of mixed bits
LOFTQ_ROUNDS = 5
CORRECTIONS = (("loftq", 0), ("qera", TEXT))  # peers that correct a quantization error, and tokens


class Base(NamedTuple):
    """How a base is made; these fields identify its row.

    Attributes:
        maker: a key of PEERS, or qrefta.
        rank: R of a stack. Peers get as many components over its layers together.
        calibration: tokens of text; 0 for none.
        quant_type, block_size, double_quant: the format; a base of mixed bits has no quant_type.
        scales, rounding, refine: of qrefta; None for its defaults.
        generic: calibrated on `prepare`'s generic text instead of text like the first measured one.
        target_bits: largest mean of bits a weight of a base of mixed bits.
    """

    maker: str = "qrefta"
    rank: int = 0
    calibration: int = 0
    quant_type: QuantType | None = "nf4"
    block_size: int = 64
    double_quant: bool = False
    scales: str | None = None
    rounding: str | None = None
    refine: int | None = None
    generic: bool = False
    target_bits: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The base of a row; older rows have no fields for what was the default."""
        return cls(**{name: row[name] for name in cls._fields if name in row})

    @property
    def label(self) -> str:
        """The fields that differ from plain NF4, for people."""
        words = [self.maker]
        words += [f"{self.target_bits:g} bits"] if self.quant_type is None else []
        words += [self.quant_type.upper()] if self.quant_type is not None else []
        words += [f"block {self.block_size}"] if self.block_size != 64 else []
        words += ["double quantization"] if self.double_quant else []
        words += [f"R={self.rank}"] if self.rank else []
        words += [word for word in (self.scales, self.rounding) if word]
        words += ["defaults"] if self.maker == "qrefta" and self.scales is None else []
        words += [f"refine={self.refine}"] if self.refine is not None else []
        words += ["calibrated"] if self.calibration else []
        words += [f"on {self.calibration:,} tokens"] if self.calibration not in (0, TEXT) else []
        words += ["of generic text"] if self.generic else []
        return " ".join(words)

    @property
    def format(self) -> QuantFormat:
        """Its format, unless its bits are mixed."""
        assert self.quant_type is not None, "a base of mixed bits has several"
        return QuantFormat(self.quant_type, self.block_size, self.double_quant)


class Calibration(NamedTuple):
    """Text to calibrate with.

    Attributes:
        moments: of the inputs of the 16-bit model.
        batches: inputs of the model.
    """

    moments: Moments
    batches: list[Batch]


class Made(NamedTuple):
    """The cost of a base.

    Attributes:
        bits_per_weight: of the quantized linear layers, with scales and factors.
        seconds: to make it, without loading the model and without calibrating.
        settings: qrefta's settings, with its defaults; None for a peer.
    """

    bits_per_weight: float
    seconds: float
    settings: dict[str, Any] | None


UNCALIBRATED = partial(Base, scales="searched", rounding="nearest")  # `prepare` without text
CALIBRATED = partial(Base, scales="searched", rounding="feedback", calibration=TEXT)


def sets_of_bases() -> dict[str, list[Base]]:
    """The bases of a language model, by the question that they answer."""
    return {
        "peers": _peers(),
        "refinements": _refinements(),
        "ranks": _ranks(),
        "formats": _formats(),
        "bits": _fewer_bits(),
        "mixed": _mixed_bits(),
        "sequential": _sequential(),
        "calibration": [
            Base("gptq", calibration=LITTLE_TEXT),
            CALIBRATED(calibration=LITTLE_TEXT),
            CALIBRATED(rank=R, calibration=LITTLE_TEXT),
            CALIBRATED(calibration=HALF_TEXT),
            CALIBRATED(rank=R, calibration=HALF_TEXT),
            CALIBRATED(calibration=HALF_TEXT, generic=True),
            CALIBRATED(rank=R, calibration=HALF_TEXT, generic=True),
        ],
    }


def _peers() -> list[Base]:
    pairs = [
        Base(maker, rank, TEXT if maker == "qera" else 0)
        for maker in ("pissa", "loftq", "qera")
        for rank in PEER_RANKS
    ]
    return [
        Base("bitsandbytes"),
        Base("bitsandbytes", double_quant=True),
        Base("bitsandbytes", quant_type="fp4"),
        Base("gptq", calibration=TEXT),
        Base("gptq-ordered", calibration=TEXT),
        *pairs,
    ]


def _refinements() -> list[Base]:
    """Each refinement alone and with the others, without factors and with R of them.

    Error feedback needs calibration. Plain rounding without factors is bitsandbytes' NF4.
    """
    scales = ("absmax", "searched")
    found = []
    for tokens, rounding in ((0, "nearest"), (TEXT, "nearest"), (TEXT, "feedback")):
        for scale in scales:
            base = Base(calibration=tokens, scales=scale, rounding=rounding)
            plain = scale == "absmax" and rounding == "nearest"
            found += [] if plain else [base]
            rounds = (0, 1, 3) if rounding == "feedback" else (0, 5)
            found += [base._replace(rank=R, refine=count) for count in rounds]
    return found


def _ranks() -> list[Base]:
    """Without and with calibration, by R; `_refinements` has R = 64.

    The smallest R is measured with ReFTA's default settings.
    """
    small, *ranks = (rank for rank in RANKS if rank != R)
    plain = [
        Base(rank=rank, scales="absmax", rounding="nearest", refine=5) for rank in (small, *ranks)
    ]
    searched = [UNCALIBRATED(rank=rank, refine=5) for rank in ranks]
    calibrated = [CALIBRATED(rank=rank, refine=1) for rank in ranks]
    return [*plain, Base(rank=small), *searched, Base(rank=small, calibration=TEXT), *calibrated]


def _formats() -> list[Base]:
    """Other formats, plain and with all refinements."""
    formats: list[dict[str, Any]] = [
        {"double_quant": True},
        {"block_size": 32},
        {"block_size": 128},
        {"quant_type": "fp4"},
        {"quant_type": "int4"},
    ]
    found = []
    for one in formats:
        found += [Base(scales="absmax", rounding="nearest", **one)]
        found += [UNCALIBRATED(**one), CALIBRATED(**one), CALIBRATED(rank=R, refine=1, **one)]
    bitsandbytes = ({"double_quant": True}, {"quant_type": "fp4"})  # these are in `_peers`
    same = [Base(scales="absmax", rounding="nearest", **one) for one in bitsandbytes]
    return [base for base in found if base not in same]


def _fewer_bits() -> list[Base]:
    """Three and two bits with scales in 8 bits: plain, with peers' corrections, and ours by R and
    block size.
    """
    found = []
    for kind in ("nf3", "nf2"):
        one: dict[str, Any] = {"quant_type": kind, "double_quant": True}
        found += [Base(scales="absmax", rounding="nearest", **one), UNCALIBRATED(**one)]
        found += [
            Base(maker, rank=max(RANKS), calibration=tokens, **one) for maker, tokens in CORRECTIONS
        ]
        found += [CALIBRATED(**one)]
        found += [CALIBRATED(rank=rank, refine=1, **one) for rank in RANKS]
        found += [
            CALIBRATED(rank=max(RANKS), refine=1, **one | {"block_size": size})
            for size in (32, 128)
        ]
        integers = one | {"quant_type": kind.replace("nf", "int")}
        found += [CALIBRATED(**integers)]
        for maker in ("gptq", "gptq-ordered"):
            found += [Base(maker, calibration=TEXT, **levels) for levels in (one, integers)]
    return found


def _mixed_bits() -> list[Base]:
    """Bits by stack at two means, without and with factors."""
    mixed = partial(CALIBRATED, quant_type=None, double_quant=True)
    return [
        *(mixed(target_bits=target) for target in TARGETS),
        *(mixed(target_bits=target, rank=R, refine=1) for target in TARGETS),
        mixed(target_bits=max(TARGETS), rank=max(RANKS), refine=1),
    ]


def _sequential() -> list[Base]:
    """Layers rounded one after the other, by bits, without and with factors."""
    one = partial(CALIBRATED, rounding="sequential")
    few = partial(one, double_quant=True)
    mixed = partial(few, quant_type=None, target_bits=min(TARGETS))
    return [
        one(),
        few(quant_type="nf3"),
        one(calibration=HALF_TEXT, generic=True),
        one(calibration=HALF_TEXT),
        mixed(),
        few(quant_type="nf3", rank=max(RANKS), refine=1),
        few(),
        one(rank=R, refine=1),
        mixed(rank=R, refine=1),
        few(quant_type="nf2"),
        *(few(quant_type=kind, block_size=32) for kind in ("nf3", "nf2")),
        *(mixed(target_bits=target, block_size=32) for target in (*TARGETS[1:], 3.6)),
        *(mixed(target_bits=3.6, block_size=32, calibration=tokens) for tokens in MUCH_TEXT),
        few(quant_type="nf3", block_size=32, calibration=MUCH_TEXT[0]),
    ]


def encoder_bases() -> list[Base]:
    """The bases of a sentence encoder: fewer, since one set answers all questions."""
    ranks = (48, 192)
    return [
        Base("bitsandbytes"),
        UNCALIBRATED(),
        CALIBRATED(scales="absmax"),
        CALIBRATED(),
        *(Base(rank=r, scales="absmax", rounding="nearest", refine=5) for r in ranks),
        *(UNCALIBRATED(rank=r, refine=5) for r in ranks),
        *(CALIBRATED(rank=r, refine=1) for r in ranks),
    ]


def largest_rank(model: PreTrainedModel) -> int:
    """The largest R that all stacks of a model allow."""
    return min(
        stack.layers * min(stack.out_features, stack.in_features) for stack in find_stacks(model)
    )


def make_base(model: PreTrainedModel, base: Base, text: Calibration | None) -> Made:
    """Replace the weights of a dense model by the weights of a base.

    Args:
        model: dense, in float32; changed in place.
        base: how to make it.
        text: to calibrate with, if the base is calibrated.
    """
    start = perf_counter()
    if base.maker == "qrefta":
        bits, settings = _prepare(model, base, text)
    else:
        bits = _quantize_with_peer(model, base, None if text is None else text.moments)
        settings = None
    return Made(bits, perf_counter() - start, settings)


def _prepare(
    model: PreTrainedModel, base: Base, text: Calibration | None
) -> tuple[float, dict[str, Any]]:
    """Bits a weight and settings of our base; the model gets dense weights again."""
    names = (
        "quant_type",
        "block_size",
        "double_quant",
        "scales",
        "rounding",
        "refine",
        "target_bits",
    )
    given = {name: getattr(base, name) for name in names if getattr(base, name) is not None}
    if text is not None and base.rounding == "sequential":
        given["calibration"] = text.batches
    elif text is not None:
        given["moments"] = text.moments
    qrefta.prepare(
        model,
        "auto" if base.quant_type is None else base.format.bits,
        base.rank,
        method="refta",
        progress=False,
        **given,
    )
    config = prepared_config(model)
    stored_bytes = sum(report.bytes for report in config.stacks)
    weights = sum(report.weights for report in config.stacks)
    qrefta.merge(model, torch.float32)
    return 8 * stored_bytes / weights, config.settings.to_dict()


@torch.no_grad()
def _quantize_with_peer(model: PreTrainedModel, base: Base, moments: Moments | None) -> float:
    """Bits a weight of a peer's base."""
    stored_bytes = 0
    count = 0
    for stack in find_stacks(model):
        for index in range(stack.layers):
            weight = read_slice(model, stack, index)
            rank = base.rank // stack.layers + (index < base.rank % stack.layers)
            dense = PEERS[base.maker](weight.clone(), base, rank, moments, stack, index)
            weight.copy_(dense)
            stored_bytes += sum(base.format.packed_sizes(weight.numel()).values())
            stored_bytes += 2 * rank * sum(weight.shape)
            count += weight.numel()
    return 8 * stored_bytes / count


def _bitsandbytes(weight: Tensor, base: Base, *_: Any) -> Tensor:
    """Plain rounding, with the bits of bitsandbytes' kernels."""
    return quantize(weight, base.format).dequantize(torch.float32)


def _gptq(
    weight: Tensor, base: Base, rank: int, moments: Moments, stack: LayerStack, index: int
) -> Tensor:
    moment = moments.of(stack.module_and_expert(index)[0])
    ordered = base.maker == "gptq-ordered"
    kind = base.format.quant_type
    return gptq(weight, moment, base.block_size, quant_type=kind, ordered=ordered)


def _pissa(weight: Tensor, base: Base, rank: int, *_: Any) -> Tensor:
    up, down, rest = pissa(weight, rank)
    return rounded(rest, base.format) + up @ down


def _loftq(weight: Tensor, base: Base, rank: int, *_: Any) -> Tensor:
    up, down, rest = loftq(weight, rank, LOFTQ_ROUNDS, base.format)
    return rounded(rest, base.format) + up @ down


def _qera(
    weight: Tensor, base: Base, rank: int, moments: Moments, stack: LayerStack, index: int
) -> Tensor:
    alone = replace(stack, modules=(stack.module_and_expert(index)[0],))
    quantized = rounded(weight, base.format)
    up, down = qera(weight - quantized, rank, shared_metric(moments, alone))
    return quantized + up @ down


PEERS: dict[str, Callable[..., Tensor]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "gptq-ordered": _gptq,
    "pissa": _pissa,
    "loftq": _loftq,
    "qera": _qera,
}


class Errors(NamedTuple):
    """Squared errors of all linear layers of the blocks together.

    Attributes:
        weight: sum of ||W - What||_F^2.
        output: sum of E||x (W - What)^T||^2.
    """

    weight: float
    output: float


def plain_errors(dense: PreTrainedModel, moments: Moments) -> Errors:
    """The errors of plain rounding to NF4."""
    return _errors(dense, lambda stack, index, weight: rounded(weight, PLAIN), moments)


def errors_of(model: PreTrainedModel, dense: PreTrainedModel, moments: Moments) -> Errors:
    """The errors of a base.

    Args:
        model: with the weights of the base.
        dense: the 16-bit model.
        moments: of the inputs of the dense model, on text that the base was not calibrated on.
    """
    return _errors(dense, lambda stack, index, _: read_slice(model, stack, index), moments)


def _errors(
    dense: PreTrainedModel, weight_of: Callable[[LayerStack, int, Tensor], Tensor], moments: Moments
) -> Errors:
    weights = 0.0
    outputs = 0.0
    for stack in find_stacks(dense):
        for index in range(stack.layers):
            weight = read_slice(dense, stack, index)
            error = weight - weight_of(stack, index, weight)
            weights += error.double().square().sum().item()
            outputs += output_error(error, moments.of(stack.module_and_expert(index)[0]))
    return Errors(weights, outputs)


def chosen_bases(
    bases: list[Base],
    only: str,
    limit: int,
    known: list[dict[str, Any]],
    setting: dict[str, Any],
) -> list[Base]:
    """The bases that are still to be measured.

    Args:
        bases: to choose from.
        only: words that the label contains; "" for all.
        limit: the largest R of the model.
        known: rows that exist.
        setting: the fields of a row that identify its model and texts.
    """
    measured = {Base.of(row) for row in known if setting.items() <= row.items()}
    return [
        base
        for base in dict.fromkeys(bases)
        if only in base.label and base.rank <= limit and base not in measured
    ]


def base_row(
    base: Base,
    model: PreTrainedModel,
    dense: PreTrainedModel,
    texts: dict[tuple[int, bool], Calibration],
    held_out: Moments,
    plain: Errors,
) -> dict[str, Any]:
    """Make a base on a fresh model: its cost, and its errors relative to plain rounding to NF4.

    Args:
        base: how to make it.
        model: dense; it gets the weights of the base.
        dense: the same model, which stays as it is.
        texts: to calibrate with, by tokens and whether they are generic.
        held_out: moments to measure the output error with.
        plain: the errors of plain rounding to NF4.
    """
    made = make_base(model, base, texts.get((base.calibration, base.generic)))
    found = errors_of(model, dense, held_out)
    return {
        **base._asdict(),
        **made._asdict(),
        "weight_error": found.weight / plain.weight,
        "output_error": found.output / plain.output,
    }
