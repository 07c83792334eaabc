"""The same decoder as transformer.py on a device: every operation writes into a fixed buffer, so a
forward pass is a list of kernel launches that a CUDA graph can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dendrite_engine.attention.device_base import DeviceAttention, DeviceBatch
from dendrite_engine.kernels.device_packed import DevicePages
from dendrite_engine.models.config import ModelConfig
from dendrite_engine.models.device_linear import (
    DEVICE_DETERMINISTIC_TILE,
    DeviceLinearFactory,
)
from dendrite_engine.models.layers import load_layers, output_matrix
from dendrite_engine.models.rope import rope_tables
from dendrite_engine.models.weights import WeightSource

KVLayers = Sequence[tuple[Any, Any]]  # tensors, or DevicePages


@dataclass(frozen=True, slots=True)
class Rows:
    """The first rows of all activation buffers; compute dtype unless said otherwise."""

    residual: torch.Tensor  # fp32 [rows, hidden]
    normed: torch.Tensor  # [rows, hidden]
    qkv: torch.Tensor  # [rows, (heads + 2 kv_heads) * head_dim]
    q: torch.Tensor  # [rows, heads, head_dim]
    attended: torch.Tensor  # [rows, heads, head_dim]
    attended_flat: torch.Tensor  # the same memory as [rows, heads * head_dim]
    update: torch.Tensor  # [rows, hidden]
    gate_up: torch.Tensor  # [rows, 2 * intermediate]
    gated: torch.Tensor  # [rows, intermediate]


class Activations:
    """Buffers for batches of up to `max_rows` rows, allocated once.

    There are whole deterministic tiles of rows: products may run over rows that nobody needs.
    """

    def __init__(
        self, config: ModelConfig, max_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        capacity = padded_rows(max_rows)
        heads, dim = config.num_heads, config.head_dim

        def buffer(*width: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(capacity, *width, dtype=dtype, device=device)

        attended = buffer(heads, dim)
        self._all = Rows(
            residual=buffer(config.hidden_size, dtype=torch.float32),
            normed=buffer(config.hidden_size),
            qkv=buffer((heads + 2 * config.num_kv_heads) * dim),
            q=buffer(heads, dim),
            attended=attended,
            attended_flat=attended.view(capacity, heads * dim),
            update=buffer(config.hidden_size),
            gate_up=buffer(2 * config.intermediate_size),
            gated=buffer(config.intermediate_size),
        )

    def rows(self, count: int) -> Rows:
        """Views of the first `count` rows."""
        whole = self._all
        return Rows(*(getattr(whole, name)[:count] for name in Rows.__slots__))


def padded_rows(rows: int) -> int:
    """Rows in whole deterministic tiles."""
    return -(-rows // DEVICE_DETERMINISTIC_TILE) * DEVICE_DETERMINISTIC_TILE


class DeviceTransformer:
    """A decoder-only model whose K/V live in token-major pages on a device.

    Attributes:
        config: shape and arithmetic.
        linear: how weights are multiplied, and why.
        dtype, device: of weights and activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        linear: DeviceLinearFactory,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.linear, self.dtype, self.device = config, linear, dtype, device
        hidden, vocab = config.hidden_size, config.vocab_size
        self.embedding = source.get("model.embed_tokens.weight", vocab, hidden)  # [vocab, hidden]
        self.layers = load_layers(config, source, linear)
        self.final_norm = source.get("model.norm.weight", hidden)
        self.lm_head = linear(output_matrix(config, source, self.embedding))
        self._cos = self._sin = torch.empty(0)

    def set_max_positions(self, max_positions: int) -> None:
        """Make the RoPE tables for positions 0..max_positions-1."""
        cos, sin = rope_tables(self.config, max_positions)
        self._cos, self._sin = cos.to(self.device), sin.to(self.device)

    def gemm_rows(self, rows: int) -> int:
        """Rows that products run over for a batch of `rows` rows."""
        return padded_rows(rows) if self.linear.deterministic else rows

    def forward(
        self,
        batch: DeviceBatch,
        kv: KVLayers,
        attention: DeviceAttention,
        ops: Any,
        activations: Activations,
        logits: torch.Tensor,
        part: range | None = None,
    ) -> None:
        """Store the batch's K/V and write the logits of `batch.logits_rows[:wanted]`.

        Args:
            batch: the step.
            kv: K and V pages of every layer: [pages, kv_heads, page_size, head_dim], or packed.
            attention: the backend, prepared for this batch.
            ops: the device kernels.
            activations: buffers of at least batch.rows rows.
            logits: fp32 [gemm_rows(wanted), vocab], written; with no rows nothing is computed
                after the last layer.
            part: layers to run, at least one; None: all. A pass may be cut into parts that are run
                in order: the one with the first layer embeds, the one with the last writes the
                logits, and what one leaves to the next lies in `activations`.
        """
        part = range(len(self.layers)) if part is None else part
        a = activations.rows(batch.rows)
        gemm_rows = self.gemm_rows(batch.rows)
        g = a if gemm_rows == batch.rows else activations.rows(gemm_rows)
        if part.start == 0:
            ops.embed(batch.token_ids, self.embedding, a.residual)
        for index in part:
            self._run_layer(index, batch, kv[index], attention, ops, a, g)
        if part.stop == len(self.layers) and logits.shape[0]:
            self._write_logits(batch, activations, a, logits, ops)

    def _run_layer(
        self,
        index: int,
        batch: DeviceBatch,
        pages: tuple[Any, Any],
        attention: DeviceAttention,
        ops: Any,
        a: Rows,
        g: Rows,
    ) -> None:
        """One block; it leaves its last product in `update`, which what follows adds.

        Args:
            a, g: the rows of the batch, and those that products run over.
        """
        config, eps = self.config, self.config.rms_eps
        layer, (k_pages, v_pages) = self.layers[index], pages
        update = a.update if index else None
        ops.add_rms_norm(update, a.residual, layer.input_norm, eps, a.normed, None)
        layer.qkv(g.normed, g.qkv)
        store = _store_packed if isinstance(k_pages, DevicePages) else _store_dense
        rope = batch.positions, self._cos, self._sin, batch.slots
        store(ops, a.qkv, rope, pages, a.q, (layer.q_norm, layer.k_norm, eps))
        attention.attend(
            a.q, k_pages, v_pages, batch, a.attended, scale=config.scale, window=layer.window
        )
        layer.out(g.attended_flat, g.update)
        ops.add_rms_norm(a.update, a.residual, layer.post_norm, eps, a.normed, None)
        if layer.gate_up.serves_silu_mul(g.normed.shape[0]):
            layer.gate_up.silu_mul(g.normed, g.gated)
        else:
            layer.gate_up(g.normed, g.gate_up)
            ops.silu_mul(a.gate_up, a.gated)
        layer.down(g.gated, g.update)

    def _write_logits(
        self,
        batch: DeviceBatch,
        activations: Activations,
        a: Rows,
        logits: torch.Tensor,
        ops: Any,
    ) -> None:
        rows = batch.logits_rows[: logits.shape[0]]
        normed = activations.rows(logits.shape[0]).normed
        eps = self.config.rms_eps
        ops.add_rms_norm(a.update, a.residual, self.final_norm, eps, normed[: rows.shape[0]], rows)
        self.lm_head(normed, logits)


_Rope = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # positions, cos, sin, slots
_Norms = tuple[torch.Tensor | None, torch.Tensor | None, float]  # of q and k, epsilon


def _store_dense(
    ops: Any, qkv: torch.Tensor, rope: _Rope, pages: tuple[Any, Any], q: torch.Tensor, norms: _Norms
) -> None:
    ops.rope_store_kv(qkv, *rope, *pages, q, *norms)


def _store_packed(
    ops: Any, qkv: torch.Tensor, rope: _Rope, pages: tuple[Any, Any], q: torch.Tensor, norms: _Norms
) -> None:
    keys, values = pages
    q_norm, k_norm, eps = norms
    ops.rope_store_packed(
        qkv, *rope, keys.data, q, q_norm, k_norm, keys.signs, values.signs, keys.mean, eps,
        keys.layer_at, keys.page_size, keys.kv_heads, keys.codec.native_id, values.codec.native_id,
    )  # fmt: skip
