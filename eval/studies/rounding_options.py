"""Additions to rounding with error feedback that `prepare` leaves out, measured beside it.

    feedback    qrefta's searched scales and codes with error feedback, without factors: all others
                start from it
    refitted    then the scales of a row's blocks are fitted to its codes: least squares under the
                moment of the inputs
    descent     then every code moves to its best value, given all others, in some passes over the
                columns
    sequential  moments are gathered in the order of the layers, on inputs that the quantized layers
                before give, as GPTQ does, instead of on the 16-bit model
    norms       then the gains of the norms train for some steps to the outputs of the 16-bit model

A row has the KL divergence on each text, the squared error of outputs on the calibration text
relative to feedback alone, and the seconds of rounding. The model and the texts are the ones of
`python -m eval kld`.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from eval.peers.bases import HALF_TEXT
from eval.rows import append, read
from eval.studies.kld import (
    WINDOWS,
    CacheOption,
    DataOption,
    RowsOption,
    batches_of_windows,
    cached_moments,
    calibration_windows,
    compare,
    find_texts,
    load,
    named,
    remember_logits,
)
from eval.tasks.smollm2 import cache_folder, smollm2_folder
from qrefta.cli import guarded, quiet_libraries
from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.linalg.metric import output_error
from qrefta.model.stacks import find_stacks
from qrefta.model.weights import read_slice
from qrefta.nn.grid import Grid, grid_of, inverse, nearest
from qrefta.nn.quantize import quantize
from qrefta.nn.quantized import QuantFormat, QuantizedWeight
from qrefta.split.moments import Moments
from qrefta.split.rounding import DAMPING, StackRounding

SETTINGS = Settings(rank=0)
FORMAT = QuantFormat("nf4")
PASSES = 3  # of coordinate descent
STEPS = 32  # of training norms, two windows of 256 tokens each
RATE = 1e-3  # of the first step; it falls to zero
BLOCKS = "model.layers"  # of Llama-like models
console = Console()


class Layer(NamedTuple):
    """A linear layer: its weight, (out, in), its stack alone, and the moments of its inputs."""

    weight: Tensor
    stack: LayerStack
    moments: Moments

    @property
    def moment(self) -> Tensor:
        return self.moments.of(self.stack.modules[0])

    def packed(self) -> QuantizedWeight:
        """Rounded with error feedback."""
        rounding = StackRounding(SETTINGS, self.stack, self.moments).stored(0)
        return quantize(self.weight, FORMAT, rounding)


def run(
    tokens: Annotated[int, typer.Option(help="Tokens of each text to measure on.")] = 2048,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = HALF_TEXT,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Llama-like model; default: SmolLM2-135M.")
    ] = None,
    only: Annotated[str, typer.Option(help="One option; default: all.")] = "",
    data: DataOption = None,
    cache: CacheOption = None,
    rows: RowsOption = Path("rounding_options.jsonl"),
) -> None:
    """Measure the options that have no row yet."""
    quiet_libraries()
    if only and only not in OPTIONS:
        raise ValueError(f"--only is {only!r}; options are {', '.join(OPTIONS)}")
    texts = find_texts(data, None, None, tokens, window)
    cache = cache_folder(cache)
    folder = model or smollm2_folder(cache)
    setting = {
        "study": "rounding_options",
        "model": folder.name,
        "calibration_text": named(texts.calibration),
        "calibration_tokens": calibration_tokens,
        "tokens": tokens,
        "window": window,
    }
    known = read(rows) if rows.exists() else []
    done = {row["option"] for row in known if setting.items() <= row.items()}
    names = [name for name in OPTIONS if name not in done and only in ("", name)]
    dense = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = min(WINDOWS[HALF_TEXT], dense.config.max_position_embeddings)
    batches = batches_of_windows(calibration_windows(texts, tokenizer, calibration_tokens, length))
    moments = cached_moments(dense, batches, cache)
    with TemporaryDirectory() as logits:
        remember_logits(dense, Path(logits))
        for name in names:
            quantized = load(folder)
            start = perf_counter()
            OPTIONS[name](quantized, moments, batches)
            row = setting | {
                "option": name,
                "seconds": perf_counter() - start,
                "output_error": error_of_outputs(quantized, dense, moments),
                "texts": compare(quantized, dense, tokenizer, texts),
            }
            append(rows, [row], seed=0)
            kept = ", ".join(
                f"{text['text']} KLD {text['kl_mean']:.4f} ± {text['kl_stderr']:.4f}"
                for text in row["texts"]
            )
            console.print(f"{name}: {kept}; {row['seconds']:.0f} s")


def error_of_outputs(model: PreTrainedModel, dense: PreTrainedModel, moments: Moments) -> float:
    """The squared error of the outputs of all linear layers on the inputs of the 16-bit model."""
    return sum(
        output_error(layer.weight - read_slice(model, stack, index), layer.moment)
        for stack in find_stacks(dense)
        for index, layer in enumerate(layers_of(dense, stack, moments))
    )


def layers_of(model: PreTrainedModel, stack: LayerStack, moments: Moments) -> list[Layer]:
    """The linear layers of a stack."""
    return [
        Layer(read_slice(model, stack, index), replace(stack, modules=(path,)), moments)
        for index, path in enumerate(stack.modules)
    ]


def each_layer(
    change: Callable[[Layer], Tensor],
) -> Callable[[PreTrainedModel, Moments, list[dict[str, Tensor]]], None]:
    """A function that replaces the weight of every linear layer by `change` of it."""

    @torch.no_grad()
    def all_layers(model: PreTrainedModel, moments: Moments, _: Any) -> None:
        for stack in find_stacks(model):
            for layer in layers_of(model, stack, moments):
                layer.weight.copy_(change(layer))

    return all_layers


def fed_back(layer: Layer) -> Tensor:
    """A weight rounded with error feedback, (out, in)."""
    return layer.packed().dequantize(torch.float32)


def refitted(layer: Layer) -> Tensor:
    """The same with scales that minimize (w - P s) S (w - P s)^T for every row w.

    P holds the levels of the row by block, and S is the damped moment.
    """
    packed, damped = layer.packed(), damped_moment(layer)
    size = FORMAT.block_size
    out_features, in_features = layer.weight.shape
    blocks = in_features // size
    levels = packed.dequantize(torch.float32) * inverse(scales_of(packed))
    normal = torch.empty(out_features, blocks, blocks, dtype=torch.float64)
    for block in range(blocks):
        columns = slice(block * size, (block + 1) * size)
        images = levels[:, columns] @ damped[columns]
        normal[:, :, block] = (images * levels).view(out_features, blocks, size).sum(-1)
    right = ((layer.weight @ damped) * levels).view(out_features, blocks, size).sum(-1).double()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += 1e-8 * diagonal.mean()
    fitted = torch.linalg.solve(normal, right.unsqueeze(-1)).squeeze(-1).float()
    return levels * fitted.repeat_interleave(size, 1)


def descended(layer: Layer) -> Tensor:
    """The same with codes that moved to the best value given all others, for fixed scales.

    In every pass the columns are visited by their moment, the largest first, as in feedback.
    """
    packed, damped = layer.packed(), damped_moment(layer)
    scales = scales_of(packed).T.contiguous()
    values = packed.dequantize(torch.float32).T.contiguous()
    grid = grid_of(FORMAT.quant_type, values.device)
    order = damped.diagonal().argsort(descending=True, stable=True).tolist()
    targets = layer.weight.T
    gradient = damped @ (targets - values)  # S E^T, (in, out)
    for _ in range(PASSES):
        for k in order:
            moved = move(values[k], gradient[k] / damped[k, k], scales[k], grid)
            gradient.addr_(damped[:, k], moved - values[k], alpha=-1)
            values[k] = moved
    return values.T


def move(values: Tensor, steps: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The levels nearest to values + steps."""
    return grid.levels[nearest(values + steps, inverse(scales), grid)] * scales


