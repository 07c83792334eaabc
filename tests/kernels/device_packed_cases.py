"""Trees and rows in packed pages of the device path, for tests of the three packed operations."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from device_cases import NAN, Target
from tree_cases import TreeCase
from tree_cases import attend as attend_dense
from work_cases import Cut, cut_work

from dendrite_engine.cache.formats import PageShape
from dendrite_engine.cache.formats.choice import layer_format
from dendrite_engine.cache.formats.device_packed import DevicePackedFormat, DevicePackedStore
from dendrite_engine.kernels import reference
from dendrite_engine.kernels.device_packed import DevicePages
from dendrite_engine.kernels.hadamard import norm, transform
from dendrite_engine.kernels.packed_reference import rotated_query

LAYER = 1  # of three: what a wrong layer_at touches is seen
MAX_POSITION = 50


def need_packed(target: Target, *operations: str) -> None:
    """Skip the test where the target's library does not implement these operations."""
    namespace, key = ("dendrite", "CUDA") if target.name == "cuda" else ("dendrite_emulated", "CPU")
    for operation in operations:
        name = f"{namespace}::{operation}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            pytest.skip(f"the {target.name} library has no {operation}")


def make_pool(
    name: str, *, num_pages=6, kv_heads=2, dim=64, page_size=16, mean=None, device="cpu"
) -> DevicePackedStore:
    """A pool of three layers, the middle one of the format, full of poison."""
    layers = [layer_format("fp8_e4m3"), layer_format(name), layer_format("bf16")]
    shape = PageShape(3, num_pages, kv_heads, dim, page_size)
    means = None if mean is None else mean.expand(3, kv_heads, dim)
    store = DevicePackedFormat(name, layers, torch.device(device), means).allocate(shape)
    store.poison(torch.arange(num_pages))
    return store


