"""FluteConfig: what vLLM asks of a quantization method, answered from ``quantization_config``."""

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from .. import dispatch
from ..checkpoint import LayerSpec, LutConfig, check_checkpoint
from ..errors import FluteError
from ..format import QUANT_METHOD
from . import metrics


class FluteConfig(QuantizationConfig):
    """Quantization method ``flute``: lut-v1 checkpoints."""

    def __init__(self, lut: LutConfig | None = None):
        super().__init__()
        if lut is None:  # vLLM's way to say: --quantization flute on a checkpoint that is not quantized
            raise FluteError(
                "this checkpoint is not LUT-quantized (config.json has no quantization_config): "
                "run 'vllm-flute quantize MODEL -o OUT' and serve OUT"
            )
        self.lut = lut
        dispatch.backend(current_platform.device_type)  # a machine that cannot run it ends here, in one line
        metrics.share_directory()

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FluteConfig":
        return cls(LutConfig.from_dict(config))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, **kwargs) -> str | None:
        return None

    def maybe_update_config(self, model_name: str, *args, **kwargs) -> None:
        """Check a local checkpoint's headers before an engine starts, while an error is still one clear line."""
        if Path(model_name).is_dir():
            check_checkpoint(model_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        from .linear import FluteLinearMethod

        if isinstance(layer, ParallelLMHead):
            return None if self.lut.is_ignored(prefix) else FluteLinearMethod(self.layer_spec(prefix), self, prefix)
        if isinstance(layer, LinearBase):
            spec = self.layer_spec(prefix)
            return FluteLinearMethod(spec, self, prefix) if spec else UnquantizedLinearMethod()
        return None

    def layer_spec(self, prefix: str) -> LayerSpec | None:
        """Bits and group size of a (possibly fused) layer by vLLM's name for it; None when it is not quantized.

        Raises FluteError when the matrices that vLLM fuses into this layer differ in either.
        """
        parent, _, last = prefix.rpartition(".")
        names = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(last, [last])]
        specs = {name: None if self.lut.is_ignored(name) else self.lut.layer(name) for name in names}
        if len(set(specs.values())) > 1:
            raise FluteError(
                f"{prefix} is one layer in vLLM, but its parts differ: "
                + ", ".join(f"{n}: {s or 'not quantized'}" for n, s in specs.items())
                + "; quantize them alike"
            )
        return specs[names[0]]