def damped_moment(layer: Layer) -> Tensor:
    """S with the damping of feedback."""
    damped = layer.moment.float().clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    return damped


def scales_of(packed: QuantizedWeight) -> Tensor:
    """The scale of every weight, (out, in); rows are whole blocks."""
    return packed.block_scales().repeat_interleave(packed.format.block_size).view(packed.shape)


@torch.no_grad()
def sequential(model: PreTrainedModel, _: Moments, batches: list[dict[str, Tensor]]) -> None:
    """Round the blocks in order, each on the moments of the inputs that it gets as the model is.

    Within a block, linear layers with the same input are rounded together.
    """
    blocks = model.get_submodule(BLOCKS)
    stacks = find_stacks(model)
    calls = inputs_of(model, blocks[0], batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    for index, block in enumerate(blocks):
        alone = {
            path: replace(stack, modules=(path,))
            for stack in stacks
            for path in stack.modules
            if path.startswith(f"{BLOCKS}.{index}.")
        }
        while alone:
            found = inputs_seen(model, block, list(alone), calls, tokens)
            first = next(iter(found.values()))
            for path, moment in found.items():
                if torch.equal(moment, first):
                    stack = alone.pop(path)
                    moments = Moments({path: path}, {path: tokens}, {path: moment}.__getitem__)
                    layer = Layer(model.get_submodule(path).weight, stack, moments)
                    layer.weight.copy_(fed_back(layer))
        calls = [(block(hidden, **options), options) for hidden, options in calls]


def inputs_of(
    model: PreTrainedModel, block: nn.Module, batches: list[dict[str, Tensor]]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Hidden states and keyword arguments that a block gets for every batch."""
    calls = []

    def keep(_: nn.Module, given: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        calls.append((given[0], options))

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    return calls


def inputs_seen(
    model: PreTrainedModel,
    block: nn.Module,
    paths: list[str],
    calls: list[tuple[Tensor, dict[str, Any]]],
    tokens: int,
) -> dict[str, Tensor]:
    """Second moments of the inputs of a block's linear layers, by path."""
    sums: dict[str, Tensor] = {}

    def add(path: str, given: tuple[Tensor, ...]) -> None:
        tokens = given[0].flatten(0, -2)
        sums[path] = sums.get(path, torch.zeros(())) + tokens.T @ tokens

    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, given, path=path: add(path, given)
        )
        for path in paths
    ]
    for hidden, options in calls:
        block(hidden, **options)
    for handle in handles:
        handle.remove()
    return {path: total / tokens for path, total in sums.items()}


