"""FluteConfig: what vLLM asks of a quantization method, answered from ``quantization_config``.

A checkpoint's own says how it is stored; none, or ``{"quant_method": "flute", "online": true, ...}`` given by
``--hf-overrides``, means to quantize a plain checkpoint while it loads.
"""

import os
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from .. import dispatch
from ..checkpoint import LayerSpec, LutConfig, check_checkpoint
from ..checkpoint.products import has_bf16_products
from ..checkpoint.reader import CONFIG, read_json
from ..checkpoint.sources import upstream_flute
from ..errors import FluteError
from ..format import QUANT_METHOD
from . import metrics, upstream
from .linear import FluteLinearMethod
from .moe import FluteMoEMethod
from .online import OnlineConfig, OnlineLinearMethod, check_plain

logger = init_logger("vllm.flute")  # below "vllm", whose handlers vLLM sets up


def check_kv_space() -> None:
    """FluteError where the KV cache cannot fit: vLLM's own error is deep in a worker's traceback."""
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    available = psutil.virtual_memory().available / 2**30
    if space.isdecimal() and int(space) > available:
        raise FluteError(
            f"VLLM_CPU_KVCACHE_SPACE={space}: so many GiB for the KV cache, but {available:.1f} GiB of memory are "
            "available; set it lower"
        )


class FluteConfig(QuantizationConfig):
    """Quantization method ``flute``: lut-v1 checkpoints, and plain ones that are quantized while they load.

    ``lut`` None is vLLM's way to say: --quantization flute, and a config.json without quantization_config.
    ``upstream``: the tensors are those of the package flute-kernel.
    """

    def __init__(self, lut: LutConfig | OnlineConfig | None = None, upstream: bool = False):
        super().__init__()
        self.upstream = upstream
        self.lut = OnlineConfig() if lut is None else lut
        if (
            current_platform.is_cpu()
        ):  # one that cannot run it ends here, in one line; a GPU is for the workers to start
            dispatch.backend("cpu")
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
        if found := upstream_flute.settings(None, {"quantization_config": config}):
            return cls(upstream_flute.lut_config(found, "quantization_config"), upstream=True)
        return cls((OnlineConfig if config.get("online") else LutConfig).from_dict(config))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, **kwargs) -> str | None:
        """Takes no other method's checkpoint, and says so while an error is still one clear line."""
        found = hf_quant_cfg.get("quant_method")
        if user_quant == QUANT_METHOD and found != QUANT_METHOD:
            raise FluteError(
                f"--quantization {QUANT_METHOD}, but config.json says quant_method {found!r}: leave the option out to "
                "serve the checkpoint as it is, or give the unquantized one"
            )
        return None

    @property
    def online(self) -> bool:
        return isinstance(self.lut, OnlineConfig)

    @property
    def extensions(self) -> tuple[str, ...]:
        """Optional parts of a layer that the checkpoint has somewhere."""
        return () if self.online else self.lut.extensions

    def maybe_update_config(self, model_name: str, *args, **kwargs) -> None:
        """Check the memory and a local checkpoint's headers before an engine starts, while an error is one line."""
        if current_platform.is_cpu():
            check_kv_space()
        path = Path(model_name)
        if self.online and path.is_dir() and (found := upstream_flute.settings(path, read_json(path / CONFIG))):
            self.lut, self.upstream = upstream_flute.lut_config(found, str(path / upstream_flute.SETTINGS)), True
        if self.online:
            logger.info("online quantization while loading: %s", self.lut)
        if path.is_dir():
            if self.upstream:
                upstream.check(path)
            elif self.online:
                check_plain(read_json(path / CONFIG), path)
            elif any(path.glob("*.safetensors*")):  # --load-format dummy needs none
                check_checkpoint(path)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        offline = upstream.UpstreamLinearMethod if self.upstream else FluteLinearMethod
        method = OnlineLinearMethod if self.online else offline
        if isinstance(layer, ParallelLMHead):
            if not self.lut.is_ignored(prefix):
                return method(self.layer_spec(prefix), self, prefix)
            # vLLM makes a model's modules with its dtype as the default.
            if current_platform.is_cpu() and torch.get_default_dtype() != torch.float32 and not has_bf16_products():
                logger.warning_once(
                    "%s is not quantized, and torch multiplies 16-bit matrices in a plain loop on this CPU: batches "
                    "are several times as slow as with a quantized one (vllm-flute quantize --lm-head)",
                    prefix,
                )
            return None
        if isinstance(layer, LinearBase):
            spec = self.layer_spec(prefix)
            if spec is None and self.online:
                logger.warning_once(
                    "online quantization leaves layers called %s as they are", prefix.rpartition(".")[2]
                )
            return method(spec, self, prefix) if spec else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return self._moe_method(layer, prefix)
        return None

    def _moe_method(self, layer: RoutedExperts, prefix: str) -> FluteMoEMethod | None:
        projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name), (layer.ckpt_down_proj_name,)
        w13, w2 = (
            self._shared_spec(prefix, [f"{prefix}.{e}.{p}" for e in range(layer.global_num_experts) for p in parts])
            for parts in projections
        )
        if (w13 is None) != (w2 is None):
            raise FluteError(f"{prefix}: some matrices of the experts are quantized and some are not: quantize all")
        if w13 and (self.extensions or self.upstream):
            found = " and ".join(self.extensions) or "the layout of flute-kernel: import the checkpoint"
            raise FluteError(f"{prefix}: LUT-quantized experts do not support {found}")
        return FluteMoEMethod(layer.moe_config, w13, w2, self, prefix) if w13 else None

    def layer_spec(self, prefix: str) -> LayerSpec | None:
        """Bits and group size of a (possibly fused) layer by vLLM's name for it; None when it is not quantized.

        Raises FluteError when the matrices that vLLM fuses into this layer differ in either.
        """
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return self._shared_spec(prefix, [f"{parent}.{part}" if parent else part for part in parts])

    def _shared_spec(self, prefix: str, names: list[str]) -> LayerSpec | None:
        specs = {name: None if self.lut.is_ignored(name) else self.lut.layer(name) for name in names}
        if len(set(specs.values())) > 1:
            raise FluteError(
                f"{prefix} is one layer in vLLM, but its parts differ: "
                + ", ".join(f"{n}: {s or 'not quantized'}" for n, s in specs.items())
                + "; quantize them alike"
            )
        return specs[names[0]]
