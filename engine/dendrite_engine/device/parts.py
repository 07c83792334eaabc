"""Builds the device path: weights on the device, its buffers, pages in what is left of memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dendrite_engine.attention import DEVICE_ATTENTION_BACKENDS
from dendrite_engine.attention.device_base import AttentionSetup, DeviceAttention
from dendrite_engine.cache.formats import PageFormat, PageShape, pool_shape
from dendrite_engine.cache.formats.choice import choose_device_format
from dendrite_engine.cache.formats.device_packed import DevicePackedFormat
from dendrite_engine.cache.key_mean import load_key_mean
from dendrite_engine.cache.pages import KVPages
from dendrite_engine.config import EngineConfig
from dendrite_engine.device.choice import (
    FORMAT_OF,
    DeviceChoice,
    compute_dtype,
    page_format_name,
)
from dendrite_engine.device.graphs import Buckets, GraphCache
from dendrite_engine.device.metadata import Metadata
from dendrite_engine.device.runner import DeviceRunner, DeviceState, logits_capacity
from dendrite_engine.errors import BackendUnavailable, InvalidArgument
from dendrite_engine.models.config import ModelConfig
from dendrite_engine.models.device_linear import DeviceLinearFactory
from dendrite_engine.models.device_transformer import Activations, DeviceTransformer
from dendrite_engine.models.random_weights import RandomWeights
from dendrite_engine.models.weights import WeightReader

RESERVED_BYTES = 512 << 20  # cuBLAS workspaces, captured graphs, what torch can't give back
RESERVED_LOGITS = 1024  # rows of logits (and of what sampling makes of them) besides the buffer's
MEMORY_SHARE = 0.9  # of what is left, for pages
DEFAULT_CPU_BYTES = 1 << 30  # for pages, where memory is the machine's


@dataclass(slots=True)
class DeviceParts:
    """The device path of one engine; `report` is kept up to date by the runner."""

    runner: DeviceRunner
    pages: KVPages
    ops: Any
    report: dict[str, str]


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """What the device path is built for.

    Attributes:
        path: the model's directory.
        model_config: its shape.
        config: the engine's settings.
        choice: the device.
        max_context: positions.
        max_rows: rows of a batch at most.
    """

    path: Path
    model_config: ModelConfig
    config: EngineConfig
    choice: DeviceChoice
    max_context: int
    max_rows: int


def build_device(request: DeviceRequest) -> DeviceParts:
    """Load the weights, allocate every buffer and make the runner.

    Raises:
        ModelError: the weights can't be used.
        InvalidArgument: the settings don't fit the device's memory or each other.
    """
    if request.choice.is_twin:
        return _build(request, None)
    with torch.cuda.device(request.choice.device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # memory freed by this engine is reused in this order only
            parts = _build(request, stream)
            stream.synchronize()
    return parts


def _build(request: DeviceRequest, stream: torch.cuda.Stream | None) -> DeviceParts:
    config, choice, max_rows = request.config, request.choice, request.max_rows
    dtype = compute_dtype(config, choice)
    page_format = _page_format(request, dtype)
    DEVICE_ATTENTION_BACKENDS.get(_attention_name(config))  # an unknown name, before the weights
    model = _load(request, dtype)
    model.set_max_positions(request.max_context)
    buckets = Buckets(min(config.graph_rows, max_rows))
    activations = Activations(request.model_config, max_rows, dtype, choice.device)
    logits = torch.zeros(
        logits_capacity(buckets), request.model_config.vocab_size, device=choice.device
    )
    attention = _attention(request, dtype, buckets.largest, page_format)
    shape = _page_shape(request, page_format)
    pages = _allocate(page_format, shape, stream)
    metadata = Metadata(max_rows, attention.work_capacity(shape.num_pages), choice.device)
    graphs = _graphs(choice, attention, buckets)
    report = _report(request, model, attention, graphs)
    state = DeviceState(
        model, pages, attention, choice.ops, activations, logits, metadata, graphs, buckets
    )
    runner = DeviceRunner(state, lambda reason: report.update(graphs=reason))
    return DeviceParts(runner, pages, choice.ops, report)


def _page_format(request: DeviceRequest, dtype: torch.dtype) -> PageFormat:
    config, unit = request.config, _page_unit(request)
    if config.kv_first_page is not None:
        raise InvalidArgument(
            f"kv_first_page={config.kv_first_page!r} is for the CPU: GPU kernels read the same "
            "format in all pages of a layer. Leave it out; kv_layers, such as {0: 'bf16', -1: "
            "'bf16'}, gives single layers a finer format"
        )
    return choose_device_format(
        page_format_name(config, dtype),
        unit,
        request.choice.device,
        FORMAT_OF[dtype],
        dict(config.kv_layers),
        load_key_mean(request.path, unit) if config.kv_center else None,
    )


def _page_unit(request: DeviceRequest) -> PageShape:
    """Sizes of a pool of one page."""
    model, page_size = request.model_config, request.config.page_size
    return PageShape(model.num_layers, 1, model.num_kv_heads, model.head_dim, page_size)


def _load(request: DeviceRequest, dtype: torch.dtype) -> DeviceTransformer:
    config, device = request.config, request.choice.device
    linear = DeviceLinearFactory(request.choice.ops, dtype, deterministic=config.deterministic)
    if config.weights == "random":
        source = RandomWeights(request.model_config, device, dtype, config.seed)
        model = DeviceTransformer(request.model_config, source, linear, dtype, device)
    else:
        with WeightReader(request.path, dtype, device, aligned=True) as reader:
            model = DeviceTransformer(request.model_config, reader, linear, dtype, device)
    linear.find_tiles(request.max_rows, [model.lm_head])
    return model


def _attention(
    request: DeviceRequest, dtype: torch.dtype, graph_rows: int, page_format: PageFormat
) -> DeviceAttention:
    """The backend that was asked for, or the next best with the reason."""
    config, model = request.config, request.model_config
    cell_bytes = 0
    if isinstance(page_format, DevicePackedFormat):
        cell_bytes = page_format.cell_bytes(_page_unit(request))
    setup = AttentionSetup(
        ops=request.choice.ops,
        device=request.choice.device,
        dtype=dtype,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        windows=frozenset(model.windows) or frozenset({0}),
        page_size=config.page_size,
        max_rows=request.max_rows,
        graph_rows=graph_rows,
        deterministic=config.deterministic,
        is_twin=request.choice.is_twin,
        kv_format=page_format.name,
        cell_bytes=cell_bytes,
    )
    failed: list[str] = []
    for name in dict.fromkeys((_attention_name(config), "tree", "reference")):
        backend = _try_backend(name, setup, failed)
        if backend is not None:
            backend.reason = "; ".join([backend.reason, *failed])
            return backend
    raise InvalidArgument(f"no attention backend can run here: {'; '.join(failed)}")


def _try_backend(name: str, setup: AttentionSetup, failed: list[str]) -> DeviceAttention | None:
    try:
        return DEVICE_ATTENTION_BACKENDS.get(name)(setup)
    except BackendUnavailable as error:
        failed.append(f"{name} can't run: {error}")
        return None


def _attention_name(config: EngineConfig) -> str:
    return "tree" if config.attention == "auto" else config.attention


def _page_shape(request: DeviceRequest, page_format: PageFormat) -> PageShape:
    config, unit = request.config, _page_unit(request)
    budget = 0 if config.num_pages is not None else config.kv_bytes(_free_bytes(request))
    return pool_shape(page_format, unit, config.num_pages, budget)


def _free_bytes(request: DeviceRequest) -> int:
    """Bytes that pages take by default."""
    device = request.choice.device
    if device.type != "cuda":
        return DEFAULT_CPU_BYTES
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what loading left behind
    free, _ = torch.cuda.mem_get_info(device)
    logits = 4 * request.model_config.vocab_size * min(request.max_rows, RESERVED_LOGITS)
    return max(int((free - RESERVED_BYTES - logits) * MEMORY_SHARE), 1)


def _allocate(
    page_format: PageFormat, shape: PageShape, stream: torch.cuda.Stream | None
) -> KVPages:
    try:
        return KVPages(page_format, shape, stream)
    except torch.OutOfMemoryError as error:
        wanted = page_format.bytes_per_page(shape) * shape.num_pages
        raise InvalidArgument(
            f"{shape.num_pages} pages take {wanted / 2**30:.2f} GiB, which the device does not "
            "have free; ask for less with kv_budget or num_pages"
        ) from error


def _graphs(choice: DeviceChoice, attention: DeviceAttention, buckets: Buckets) -> GraphCache:
    if choice.is_twin:
        return GraphCache(is_on=False, reason="off: CPU tensors")
    if not buckets.largest:
        return GraphCache(is_on=False, reason="off: graph_rows is 0")
    if not attention.supports_graphs:
        return GraphCache(
            is_on=False, reason=f"off: attention {attention.name!r} can't be captured"
        )
    return GraphCache(is_on=True, reason=f"on: batches of up to {buckets.largest} rows")


def _report(
    request: DeviceRequest,
    model: DeviceTransformer,
    attention: DeviceAttention,
    graphs: GraphCache,
) -> dict[str, str]:
    choice = request.choice
    name = "cuda-twin" if choice.is_twin else str(choice.device)
    return {
        "device": f"{name}: {choice.reason}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernels": f"{choice.ops.name}: {choice.ops.reason}",
        "attention": f"{attention.name}: {attention.reason}",
        "linear": model.linear.reason,
        "graphs": graphs.reason,
    }
