"""Kernels, layers and weight bandwidth: what the plugin's metrics tell."""

from panels import INSTANCE, Dashboard, Panel, rate, share

FALLBACK = 'kernel=~"portable|reference|triton"'
CALLS, TOKENS = "vllm_flute:kernel_calls_total", "vllm_flute:kernel_tokens_total"
STREAMED = "vllm_flute:weight_bytes_streamed_total"
ON_FALLBACK = share(rate(CALLS, f"{INSTANCE}, {FALLBACK}"), rate(CALLS, INSTANCE))
# decode_kernel and prefill_kernel are two labels of one series: the union counts a layer once.
LAYERS_ON_FALLBACK = share(
    "sum by (instance) ("
    + " or ".join(f"vllm_flute:layers{{{INSTANCE}, {when}_{FALLBACK}}}" for when in ("decode", "prefill"))
    + ")",
    f"sum by (instance) (vllm_flute:layers{{{INSTANCE}}})",
)
BYTES = f"sum by (instance) (vllm_flute:quantized_weight_bytes{{{INSTANCE}}})"

KERNELS = Dashboard(
    "vllm-flute-kernels",
    "vllm-flute: kernels",
    "What the LUT kernels of the quantized layers do. Under CUDA graphs the kernel counters see captures, not replays.",
    {
        "At a glance": [
            Panel(
                "Quantized layers",
                "Layers that this plugin computes.",
                "short",
                {"{{instance}}": f"sum by (instance) (vllm_flute:layers{{{INSTANCE}}})"},
                "stat",
                6,
            ),
            Panel(
                "Packed weights",
                "Resident bytes of the quantized layers, all ranks.",
                "bytes",
                {"{{instance}}": BYTES},
                "stat",
                6,
            ),
            Panel(
                "Weight bandwidth",
                "Bytes of packed weights that the kernels read in a second.",
                "binBps",
                {"{{instance}}": rate(STREAMED, INSTANCE)},
                "stat",
                6,
            ),
            Panel(
                "Layers on a fallback kernel",
                "Share of the layers whose kernel for one or for 512 tokens is portable, reference or triton.",
                "percentunit",
                {"{{instance}}": LAYERS_ON_FALLBACK},
                "stat",
                6,
            ),
        ],
        "Weight bandwidth": [
            Panel(
                "Weight bandwidth, by kernel",
                "Bytes of packed weights read in a second. At one token a step memory is the limit.",
                "binBps",
                {"{{kernel}}": rate(STREAMED, INSTANCE, by="kernel")},
                "stacked",
            ),
            Panel(
                "Weight bandwidth, from steps",
                "Steps a second times the resident bytes: holds under CUDA graphs too. "
                "Steps that only read a part of a long prompt are not counted.",
                "binBps",
                {"{{instance}}": f"{rate('vllm:iteration_tokens_total_count')} * on (instance) {BYTES}"},
            ),
            Panel(
                "Weight bytes for a generated token",
                "Falls as more streams share a step, rises with the share of prompts.",
                "bytes",
                {"{{instance}}": f"{rate(STREAMED, INSTANCE)} / on (instance) {rate('vllm:generation_tokens_total')}"},
            ),
        ],
        "Kernel mix": [
            Panel(
                "Calls, by kernel",
                "Operator calls a second.",
                "cps",
                {"{{kernel}} ({{isa}})": rate(CALLS, INSTANCE, by="kernel, isa")},
                "stacked",
            ),
            Panel(
                "Calls, by tokens in a call",
                "The dispatcher chooses the kernel by this number (M).",
                "cps",
                {"M = {{m_bucket}}": rate(CALLS, INSTANCE, by="m_bucket")},
                "stacked",
            ),
            Panel(
                "Calls, by tokens in a call and kernel",
                "Which kernel serves which M.",
                "cps",
                {"M = {{m_bucket}} {{kernel}}": rate(CALLS, INSTANCE, by="m_bucket, kernel")},
            ),
            Panel(
                "Tokens, by kernel",
                "Rows of the activations, summed over layers, a second.",
                "suffix: tok/s",
                {"{{kernel}}": rate(TOKENS, INSTANCE, by="kernel")},
                "stacked",
            ),
            Panel(
                "Tokens in a call",
                "Mean by kernel.",
                "short",
                {"{{kernel}}": f"{rate(TOKENS, INSTANCE, by='kernel')} / {rate(CALLS, INSTANCE, by='kernel')}"},
            ),
            Panel(
                "Fallback share",
                "Share of the calls that ran portable, reference or triton: slow paths.",
                "percentunit",
                {"{{instance}}": ON_FALLBACK},
            ),
        ],
        "Layers": [
            Panel(
                "Layers, format and kernels",
                "Layers of one kind by bits, group size, codebook and layout, with the kernels for 1 and 512 tokens.",
                "short",
                {"": f"vllm_flute:layers{{{INSTANCE}}}"},
                "table",
                16,
            ),
            Panel(
                "Packed weights, by layer",
                "Resident bytes, all ranks.",
                "bytes",
                {"{{layer_group}}": f"sum by (layer_group) (vllm_flute:quantized_weight_bytes{{{INSTANCE}}})"},
                "stacked",
            ),
            Panel(
                "Build",
                "Version of the plugin, of its operators and of torch; device, instruction set, dispatch table.",
                "short",
                {"": f"vllm_flute:build_info{{{INSTANCE}}}"},
                "table",
                24,
            ),
        ],
    },
)
