"""kv-attention: tree attention over pages of every format, and the store into them.

One layer, kernels only, in a CUDA graph, timed as the benchmark "attention" times them. Pages hold
random codes under one scale: kernels do the same work whatever the numbers are. Every result is
compared with fp32 attention over decoded pages on sampled rows; a wrong one has no time.
`tb_per_s`: bytes of K and V of all tokens, scales included, read once, over the time.
`times_unquantised`: how many times faster than the kernel for unquantised pages of the compute
dtype.

The store is RoPE, quantising and writing of one token of each branch. `share_of_step`: its time
over that of a layer's decode step, whose products count at their floor, so that the share is rather
too large than too small.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dendrite_engine.cache.formats import PageShape
from dendrite_engine.cache.formats.choice import layer_format
from dendrite_engine.cache.formats.device_packed import DevicePackedFormat
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.device_ops import device_kernels
from dendrite_engine.kernels.device_packed import DevicePages
from dendrite_lab.bench import gpu_ours, measure
from dendrite_lab.bench.gpu_attention_case import (
    Case,
    Heads,
    attend_row,
    distance,
    make_case,
    relative_error,
    row_pages,
    sampled_rows,
)
from dendrite_lab.bench.gpu_timing import Call, cache_bytes, copies_for, microseconds
from dendrite_lab.bench.gpu_trees import Planned, parse_tree, plan_tree
from dendrite_lab.bench.shapes import BYTES_PER_S, ELEMENT, SHAPES

HEADS = ("32x8x128", "32x4x64")
TREES = ("64; 32768", "1,64; 4096,64", "1,64; 32768,64")
FORMATS = ("fp8_e4m3", "fp8_e5m2", "mxfp8", "k8v4", "tq4", "tq3", "tq2")
DENSE = "unquantised"
COPY_TB_PER_S = 2.99  # what a large copy reaches on an H100
WRONG = 2e-2  # relative error above which a result has no time
CHECKED_ROWS = 3
# What keeps random codes finite, and scales near 1: fp16, E8M0.
_MASKS = {"fp8_e4m3": 0xBF, "mxfp8": 0xBF, "fp8_e5m2": 0xBB}
_SCALES = {2: (0x00, 0x3C), 1: (127,)}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pool:
    """Copies of a tree's pages in one format.

    Attributes:
        sides: K and V of each copy.
        token_bytes: K and V of one token, scales included.
    """

    sides: list[tuple[DevicePages, DevicePages]]
    token_bytes: int


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    args = _arguments(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows: list[Row] = []
    for text in args.trees:
        planned = plan_tree(parse_tree(text))
        for heads in map(Heads.parse, args.heads):
            found = _attention(planned, heads, args, device, dtype)
            rows += found
            for row in found:
                _say(row)
    stores: list[Row] = []
    for heads in map(Heads.parse, args.heads):
        steps = [row for row in rows if row["heads"] == heads.name]
        found = [add_share(row, heads, steps) for row in _store(heads, args, device, dtype)]
        stores += found
        for row in found:
            _say(row)
    return measure.report(
        "kv-attention", argv, rows, store=stores, dtype=args.dtype, copy_tb_per_s=COPY_TB_PER_S
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dendrite-lab bench kv-attention")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (the twin)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--trees", nargs="+", default=list(TREES), metavar="TREE")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), metavar="QxKVxDIM")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--branches", type=int, default=64, help="rows of the store")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(list(argv))
    for name in ("repeats", "branches"):
        if getattr(args, name) < 1:
            raise InvalidArgument(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in args.formats:
        layer_format(name)
    return args


# -- attention ----------------------------------------------------------------------------------


def _attention(
    planned: Planned, heads: Heads, args: argparse.Namespace, device: torch.device,
    dtype: torch.dtype,
) -> list[Row]:  # fmt: skip
    """One row a format, the unquantised pages first."""
    case = make_case(planned, heads, device, dtype)
    token = 2 * heads.kv_heads * heads.head_dim * dtype.itemsize
    rows = [_timed(case, DENSE, token, args.repeats, lambda: _dense(case))]
    case.k = case.v = case.k[:1, :1].clone()  # their memory is the next format's
    rows += [_quantised(case, name, args.repeats) for name in args.formats]
    base = rows[0]["us"]
    for row in rows:
        row["times_unquantised"] = _ratio(base, row["us"])
    return rows


Made = tuple[Call, int, Callable[[torch.Tensor], float]]  # the call, its copies, error of a result


def _dense(case: Case) -> Made:
    return gpu_ours.ours(case).call, case.copies, lambda out: relative_error(case, out)


def _quantised(case: Case, name: str, repeats: int) -> Row:
    pool = make_pool(name, case.planned, case.heads, case.device)

    def make() -> Made:
        contestant = gpu_ours.ours(case, packed=pool.sides)
        return contestant.call, len(pool.sides), lambda out: packed_error(case, pool, out)

    return _timed(case, name, pool.token_bytes, repeats, make)


def _timed(case: Case, name: str, token_bytes: int, repeats: int, make: Callable[[], Made]) -> Row:
    tree = case.planned.tree
    row: Row = {
        "tree": tree.name, "heads": case.heads.name, "format": name,
        "bytes": tree.unique_tokens * token_bytes, "us": None,
    }  # fmt: skip
    try:
        call, copies, error_of = make()
        times = microseconds(call, copies, case.device, repeats)
        error = error_of(call(0))
    except Exception as failure:  # one format's trouble must not hide the others' numbers
        return {**row, "trouble": f"{type(failure).__name__}: {str(failure)[:300]}"}
    row["error"] = float(f"{error:.2g}") if math.isfinite(error) else None
    if not error <= WRONG:
        return {**row, "trouble": f"wrong: relative error {error:.2g}"}
    row["us"] = measure.spread(times, 1)
    microsecond = max(measure.spread(times, 4)["median"], 1e-9)
    row["tb_per_s"] = round(tree.unique_tokens * token_bytes / microsecond / 1e6, 3)
    return row


def make_pool(name: str, planned: Planned, heads: Heads, device: torch.device) -> Pool:
    """Pages of one layer full of random codes; as many copies as the L2 cache asks for.

    Raises:
        InvalidArgument: the format does not go with these heads.
    """
    layer = layer_format(name)
    page_format = DevicePackedFormat(name, [layer], device)
    shape = PageShape(1, planned.num_pages, heads.kv_heads, heads.head_dim, planned.page_size)
    token_bytes = page_format.bytes_per_token(shape)
    working_set = planned.tree.unique_tokens * token_bytes
    copies = copies_for(working_set, cache_bytes(device))
    sides = [page_format.allocate(shape).layers[0] for _ in range(copies)]
    for keys, values in sides:
        fill(keys)
        fill(values)
    return Pool(sides, token_bytes)


def fill(side: DevicePages) -> None:
    """Random codes of finite numbers near 1, and scales of 1."""
    codes, scales = side.parts()
    if side.codec.bits >= 16:
        kind = {32: torch.float32}.get(side.codec.bits, torch.bfloat16)
        if side.codec.name == "fp16":
            kind = torch.float16
        codes.copy_(torch.randn(*codes.shape[:-1], side.head_dim, device=codes.device)
                    .to(kind).view(torch.uint8))  # fmt: skip
        return
    codes.random_(0, 256)
    if side.codec.name in _MASKS:
        codes.bitwise_and_(_MASKS[side.codec.name])
    if side.codec.scale_width:
        one = torch.tensor(_SCALES[side.codec.scale_width], dtype=torch.uint8)
        scales.copy_(one.repeat(side.codec.scale_items(side.head_dim)))


def packed_error(case: Case, pool: Pool, out: torch.Tensor) -> float:
    """||out - exact|| / ||exact|| over some rows, against fp32 attention over decoded pages."""
    keys, values = pool.sides[0]
    rows = sampled_rows(out.shape[0])[-CHECKED_ROWS:]
    exact = []
    for row in rows:
        pages, length = row_pages(case, row)
        k, v = (
            read(pages).transpose(1, 2).flatten(0, 1)[:length]
            for read in (keys.stored, values.restored)
        )
        exact.append(attend_row(case, row, k, v))
    return distance(out[torch.tensor(rows, device=out.device)], torch.stack(exact))


# -- store --------------------------------------------------------------------------------------


def _store(
    heads: Heads, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """Time of storing one token of each branch, unquantised first."""
    rows, dim, ops = args.branches, heads.head_dim, device_kernels()
    width = (heads.heads + 2 * heads.kv_heads) * dim
    qkv = torch.randn(rows, width, dtype=dtype, device=device)
    q = torch.empty(rows, heads.heads, dim, dtype=dtype, device=device)
    at = torch.arange(rows, dtype=torch.int32, device=device)
    table = torch.ones(rows, dim // 2, device=device)
    rope = qkv, at, table, table, at * 16
    dense = torch.zeros(2, rows, heads.kv_heads, 16, dim, dtype=dtype, device=device)
    shape = PageShape(1, rows, heads.kv_heads, dim, 16)

    def store_dense(_: int) -> torch.Tensor:
        ops.rope_store_kv(*rope, dense[0], dense[1], q)
        return q

    calls: dict[str, Call] = {DENSE: store_dense}
    for name in args.formats:
        page_format = DevicePackedFormat(name, [layer_format(name)], device)
        calls[name] = _store_packed(ops, rope, page_format.allocate(shape).layers[0], q)
    base: dict[str, float | int] | None = None
    found = []
    for name, call in calls.items():
        us = measure.spread(microseconds(call, 1, device, args.repeats), 2)
        base = base or us
        found.append({
            "heads": heads.name, "branches": rows, "format": name, "store_us": us,
            "times_unquantised": _ratio(us, base),
        })  # fmt: skip
    return found


def _store_packed(ops: Any, rope: tuple[torch.Tensor, ...], sides: Any, q: torch.Tensor) -> Call:
    keys, values = sides
    layout = (
        keys.layer_at, keys.page_size, keys.kv_heads, keys.codec.native_id, values.codec.native_id,
    )  # fmt: skip

    def call(_: int) -> torch.Tensor:
        ops.rope_store_packed(
            *rope, keys.data, q, None, None, keys.signs, values.signs, None, 1e-6, *layout
        )
        return q

    return call


def add_share(row: Row, heads: Heads, attention: Sequence[Row]) -> Row:
    """The row with its share of a layer's decode step: attention as measured in this format on the
    fastest tree, the layer's weights read once at 3.0 TB/s, and the store.
    """
    times = [
        one["us"]["median"] for one in attention if one["format"] == row["format"] and one["us"]
    ]
    weights = layer_bytes(heads)
    if not times or not weights:
        return row
    store = row["store_us"]["median"]
    step = store + min(times) + weights / BYTES_PER_S * 1e6
    return {**row, "share_of_step": round(store / step, 4)}


def layer_bytes(heads: Heads) -> int:
    """Bytes of one layer's matrices of the first known model with such heads; 0 without."""
    for shape in SHAPES.values():
        if (shape.heads, shape.kv_heads, shape.head_dim) == (
            heads.heads, heads.kv_heads, heads.head_dim,
        ):  # fmt: skip
            width = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
            return ELEMENT * shape.hidden * (width + 3 * shape.inner)
    return 0


def _ratio(above: Row | None, below: Row | None) -> float | None:
    if not above or not below or not below["median"]:
        return None
    return round(float(above["median"]) / float(below["median"]), 2)


def _say(row: Row) -> None:
    """Progress, on stderr: stdout may be the report."""
    sys.stderr.write("  ".join(f"{key} {value}" for key, value in row.items()) + "\n")
    sys.stderr.flush()
