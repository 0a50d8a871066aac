"""4-bit fine-tuning with shared tensor factors: prepare, train, save, load, merge, export, report."""

from qrefta._prepare import prepare
from qrefta.config import QReftaConfig
from qrefta.export.lora import export_lora
from qrefta.export.merge import merge
from qrefta.hf_quantizer import load, quant_report
from qrefta.memory.plan import plan
from qrefta.train._finetune import FinetuneResult, finetune
from qrefta.train.evaluate import evaluate

__version__ = "0.1.0"
__all__ = [
    "FinetuneResult",
    "QReftaConfig",
    "evaluate",
    "export_lora",
    "finetune",
    "load",
    "merge",
    "plan",
    "prepare",
    "quant_report",
]
