"""python -m eval.output_error: error of a model's outputs on text, by kind of split.

What a user feels is E||x (W - What)^T||^2, not ||W - What||_F^2. Of one file of text, every other batch calibrates and
the rest measures. For each stack, relative to quantizing W whole:

- plain: ReFTA's split, one shot, and refined;
- qera: W quantized whole, then the best rank-R correction of its error under the inputs' metric (QERA's idea, for a
  stack; same number of components);
- calibrated: the activation-aware split, refined.
"""

from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from eval.demo import model_folder
from eval.rows import append
from qrefta.config import QReftaConfig
from qrefta.data import read_calibration
from qrefta.moments import Moments, gather_moments, output_error, shared_metric
from qrefta.quantize import rounded
from qrefta.split import split_layers, split_stack
from qrefta.stack import LayerStack, Weights, find_stacks, model_weights
from qrefta.tensor import Slices, mix, t_svd_exact, transform_matrix

console = Console()


def run(
    text: Annotated[Path, typer.Argument(help="File of text: txt, csv, tsv, jsonl, parquet.")],
    model: Annotated[str | None, typer.Option(help="Hub name or folder; default: the embedded MiniLM.")] = None,
    samples: Annotated[int, typer.Option(help="Texts that calibrate, and texts that measure.")] = 600,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 48,
    ranks: Annotated[str, typer.Option(help="Values of R, with commas.")] = "48,192",
    types: Annotated[str, typer.Option(help="4-bit formats, with commas.")] = "nf4,int4",
    seed: Annotated[int, typer.Option(help="Of the choice of texts.")] = 0,
    rows: Annotated[Path | None, typer.Option(help="File to add the measurements to, as JSON lines.")] = None,
) -> None:
    """Measure the output error of every stack of a model, by kind of split."""
    source = model or model_folder()
    dense = AutoModel.from_pretrained(source, dtype=torch.float32)
    batches = read_calibration(
        text, AutoTokenizer.from_pretrained(source), samples=2 * samples, max_length=max_length, seed=seed
    )
    stacks = find_stacks(dense)
    calibration, test = (gather_moments(dense, stacks, batches[start::2]) for start in (0, 1))
    cells = list(product(stacks, types.split(","), map(int, ranks.split(","))))
    found = []
    for stack, quant_type, rank in track(cells, "Splitting"):
        ratios = measure(stack, model_weights(dense, stack), quant_type, rank, calibration, test)
        console.print(f"{stack.name} {quant_type} R={rank}: " + ", ".join(f"{k} {v:.3f}" for k, v in ratios.items()))
        found += [
            {"kind": "stack", "stack": stack.name, "quant_type": quant_type, "rank": rank, "split": name,
             "rounds": 0 if name in ("plain", "qera") else QReftaConfig().refine, "output_ratio": ratio,
             "n": samples, "max_length": max_length}
            for name, ratio in ratios.items()
        ]  # fmt: skip
    if rows is not None:
        append(rows, [{"study": "output_error"} | row for row in found], seed=seed)


def measure(
    stack: LayerStack, weights: Weights, quant_type: str, rank: int, calibration: Moments, test: Moments
) -> dict[str, float]:
    """Output error on `test` over that of quantizing whole weights, by kind of split."""
    metric = shared_metric(calibration, stack)
    one_shot, refined = (QReftaConfig(quant_type=quant_type, refine=n) for n in (0, QReftaConfig().refine))
    moments = [test.of(path) for path in stack.modules]

    def ratio(config: QReftaConfig, weighted: bool) -> float:
        split = split_stack(weights, config, rank, metric if weighted else None)
        layers = zip(split_layers(weights, split, config), moments, strict=True)
        errors = [(output_error(layer.error, m), output_error(layer.whole_error, m)) for layer, m in layers]
        return sum(error for error, _ in errors) / sum(whole for _, whole in errors)

    return {
        "plain": ratio(one_shot, weighted=False),
        "plain refined": ratio(refined, weighted=False),
        "qera": qera(weights, one_shot, rank, calibration, stack, moments),
        "calibrated": ratio(refined, weighted=True),
    }


def qera(
    weights: Weights, config: QReftaConfig, rank: int, calibration: Moments, stack: LayerStack, moments: list[Tensor]
) -> float:
    """The ratio of quantizing W whole and adding the error's best rank-R part under the metric, by an exact t-SVD."""
    errors = torch.stack([w - rounded(w, config.format) for w in weights.rows(0, weights.shape[1])])
    transform = transform_matrix(lambda: [(slice(0, errors.shape[1]), errors)], len(errors), "lsm3")
    mixed = mix(errors, transform)
    slices = Slices(
        lambda: [(slice(0, errors.shape[1]), mixed)], weights.shape, errors.device, shared_metric(calibration, stack)
    )
    found = t_svd_exact(slices, rank)
    left = whole = 0.0
    for layer, moment in enumerate(moments):
        correction = (found.left * found.values * transform[layer, found.slices]) @ found.right
        left += output_error(errors[layer] - correction.float(), moment)
        whole += output_error(errors[layer], moment)
    return left / whole


if __name__ == "__main__":
    typer.run(run)
