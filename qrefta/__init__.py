"""4-bit fine-tuning with shared tensor factors: prepare, train, save, load, merge, export, compare.

The names are imported on first use. `import qrefta` imports neither torch nor transformers; it
makes sure that transformers will know prepared models (see `qrefta._plugin`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qrefta import _plugin

if TYPE_CHECKING:
    from qrefta._prepare import prepare, prepare_checkpoint
    from qrefta.config.rank import RankBudget
    from qrefta.config.settings import Settings
    from qrefta.export.consolidate import consolidate
    from qrefta.export.gguf import export_gguf
    from qrefta.export.lora import export_lora
    from qrefta.export.merge import merge
    from qrefta.hf_config import QReftaConfig
    from qrefta.measure.compare import TextComparison, compare
    from qrefta.measure.harness import evaluate
    from qrefta.memory.plan import plan
    from qrefta.model.load import load
    from qrefta.model.prepared import quant_report
    from qrefta.model.whole_folder import verify
    from qrefta.train.finetune import finetune
    from qrefta.train.run import FinetuneResult
    from qrefta.train.sharding import shard

__version__ = "0.1.0"
__all__ = [
    "FinetuneResult",
    "QReftaConfig",
    "RankBudget",
    "Settings",
    "TextComparison",
    "compare",
    "consolidate",
    "evaluate",
    "export_gguf",
    "export_lora",
    "finetune",
    "load",
    "merge",
    "plan",
    "prepare",
    "prepare_checkpoint",
    "quant_report",
    "shard",
    "verify",
]

_MODULES = {
    "QReftaConfig": "qrefta.hf_config",
    "compare": "qrefta.measure.compare",
    "consolidate": "qrefta.export.consolidate",
    "evaluate": "qrefta.measure.harness",
    "export_gguf": "qrefta.export.gguf",
    "export_lora": "qrefta.export.lora",
    "FinetuneResult": "qrefta.train.run",
    "finetune": "qrefta.train.finetune",
    "load": "qrefta.model.load",
    "merge": "qrefta.export.merge",
    "plan": "qrefta.memory.plan",
    "RankBudget": "qrefta.config.rank",
    "Settings": "qrefta.config.settings",
    "prepare": "qrefta._prepare",
    "prepare_checkpoint": "qrefta._prepare",
    "quant_report": "qrefta.model.prepared",
    "shard": "qrefta.train.sharding",
    "TextComparison": "qrefta.measure.compare",
    "verify": "qrefta.model.whole_folder",
}

_plugin.register()


def __getattr__(name: str) -> Any:
    """A public name, imported on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'qrefta' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
