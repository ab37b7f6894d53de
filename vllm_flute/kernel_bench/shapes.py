"""The shapes of linear layers that are worth measuring."""

import re

from ..errors import FluteError

# Distinct N x K of a decoder layer as vLLM fuses it (q, k and v; gate and up), from the models' config.json on the
# hub: hidden_size, intermediate_size, num_attention_heads, num_key_value_heads. The output heads are not among them.
MODELS = {
    # meta-llama/Meta-Llama-3-8B: 4096, 14336, 32 and 8 heads of 128
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    # meta-llama/Llama-3.2-1B: 2048, 8192, 32 and 8 heads of 64
    "llama-3.2-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
    # HuggingFaceTB/SmolLM2-135M: 576, 1536, 9 and 3 heads of 64
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}


def parse(names: str) -> list[tuple[int, int]]:
    """(N, K) of a comma-separated list of NxK and of models; each once, in their order."""
    found: dict[tuple[int, int], None] = {}
    for name in names.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", name)
        if name in MODELS:
            found |= dict.fromkeys(MODELS[name])
        elif match and int(match[1]) and int(match[2]):
            found[int(match[1]), int(match[2])] = None
        else:
            raise FluteError(f"--shapes {name!r}: expected NxK or one of {', '.join(MODELS)}")
    return list(found)
