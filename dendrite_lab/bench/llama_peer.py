"""llama.cpp as a peer: what its sequence copy costs. Needs llama-cpp-python and a GGUF file."""

from __future__ import annotations

import time
from pathlib import Path

import llama_cpp


def seq_cp_microseconds(gguf: Path, num_tokens: int, repeats: int = 50) -> list[float]:
    """Microseconds of each `llama_memory_seq_cp` of a sequence of `num_tokens` tokens.

    The context is unified (one buffer for all sequences), where the copy is metadata only.
    """
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 2 * num_tokens + 512
    params.n_seq_max = 16
    params.kv_unified = True
    params.n_batch = params.n_ubatch = 512
    context = llama_cpp.llama_init_from_model(model, params)
    try:
        _prefill(context, num_tokens)
        memory = llama_cpp.llama_get_memory(context)
        return [_copy(memory, 1 + i % 15) for i in range(repeats)]
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def _prefill(context: object, num_tokens: int) -> None:
    for start in range(0, num_tokens, 512):
        count = min(512, num_tokens - start)
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i in range(count):
            batch.token[i] = 100 + (start + i) % 1000
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = False
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError(f"llama_decode failed at token {start}")
        llama_cpp.llama_batch_free(batch)


def _copy(memory: object, target: int) -> float:
    start = time.perf_counter()
    llama_cpp.llama_memory_seq_cp(memory, 0, target, -1, -1)
    elapsed = (time.perf_counter() - start) * 1e6
    llama_cpp.llama_memory_seq_rm(memory, target, -1, -1)
    return elapsed
