"""Online quantization: a plain checkpoint is quantized while it loads.

Each weight is quantized as vLLM reads it, whole, and handed on as the tensors that an offline checkpoint would have:
the same codes as `vllm-flute quantize` writes, whatever the number of ranks, and one plain weight in memory at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs

from ..checkpoint import LayerSpec
from ..checkpoint.config import HEAD, LINEAR, check_pattern, first_match
from ..checkpoint.quantize import fit_group
from ..codebook import DEFAULT_CODEBOOK
from ..errors import FluteError
from ..format import GROUP_SIZES, PARTS, QUANT_METHOD, LutTensor
from ..quantization import DATA_FREE, quantize
from .linear import FluteLinearMethod

logger = init_logger("vllm.flute")  # below "vllm", whose handlers vLLM sets up

_KEYS = ("quant_method", "online", "bits", "group_size", "codebook", "ignore", "overrides", "lm_head", "method")


@dataclass(frozen=True)
class OnlineConfig:
    """Settings of online quantization, which are options of `vllm-flute quantize`.

    Attributes:
        bits, group_size: of every linear layer of a decoder block; group size 0 is a whole row. Where it does not
            divide a layer's K, that layer takes the largest supported one that does.
        codebook, method: see `quantization.quantize`; the defaults are those of `quantize_checkpoint` without
            calibration.
        ignore: modules to leave as they are (see `checkpoint.config.matches`).
        overrides: bits and group size by a name that is matched like ``ignore``; the first match counts.
        lm_head: quantize the output head too.
    """

    bits: int = 4
    group_size: int = 64
    codebook: str = DEFAULT_CODEBOOK
    method: str = DATA_FREE
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, LayerSpec] = field(default_factory=dict)
    lm_head: bool = False

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "OnlineConfig":
        """Parse ``{"quant_method": "flute", "online": true, ...}``.

        Raises FluteError for unknown keys and unsupported values.
        """
        where = "online quantization"
        if unknown := sorted(set(d) - set(_KEYS)):
            raise FluteError(f"{where}: unknown keys {', '.join(unknown)} (known: {', '.join(_KEYS)})")
        method, lm_head = d.get("method", cls.method), d.get("lm_head", False)
        codebook = d.get("codebook", cls.codebook)
        default = _spec(d, LayerSpec(cls.bits, cls.group_size), codebook, method, where)
        ignore, overrides = d.get("ignore", []), d.get("overrides", {})
        if not isinstance(lm_head, bool) or not isinstance(overrides, Mapping) or not isinstance(ignore, list | tuple):
            raise FluteError(
                f"{where}: lm_head is {lm_head!r}, ignore {ignore!r} and overrides {overrides!r}; "
                "expected true or false, a list of names and an object by name"
            )
        return cls(
            *default,
            codebook,
            method,
            tuple(check_pattern(str(entry)) for entry in ignore),
            {
                check_pattern(name): _spec(spec, default, codebook, method, f"{where}: override {name}")
                for name, spec in overrides.items()
            },
            lm_head,
        )

    def is_ignored(self, name: str) -> bool:
        """Whether the module of this dotted name stays as it is: what `vllm-flute quantize` would not touch either."""
        if name == HEAD:
            return not self.lm_head
        return not LINEAR.fullmatch(f"{name}.weight") or first_match(self.ignore, name) is not None

    def layer(self, name: str) -> LayerSpec:
        """Bits and the group size that is asked for (0: a whole row)."""
        entry = first_match(self.overrides, name)
        return self.overrides[entry] if entry else LayerSpec(self.bits, self.group_size)

    def quantize(self, weight: torch.Tensor, spec: LayerSpec, name: str) -> LutTensor:
        """Quantize a plain weight ``[N, K]`` by its layer's spec."""
        return quantize(weight, *spec, self.codebook, name=name, method=self.method)

    def __str__(self) -> str:
        group = f"group {self.group_size}" if self.group_size else "a scale a row"
        head = ", output head too" if self.lm_head else ""
        return f"{self.bits} bits, {group}, codebook {self.codebook}, {self.method}{head}"


def _spec(values: Any, default: LayerSpec, codebook: Any, method: Any, where: str) -> LayerSpec:
    """``bits`` and ``group_size`` of an object; raises FluteError for those that cannot quantize by this method."""
    if not isinstance(values, Mapping) or not isinstance(codebook, str):
        raise FluteError(f"{where} is {values!r} with codebook {codebook!r}, expected an object and a name")
    bits, group_size = values.get("bits", default.bits), values.get("group_size", default.group_size)
    if group_size not in (0, *GROUP_SIZES):
        supported = ", ".join(map(str, GROUP_SIZES))
        raise FluteError(f"{where}: unsupported group size {group_size!r} (supported: {supported}, and 0 for a row)")
    try:
        quantize(torch.zeros(1, 16), bits, 16, codebook, method=method)
    except FluteError as e:
        raise FluteError(f"{where}: {e}") from None
    return LayerSpec(bits, group_size)


def check_plain(config: Mapping[str, Any], path) -> None:
    """Raise FluteError when the checkpoint of this config.json is quantized already."""
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "unknown")
        hint = "serve it without the online settings" if method == QUANT_METHOD else "serve the unquantized checkpoint"
        raise FluteError(f"{path} is quantized already (quant_method {method!r}), online quantization cannot: {hint}")


def plain_weight(shape: tuple[int, ...], dtype: torch.dtype, loader: Callable) -> Parameter:
    """What vLLM finds under a plain weight's name: no memory, only a loader."""
    param = Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    set_weight_attrs(param, {"weight_loader": loader, "input_dim": len(shape) - 1, "output_dim": len(shape) - 2})
    return param


class OnlineLinearMethod(FluteLinearMethod):
    """`FluteLinearMethod` for a plain weight; a layer that cannot be packed stays as it is."""

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
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        if isinstance(layer, LinearBase) and input_size_per_partition % 8:
            logger.warning(
                "%s stays %s: K=%d on a rank is no multiple of 8", self.prefix, params_dtype, input_size_per_partition
            )
            layer.quant_method = UnquantizedLinearMethod()
            layer.quant_method.create_weights(layer, *sizes, weight_loader=weight_loader, **kwargs)
            return
        self.spec = LayerSpec(self.spec.bits, fit_group(self.spec.group_size, input_size, self.prefix))
        super().create_weights(layer, *sizes, weight_loader, **kwargs)

        def load(param, loaded_weight, *shard_id):
            t = self._quantize(loaded_weight.to(layer.qweight.device))
            for part in PARTS:
                stored = getattr(layer, part)
                stored.weight_loader(stored, getattr(t, part), *shard_id)

        shape = (sum(output_partition_sizes), input_size_per_partition)
        layer.register_parameter("weight", plain_weight(shape, params_dtype, load))

    def _quantize(self, weight: torch.Tensor) -> LutTensor:
        return self.config.lut.quantize(weight, self.spec, f"{self.prefix}.weight")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack; a tied head is quantized here from the embedding, which stays as it is."""
        weight = layer.weight
        del layer.weight
        if not weight.is_meta:  # vLLM has put the embedding's rows of this rank in its place
            t = self._quantize(weight.data)
            for part in PARTS:
                stored = getattr(layer, part)
                stored.data, stored.loaded = getattr(t, part).reshape(stored.shape), 1
        super().process_weights_after_loading(layer)
