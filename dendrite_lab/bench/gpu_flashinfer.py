"""FlashInfer as a contestant of the attention benchmark: flat decode and cascades.

`run` is timed inside a CUDA graph, planning stays outside. Each kind is given its best case:

* flat: paged decode, on CUDA cores and on tensor cores; for prompts paged prefill;
* cascade: `MultiLevelCascadeAttentionWrapper` as it is shipped, with one level for each level of
  the tree, and with the two levels that read the fewest bytes;
* cascade-fa2: the same levels by FlashInfer's FA2 prefill kernels, which split keys among SMs as
  the FA3 ones, the default on Hopper, do not. FlashInfer's cascade does not offer that choice; it
  is put together here from its parts.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dendrite_engine.attention.flashinfer import Geometry, Run, WrapperMaker
from dendrite_engine.attention.flashinfer_plan import (
    PageTable,
    cascade_depth,
    cascade_tables,
    flat_table,
)
from dendrite_lab.bench.gpu_attention_case import Case, Contestant, Heads, Maker, make_case
from dendrite_lab.bench.gpu_trees import parse_tree, plan_tree

WORKSPACE_BYTES = 512 << 20


def available() -> str | None:
    """None where FlashInfer can be used, else why not."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        importlib.import_module("flashinfer")
    except Exception as error:  # an optional dependency may fail in any way while it loads
        return f"{type(error).__name__}: {error}"
    return None


def contestants(case: Case) -> dict[str, Maker]:
    """Name -> maker of every FlashInfer variant that makes sense for the tree."""
    if case.planned.tree.queries_a_leaf > 1:
        return {"prefill": prefill}
    found: dict[str, Maker] = {
        "flat": functools.partial(flat, tensor_cores=False),
        "flat-tc": functools.partial(flat, tensor_cores=True),
    }
    plan, page_size = case.planned.plan, case.planned.page_size
    depth = cascade_depth(plan)
    if depth == 0:
        return found
    all_levels = cascade_tables(plan, page_size)
    variants = {"": all_levels}
    if depth > 1:
        variants["-2"] = best_two_levels(case, depth)
    for suffix, tables in variants.items():
        found[f"cascade{suffix}"] = functools.partial(cascade, tables=tables)
        found[f"cascade-fa2{suffix}"] = functools.partial(cascade_fa2, tables=tables)
    return found


def best_two_levels(case: Case, depth: int) -> list[PageTable]:
    """The one level of sharing, and the rest by each branch, that read the fewest tokens."""
    plan, page_size = case.planned.plan, case.planned.page_size
    choices = [cascade_tables(plan, page_size, [level]) for level in range(depth)]
    return min(choices, key=lambda tables: tokens_read(tables, page_size))


def tokens_read(tables: Sequence[PageTable], page_size: int) -> int:
    """K/V tokens that all requests of all levels read."""
    return sum(int(table.kv_lens(page_size).sum()) for table in tables)


def flat(case: Case, *, tensor_cores: bool) -> Contestant:
    """Paged decode: every branch reads its own page list."""
    geometry, maker = _geometry(case), _maker(case.device)
    wrapper = maker.decode(geometry, tensor_cores)
    table = flat_table(case.planned.plan, case.planned.page_size)
    run, host_us = _plan(lambda: wrapper.plan([table], geometry))
    return _contestant(case, run, host_us)


def prefill(case: Case) -> Contestant:
    """Paged prefill, causal, by its default kernels (FA3 on Hopper)."""
    geometry = _geometry(case)
    wrapper = _maker(case.device).levels(1)
    table = flat_table(case.planned.plan, case.planned.page_size)
    run, host_us = _plan(lambda: wrapper.plan([table], geometry))
    return _contestant(case, run, host_us)


def cascade(case: Case, *, tables: Sequence[PageTable]) -> Contestant:
    """FlashInfer's cascade over these levels."""
    geometry = _geometry(case)
    wrapper = _maker(case.device).levels(len(tables))
    run, host_us = _plan(lambda: wrapper.plan(tables, geometry))
    return _contestant(case, run, host_us)


def cascade_fa2(case: Case, *, tables: Sequence[PageTable]) -> Contestant:
    """The same levels by FA2 prefill kernels, merged in place as FlashInfer's cascade does."""
    module = importlib.import_module("flashinfer")
    geometry = _geometry(case)
    make = module.BatchPrefillWithPagedKVCacheWrapper
    wrappers = [make(_workspace(case.device), "HND", backend="fa2") for _ in tables]

    def plan() -> Run:
        for wrapper, table in zip(wrappers, tables, strict=True):
            arrays = (table.qo_indptr, table.kv_indptr, table.indices, table.last_page_len)
            tensors = [torch.from_numpy(array) for array in arrays]
            wrapper.plan(*tensors, *geometry.sizes(), causal=False, **geometry.options())
        return run

    def run(q: torch.Tensor, pages: Any, out: torch.Tensor | None) -> torch.Tensor:
        del out
        result: torch.Tensor
        result, lse = wrappers[-1].run(q, pages, return_lse=True)
        for wrapper in wrappers[:-1]:
            module.merge_state_in_place(result, lse, *wrapper.run(q, pages, return_lse=True))
        return result

    planned, host_us = _plan(plan)
    return _contestant(case, planned, host_us)


def compile_all(heads: Sequence[Heads], device: torch.device, dtype: torch.dtype) -> float:
    """Compile the kernels that these heads need, beside each other; returns the seconds it took."""
    start = time.perf_counter()
    planned = plan_tree(parse_tree("1,2; 16,16"))
    cases = [make_case(planned, one, device, dtype) for one in heads]
    jobs = [(make, case) for case in cases for make in contestants(case).values()]

    def compile_one(job: tuple[Maker, Case]) -> None:
        make, case = job
        with torch.cuda.device(device):
            make(case)

    with ThreadPoolExecutor(len(jobs) + 1) as pool:
        futures = [pool.submit(compile_one, job) for job in jobs]
        futures.append(pool.submit(_compile_merge, device))
        for future in futures:
            future.exception()  # a variant that fails to compile is reported where it is measured
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _compile_merge(device: torch.device) -> None:
    values = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
    lse = torch.zeros(1, 1, device=device)
    module = importlib.import_module("flashinfer")
    module.merge_state_in_place(values, lse, values.clone(), lse.clone())


def _geometry(case: Case) -> Geometry:
    heads = case.heads
    return Geometry(
        heads.heads, heads.kv_heads, heads.head_dim, case.planned.page_size, case.q.dtype,
        case.scale,
    )  # fmt: skip


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _maker(device: torch.device) -> WrapperMaker:
    return WrapperMaker(importlib.import_module("flashinfer"), _workspace(device))


def _plan(plan: Callable[[], Run]) -> tuple[Run, float]:
    """Plan twice; the second time is the one a step would take."""
    plan()
    start = time.perf_counter()
    run = plan()
    return run, (time.perf_counter() - start) * 1e6


def _contestant(case: Case, run: Run, host_us: float) -> Contestant:
    return Contestant(lambda index: run(case.q, (case.k[index], case.v[index]), None), host_us)
