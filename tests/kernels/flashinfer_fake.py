"""FlashInfer's three wrappers in plain torch: what their documentation says, in float64.

Strict where the real ones read garbage: page lists must tile, last pages must be in range, queries
must be covered in order. Put into sys.modules as `flashinfer`.
"""

from __future__ import annotations

import math

import torch

__version__ = "0.0-fake"


def _check(qo, kv, indices, last, page_size):
    assert all(t.dtype == torch.int32 for t in (qo, kv, indices, last))
    assert qo[0] == 0
    assert kv[0] == 0
    assert kv[-1] == len(indices)
    assert (qo[1:] > qo[:-1]).all()
    pages = kv[1:] - kv[:-1]
    assert (pages >= 0).all()
    assert ((last >= 1) & (last <= page_size))[pages > 0].all()
    assert (last == 0)[pages == 0].all()


class _Level:
    """One FlashInfer kernel: outputs and base-2 log-sum-exps of a page table."""

    def __init__(self, tables, sizes, causal, options):
        self.qo, self.kv, self.indices, self.last = tables
        self.heads, self.kv_heads, self.head_dim, self.page_size = sizes
        _check(*tables, self.page_size)
        self.causal, self.scale = causal, options["sm_scale"]
        self.left = options["window_left"]

    def run(self, q, pages):
        keys, values = (part.double() for part in pages)
        assert keys.shape[1:] == (self.kv_heads, self.page_size, self.head_dim)
        assert q.shape == (int(self.qo[-1]), self.heads, self.head_dim)
        out = torch.zeros(q.shape, dtype=torch.float64)
        lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
        for i, last in enumerate(self.last.tolist()):
            ids = self.indices[self.kv[i] : self.kv[i + 1]].long()
            if len(ids) == 0:
                continue
            length = (len(ids) - 1) * self.page_size + last
            k, v = (x[ids].transpose(1, 2).flatten(0, 1)[:length] for x in (keys, values))
            rows = slice(int(self.qo[i]), int(self.qo[i + 1]))
            out[rows], lse[rows] = self._request(q[rows].double(), k, v)
        return out, lse

    def _request(self, q, k, v):
        group = self.heads // self.kv_heads
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        score = torch.einsum("qhd,khd->qhk", q, k) * self.scale
        at = len(k) - len(q) + torch.arange(len(q))[:, None]
        cols = torch.arange(len(k))[None]
        seen = (cols <= at) if self.causal else torch.ones(len(q), len(k), dtype=torch.bool)
        if self.left >= 0:
            seen &= cols >= at - self.left
        score = score.masked_fill(~seen[:, None], -math.inf)
        lse = torch.logsumexp(score, -1)
        return torch.einsum("qhk,khd->qhd", torch.exp(score - lse[..., None]), v), lse


class _Wrapper:
    def __init__(self, workspace, layout, **options):
        assert layout == "HND"
        assert workspace.dtype == torch.uint8
        self.options = options

    def _write(self, result, q, out):
        if out is None:
            return result.to(q.dtype)
        return out.copy_(result)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(self, kv, indices, last, *sizes, **options):
        qo = torch.arange(len(last) + 1, dtype=torch.int32)
        self.level = _Level((qo, kv, indices, last), sizes, True, options)

    def run(self, q, pages, out=None):
        return self._write(self.level.run(q, pages)[0], q, out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(self, qo, kv, indices, last, *sizes, causal, **options):
        self.level = _Level((qo, kv, indices, last), sizes, causal, options)

    def run(self, q, pages, out=None):
        return self._write(self.level.run(q, pages)[0], q, out)


class MultiLevelCascadeAttentionWrapper(_Wrapper):
    def __init__(self, num_levels, workspace, layout):
        super().__init__(workspace, layout)
        self.num_levels = num_levels

    def plan(self, qo, kv, indices, last, *sizes, causal, **options):
        tables = list(zip(qo, kv, indices, last, strict=True))
        assert len(tables) == self.num_levels
        self.levels = [
            _Level(table, sizes, causal and i == len(tables) - 1, options)
            for i, table in enumerate(tables)
        ]

    def run(self, q, pages):
        out, lse = self.levels[-1].run(q, pages)
        for level in self.levels[:-1]:
            other, other_lse = level.run(q, pages)
            top = torch.maximum(lse, other_lse)
            a, b = torch.exp(lse - top), torch.exp(other_lse - top)
            out = (out * a[..., None] + other * b[..., None]) / (a + b)[..., None]
            lse = top + torch.log(a + b)
        return out.to(q.dtype)
