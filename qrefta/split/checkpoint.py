"""A checkpoint folder -> a prepared checkpoint folder, with little memory: no model and no whole
stack is held.

The linear layers are found on a copy of the model without storage (the meta device). Their weights
are read from the safetensors files a few rows at a time, again in every pass. The packed layers and
factors of each stack are written, about `_PART_BYTES` at a time, and entered in a journal once the
stack is complete. An interrupted run resumes from the stacks in the journal. config.json is written
last: until then no loader takes the folder for a model. The source is only read.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from qrefta.choices import QuantType
from qrefta.config.rank import Rank
from qrefta.config.report import StackReport
from qrefta.config.settings import Settings
from qrefta.config.sizes import parse_bytes
from qrefta.config.stack import BANK, LayerStack
from qrefta.files.checksums import Checksums, settings_checksum
from qrefta.files.companions import copy_companions
from qrefta.files.folders import JOURNAL, LOCK, check_new, held
from qrefta.files.header import read_checksums
from qrefta.files.json_file import read_json
from qrefta.files.safetensors import Checkpoint
from qrefta.files.shards import ShardWriter, copy_shard, write_index
from qrefta.files.sources import resolve_folder
from qrefta.files.whole_file import clear_unfinished, replace_text
from qrefta.hf_config import QReftaConfig
from qrefta.model.build import bank_key, model_class, with_trained_modules
from qrefta.model.check import FRESH_BYTES, FRESH_SHARE
from qrefta.model.config_file import check_config, no_model
from qrefta.model.modes import as_written
from qrefta.model.names import weight_parts
from qrefta.model.stacks import find_stacks, select_stacks
from qrefta.model.unquantized import warn_of_unquantized
from qrefta.model.weights import BLOCK_BYTES, Weights, check_values
from qrefta.model_card import write_card
from qrefta.nn.factors import stored_factors
from qrefta.split.loop import split_stacks
from qrefta.split.moment_sums import FULL_WIDTH
from qrefta.split.moments import Moments
from qrefta.split.stack_split import StackSplit

# For `max_memory`: as much as it needs, six times the largest linear layer in float32.
UNLIMITED = 1 << 62
_REST = "model-rest.safetensors"
_PART_BYTES = 128 << 20
_BLOCKS = 8  # blocks in float32 that exist at once, temporaries of the kernels included
_LAYERS = 6  # layers in float32 that exist at once
_BASIS = 50  # columns of the basis of a slice in the tensor SVD, about, besides those for the rank
_LEAST_BLOCK_BYTES = 4 << 20
_OVERHEAD_BYTES = 256 << 20
_MOMENTS = 2  # second moments of the inputs of a layer that exist at once, with error feedback


def without_order(settings: Settings) -> Settings:
    """The settings with rounding="auto" resolved, for preparing without a model that runs.

    Raises:
        ValueError: if rounding is "sequential".
    """
    if settings.must_round_in_order:
        raise ValueError(
            'rounding="sequential" runs the model on calibration text, so it needs the model in '
            'memory: call qrefta.prepare(model, calibration=..., rounding="sequential").'
        )
    return settings.with_rounding(in_order=False)


@as_written()
def convert(
    source: str | Path,
    out: Path,
    settings: Settings,
    moments: Moments | None,
    device: torch.device,
    max_memory: int | str,
    progress: bool,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    kind: type[PreTrainedModel] | None = None,
) -> Path:
    """Prepare the model in `source` (folder or hub name) into `out`; the arguments of
    `qrefta.prepare_checkpoint`.

    The result equals preparing in memory bit for bit on the same device, unless `max_memory` makes
    blocks smaller than `BLOCK_BYTES`, or the checkpoint holds tensors of another dtype than the
    model is loaded in.

    Args:
        base_model: name of the source to keep in the config; default: `source`.
        trust_remote_code: whether to run code that comes with the model.
        kind: a class in whose module the model's class is looked for first.

    Returns:
        `out`.

    Raises:
        ValueError: as `qrefta.prepare_checkpoint`.
    """
    calibrated = moments is not None
    dense = resolve_folder(source)
    settings = without_order(settings)
    checkpoint = CheckpointSource(
        dense, settings, device, max_memory, calibrated, trust_remote_code, kind
    )
    if moments is not None:
        moments.check(checkpoint.stacks)
    settings = checkpoint.settings
    with _locked(out):
        folder = FolderSink(out, checkpoint, moments)
        split_stacks(checkpoint, folder, settings, moments, progress)
        config = QReftaConfig(
            settings,
            calibrated=calibrated,
            base_model=base_model or str(source),
            stacks=folder.reports,
        )
        folder.finish(config)
    return out


class CheckpointSource:
    """The stacks of a dense checkpoint folder, read a few rows at a time.

    Args:
        folder: with config.json and safetensors files.
        settings: what to prepare.
        device: where a stack is worked on.
        max_memory: bytes that preparing may take.
        calibrated: whether residuals may be rounded with error feedback.
        trust_remote_code: whether to run code that comes with the model.
        kind: a class in whose module the model's class is looked for first.

    Attributes:
        settings: with the paths of all modules that train in full.

    Raises:
        ValueError: if the folder holds no dense model, a weight is missing, or `max_memory` is too
            small.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        device: torch.device,
        max_memory: int | str,
        calibrated: bool,
        trust_remote_code: bool = False,
        kind: type[PreTrainedModel] | None = None,
    ) -> None:
        self.folder = folder
        self.device = device
        self.checkpoint = Checkpoint(folder)
        model = _model_without_storage(folder, self.checkpoint, trust_remote_code, kind)
        self.model_config = model.config
        self.stacks = find_stacks(model)
        targets = select_stacks(self.stacks, settings.target_modules)
        self.settings = with_trained_modules(model, settings, self.stacks)
        _check_bytes(folder, self.checkpoint, model)
        self.parts = weight_parts(model, self.checkpoint, self.stacks)
        warn_of_unquantized(model, self.stacks)
        limit = parse_bytes("max_memory", max_memory)
        feedback = calibrated and settings.feeds_back
        self._block_bytes = _block_bytes(self.stacks, targets, limit, feedback)

    def weights(self, stack: LayerStack) -> Weights:
        adapted = stack.adapted

        def read(layer: int, start: int, stop: int) -> Tensor:
            parts = self.parts[adapted[layer]]
            rows = self.checkpoint.read_parts(parts, start, stop, columns=stack.transposed)
            check_values(parts[0].name, rows)
            return rows

        return Weights(stack.shape, read, self.device, self._block_bytes, keep=False)


