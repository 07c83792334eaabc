"""Teacher-forced logits of every token, through pages of any format: what quality is measured with.

A row's K and V are stored before it attends, so every token, also the ones of its own chunk, is
read as the pages hold it. There is no second path that attends to unquantised K and V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dendrite_engine import kernels
from dendrite_engine.attention import AttentionBackend, ForwardBatch
from dendrite_engine.attention.tree import TreeAttention
from dendrite_engine.cache import make_core
from dendrite_engine.cache.formats import PageShape
from dendrite_engine.cache.formats.choice import choose_format
from dendrite_engine.cache.pages import KVPages
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.models.config import ModelConfig
from dendrite_engine.models.families import read_model_config
from dendrite_engine.models.hub import resolve_model
from dendrite_engine.models.linear import LinearFactory
from dendrite_engine.models.tokenizer import Tokenizer
from dendrite_engine.models.transformer import Transformer

PAGE_SIZE = 16


@dataclass(frozen=True)
class ScoringModel:
    """A model on the CPU, shared by scorers of several formats.

    Attributes:
        path: the model's directory.
        config: its shape.
        tokenizer: text to ids.
        transformer: the weights.
        ops: the kernels.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    transformer: Transformer
    ops: Any

    @classmethod
    def load(cls, model: str | Path) -> ScoringModel:
        """Read a model; `model` is what `Engine.from_pretrained` takes.

        Raises:
            ModelError: it can't be used.
        """
        path = resolve_model(model)
        config = read_model_config(path)
        transformer = Transformer.load(path, config, LinearFactory())
        transformer.set_max_positions(config.max_context)
        return cls(path, config, Tokenizer(path), transformer, kernels.load("auto"))

    def unit(self) -> PageShape:
        """Sizes of a pool of one page."""
        config = self.config
        return PageShape(
            config.num_layers, 1, config.num_kv_heads, config.head_dim, PAGE_SIZE
        )  # fmt: skip

    def pages(
        self,
        kv_format: str,
        tokens: int,
        overrides: Mapping[int, str] | None = None,
        key_mean: torch.Tensor | None = None,
        first: str | None = None,
    ) -> KVPages:
        """A pool of this format that holds `tokens` tokens; see `choose_format`."""
        unit = self.unit()
        page_format = choose_format(kv_format, unit, overrides, key_mean, first)
        return KVPages(page_format, replace(unit, num_pages=-(-tokens // PAGE_SIZE) + 1))


class Scorer:
    """One growing sequence of tokens in pages of one format.

    Args:
        model: the model.
        pages: from `ScoringModel.pages`.
        attention: a backend to watch the run with; None takes the engine's kernels.
    """

    def __init__(
        self,
        model: ScoringModel,
        pages: KVPages,
        attention: AttentionBackend[ForwardBatch] | None = None,
    ) -> None:
        self._model, self.pages = model, pages
        self._attention = attention or TreeAttention(model.ops)
        self._core = make_core(pages.shape.num_pages, PAGE_SIZE, prefix_cache=False)
        self.pages.page_state = self._core.page_state
        self._branch: int | None = None

    def reset(self) -> None:
        """Forget the sequence."""
        if self._branch is not None:
            self._core.prune(self._branch)
            self._branch = None

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int], scored: int | None = None) -> torch.Tensor:
        """Append tokens and compute them in one forward pass.

        Args:
            tokens: ids.
            scored: logits are wanted after the last so many of them; None: all.

        Returns:
            fp32 [scored, vocab]: what comes after each of these tokens.

        Raises:
            OutOfPages: the pool is full.
            InvalidArgument: no tokens, or more than the model's context.
        """
        ids = np.asarray(tokens, np.int32)
        if self._branch is None:
            self._branch, _ = self._core.create(ids)
        else:
            self._core.append(self._branch, ids)
        held, limit = self._core.num_tokens(self._branch), self._model.config.max_context
        if held > limit:
            raise InvalidArgument(f"{held} tokens are more than the model's context of {limit}")
        plan: Any = self._core.plan([self._branch], [len(ids)])
        count = len(ids) if scored is None else scored
        rows = torch.arange(len(ids) - count, len(ids))
        batch = replace(ForwardBatch.build(plan), logits_rows=rows)
        model = self._model
        self.pages.begin(plan, model.ops)
        logits = model.transformer.forward(batch, self.pages, self._attention, model.ops)
        plan.commit()
        return logits


def stored_rows(pages: torch.Tensor, slots: torch.Tensor, is_key: bool) -> torch.Tensor:
    """K or V [T, kv_heads, head_dim] that unquantised pages of one layer hold in `slots`."""
    size = pages.shape[3] if is_key else pages.shape[2]
    page, offset = slots.long() // size, slots.long() % size
    return pages[page, :, :, offset] if is_key else pages[page, :, offset, :]


class AttentionProbe(AttentionBackend[ForwardBatch]):
    """Runs beside a reference run in fp32 pages: what each layer's attention would give if the same
    K and V had been stored in other formats.

    Args:
        model: the model.
        pools: other pools by name, of the same number of pages as the reference's.
    """

    name = "probe"
    reason = "measures the error of attention"

    def __init__(self, model: ScoringModel, pools: Mapping[str, KVPages]) -> None:
        layers = model.config.num_layers
        self._inner, self._ops = TreeAttention(model.ops), model.ops
        self._pools = dict(pools)
        self._views: dict[str, Sequence[tuple[Any, Any]]]
        self._views = {name: pool.views() for name, pool in pools.items()}
        self._errors = {name: torch.zeros(layers, dtype=torch.float64) for name in pools}
        self._sizes = torch.zeros(layers, dtype=torch.float64)
        self._key_sums = torch.zeros(layers, model.config.num_kv_heads, model.config.head_dim)
        self._rows = 0
        self._layer = 0

    def attend(
        self,
        q: torch.Tensor,
        k_pages: Any,
        v_pages: Any,
        batch: ForwardBatch,
        out: torch.Tensor,
        *,
        scale: float,
        window: int,
    ) -> None:
        """See AttentionBackend.attend; then the same for every pool."""
        self._inner.attend(q, k_pages, v_pages, batch, out, scale=scale, window=window)
        layer, rows = self._layer, len(q)
        self._layer = (layer + 1) % len(self._sizes)
        if layer == 0:
            self._rows += rows
            for pool in self._pools.values():
                pool.begin(batch.plan, self._ops)
        keys = stored_rows(k_pages, batch.slots, is_key=True)
        values = stored_rows(v_pages, batch.slots, is_key=False)
        self._key_sums[layer] += keys.sum(0)
        self._sizes[layer] += out.double().square().sum()
        qkv = torch.cat([x.reshape(rows, -1) for x in (q, keys, values)], dim=1)
        still = torch.ones(1, q.shape[-1] // 2), torch.zeros(1, q.shape[-1] // 2)  # no rotation
        nowhere = torch.zeros(rows, dtype=torch.int32)
        for name, views in self._views.items():
            same, other = torch.empty_like(q), torch.empty_like(q)
            self._ops.rope_store_kv(qkv, nowhere, *still, batch.slots, *views[layer], same)
            self._inner.attend(q, *views[layer], batch, other, scale=scale, window=window)
            self._errors[name][layer] += (other - out).double().square().sum()

    def errors(self) -> dict[str, list[float]]:
        """Relative L2 error of the attention output of each layer, by pool."""
        return {
            name: (errors / self._sizes).sqrt().tolist() for name, errors in self._errors.items()
        }

    def key_mean(self) -> torch.Tensor:
        """Mean of K over all rows, fp32 [num_layers, kv_heads, head_dim]."""
        return self._key_sums / max(self._rows, 1)
