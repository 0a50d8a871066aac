"""4-bit fine-tuning with shared tensor factors: prepare, train, save, load, merge, report."""

from qrefta.config import QReftaConfig
from qrefta.export import merge
from qrefta.finetune import finetune
from qrefta.prepare import prepare
from qrefta.quantizer import load, quant_report

__version__ = "0.1.0"
__all__ = ["QReftaConfig", "finetune", "load", "merge", "prepare", "quant_report"]
