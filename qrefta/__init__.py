"""4-bit fine-tuning with shared tensor factors: prepare, train, save, load, merge, export, report."""

from qrefta.config import QReftaConfig
from qrefta.evaluate import evaluate
from qrefta.export import merge
from qrefta.finetune import finetune
from qrefta.lora import export_lora
from qrefta.plan import plan
from qrefta.prepare import prepare
from qrefta.quantizer import load, quant_report

__version__ = "0.1.0"
__all__ = ["QReftaConfig", "evaluate", "export_lora", "finetune", "load", "merge", "plan", "prepare", "quant_report"]
