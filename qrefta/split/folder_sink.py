"""A prepared folder as sink of `split_stacks`, with a journal by which an interrupted run resumes.

The packed layers and factors of each stack are written, about `_PART_BYTES` at a time, and entered
in the journal once the stack is complete. config.json is written last: until then no loader takes
the folder for a model.
"""

import json
from pathlib import Path
from typing import Any

from qrefta.choices import QuantType
from qrefta.config.rank import Rank
from qrefta.config.report import StackReport
from qrefta.config.settings import Settings
from qrefta.config.stack import BANK
from qrefta.files.checksums import Checksums, settings_checksum
from qrefta.files.companions import copy_companions
from qrefta.files.folders import JOURNAL
from qrefta.files.header import read_checksums
from qrefta.files.json_file import read_json
from qrefta.files.safetensors import Checkpoint
from qrefta.files.shards import ShardWriter, copy_shard, write_index
from qrefta.files.whole_file import replace_text
from qrefta.hf_config import QReftaConfig
from qrefta.model.build import bank_key
from qrefta.model_card import write_card
from qrefta.nn.factors import stored_factors
from qrefta.split.folder_source import FolderSource
from qrefta.split.moments import Moments
from qrefta.split.stack_split import StackSplit

_REST = "model-rest.safetensors"
_PART_BYTES = 128 << 20


class FolderSink:
    """A folder that a prepared checkpoint is written to, with a journal of the stacks that are
    complete.

    Attributes:
        ranks, quant_types, reports: see `qrefta.split.loop.Sink`.

    Raises:
        ValueError: if the folder holds an unfinished run with other settings.
    """

    def __init__(self, out: Path, source: FolderSource, moments: Moments | None) -> None:
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
        if split.factors is not None:
            for name, tensor in stored_factors(split.factors).items():
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
