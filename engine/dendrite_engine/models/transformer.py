"""The decoder that Llama, Mistral and Qwen3 share: RMSNorm, GQA with RoPE on pages, SwiGLU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dendrite_engine.attention.base import AttentionBackend, ForwardBatch
from dendrite_engine.cache.pages import KVPages
from dendrite_engine.models.config import ModelConfig
from dendrite_engine.models.layers import load_layers, output_matrix
from dendrite_engine.models.linear import LinearFactory
from dendrite_engine.models.rope import rope_tables
from dendrite_engine.models.weights import WeightReader, WeightSource


class Transformer:
    """A decoder-only model whose K/V live in pages.

    Attributes:
        config: shape and arithmetic.
        linear: how weights are multiplied, and why.
    """

    def __init__(self, config: ModelConfig, reader: WeightSource, linear: LinearFactory) -> None:
        self.config, self.linear = config, linear
        hidden, vocab = config.hidden_size, config.vocab_size
        self.embedding = reader.get("model.embed_tokens.weight", vocab, hidden)  # [vocab, hidden]
        self.layers = load_layers(config, reader, linear)
        self.final_norm = reader.get("model.norm.weight", hidden)
        self.lm_head = linear(output_matrix(config, reader, self.embedding))
        self._cos = self._sin = torch.empty(0)

    @classmethod
    def load(cls, directory: Path, config: ModelConfig, linear: LinearFactory) -> Transformer:
        """Read the weights of a model directory (safetensors only) as fp32.

        Raises:
            ModelError: a file or tensor is missing, malformed, or has another shape than
                config.json.
        """
        with WeightReader(directory) as reader:
            return cls(config, reader, linear)

    def set_max_positions(self, max_positions: int) -> None:
        """Make the RoPE tables for positions 0..max_positions-1."""
        self._cos, self._sin = rope_tables(self.config, max_positions)

    def forward(
        self,
        batch: ForwardBatch,
        pages: KVPages,
        attention: AttentionBackend[ForwardBatch],
        ops: Any,
    ) -> torch.Tensor:
        """Run one batch: store its K/V, return logits fp32 [len(batch.logits_rows), vocab].

        Rows attend to what their branches hold in pages and to themselves.
        """
        config, eps = self.config, self.config.rms_eps
        rows = batch.token_ids.shape[0]
        residual = self.embedding[batch.token_ids.long()]  # [T, hidden]
        normed = torch.empty_like(residual)
        q = torch.empty(rows, config.num_heads, config.head_dim)
        attended = torch.empty_like(q)
        gated = torch.empty(rows, config.intermediate_size)
        update: torch.Tensor | None = None
        for layer, (k_pages, v_pages) in zip(self.layers, pages.views(), strict=True):
            _norm(ops, update, residual, layer.input_norm, eps, normed)
            ops.rope_store_kv(
                layer.qkv(normed), batch.positions, self._cos, self._sin, batch.slots,
                k_pages, v_pages, q, layer.q_norm, layer.k_norm, eps,
            )  # fmt: skip
            attention.attend(
                q, k_pages, v_pages, batch, attended, scale=config.scale, window=layer.window
            )
            update = layer.out(attended.view(rows, -1))
            _norm(ops, update, residual, layer.post_norm, eps, normed)
            ops.silu_mul(layer.gate_up(normed), gated)
            update = layer.down(gated)
        return self._logits(batch, update, residual, ops)

    def _logits(
        self, batch: ForwardBatch, update: torch.Tensor | None, residual: torch.Tensor, ops: Any
    ) -> torch.Tensor:
        wanted = batch.logits_rows
        if update is not None:
            residual = residual.index_select(0, wanted) + update.index_select(0, wanted)
        normed = torch.empty_like(residual)
        if residual.shape[0] == 0:
            return torch.empty(0, self.config.vocab_size)
        ops.add_rms_norm(residual, None, self.final_norm, self.config.rms_eps, normed)
        return self.lm_head(normed)


def _norm(
    ops: Any,
    update: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    """residual += update, if there is one; then out = RMSNorm(residual) * weight."""
    if update is None:
        ops.add_rms_norm(residual, None, weight, eps, out)
    else:
        ops.add_rms_norm(update, residual, weight, eps, out)
