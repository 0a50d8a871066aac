"""A checkpoint folder -> a prepared checkpoint folder, through a small window: no model and no whole stack in memory.

The linears are found on a copy of the model without storage (the meta device); their weights are read from the
safetensors files a few rows at a time, in every pass anew. Each stack's packed layers and factors are written, about
`_PART_BYTES` at a time, and entered in a journal once the stack is complete. An interrupted run, whatever stopped it,
goes on from the stacks in the journal. config.json is written last: until then no loader takes the folder
for a model. The source is only read.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from qrefta.config import QReftaConfig, StackRow
from qrefta.files.checksums import write_digests
from qrefta.files.safetensors import (
    Checkpoint,
    Part,
    ShardWriter,
    copy_companions,
    copy_shard,
    read_json,
    replace_text,
    resolve_folder,
    write_index,
)
from qrefta.model.build import bank_key, model_class, trained_modules
from qrefta.model.check import FRESH_BYTES, FRESH_SHARE, check_config
from qrefta.model.names import weight_parts
from qrefta.model.stacks import (
    BLOCK_BYTES,
    LayerStack,
    Weights,
    check_values,
    find_stacks,
    select_stacks,
)
from qrefta.model_card import write_card
from qrefta.nn.factors import BANK, Rank, stored_factors
from qrefta.nn.quantized import Packed
from qrefta.split.allocate import choose_ranks
from qrefta.split.calibrate import Moments
from qrefta.split.stack_split import StackSplit

JOURNAL = "qrefta_unfinished.json"
_PART_BYTES = 128 << 20
_BLOCKS, _LAYERS = (
    8,
    6,
)  # blocks and layers in float32 that exist at once, temporaries of the kernels included
_BASIS = 50  # columns of a slice's basis in the tensor SVD, about, beside those for the rank
_LEAST_BLOCK_BYTES = 4 << 20
_OVERHEAD_BYTES = 256 << 20
UNLIMITED = 1 << 62  # for `max_memory`: what it takes, six times the largest linear in float32


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
    _check_bytes(folder, checkpoint, model)
    parts = weight_parts(model, checkpoint, stacks)
    block_bytes = _block_bytes(stacks, targets, _bytes(max_memory))
    weights = {stack: _weights(checkpoint, stack, parts, device, block_bytes) for stack in stacks}

    journal = _Journal(out, _fingerprint(checkpoint, config))
    if journal.ranks is None:
        ranks = choose_ranks(
            targets, [weights[stack] for stack in targets], config, moments, progress
        )
        journal.begin([ranks.get(stack, 0) for stack in stacks])
    total = sum(stack.layers * stack.out_features * stack.in_features for stack in stacks)
    with tqdm(
        total=total, desc="Preparing", unit="weights", unit_scale=True, disable=not progress
    ) as bar:
        for index, stack in enumerate(stacks):
            bar.set_postfix_str(stack.name)
            if index >= len(journal.rows):
                split = StackSplit(stack, weights[stack], config, journal.ranks[index], moments)
                files = _write_stack(out, index, split, checkpoint, parts)
                journal.enter(split.row(), files)
            bar.update(stack.layers * stack.out_features * stack.in_features)
    config.stacks, config.base_model = journal.rows, str(source)
    files = journal.files + _write_rest(
        out, checkpoint, {part.name for own in parts.values() for part in own}
    )
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
            self._resume(read_json(self.path))
        elif out.exists() and (
            not out.is_dir() or any(path.name != f"{JOURNAL}.tmp" for path in out.iterdir())
        ):
            raise ValueError(f"{out} exists and is not empty; choose another folder or remove it.")

    def _resume(self, state: Any) -> None:
        lists = ("ranks", "files", "rows")
        whole = isinstance(state, dict) and isinstance(state.get("fingerprint"), dict)
        if not whole or not all(isinstance(state.get(name), list) for name in lists):
            raise ValueError(
                f"{self.path} is damaged; remove the folder {self.path.parent} and prepare anew."
            )
        changed = [
            key for key, value in self.fingerprint.items() if state["fingerprint"].get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{self.path.parent} holds an unfinished run with another {', '.join(changed)}; give the same "
                "settings to go on, or remove the folder."
            )
        self.ranks, self.files = state["ranks"], state["files"]
        self.rows = QReftaConfig(stacks=state["rows"]).stacks
        strange = [
            file for file in self.files if not isinstance(file, str) or Path(file).name != file
        ]
        if strange:
            raise ValueError(
                f"{self.path} names {strange[0]!r}, which is outside its folder; it is refused."
            )

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
    config = _read_config(folder)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{folder} is already quantized; prepare quantizes a dense checkpoint itself."
        )
    if config.dtype is None:
        dtypes = map(checkpoint.dtype, checkpoint.names)
        config.dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    kind = model_class((config.architectures or [""])[0], folder)
    try:
        with init_empty_weights(include_buffers=True):
            return kind(config)
    except Exception as error:
        raise _no_model(folder, error) from error


def _read_config(folder: Path) -> PreTrainedConfig:
    """Its config.json, as transformers reads it; a number out of range would have it count for ever."""
    found = read_json(folder / "config.json")
    if not isinstance(found, dict):
        raise ValueError(
            f"{folder / 'config.json'} is damaged: it holds no settings by name; copy it again."
        )
    check_config(found)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _no_model(folder, error) from error


def _no_model(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"The config.json of {folder} makes no model ({type(error).__name__}: {error}); it is damaged, or of another "
        "version of transformers: copy it again."
    )


def _check_bytes(folder: Path, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse files that hold far more than the model: a sparse one of terabytes would be copied, zero by zero."""
    held = sum(map(checkpoint.nbytes, checkpoint.names))
    wanted = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
    if held > max(FRESH_BYTES, FRESH_SHARE * wanted):
        raise ValueError(
            f"The files of {folder} hold {held / 1e9:.1f} GB, and its config.json's model {wanted / 1e9:.3f} GB; "
            "they do not belong together: copy the folder again."
        )


