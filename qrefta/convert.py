"""A checkpoint folder -> a prepared checkpoint folder, through a small window: no model and no whole stack in memory.

The linears are found on a copy of the model without storage (the meta device); their weights are read from the
safetensors files a few rows at a time, in every pass anew. Each stack's packed layers and factors are written, about
`_PART_BYTES` at a time, and entered in a journal once the stack is complete. An interrupted run, whatever stopped it,
goes on from the stacks in the journal. config.json is written last: until then no loader takes the folder
for a model. The source is only read.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils.modeling import convert_file_size_to_int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from qrefta.build import bank_key, trained_modules
from qrefta.config import QReftaConfig, StackRow
from qrefta.factors import BANK, Rank, stored_factors
from qrefta.moments import Moments
from qrefta.quantize import Packed
from qrefta.quantizer import model_class
from qrefta.rank import choose_ranks
from qrefta.report import StackSplit
from qrefta.shards import (
    Checkpoint,
    Part,
    copy_shard,
    replace_text,
    resolve_folder,
    write_index,
    write_shard,
)
from qrefta.sources import weight_parts
from qrefta.stack import BLOCK_BYTES, LayerStack, Weights, find_stacks, select_stacks

JOURNAL = "qrefta_unfinished.json"
_PART_BYTES = 128 << 20
_BLOCKS, _LAYERS = 8, 6  # blocks and layers in float32 that exist at once, temporaries of the kernels included
_BASIS = 50  # columns of a slice's basis in the tensor SVD, about, beside those for the rank
_LEAST_BLOCK_BYTES = 4 << 20
_OVERHEAD_BYTES = 256 << 20
_COPIED = (".json", ".txt", ".model", ".jinja")  # beside the weights: tokenizer, generation settings


def convert(
    source: str | Path,
    out: Path,
    config: QReftaConfig,
    moments: Moments | None,
    device: torch.device,
    max_memory: int | str,
    progress: bool,
) -> Path:
    """Prepare the model in `source` (folder or hub name) into `out`; the arguments of `qrefta.prepare`.

    The result equals preparing in memory: bit for bit on the same device, unless `max_memory` makes blocks smaller than
    `BLOCK_BYTES`, or the checkpoint holds tensors of another dtype than the model is loaded in.

    Returns:
        `out`.

    Raises:
        ValueError: as `qrefta.prepare`; and if `out` holds something else, the checkpoint is damaged or lacks a weight,
            or `max_memory` is too small.
    """
    folder = resolve_folder(source)
    checkpoint = Checkpoint(folder)
    model = _skeleton(folder, checkpoint)
    stacks = find_stacks(model)
    targets = select_stacks(stacks, config.target_modules)
    config.modules_to_save = trained_modules(model, config.modules_to_save, stacks)
    parts = weight_parts(model, checkpoint, stacks)
    block_bytes = _block_bytes(stacks, targets, _bytes(max_memory))
    weights = {stack: _weights(checkpoint, stack, parts, device, block_bytes) for stack in stacks}

    journal = _Journal(out, _fingerprint(checkpoint, config))
    if journal.ranks is None:
        ranks = choose_ranks(targets, [weights[stack] for stack in targets], config, moments, progress)
        journal.begin([ranks.get(stack, 0) for stack in stacks])
    total = sum(stack.layers * stack.out_features * stack.in_features for stack in stacks)
    with tqdm(total=total, desc="Preparing", unit="weights", unit_scale=True, disable=not progress) as bar:
        for index, stack in enumerate(stacks):
            bar.set_postfix_str(stack.name)
            if index >= len(journal.rows):
                split = StackSplit(stack, weights[stack], config, journal.ranks[index], moments)
                files = _write_stack(out, index, split, checkpoint, parts)
                journal.enter(split.row(), files)
            bar.update(stack.layers * stack.out_features * stack.in_features)
    config.stacks = journal.rows
    files = journal.files + _write_rest(out, checkpoint, {part.name for own in parts.values() for part in own})
    _finish(folder, out, model.config, config, files)
    return out


class _Journal:
    """What an unfinished folder holds so far, kept in the folder itself.

    Attributes:
        ranks: of every stack, in order; None before they are chosen.
        rows, files: of the stacks that are complete.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        self.path, self.fingerprint = out / JOURNAL, fingerprint
        self.ranks: list[Rank] | None = None
        self.rows: list[StackRow] = []
        self.files: list[str] = []
        if self.path.is_file():
            self._resume(json.loads(self.path.read_text(encoding="utf-8")))
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and is not empty; choose another folder or remove it.")

    def _resume(self, state: dict[str, Any]) -> None:
        changed = [key for key, value in self.fingerprint.items() if state["fingerprint"].get(key) != value]
        if changed:
            raise ValueError(
                f"{self.path.parent} holds an unfinished run with another {', '.join(changed)}; give the same "
                "settings to go on, or remove the folder."
            )
        self.ranks, self.files = state["ranks"], state["files"]
        self.rows = [StackRow(**row) for row in state["rows"]]

    def begin(self, ranks: list[Rank]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.ranks = ranks
        self._write()

    def enter(self, row: StackRow, files: list[str]) -> None:
        """One more stack is complete."""
        self.rows.append(row)
        self.files += files
        self._write()

    def _write(self) -> None:
        state = {"fingerprint": self.fingerprint, "ranks": self.ranks, "files": self.files}
        state["rows"] = [asdict(row) for row in self.rows]
        replace_text(self.path, json.dumps(state))


def _skeleton(folder: Path, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model without storage, by its config.json; with the dtype that its weights have."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} is already quantized; prepare quantizes a dense checkpoint itself.")
    if config.dtype is None:
        config.dtype = next(d for d in map(checkpoint.dtype, checkpoint.names) if d.is_floating_point)
    with init_empty_weights(include_buffers=True):
        return model_class((config.architectures or [""])[0], folder)(config)


def _weights(
    checkpoint: Checkpoint, stack: LayerStack, parts: dict[str, list[Part]], device: torch.device, block_bytes: int
) -> Weights:
    adapted = stack.adapted

    def read(layer: int, start: int, stop: int) -> Tensor:
        own = parts[adapted[layer]]
        rows = checkpoint.read_parts(own, start, stop, columns=stack.transposed)
        if not rows.is_floating_point():
            raise ValueError(f"{own[0].name} is {rows.dtype}; prepare takes float32, bfloat16 or float16.")
        if not torch.isfinite(rows).all():
            raise ValueError(f"{own[0].name} holds NaN or infinite values; the checkpoint is damaged.")
        return rows

    return Weights(stack.shape, read, device, block_bytes, keep=False)


def _write_stack(
    out: Path, index: int, split: StackSplit, checkpoint: Checkpoint, parts: dict[str, list[Part]]
) -> list[str]:
    """Write the packed layers and the factors of a stack; the names of the files."""
    files = _Parts(out, f"model-stack{index:03d}")
    if split.split.factors is not None:
        for name, tensor in stored_factors(split.split.factors).items():
            files.add(f"{BANK}.{bank_key(index)}.{name}", tensor)
    for path, residual in zip(split.stack.adapted, split.residuals(), strict=True):
        source = parts[path][0].name
        stem = f"{path}." if split.stack.experts else source.removesuffix("weight")
        if isinstance(residual, Packed):
            for field, tensor in residual._asdict().items():
                if tensor is not None:
                    files.add(stem + field, tensor)
        else:
            files.add(stem + "weight", residual.to(checkpoint.dtype(source)))
    return files.close()


def _write_rest(out: Path, checkpoint: Checkpoint, written: set[str]) -> list[str]:
    """Copy every other tensor as it is: embeddings, norms, biases, heads."""
    names = [name for name in checkpoint.names if name not in written]
    if names:
        copy_shard(out / "model-rest.safetensors", checkpoint, names)
    return ["model-rest.safetensors"] if names else []


class _Parts:
    """Safetensors files of about `_PART_BYTES`, each written as soon as it is full."""

    def __init__(self, out: Path, stem: str) -> None:
        self.out, self.stem = out, stem
        self.tensors: dict[str, Tensor] = {}
        self.nbytes = 0
        self.files: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.detach().to("cpu").contiguous()
        self.nbytes += self.tensors[name].nbytes
        if self.nbytes >= _PART_BYTES:
            self._flush()

    def close(self) -> list[str]:
        if self.tensors:
            self._flush()
        return self.files

    def _flush(self) -> None:
        self.files.append(f"{self.stem}-{len(self.files):04d}.safetensors")
        write_shard(self.out / self.files[-1], self.tensors)
        self.tensors, self.nbytes = {}, 0


def _finish(folder: Path, out: Path, model: PreTrainedConfig, config: QReftaConfig, files: list[str]) -> None:
    """Write all that makes a folder of the files: index, tokenizer, and at the very end config.json."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _COPIED and file.name != "config.json" and ".index." not in file.name and file.is_file():
            shutil.copyfile(file, out / file.name)
    write_index(out, files)
    for stray in _strays(out, files):
        stray.unlink()
    model.quantization_config = config
    (out / JOURNAL).unlink()
    replace_text(out / "config.json", model.to_json_string(use_diff=True))


def _strays(out: Path, files: list[str]) -> Iterator[Path]:
    """Parts that an interrupted run left and this one did not write again."""
    return (path for path in out.glob("model-*.safetensors") if path.name not in files)


def _fingerprint(checkpoint: Checkpoint, config: QReftaConfig) -> dict[str, Any]:
    """What an unfinished run must agree with: the settings, and the source's tensors and file times."""
    settings = {key: value for key, value in config.to_dict().items() if key != "stacks"}
    return json.loads(json.dumps({"settings": settings, "source": checkpoint.fingerprint()}))


def _bytes(max_memory: int | str) -> int:
    try:
        return convert_file_size_to_int(max_memory)
    except ValueError as error:
        raise ValueError(f'max_memory is {max_memory!r}; give bytes or text like "3GB"') from error


def _block_bytes(stacks: list[LayerStack], targets: list[LayerStack], max_memory: int) -> int:
    """Bytes of a block of rows that keep within `max_memory`."""
    layer = 4 * max(stack.out_features * stack.in_features for stack in stacks)
    row = 4 * max(stack.layers * stack.in_features for stack in stacks)  # of all layers: many where there are experts
    beside = _OVERHEAD_BYTES + 4 * _BASIS * max(stack.layers * stack.in_features for stack in targets)
    needed = beside + max(_LAYERS * layer, _BLOCKS * max(_LEAST_BLOCK_BYTES, row))
    if max_memory < needed:
        raise ValueError(
            f"max_memory is {max_memory / 1e9:.2f} GB, but this model needs {needed / 1e9:.2f} GB: its largest linear "
            f"has {layer / 4e6:.1f} million weights, its largest stack {max(stack.layers for stack in stacks)} linears"
        )
    return min(BLOCK_BYTES, (max_memory - beside) // _BLOCKS)