class FolderSink:
    """A folder that a prepared checkpoint is written to, with a journal of the stacks that are
    complete.

    Attributes:
        ranks, quant_types, reports: see `qrefta.split.loop.Sink`.

    Raises:
        ValueError: if the folder holds an unfinished run with other settings.
    """

    def __init__(self, out: Path, source: CheckpointSource, moments: Moments | None) -> None:
        self.out = out
        self.source = source
        self.ranks: list[Rank] | None = None
        self.quant_types: list[QuantType | None] | None = None
        self.reports: list[StackReport] = []
        self._files: list[str] = []
        self._path = out / JOURNAL
        self._fingerprint = _fingerprint(source.checkpoint, source.settings, moments)
        if self._path.is_file():
            self._resume(read_json(self._path))

    def begin(self, ranks: list[Rank], quant_types: list[QuantType | None]) -> None:
        self.ranks = ranks
        self.quant_types = quant_types
        self._write_journal()

    def write(self, split: StackSplit) -> None:
        index = len(self.reports)
        writer = ShardWriter(self.out, f"model-stack{index:03d}-", _PART_BYTES)
        if split.split.factors is not None:
            for name, tensor in stored_factors(split.split.factors).items():
                writer.add(f"{BANK}.{bank_key(index)}.{name}", tensor)
        for path, residual in zip(split.stack.adapted, split.residuals(), strict=True):
            part = self.source.parts[path][0]
            source = part.name
            shared = split.stack.experts or part.rows is not None
            stem = f"{path}." if shared else source.removesuffix("weight")
            stored = residual.to("cpu", self.source.checkpoint.dtype(source))
            for name, tensor in stored.tensors().items():
                writer.add(stem + name, tensor)
        self._files += writer.close()
        self.reports.append(split.report())
        self._write_journal()

    def finish(self, config: QReftaConfig) -> None:
        """Write the other tensors, the index, the tokenizer, and at the very end config.json.

        The journal stays until then: a run that is killed in here resumes like any other.
        """
        model_config = self.source.model_config
        model_config.quantization_config = config
        settings = model_config.to_json_string(use_diff=True)
        files = [*self._files, self._write_rest(settings)]
        copy_companions(self.source.folder, self.out)
        write_index(self.out, files)
        for path in self.out.glob("model-*.safetensors"):
            if path.name not in files:  # an interrupted run left it
                path.unlink()
        write_card(self.out, config)
        replace_text(self.out / "config.json", settings)
        self._path.unlink()

    def _write_rest(self, settings: str) -> str:
        """Copy all other tensors unchanged: embeddings, norms, biases, heads; the name of the file.

        Its header holds the checksums of all files and of config.json too, so that files of two
        runs are told apart.
        """
        known: dict[str, str | None] = {}
        for file in self._files:
            checksums = read_checksums(self.out / file)
            if checksums is not None:
                known |= checksums.tensors
        split = {part.name for parts in self.source.parts.values() for part in parts}
        names = [name for name in self.source.checkpoint.names if name not in split]
        covered = Checksums(known, settings_checksum(json.loads(settings)))
        copy_shard(self.out / _REST, self.source.checkpoint, names, covered)
        return _REST

    def _write_journal(self) -> None:
        state = {
            "fingerprint": self._fingerprint,
            "ranks": self.ranks,
            "quant_types": self.quant_types,
            "files": self._files,
            "reports": [report.to_dict() for report in self.reports],
        }
        replace_text(self._path, json.dumps(state))

    def _resume(self, state: Any) -> None:
        lists = ("ranks", "quant_types", "files", "reports")
        whole = isinstance(state, dict) and isinstance(state.get("fingerprint"), dict)
        if not whole or not all(isinstance(state.get(name), list) for name in lists):
            raise ValueError(
                f"{self._path} is damaged; remove the folder {self.out} and prepare again."
            )
        changed = [
            key
            for key, value in self._fingerprint.items()
            if state["fingerprint"].get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{self.out} holds an unfinished run with another {', '.join(changed)}; give the "
                "same settings to resume it, or remove the folder."
            )
        strange = [
            file for file in state["files"] if not isinstance(file, str) or Path(file).name != file
        ]
        if strange:
            raise ValueError(
                f"{self._path} names {strange[0]!r}, which is outside its folder; it is refused."
            )
        self.ranks = [tuple(rank) if isinstance(rank, list) else rank for rank in state["ranks"]]
        self.quant_types = state["quant_types"]
        self._files = state["files"]
        self.reports = [StackReport.from_dict(report) for report in state["reports"]]


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Within this context no other process prepares into the folder; it is made if it is new.

    Raises:
        ValueError: if another process holds the folder, or it holds something else than an
            unfinished run.
    """
    _check_out(out)
    with held(out):
        _check_out(out)  # another process may have finished it meanwhile
        clear_unfinished(out)
        yield


def _check_out(out: Path) -> None:
    """Refuse a folder with other files than an unfinished run; a run that was killed early has left
    its lock, and its journal under a temporary name.
    """
    if not (out / JOURNAL).is_file():
        check_new(out, ignoring=[LOCK, f"{JOURNAL}.*.tmp"])


def _model_without_storage(
    folder: Path,
    checkpoint: Checkpoint,
    trust_remote_code: bool,
    kind: type[PreTrainedModel] | None,
) -> PreTrainedModel:
    """The model that config.json describes, without storage, in the dtype of its weights."""
    settings = _read_settings(folder)
    kind = _near(kind, settings) or model_class(settings, folder, trust_remote_code)
    config = _read_config(kind, folder, trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{folder} is already quantized; prepare quantizes a dense checkpoint itself."
        )
    if config.dtype is None:
        dtypes = map(checkpoint.dtype, checkpoint.names)
        config.dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    try:
        with init_empty_weights(include_buffers=True):
            return kind(config)
    except Exception as error:
        raise no_model(folder, error) from error


def _near(
    kind: type[PreTrainedModel] | None, settings: dict[str, Any]
) -> type[PreTrainedModel] | None:
    """The class that config.json names, if it is in the module of `kind`; no code is run for it."""
    name = (settings.get("architectures") or [""])[0]
    module = None if kind is None else sys.modules.get(kind.__module__)
    found = getattr(module, str(name), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _read_settings(folder: Path) -> dict[str, Any]:
    """The content of config.json; a number out of range is refused, since building would not
    end.
    """
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise ValueError(
            f"{folder / 'config.json'} is damaged: it holds no settings by name; copy it again."
        )
    check_config(settings)
    return settings


def _read_config(
    kind: type[PreTrainedModel], folder: Path, trust_remote_code: bool
) -> PreTrainedConfig:
    """config.json as transformers reads it."""
    try:
        if not kind.__module__.startswith("transformers.") and kind.config_class is not None:
            return kind.config_class.from_pretrained(folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise no_model(folder, error) from error


def _check_bytes(folder: Path, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse files that hold far more than the model: a sparse file of terabytes would be copied,
    zero by zero.
    """
    held = sum(map(checkpoint.nbytes, checkpoint.names))
    wanted = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
    if held > max(FRESH_BYTES, FRESH_SHARE * wanted):
        raise ValueError(
            f"The files of {folder} hold {held / 1e9:.1f} GB, and the model of its config.json "
            f"{wanted / 1e9:.3f} GB; they do not belong together: copy the folder again."
        )