def _weights(
    checkpoint: Checkpoint,
    stack: LayerStack,
    parts: dict[str, list[Part]],
    device: torch.device,
    block_bytes: int,
) -> Weights:
    adapted = stack.adapted

    def read(layer: int, start: int, stop: int) -> Tensor:
        own = parts[adapted[layer]]
        rows = checkpoint.read_parts(own, start, stop, columns=stack.transposed)
        check_values(own[0].name, rows)
        return rows

    return Weights(stack.shape, read, device, block_bytes, keep=False)


def _write_stack(
    out: Path, index: int, split: StackSplit, checkpoint: Checkpoint, parts: dict[str, list[Part]]
) -> list[str]:
    """Write the packed layers and the factors of a stack; the names of the files."""
    files = ShardWriter(out, f"model-stack{index:03d}-", _PART_BYTES)
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


def _finish(
    folder: Path, out: Path, model: PreTrainedConfig, config: QReftaConfig, files: list[str]
) -> None:
    """Write all that makes a model of the files: index, tokenizer, and at the very end config.json and the digests.

    The journal stays until then: a run that is killed in here goes on like any.
    """
    copy_companions(folder, out)
    write_index(out, files)
    for stray in _strays(out, files):
        stray.unlink()
    model.quantization_config = config
    write_card(out, config)
    replace_text(out / "config.json", model.to_json_string(use_diff=True))
    write_digests(out)
    (out / JOURNAL).unlink()


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
    row = 4 * max(
        stack.layers * stack.in_features for stack in stacks
    )  # of all layers: many where there are experts
    beside = _OVERHEAD_BYTES + 4 * _BASIS * max(
        stack.layers * stack.in_features for stack in targets
    )
    needed = beside + max(_LAYERS * layer, _BLOCKS * max(_LEAST_BLOCK_BYTES, row))
    if max_memory < needed:
        raise ValueError(
            f"max_memory is {max_memory / 1e9:.2f} GB, but this model needs {needed / 1e9:.2f} GB: its largest linear "
            f"has {layer / 4e6:.1f} million weights, its largest stack {max(stack.layers for stack in stacks)} linears"
        )
    return min(BLOCK_BYTES, (max_memory - beside) // _BLOCKS)
