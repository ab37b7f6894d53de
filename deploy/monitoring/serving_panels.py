"""Requests, latency, queue, caches, errors: what vLLM's own metrics tell."""

from panels import INSTANCE, MODEL, Dashboard, Panel, mean, percentiles, quantile, rate, share

TTFT, ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
FAILED = share(rate("http_requests_total", f'{INSTANCE}, status="5xx"'), rate("http_requests_total", INSTANCE))
HITS = share(rate("vllm:prefix_cache_hits_total"), rate("vllm:prefix_cache_queries_total"))

SERVING = Dashboard(
    "vllm-flute-serving",
    "vllm-flute: serving",
    "Requests, latency, queue, caches and errors of `vllm serve`.",
    {
        "At a glance": [
            Panel(
                "Servers that answer",
                "Targets of the job vllm-flute whose /metrics answered the last scrape, of all its targets.",
                "percentunit",
                {"up": 'avg(up{job="vllm-flute"})'},
                "stat",
                4,
            ),
            Panel(
                "Generated tokens",
                "Output tokens a second, all streams together.",
                "suffix: tok/s",
                {"{{instance}}": rate("vllm:generation_tokens_total")},
                "stat",
                4,
            ),
            Panel(
                "First token, p95",
                "95% of the requests had their first token within this time.",
                "s",
                {"{{instance}}": quantile(0.95, TTFT)},
                "stat",
                4,
            ),
            Panel(
                "Between tokens, p95",
                "95% of the tokens came within this time after the one before.",
                "s",
                {"{{instance}}": quantile(0.95, ITL)},
                "stat",
                4,
            ),
            Panel(
                "Waiting requests",
                "Requests that wait for a place in the batch or in the KV cache.",
                "short",
                {"{{instance}}": f"sum by (instance) (vllm:num_requests_waiting{{{MODEL}}})"},
                "stat",
                4,
            ),
            Panel(
                "Failed requests",
                "Answers of status 5xx, of all requests over HTTP.",
                "percentunit",
                {"{{instance}}": FAILED},
                "stat",
                4,
            ),
        ],
        "Throughput": [
            Panel(
                "Tokens",
                "Prompt tokens read (those found in the prefix cache too) and tokens generated, a second.",
                "suffix: tok/s",
                {
                    "{{instance}} prompt": rate("vllm:prompt_tokens_total"),
                    "{{instance}} generated": rate("vllm:generation_tokens_total"),
                },
            ),
            Panel(
                "Requests ended, by reason",
                "stop: the model ended; length: its limit; abort: the client left; error: the server's fault.",
                "reqps",
                {"{{finished_reason}}": rate("vllm:request_success_total", by="finished_reason")},
                "stacked",
            ),
            Panel(
                "Tokens in a step",
                "Mean tokens that one engine step computes: the batch that the kernels see.",
                "short",
                {"{{instance}}": mean("vllm:iteration_tokens_total")},
            ),
        ],
        "Latency": [
            Panel("Time to the first token", "From arrival, with the time in the queue.", "s", percentiles(TTFT)),
            Panel("Time between tokens", "Of one stream, without the first token.", "s", percentiles(ITL)),
            Panel(
                "Whole request",
                "From arrival to the last token.",
                "s",
                percentiles("vllm:e2e_request_latency_seconds"),
            ),
            Panel(
                "Where a request's time goes",
                "Mean seconds in the queue, reading the prompt, and generating.",
                "s",
                {
                    f"{{{{instance}}}} {p}": mean(f"vllm:request_{p}_time_seconds")
                    for p in ("queue", "prefill", "decode")
                },
                "stacked",
            ),
            Panel(
                "Time in the queue, p95",
                "Before the first step of a request. Long here and short elsewhere: too few servers.",
                "s",
                {"{{instance}}": quantile(0.95, "vllm:request_queue_time_seconds")},
            ),
            Panel(
                "Length of requests, p95",
                "Tokens of the prompt and of the answer: longer requests explain longer times.",
                "short",
                {
                    "{{instance}} prompt": quantile(0.95, "vllm:request_prompt_tokens"),
                    "{{instance}} answer": quantile(0.95, "vllm:request_generation_tokens"),
                },
            ),
        ],
        "Queue and caches": [
            Panel(
                "Requests running and waiting",
                "Waiting without a break: saturated.",
                "short",
                {
                    "{{instance}} running": f"sum by (instance) (vllm:num_requests_running{{{MODEL}}})",
                    "{{instance}} waiting": f"sum by (instance) (vllm:num_requests_waiting{{{MODEL}}})",
                },
            ),
            Panel(
                "KV cache in use",
                "Share of the KV cache's blocks that running requests hold, by engine.",
                "percentunit",
                {"{{instance}} engine {{engine}}": f"vllm:kv_cache_usage_perc{{{MODEL}}}"},
            ),
            Panel(
                "Preemptions",
                "Requests that lost their KV cache to others and are computed again, a second.",
                "cps",
                {"{{instance}}": rate("vllm:num_preemptions_total")},
            ),
            Panel(
                "Prefix cache hits",
                "Share of the prompt tokens looked up that were in the prefix cache.",
                "percentunit",
                {"{{instance}}": HITS},
            ),
            Panel(
                "Prompt tokens, by source",
                "Computed, or taken from a cache.",
                "suffix: tok/s",
                {"{{source}}": rate("vllm:prompt_tokens_by_source_total", by="source")},
                "stacked",
            ),
            Panel(
                "Requests waiting, by reason",
                "capacity: no room; deferred: held back by the scheduler.",
                "short",
                {"{{reason}}": f"sum by (reason) (vllm:num_requests_waiting_by_reason{{{MODEL}}})"},
                "stacked",
            ),
        ],
        "Errors and memory": [
            Panel(
                "Answers over HTTP, by status",
                "4xx: the client's fault; 5xx: the server's.",
                "reqps",
                {"{{status}}": rate("http_requests_total", INSTANCE, by="status")},
                "stacked",
            ),
            Panel(
                "Failed requests",
                "Answers of status 5xx, of all requests over HTTP.",
                "percentunit",
                {"{{instance}}": FAILED},
            ),
            Panel(
                "Resident memory",
                "Of the API server and of the workers, which hold the weights and on a CPU the KV cache.",
                "bytes",
                {
                    "{{instance}} API server": f"process_resident_memory_bytes{{{INSTANCE}}}",
                    "{{instance}} workers": f"vllm_flute:worker_resident_memory_bytes{{{INSTANCE}}}",
                },
            ),
        ],
    },
)