def _fingerprint(
    checkpoint: Checkpoint, settings: Settings, moments: Moments | None
) -> dict[str, Any]:
    """Facts that an unfinished run must agree with: the settings, the moments, and the tensors and
    file times of the source.
    """
    facts = {
        "settings": settings.to_dict(),
        "moments": None if moments is None else moments.fingerprint(),
        "source": checkpoint.fingerprint(),
    }
    return json.loads(json.dumps(facts))


def _block_bytes(
    stacks: list[LayerStack], targets: list[LayerStack], max_memory: int, feedback: bool
) -> int:
    """Bytes of a block of rows that keep within `max_memory`."""
    layer = 4 * max(stack.out_features * stack.in_features for stack in stacks)
    row = 4 * max(stack.layers * stack.in_features for stack in stacks)  # large with many experts
    basis = 4 * _BASIS * max(stack.layers * stack.in_features for stack in targets)
    fixed = _OVERHEAD_BYTES + basis
    if feedback:
        widest = max(min(stack.in_features, FULL_WIDTH) for stack in stacks)
        fixed += 4 * _MOMENTS * widest**2
    needed = fixed + max(_LAYERS * layer, _BLOCKS * max(_LEAST_BLOCK_BYTES, row))
    if max_memory < needed:
        most_layers = max(stack.layers for stack in stacks)
        raise ValueError(
            f"max_memory is {max_memory / 1e9:.2f} GB, but this model needs {needed / 1e9:.2f} GB: "
            f"its largest linear layer has {layer / 4e6:.1f} million weights, its largest stack "
            f"{most_layers} linear layers"
        )
    return min(BLOCK_BYTES, (max_memory - fixed) // _BLOCKS)
