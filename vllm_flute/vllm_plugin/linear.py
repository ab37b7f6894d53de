"""The linear method: lut-v1 parameters while loading, one packed tensor and one operator call afterwards."""

from math import gcd

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ..checkpoint import LayerSpec
from ..codebook import make_codebook
from ..dispatch import pack_parts
from ..errors import FluteError
from ..extensions import add_offsets, centred, permuted
from ..format import EXTENSIONS
from ..ops import lut_linear_op
from . import fusion, metrics, params


def is_dummy_load() -> bool:
    """Whether vLLM was asked to leave the weights as they are (``--load-format dummy``)."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def _check_lora(layer: torch.nn.Module, prefix: str) -> None:
    """vLLM's LoRA logits processor reads the dtype and device of a head's plain weight, which a packed one has not."""
    config = get_current_vllm_config_or_none()
    if isinstance(layer, ParallelLMHead) and config is not None and config.lora_config is not None:
        raise FluteError(
            f"--enable-lora does not work with a quantized output head ({prefix}): quantize without --lm-head "
            '(online: without "lm_head")'
        )


class FluteLinearMethod(LinearMethodBase):
    """``y = x @ W^T + bias`` with W in lut-v1, for column-, row-, merged- and qkv-parallel linears and the head."""

    def __init__(self, spec: LayerSpec, config, prefix: str):
        self.spec, self.config, self.prefix = spec, config, prefix

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader,
        **kwargs,
    ) -> None:
        _check_lora(layer, self.prefix)
        bits, k, n = self.spec.bits, input_size_per_partition, sum(output_partition_sizes)
        stored_group = self.spec.group_size
        if input_size % stored_group:
            raise FluteError(
                f"{self.prefix}: group size {stored_group} does not divide its K={input_size}; the checkpoint's "
                "config.json is wrong for this layer: quantize again or add the layer to overrides"
            )
        if k % 8:
            sizes = [str(tp) for tp in range(1, 65) if input_size % (tp * 8) == 0]
            raise FluteError(
                f"{self.prefix}: tensor parallel size {input_size // k} gives each rank K={k}, which splits a byte of "
                f"{bits}-bit codes; sizes that work for K={input_size}: {', '.join(sizes)}"
            )
        group = gcd(stored_group, k)
        layer.flute_group_size = group
        layer.flute_shards = list(output_partition_sizes)
        layer.flute_n = n
        layer.register_parameter("qweight", params.codes(n, k * bits // 8, weight_loader))
        layer.register_parameter(
            "scales", params.scales(n, k // group, stored_group // group, weight_loader, self.prefix)
        )
        layer.register_parameter("codebook", params.codebooks(len(output_partition_sizes), 2**bits))
        extensions = self.config.extensions
        if "offsets" in extensions:
            offsets = params.offsets(n, k // group, stored_group // group, weight_loader)
            layer.register_parameter("offsets", offsets)
        if "perm" in extensions:
            layer.register_parameter("perm", params.perm(k, input_size // k, self.prefix))
        self.dummy = is_dummy_load()
        if (config := get_current_vllm_config_or_none()) is not None:
            # Now: when the model is made, its compiler takes a copy of the configuration.
            fusion.install(config, layer.qweight.device.type)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Re-arrange for this device and free what was loaded."""
        for part in ("qweight", "scales", "codebook"):
            if not getattr(layer, part).loaded and not self.dummy:
                raise FluteError(
                    f"{self.prefix}.{part} is missing from the checkpoint although its config.json says that the layer "
                    "is quantized; run 'vllm-flute inspect' on it"
                )
        if self.dummy:  # vLLM fills floats alone; equal codes would make lookups faster than any checkpoint's
            layer.qweight.data.random_(0, 256)
            layer.codebook.data.copy_(make_codebook("nf", self.spec.bits).expand_as(layer.codebook))
            layer.scales.data.fill_(0.02)  # times NormalFloat, a deviation like a trained weight's
        self._keep_extensions(layer)
        packed, header = pack_parts(
            layer.qweight.data, layer.scales.data, layer.codebook.data, layer.flute_group_size, layer.flute_shards
        )
        for part in ("qweight", "scales", "codebook"):
            delattr(layer, part)
        # vLLM's LoRA layers find a quantized layer's device by this name.
        layer.register_parameter("weight_packed", Parameter(packed, requires_grad=False))
        layer.register_buffer("header", header, persistent=False)
        metrics.layer_loaded(self.prefix, self.config, packed, header)

    def _keep_extensions(self, layer: torch.nn.Module) -> None:
        """Make buffers of those that the checkpoint has for this layer, None of the others."""
        for part in EXTENSIONS:
            param = layer._parameters.pop(part, None)
            kept = param is not None and param.loaded
            if part == "perm" and kept and param.loaded != layer.codebook.loaded:
                raise FluteError(f"{self.prefix}: only some parts of the layer have a perm: import the source again")
            layer.register_buffer(f"flute_{part}", param.data if kept else None, persistent=False)
        if layer.flute_offsets is not None:
            layer.codebook.data, layer.flute_offsets = centred(
                layer.codebook.data, layer.scales.data, layer.flute_offsets, layer.flute_shards
            )

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x = permuted(x, layer.flute_perm)
        y = lut_linear_op(x, layer.weight_packed, layer.header, bias, layer.flute_n, "")
        return add_offsets(y, x, layer.flute_offsets)
