"""Other engines on the same work in the same run, through their Python APIs, where installed.

All use random weights of the same shape and token ids as prompts. vLLM and SGLang keep a prefix
cache, which is their way to fork: a new request on a prompt that is known.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

MODULES = {"hf": "transformers", "vllm": "vllm", "sglang": "sglang"}
MEMORY_SHARE = 0.85
MAX_REQUESTS = 256


class Peer(Protocol):
    """An engine that completes prompts in one batch."""

    name: str

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """Generate exactly `max_tokens` tokens on each prompt; returns when all are done."""

    def close(self) -> None:
        """Free its memory."""


def installed() -> list[str]:
    """Peers whose package is there."""
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module)]


def open_peer(name: str, directory: Path, max_context: int) -> Peer:
    """The peer called `name` on the model directory.

    Raises:
        Exception: whatever it raises when it can't start.
    """
    if name == "hf":
        # Its import brings transformers, which nothing else here needs.
        from dendrite_lab.bench.gpu_hf import HuggingFace

        return HuggingFace(directory)
    makers: dict[str, Callable[[Path, int], Peer]] = {"vllm": Vllm, "sglang": Sglang}
    return makers[name](directory, max_context)


class Vllm:
    """vLLM in this process: CUDA graphs and prefix caching on, as it comes."""

    name = "vllm"

    def __init__(self, directory: Path, max_context: int) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self._vllm: Any = importlib.import_module("vllm")
        self._engine: Any = self._vllm.LLM(
            model=str(directory), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True,
            max_model_len=max_context, max_num_seqs=MAX_REQUESTS, enable_prefix_caching=True,
            gpu_memory_utilization=MEMORY_SHARE,
        )  # fmt: skip

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """See Peer.generate."""
        params = self._vllm.SamplingParams(
            temperature=1.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        self._engine.generate(requests, params, use_tqdm=False)

    def close(self) -> None:
        """See Peer.close."""
        del self._engine


class Sglang:
    """SGLang: CUDA graphs and its radix cache on, as it comes."""

    name = "sglang"

    def __init__(self, directory: Path, max_context: int) -> None:
        self._engine: Any = importlib.import_module("sglang").Engine(
            model_path=str(directory), load_format="dummy", dtype="bfloat16",
            skip_tokenizer_init=True, context_length=max_context, max_running_requests=MAX_REQUESTS,
            cuda_graph_max_bs=MAX_REQUESTS, mem_fraction_static=MEMORY_SHARE,
        )  # fmt: skip

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """See Peer.generate."""
        params = {"temperature": 1.0, "max_new_tokens": max_tokens, "ignore_eos": True}
        self._engine.generate(input_ids=[list(ids) for ids in prompts], sampling_params=params)

    def close(self) -> None:
        """See Peer.close."""
        self._engine.shutdown()
