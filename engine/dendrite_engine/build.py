"""Puts an engine together from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dendrite_engine import kernels
from dendrite_engine.attention import ATTENTION_BACKENDS, AttentionBackend, ForwardBatch
from dendrite_engine.cache import core_implementation, make_core
from dendrite_engine.cache.formats import PageShape, pool_shape
from dendrite_engine.cache.formats.choice import choose_format
from dendrite_engine.cache.key_mean import load_key_mean
from dendrite_engine.cache.pages import KVPages, PageGuard
from dendrite_engine.config import EngineConfig
from dendrite_engine.decoding import Decoder
from dendrite_engine.device.choice import (
    DeviceChoice,
    choose_device,
    compute_dtype,
    page_format_name,
)
from dendrite_engine.device.parts import DEFAULT_CPU_BYTES, DeviceParts, DeviceRequest, build_device
from dendrite_engine.device.sampler import DeviceSampler
from dendrite_engine.grammar.service import GrammarService, ModelVocabulary
from dendrite_engine.loop import StepLoop
from dendrite_engine.models.config import ModelConfig
from dendrite_engine.models.families import read_model_config
from dendrite_engine.models.hub import resolve_model
from dendrite_engine.models.linear import LinearFactory
from dendrite_engine.models.random_weights import RandomWeights
from dendrite_engine.models.tokenizer import Tokenizer
from dendrite_engine.models.transformer import Transformer
from dendrite_engine.runner import ModelRunner, Runner
from dendrite_engine.sampling import Sampler, TokenSampler
from dendrite_engine.scheduler import Scheduler
from dendrite_engine.trace import Trace
from dendrite_engine.types import EngineStats


@dataclass(slots=True)
class CpuParts:
    """The CPU path of one engine; the device path is DeviceParts."""

    runner: ModelRunner
    pages: KVPages
    ops: Any
    report: dict[str, str]


@dataclass(slots=True)
class Parts:
    """Everything an engine is made of."""

    model_path: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    trace: Trace
    core: Any
    pages: KVPages
    guard: PageGuard | None
    runner: Runner
    decoder: Decoder
    loop: StepLoop
    max_context: int
    report: dict[str, str]
    grammars: GrammarService

    def verify_guard(self) -> None:
        """Check the page checksums of debug mode; IntegrityError on the first that changed."""
        if self.guard is not None:
            self.guard.verify()

    def read_report(self) -> dict[str, str]:
        """Which implementation runs each part, and why; a backend may have changed since."""
        attention = self.runner.attention
        return {
            **self.report,
            "attention": f"{attention.name}: {attention.reason}",
            "grammar": self.grammars.report(),
        }

    def read_stats(self) -> EngineStats:
        """Counters of core, pages and loop in one value."""
        counts = self.core.stats()
        histogram = self.core.refcount_histogram()
        page_bytes = self.pages.page_bytes
        names = (
            "pages_total", "pages_free", "pages_live", "pages_shared", "pages_cached", "branches",
            "segments", "forks", "prunes", "cow_copies", "evictions", "prefix_hit_tokens",
        )  # fmt: skip
        return EngineStats(
            **{name: counts[name] for name in names},
            refcount_histogram=histogram,
            kv_format=self.pages.format.name,
            page_bytes=page_bytes,
            bytes_total=self.pages.total_bytes,
            bytes_live=counts["pages_live"] * page_bytes,
            bytes_shared=counts["pages_shared"] * page_bytes,
            bytes_saved=sum(max(refs - 1, 0) * n for refs, n in histogram.items()) * page_bytes,
            steps=self.runner.steps,
            tokens_computed=self.runner.rows,
            tokens_generated=self.decoder.tokens_generated,
            step_ms_p50=self.loop.median_step_ms,
            step_ms_last=self.runner.last_ms,
            jobs_running=self.loop.jobs_running,
            graph_steps=self.runner.graph_steps,
            host_ms_last=self.runner.host_ms,
            speculation=self.loop.speculator.stats(),
            mask_us_p50=self.decoder.guided.filler.median_mask_us,
            mask_wait_us_p50=self.decoder.guided.filler.median_wait_us,
            tokens_forced=self.decoder.guided.tokens_forced,
            grammars_cached=self.grammars.num_cached,
        )


def build_parts(model: str | Path, config: EngineConfig) -> Parts:
    """Load the model, allocate its pages and start its thread."""
    path = _model_directory(model, config)
    model_config = read_model_config(path)
    tokenizer = Tokenizer(path)
    max_context = min(config.max_context or model_config.max_context, model_config.max_context)
    limits = batch_limits(config, choice := choose_device(config))
    request = DeviceRequest(path, model_config, config, choice, max_context, limits[0])
    side = build_device(request) if choice.uses_device_path else _build_cpu(request)
    shape = side.pages.shape
    core = make_core(
        shape.num_pages,
        shape.page_size,
        prefix_cache=config.prefix_cache,
        debug=config.debug,
        implementation=config.core,
    )
    side.pages.page_state = core.page_state
    guard = PageGuard(side.pages) if config.debug else None
    trace = Trace()
    decoder = Decoder(
        core,
        _sampler(side, choice, model_config.vocab_size),
        tokenizer,
        trace,
        eos_ids=model_config.eos_token_ids,
        max_context=max_context,
        seed=config.seed,
        mask_seconds=config.grammar_limits.mask_seconds,
    )
    vocabulary = ModelVocabulary(
        tokenizer, model_config.vocab_size, tuple(model_config.eos_token_ids)
    )
    loop = StepLoop(core, side.runner, Scheduler(*limits), decoder, trace, guard)
    _complete_report(side.report, config, core, side.pages)
    return Parts(
        path, model_config, tokenizer, trace, core, side.pages, guard, side.runner, decoder, loop,
        max_context, side.report, GrammarService(vocabulary, config.grammar_limits),
    )  # fmt: skip


def _sampler(side: CpuParts | DeviceParts, choice: DeviceChoice, vocab_size: int) -> TokenSampler:
    """Tokens are chosen where the logits are."""
    if not choice.uses_device_path:
        return Sampler(side.ops, vocab_size)
    return DeviceSampler(side.ops, vocab_size, choice.device)


def batch_limits(config: EngineConfig, choice: DeviceChoice) -> tuple[int, int]:
    """max_batch_tokens and prefill_chunk, with the defaults of the device filled in."""
    rows, chunk = (2048, 1024) if choice.uses_device_path else (512, 256)
    return config.max_batch_tokens or rows, config.prefill_chunk or chunk


def _model_directory(model: str | Path, config: EngineConfig) -> Path:
    """Random weights need config and tokenizer only, so a directory may have no weights."""
    if config.weights == "random" and Path(model).is_dir():
        return Path(model).resolve()
    return resolve_model(model)


def _build_cpu(request: DeviceRequest) -> CpuParts:
    """The CPU path: weights packed in host memory, native kernels."""
    config, model_config = request.config, request.model_config
    dtype = compute_dtype(config, request.choice)
    unit = page_unit(model_config, config.page_size)
    page_format = choose_format(
        page_format_name(config, dtype),
        unit,
        dict(config.kv_layers),
        load_key_mean(request.path, unit) if config.kv_center else None,
        config.kv_first_page,
    )
    shape = pool_shape(page_format, unit, config.num_pages, config.kv_bytes(DEFAULT_CPU_BYTES))
    ops, attention = _kernels(config)
    transformer = _load_cpu(request)
    transformer.set_max_positions(request.max_context)
    pages = KVPages(page_format, shape)
    report = {
        "device": f"cpu: {request.choice.reason}",
        "dtype": "float32",
        "kernels": f"{ops.name}: {ops.reason}",
        "attention": f"{attention.name}: {attention.reason}",
        "linear": f"{transformer.linear.name}: {transformer.linear.reason}",
    }
    return CpuParts(ModelRunner(transformer, pages, attention, ops), pages, ops, report)


def page_unit(model: ModelConfig, page_size: int) -> PageShape:
    """Sizes of a pool of one page."""
    return PageShape(model.num_layers, 1, model.num_kv_heads, model.head_dim, page_size)


def _load_cpu(request: DeviceRequest) -> Transformer:
    linear = LinearFactory(deterministic=request.config.deterministic)
    if request.config.weights == "random":
        source = RandomWeights(
            request.model_config, request.choice.device, torch.float32, request.config.seed
        )
        return Transformer(request.model_config, source, linear)
    return Transformer.load(request.path, request.model_config, linear)


def _kernels(config: EngineConfig) -> tuple[Any, AttentionBackend[ForwardBatch]]:
    name = "tree" if config.attention == "auto" else config.attention
    backend = ATTENTION_BACKENDS.get(name)
    ops = kernels.load("reference" if name == "reference" else "auto")
    return ops, backend(ops)


def _complete_report(
    report: dict[str, str], config: EngineConfig, core: Any, pages: KVPages
) -> None:
    shape = pages.shape
    core_name, core_reason = core_implementation(core)
    report["core"] = f"{core_name}: {core_reason}"
    report["pages"] = (
        f"{shape.num_pages} x {shape.page_size} tokens, {pages.format.name}, "
        f"{pages.total_bytes / 2**20:.0f} MiB, {pages.format.bytes_per_token(shape)} bytes a token "
        f"({pages.format.ratio(shape):.2f} times less than 16-bit numbers)"
    )
    report["deterministic"] = "yes" if config.deterministic else "no"
    report["debug"] = "yes" if config.debug else "no"
