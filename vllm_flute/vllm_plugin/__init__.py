"""The vLLM plugin: everything that imports vllm is in this package.

`register` is the entry point of the group ``vllm.general_plugins``: vLLM calls it in every process it starts.
"""

import logging
import sys

from ..errors import FluteError
from ..format import QUANT_METHOD


def _one_line(exc_type, exc, traceback, previous=sys.excepthook):
    """Bad input ends a server's start with its own line; every other exception keeps its traceback."""
    if issubclass(exc_type, FluteError):
        print(f"vllm-flute: error: {exc}", file=sys.stderr)
    else:
        previous(exc_type, exc, traceback)


def register() -> None:
    """Register the quantization method ``flute``; calling it again changes nothing.

    Never raises: an exception here would end every vLLM process of the environment, whatever it serves.
    """
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        if QUANT_METHOD in QUANTIZATION_METHODS:
            return
        from .config import FluteConfig
    except ImportError as e:
        logging.getLogger(__name__).error(
            "the quantization method %r is not available: vllm-flute supports vLLM 0.25 to 0.33 (%s)", QUANT_METHOD, e
        )
        return

    register_quantization_config(QUANT_METHOD)(FluteConfig)
    sys.excepthook = _one_line
