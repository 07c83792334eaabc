"""Twins of the GPU's operations on packed pages; layout: kernels/device_packed.py.

Signs are those of the rotation of each side, fp32 [kv_heads, head_dim], and are there exactly where
its codec is a rotated one.
"""

from __future__ import annotations

import torch

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.device_packed import DevicePages, Rotation, codec, device_pages
from dendrite_engine.kernels.device_reference import rotated_states
from dendrite_engine.kernels.device_reference_attention import (
    PageReader,
    attend_blocks,
    tree_attention_workers,
)
from dendrite_engine.kernels.packed_reference import restored_output, rotated_query

_NAN = float("nan")
_NAN_BYTES = {1: (255,), 2: (0xFF, 0x7F)}  # of a scale, by its width: E8M0 and fp16


def copy_packed(data: torch.Tensor, copies: torch.Tensor, count: torch.Tensor) -> None:
    """Copy whole pages of data u8 [pages, page_bytes]: copies [C, 3] = (source, destination, used).

    Only the first `count` [1] are there, and those with a page that does not exist are skipped. No
    page may be both a source and a destination.
    """
    pages = len(data)
    for source, target, _used in copies[: max(int(count), 0)].tolist():
        if 0 <= source < pages and 0 <= target < pages:
            data[target] = data[source]


def rope_store_packed(
    qkv: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    slots: torch.Tensor, data: torch.Tensor, q_out: torch.Tensor,
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, k_signs: torch.Tensor | None,
    v_signs: torch.Tensor | None, k_mean: torch.Tensor | None, eps: float, layer_at: int,
    page_size: int, kv_heads: int, k_codec: int, v_codec: int,
) -> None:  # fmt: skip
    """`rope_store_kv` into packed pages: K and V are quantised as they are after norm and RoPE, in
    fp32, and K less `k_mean` [kv_heads, head_dim].

    Where K is stored rotated, so is q: transform(q * signs) / sqrt(head_dim), rounded once. A value
    head of which a number, as it comes or as it would be stored, is not finite is stored as
    zeros, and its key as NaN: in each scale, or without scales in the first code.
    """
    tables = Rotation(k_signs, v_signs, k_mean)
    keys, values = _sides(data, q_out.shape[2], layer_at, page_size, kv_heads, k_codec, v_codec,
                          tables)  # fmt: skip
    query, key, value = rotated_states(
        qkv, positions, cos, sin, q_out.shape, kv_heads, q_norm, k_norm, eps
    )
    q_out.copy_(rotated_query(query, keys))
    stored = (slots >= 0) & (slots < keys.num_pages * page_size)
    slot, key, value = slots[stored].long(), key[stored], value[stored].float()
    if len(slot) == 0:
        return
    codes, scales = values.encode(value)
    levels = values.codec.levels(codes, scales)
    bad = ~(torch.isfinite(value) & torch.isfinite(levels)).all(-1)
    values.write_slots(slot, *values.encode(value.masked_fill(bad[..., None], 0.0)))
    codes, scales = keys.encode(key)
    keys.write_slots(slot, *_with_nan(keys, codes, scales, bad))


def _with_nan(
    keys: DevicePages, codes: torch.Tensor, scales: torch.Tensor, bad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that read as NaN where `bad` [n, kv_heads] is set."""
    width = keys.codec.scale_width
    if width:
        nan = torch.tensor(_NAN_BYTES[width], dtype=torch.uint8, device=scales.device)
        return codes, torch.where(bad[..., None, None], nan, scales)
    nan, _ = keys.codec.quantise(torch.full((1, 1, 1), _NAN, device=codes.device), None)
    first = torch.where(bad[..., None], nan, codes[..., :1])
    return torch.cat((first, codes[..., 1:]), -1), scales


def tree_attention_packed(
    q: torch.Tensor, data: torch.Tensor, positions: torch.Tensor, work: torch.Tensor,
    partials: torch.Tensor, out: torch.Tensor, v_signs: torch.Tensor | None, scale: float,
    window: int, q_tile: int, workers: int, layer_at: int, page_size: int, kv_heads: int,
    k_codec: int, v_codec: int,
) -> None:  # fmt: skip
    """`tree_attention` over packed pages, with q in the basis of the K codes.

    V is summed in the basis of its codes, and each row turned back once, at the end.
    """
    del partials, workers
    keys, values = _sides(data, q.shape[2], layer_at, page_size, kv_heads, k_codec, v_codec,
                          Rotation(None, v_signs), has_k_signs=False)  # fmt: skip
    reader = PageReader(
        kv_heads, keys.stored_at, values.stored_at, lambda summed: restored_output(summed, values)
    )
    attend_blocks(q, reader, positions, work, out, scale, window, q_tile)


def _sides(
    data: torch.Tensor, head_dim: int, layer_at: int, page_size: int, kv_heads: int, k_codec: int,
    v_codec: int, tables: Rotation, *, has_k_signs: bool = True,
) -> tuple[DevicePages, DevicePages]:  # fmt: skip
    """K and V of the layer; signs have to be there exactly where they are needed."""
    codecs = codec(k_codec), codec(v_codec)
    for name, side, signs in zip(("k", "v"), codecs, (tables.k_signs, tables.v_signs), strict=True):
        needed = side.is_rotated and (name == "v" or has_k_signs)
        if needed != (signs is not None):
            raise InvalidArgument(
                f"{name}_signs must be given exactly for rotated formats; {name}_codec is "
                f"{side.name!r}"
            )
    sizes = page_size, kv_heads, head_dim
    return device_pages(data, layer_at, sizes, codecs, tables)


def tree_attention_packed_workers(
    like: torch.Tensor, head_dim: int, kv_heads: int, q_tile: int, cell_bytes: int
) -> int:
    """Workers for each kv head that fill the device of `like`; 0 where no kernel for tiles of
    `q_tile` queries holds cells of `cell_bytes`. The twin takes everything.
    """
    del cell_bytes
    return tree_attention_workers(like, head_dim, kv_heads, q_tile)
