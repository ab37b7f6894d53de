"use strict";
const PERIOD = 2000; // milliseconds
// Without what the page's own address may carry: fetch refuses an address with a password in it.
const STATUS = new URL("v1/flute/status", location.origin + location.pathname);
const LATENCIES = {
  time_to_first_token: "time to first token",
  inter_token_latency: "between tokens",
  request_latency: "whole request",
  queue_time: "in the queue",
};
const NOTHING = "\u2013";

const number = (x, digits = 1) => (x === null || x === undefined ? NOTHING : x.toFixed(digits));
const percent = (x) => (x === null || x === undefined ? NOTHING : (100 * x).toFixed(1) + "%");
const time = (x) => (x === null ? NOTHING : x < 1 ? (1000 * x).toFixed(1) + " ms" : x.toFixed(2) + " s");
const mebibytes = (x) => (x ? (x / 2 ** 20).toFixed(0) + " MiB" : NOTHING);

function put(id, text) {
  document.getElementById(id).textContent = text;
}

function rows(id, lines) {
  document.getElementById(id).replaceChildren(
    ...lines.map((cells) => {
      const row = document.createElement("tr");
      cells.forEach((text, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (!i) cell.scope = "row";
        cell.textContent = text;
        row.append(cell);
      });
      return row;
    }),
  );
}

function show(figures) {
  const { throughput, requests } = figures;
  put("generation", number(throughput.generation_tokens_per_second));
  put("prompt", number(throughput.prompt_tokens_per_second));
  put("finished", number(throughput.requests_per_second, 2));
  put("running", number(requests.running, 0));
  put("waiting", number(requests.waiting, 0));
  put("kv", percent(figures.kv_cache_usage));
  put("prefix", percent(figures.prefix_cache_hit_rate));
  put("window", number(figures.window_seconds, 0));
  rows("latency", Object.entries(LATENCIES).map(([key, name]) => {
    const { p50, p95, p99 } = figures.latency_seconds[key];
    return [name, time(p50), time(p95), time(p99)];
  }));
  rows("kernels", figures.kernels.map((k) => [
    k.kernel, k.isa, k.m_bucket, percent(k.share), number(k.calls_per_second), number(k.bytes_per_second / 1e9, 2),
  ]));
  put("bandwidth", figures.weight_bytes_per_second === null
    ? NOTHING : number(figures.weight_bytes_per_second / 1e9, 2) + " GB/s");
  const fallback = document.getElementById("fallback");
  fallback.hidden = !figures.fallback_share;
  fallback.textContent = figures.fallback_share
    ? percent(figures.fallback_share) + " of the weight bytes are read by a slow fallback kernel: see vllm-flute doctor"
    : "";
  put("weights", mebibytes(figures.memory_bytes.quantized_weights));
  put("workers", mebibytes(figures.memory_bytes.workers));
  put("api", mebibytes(figures.memory_bytes.api_server));
}

async function refresh() {
  const line = document.getElementById("server");
  let up = false;
  try {
    const answer = await fetch(STATUS, { cache: "no-store" });
    const { server, figures } = await answer.json();
    up = server.up;
    line.textContent = up
      ? `${server.models.join(", ")} \u00b7 vLLM ${server.vllm} \u00b7 ${server.url}`
      : `${server.url} is down: ${server.reason}`;
    if (up) show(figures);
  } catch {
    line.textContent = "this service does not answer";
  }
  line.className = up ? "" : "down";
  document.getElementById("figures").hidden = !up;
}

refresh();
setInterval(refresh, PERIOD);
