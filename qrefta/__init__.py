"""4-bit fine-tuning with shared tensor factors: prepare, train, save, load, merge, export, report."""

from qrefta._prepare import prepare, prepare_checkpoint
from qrefta.config import RankBudget, Settings
from qrefta.export.lora import export_lora
from qrefta.export.merge import merge
from qrefta.hf_config import QReftaConfig
from qrefta.hf_quantizer import load, quant_report
from qrefta.memory.plan import plan
from qrefta.train.evaluate import evaluate
from qrefta.train.finetune import finetune

__version__ = "0.1.0"
__all__ = [
    "QReftaConfig",
    "RankBudget",
    "Settings",
    "evaluate",
    "export_lora",
    "finetune",
    "load",
    "merge",
    "plan",
    "prepare",
    "prepare_checkpoint",
    "quant_report",
]
