"""What lies between quantized layers, in their kernels: a pass over vLLM's compiled graph.

vLLM takes one more pass of Inductor's from ``inductor_compile_config["post_grad_custom_post_pass"]`` of its compilation
config and runs it after its own, when RMS norms still are vLLM's operators. This one joins silu_and_mul to the gate and
up projections that only it reads, and then a norm with its residual to the layer before it and those that read it.
Graphs with something between (LoRA, another rank's sums), eager mode, and a server whose user has set a pass stay as
they are.
"""

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul

from ..backends import cuda
from ..dispatch import backend
from ..ops import (
    lut_linear_add_norm_op,
    lut_linear_normed_op,
    lut_linear_normed_silu_op,
    lut_linear_op,
    lut_linear_silu_op,
)

logger = init_logger("vllm.flute")

_KEY = "post_grad_custom_post_pass"
_N = 8  # of the example that the pattern is traced with; in a graph it is any number


def _separate(x, packed, header, N):
    return SiluAndMul.forward_native(lut_linear_op(x, packed, header, None, N, ""))


def _fused(x, packed, header, N):
    return lut_linear_silu_op(x, packed, header, None, N, "")


_LINEAR = lut_linear_op.default
_NORMED = {_LINEAR: lut_linear_normed_op.default, lut_linear_silu_op.default: lut_linear_normed_silu_op.default}


def _joinable(graph: Graph) -> Iterator[tuple[Node, list[Node], list[Node]]]:
    """(norm, what takes its norm, what takes its sum) of each fused_add_rms_norm between quantized layers."""
    for norm in graph.find_nodes(op="call_function", target=torch.ops.vllm_ir.fused_add_rms_norm.default):
        y, residual, weight, _, *size = norm.args
        outputs = [[u for u in norm.users if u.target is operator.getitem and u.args[1] == i] for i in (0, 1)]
        readers = [reader for output in outputs[0] for reader in output.users]
        if (
            isinstance(y, Node)
            and y.target is _LINEAR
            and len(y.users) == 1
            and weight is not None
            and not any(size)
            and not norm.kwargs
            and len(outputs[0]) + len(outputs[1]) == len(norm.users)
            and readers
            and all(r.target in _NORMED and not set(outputs[0]) & {*r.args[1:]} for r in readers)
            and {n.meta["val"].dtype for n in (y, residual, weight)} == {torch.bfloat16}
        ):
            yield norm, *outputs


def join_norms(graph: Graph) -> int:
    """Have layers do the norms between them; how many.

    bf16 alone: what is passed on is not divided by its magnitude yet, which fp16 may not hold.
    """
    found = list(_joinable(graph))
    for norm, normed, summed in found:
        y, residual, weight, epsilon, *_ = norm.args
        with graph.inserting_before(norm):
            both = graph.call_function(
                lut_linear_add_norm_op.default, (y.args[0], residual, weight, epsilon, *y.args[1:])
            )
            both.meta["val"] = lut_linear_add_norm_op.default(
                *torch.fx.map_arg(both.args, lambda node: node.meta["val"])
            )
            scaled, total, squares = (graph.call_function(operator.getitem, (both, i)) for i in range(3))
        for i, node in enumerate((scaled, total, squares)):
            node.meta["val"] = both.meta["val"][i]
        for reader in [reader for output in normed for reader in output.users]:
            reader.target = _NORMED[reader.target]
            reader.args = (scaled, squares, epsilon, *reader.args[1:])
        for output in summed:
            output.replace_all_uses_with(total)
        for node in (*normed, *summed, norm, y):
            graph.erase_node(node)
    return len(found)


class LayerFusion(InductorPass):
    """lut_linear without bias, then silu_and_mul of torch's own operators -> lut_linear_silu; :func:`join_norms`.

    ``matched``, ``norms`` count replaced calls. dtype, device: of the activations, which decide what silu is made of in
    a graph.
    """

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device, self.matched, self.norms = dtype, device, 0, 0
        self._patterns = None

    def __call__(self, graph: Graph) -> None:
        if self._patterns is None:
            self._patterns = self._trace()
        found = self._patterns.apply(graph)
        norms = join_norms(graph)
        self.matched += found
        self.norms += norms
        logger.debug("silu(gate) * up joined to %d projections, a norm to %d layers", found, norms)

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
        return self.hash_source(type(self), _separate, _fused, _joinable, join_norms, f"{self.dtype} {self.device}")


def install(config: VllmConfig, device: str) -> None:
    """Have the graphs of this configuration fused where the device's backend computes both at once; idempotent."""
    if backend(device)[0] is cuda:
        dtype = config.model_config.dtype
        config.compilation_config.inductor_compile_config.setdefault(_KEY, LayerFusion(dtype, device))
