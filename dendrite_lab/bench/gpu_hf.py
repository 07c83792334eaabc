"""Hugging Face transformers on a GPU as a peer: eager, its default attention, bf16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dendrite_lab.bench.gpu_engine import release


class HuggingFace:
    """A model of the directory's config with random weights."""

    name = "hf"

    def __init__(self, directory: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = AutoConfig.from_pretrained(directory)
        with self._device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self._model: Any = model.eval()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """See Peer.generate; one prompt at a time."""
        for ids in prompts:
            token = torch.tensor([list(ids)], device=self._device)
            cache = None
            for _ in range(max_tokens):
                out = self._model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        self._wait()

    @torch.inference_mode()
    def beam(self, ids: Sequence[int], width: int, max_tokens: int) -> None:
        """`generate` with beams, of exactly `max_tokens` tokens."""
        prompt = torch.tensor([list(ids)], device=self._device)
        self._model.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=width, do_sample=False,
            min_new_tokens=max_tokens, max_new_tokens=max_tokens, pad_token_id=0,
        )  # fmt: skip
        self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        """See Peer.close."""
        del self._model
        release()