def tune_norms(model: PreTrainedModel, moments: Moments, batches: list[dict[str, Tensor]]) -> None:
    """Round the weights, then train the gains of the norms to the KL divergence, with Adam."""
    dense = copy.deepcopy(model)
    each_layer(fed_back)(model, moments, batches)
    model.requires_grad_(False)
    gains = [
        module.weight
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and isinstance(module.weight, nn.Parameter)
    ]
    for gain in gains:
        gain.requires_grad_(True)
    optimizer = torch.optim.Adam(gains, lr=RATE)
    rows = torch.cat([batch["input_ids"] for batch in batches]).view(-1, 256)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    windows = shuffled.split(2)[:STEPS]
    for step, batch in enumerate(windows):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / len(windows))
        with torch.no_grad():
            wanted = dense(batch).logits.log_softmax(-1)
        found = model(batch).logits.log_softmax(-1)
        (wanted.exp() * (wanted - found)).sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


OPTIONS: dict[str, Callable[[PreTrainedModel, Moments, list[dict[str, Tensor]]], None]] = {
    "feedback": each_layer(fed_back),
    "refitted": each_layer(refitted),
    "descent": each_layer(descended),
    "sequential": sequential,
    "norms": tune_norms,
}

if __name__ == "__main__":
    guarded(lambda: typer.run(run))
