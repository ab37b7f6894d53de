"""SwiGLU in the kernel of the gate and up projections: a pass over vLLM's compiled graph.

vLLM takes one more pass of Inductor's from ``inductor_compile_config["post_grad_custom_post_pass"]`` of its compilation
config and runs it after its own. This one replaces an operator's call that only silu_and_mul reads by one call of both.
Graphs with something between the two (LoRA), eager mode, and a server whose user has set a pass stay as they are.
"""

import torch
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul

from ..backends import cuda
from ..dispatch import backend
from ..ops import lut_linear_op, lut_linear_silu_op

logger = init_logger("vllm.flute")

_KEY = "post_grad_custom_post_pass"
_N = 8  # of the example that the pattern is traced with; in a graph it is any number


def _separate(x, packed, header, N):
    return SiluAndMul.forward_native(lut_linear_op(x, packed, header, None, N, ""))


def _fused(x, packed, header, N):
    return lut_linear_silu_op(x, packed, header, None, N, "")


class SiluFusion(InductorPass):
    """lut_linear without bias, then silu_and_mul of torch's own operators -> lut_linear_silu.

    ``matched`` counts replaced calls. dtype, device: of the activations, which decide what silu is made of in a graph.
    """

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device, self.matched = dtype, device, 0
        self._patterns = None

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self._patterns is None:
            self._patterns = self._trace()
        found = self._patterns.apply(graph)
        self.matched += found
        logger.debug("silu(gate) * up joined to %d projections", found)

    @enable_fake_mode
    def _trace(self):
        from torch._inductor import pattern_matcher  # seconds that a process without graphs need not spend

        patterns = pattern_matcher.PatternMatcherPass()
        example = [
            torch.empty(5, 16, dtype=self.dtype, device=self.device),
            torch.empty(64, dtype=torch.uint8, device=self.device),
            torch.empty(16, dtype=torch.int64),
        ]
        pattern_matcher.register_replacement(
            _separate, _fused, example, pattern_matcher.fwd_only, patterns, scalar_workaround={"N": _N}
        )
        return patterns

    def __getstate__(self) -> dict:
        """vLLM copies and pickles its configuration; traced patterns cannot be."""
        return self.__dict__ | {"_patterns": None}

    def uuid(self) -> str:
        return self.hash_source(type(self), _separate, _fused, f"{self.dtype} {self.device}")


def install(config: VllmConfig, device: str) -> None:
    """Have the graphs of this configuration fused where the device's backend computes both at once; idempotent."""
    if backend(device)[0] is cuda:
        dtype = config.model_config.dtype
        config.compilation_config.inductor_compile_config.setdefault(_KEY, SiluFusion(dtype, device))
