"""Checkpoints on disk: read, checked and rewritten as a stream, one layer in memory."""

from .config import LayerSpec, LutConfig
from .demo_model import write_demo_model
from .dequantize import dequantize_checkpoint
from .importer import ImportReport, import_checkpoint
from .quantize import QuantizeReport, quantize_checkpoint
from .reader import Checkpoint
from .summary import kernels_by_tokens, summarize
from .validate import LayerInfo, check_checkpoint

__all__ = [
    "Checkpoint",
    "ImportReport",
    "LayerInfo",
    "LayerSpec",
    "LutConfig",
    "QuantizeReport",
    "check_checkpoint",
    "dequantize_checkpoint",
    "import_checkpoint",
    "kernels_by_tokens",
    "quantize_checkpoint",
    "summarize",
    "write_demo_model",
]