class StoreCase:
    """A batch of rows, and two pools with poisoned queries: of the kernel and of its twin.

    Without `turned` the rotation is by no angle, so that K reaches the quantiser with the same bits
    whatever the order of RoPE's additions.
    """

    def __init__(self, target: Target, name: str, rows: int = 13, dim: int = 64, *,
                 dtype=torch.float32, page_size=16, heads=6, kv_heads=2, turned=False, mean=None,
                 spread=1.0) -> None:  # fmt: skip
        self.target = target
        self.qkv = target.randn(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
        self.qkv *= spread
        self.positions = target.ints([(7 * row) % MAX_POSITION for row in range(rows)])
        angles = torch.arange(MAX_POSITION)[:, None] / 9.0 ** (torch.arange(dim // 2) / (dim // 2))
        angles = angles if turned else torch.zeros_like(angles)
        self.cos, self.sin = target.put(angles.cos()), target.put(angles.sin())
        self.norm = target.randn(dim, dtype=dtype, seed=5)
        order = torch.randperm(6 * page_size, generator=torch.Generator().manual_seed(1))
        slots = order[:rows].tolist()
        slots[1::3] = [-1] * len(slots[1::3])
        self.slots = target.ints(slots)
        sizes = {"kv_heads": kv_heads, "dim": dim, "page_size": page_size, "mean": mean}
        self.pools = [make_pool(name, device=target.device, **sizes) for _ in range(2)]
        self.queries = target.poisoned(2, rows, heads, dim, dtype=dtype)
        self.before = self.pools[0].data.clone()

    def store(self, op, index: int = 0, q_norm=None, k_norm=None, rows=slice(None)) -> None:
        keys, values = self.pools[index].layers[LAYER]
        inputs = [x[rows].clone() for x in (self.qkv, self.positions, self.slots)]
        q = self.queries[index][rows].clone()
        op(
            inputs[0], inputs[1], self.cos, self.sin, inputs[2], keys.data, q,
            q_norm, k_norm, keys.signs, values.signs, keys.mean, 1e-6, keys.layer_at,
            keys.page_size, keys.kv_heads, keys.codec.native_id, values.codec.native_id,
        )  # fmt: skip
        self.queries[index][rows] = q

    def sides(self, index: int = 0) -> tuple[DevicePages, DevicePages]:
        return self.pools[index].layers[LAYER]

    def kept(self) -> torch.Tensor:
        """Bytes of the kernel's pool that no row of the batch may have changed, bool."""
        marked = make_marks(self.sides(), self.slots)
        return marked == 0


def make_marks(sides: tuple[DevicePages, DevicePages], slots: torch.Tensor) -> torch.Tensor:
    """u8 like the pool: 255 on every byte of these slots of the layer, 0 elsewhere."""
    marks = torch.zeros_like(sides[0].data)
    wanted = slots[(slots >= 0) & (slots < sides[0].num_pages * sides[0].page_size)]
    for side in sides:
        marked = copy.copy(side)
        object.__setattr__(marked, "data", marks)
        for part in marked.parts():
            page, unit, offset = marked._place(wanted)
            part[page, unit, :, offset] = 255
    return marks


@dataclass(frozen=True)
class Tree:
    """A TreeCase with its K and V in device pages; what no row may read is poison."""

    case: TreeCase
    pool: DevicePackedStore

    @classmethod
    def make(cls, case: TreeCase, name: str, mean=None) -> Tree:
        pool = make_pool(
            name, num_pages=len(case.k_pages), kv_heads=case.kv_heads, dim=case.head_dim,
            page_size=case.page_size, mean=mean,
        )  # fmt: skip
        keys = case.k_pages.permute(0, 3, 1, 2)  # [pages, P, kv_heads, D]
        values = case.v_pages.permute(0, 2, 1, 3)
        page, offset = (~keys[:, :, 0, 0].isnan()).nonzero(as_tuple=True)
        slots = page * case.page_size + offset
        for side, vectors in zip(pool.layers[LAYER], (keys, values), strict=True):
            side.write_slots(slots, *side.encode(vectors[page, offset]))
        return cls(case, pool)

    @property
    def sides(self) -> tuple[DevicePages, DevicePages]:
        return self.pool.layers[LAYER]

    def query(self, dtype: torch.dtype) -> torch.Tensor:
        """q as the store hands it to attention."""
        return rotated_query(self.case.q, self.sides[0]).to(dtype)

    def expected(self, dtype: torch.dtype, window: int = 0) -> torch.Tensor:
        """Dense attention on decoded pages, for the rounded query turned back; fp32."""
        keys, values = self.sides
        ids = torch.arange(keys.num_pages)
        dense = copy.copy(self.case)
        dense.k_pages = keys.restored(ids).transpose(2, 3).contiguous()
        dense.v_pages = values.restored(ids).contiguous()
        q = self.query(dtype).float()
        if keys.signs is not None:
            group = q.shape[1] // keys.kv_heads
            q = transform(q) * norm(keys.head_dim) * keys.signs.repeat_interleave(group, 0)
        return attend_dense(reference.ReferenceKernels(), dense, q=q, window=window)

    def attend(self, op, cut: Cut, *, dtype=torch.float32, plan=None, q=None, window=0,
               device="cpu") -> torch.Tensor:  # fmt: skip
        """Run the op `tree_attention_packed`; returns fp32 on the CPU."""
        case, plan = self.case, plan or self.case.plan
        q = self.query(dtype) if q is None else q
        group = case.heads // case.kv_heads
        work, slots, _ = cut_work(plan, case.page_size, group, cut, window)
        partials = torch.full((slots * case.kv_heads * cut.q_tile * (case.head_dim + 2) + 4,), NAN)
        out = torch.full_like(q, NAN)
        keys, values = self.sides
        tensors = [q, keys.data, torch.from_numpy(plan.positions), work, partials, out]
        on_device = [tensor.to(device) for tensor in tensors]
        signs = None if values.signs is None else values.signs.to(device)
        op(
            *on_device, signs, 0.25, window, cut.q_tile, cut.workers, keys.layer_at,
            keys.page_size, keys.kv_heads, keys.codec.native_id, values.codec.native_id,
        )  # fmt: skip
        return on_device[5].float().cpu()
