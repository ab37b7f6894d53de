"""What `quality.py` runs in an environment that has llama-cpp-python: its quantizer, and its logits of token windows.

    PYTHON quality_llama_cpp_worker.py JSON

JSON is {"quantize": SRC.gguf, "out": OUT.gguf, "type": "Q4_0", "keep": ggml type of embedding and head} and the answer
one line of JSON; or {"logits": MODEL.gguf, "windows": FILE, "threads": N} and the answer, for each (token ids, new) of
the file, the logits fp32 [new, vocabulary] that predict the last `new` tokens, as raw bytes.
"""

import ctypes
import json
import re
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def _quiet(level, text, data):
    pass


def quantize(task: dict) -> dict:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{task['type']}")
    params.nthread = task["threads"]
    params.output_tensor_type = params.token_embedding_type = task["keep"]
    begin = time.monotonic()
    if llama_cpp.llama_model_quantize(task["quantize"].encode(), task["out"].encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not make {task['out']}")
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return {"seconds": time.monotonic() - begin, "peak_bytes": peak}


def logits(task: dict) -> None:
    windows = json.loads(Path(task["windows"]).read_text())
    longest = max(len(ids) for ids, _ in windows)
    model = llama_cpp.llama_model_load_from_file(task["logits"].encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = longest
    params.n_threads = params.n_threads_batch = task["threads"]
    context = model and llama_cpp.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"llama.cpp could not load {task['logits']}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(longest, 0, 1)
    for ids, new in windows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            # A token is predicted at the position before it.
            batch.logits[i] = len(ids) - new - 1 <= i < len(ids) - 1
        if llama_cpp.llama_decode(context, batch):
            sys.exit("llama.cpp could not decode a window")
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (new, vocabulary))
        sys.stdout.buffer.write(found.tobytes())


def main() -> None:
    task = json.loads(sys.argv[1])
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if "quantize" in task:
        print(json.dumps(quantize(task)))
    else:
        logits(task)


if __name__ == "__main__":
    main()
