"""Puts an engine together from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dendrite_engine import kernels
from dendrite_engine.attention import ATTENTION_BACKENDS, AttentionBackend, ForwardBatch
from dendrite_engine.cache import core_implementation, make_core
from dendrite_engine.cache.formats import PAGE_FORMATS, PageShape
from dendrite_engine.cache.pages import KVPages, PageGuard
from dendrite_engine.config import EngineConfig, parse_bytes
from dendrite_engine.decoding import Decoder
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.loop import StepLoop
from dendrite_engine.models.config import ModelConfig
from dendrite_engine.models.families import read_model_config
from dendrite_engine.models.hub import resolve_model
from dendrite_engine.models.linear import LinearFactory
from dendrite_engine.models.tokenizer import Tokenizer
from dendrite_engine.models.transformer import Transformer
from dendrite_engine.runner import ModelRunner
from dendrite_engine.sampling import Sampler
from dendrite_engine.scheduler import Scheduler
from dendrite_engine.trace import Trace
from dendrite_engine.types import EngineStats


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
    runner: ModelRunner
    decoder: Decoder
    loop: StepLoop
    max_context: int
    report: dict[str, str]

    def verify_guard(self) -> None:
        """Check the page checksums of debug mode; IntegrityError on the first that changed."""
        if self.guard is not None:
            self.guard.verify()

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
            page_bytes=page_bytes,
            bytes_live=counts["pages_live"] * page_bytes,
            bytes_shared=counts["pages_shared"] * page_bytes,
            bytes_saved=sum(max(refs - 1, 0) * n for refs, n in histogram.items()) * page_bytes,
            steps=self.runner.steps,
            tokens_computed=self.runner.rows,
            tokens_generated=self.decoder.tokens_generated,
            step_ms_p50=self.loop.median_step_ms,
            step_ms_last=self.runner.last_ms,
            jobs_running=self.loop.jobs_running,
        )


def build_parts(model: str | Path, config: EngineConfig) -> Parts:
    """Load the model, allocate its pages and start its thread."""
    page_format = _page_format(config)
    if config.attention != "auto":
        ATTENTION_BACKENDS.get(config.attention)
    path = resolve_model(model)
    model_config = read_model_config(path)
    tokenizer = Tokenizer(path)
    max_context = min(config.max_context or model_config.max_context, model_config.max_context)
    shape = _page_shape(config, model_config, page_format)
    transformer = Transformer.load(
        path, model_config, LinearFactory(deterministic=config.deterministic)
    )
    transformer.set_max_positions(max_context)
    ops, attention = _kernels(config)
    core = make_core(
        shape.num_pages,
        shape.page_size,
        prefix_cache=config.prefix_cache,
        debug=config.debug,
        implementation=config.core,
    )
    pages = KVPages(page_format, shape)
    guard = PageGuard(pages) if config.debug else None
    trace = Trace()
    runner = ModelRunner(transformer, pages, attention, ops)
    decoder = Decoder(
        core,
        Sampler(ops, model_config.vocab_size),
        tokenizer,
        trace,
        eos_ids=model_config.eos_token_ids,
        max_context=max_context,
        seed=config.seed,
    )
    scheduler = Scheduler(config.max_batch_tokens, config.prefill_chunk)
    loop = StepLoop(core, runner, scheduler, decoder, trace, guard)
    report = _report(config, core, ops, attention, transformer, pages)
    return Parts(
        path,
        model_config,
        tokenizer,
        trace,
        core,
        pages,
        guard,
        runner,
        decoder,
        loop,
        max_context,
        report,
    )


def _page_format(config: EngineConfig) -> Any:
    return PAGE_FORMATS.get("fp32" if config.kv_format == "auto" else config.kv_format)()


def _page_shape(config: EngineConfig, model: ModelConfig, page_format: Any) -> PageShape:
    unit = PageShape(model.num_layers, 1, model.num_kv_heads, model.head_dim, config.page_size)
    num_pages = config.num_pages
    if num_pages is None:
        budget = parse_bytes(config.kv_budget)
        page_bytes = page_format.bytes_per_page(unit)
        num_pages = budget // page_bytes
        if num_pages < 1:
            raise InvalidArgument(
                f"kv_budget of {budget} bytes holds no page: one page of this model takes "
                f"{page_bytes} bytes ({config.page_size} tokens, {page_format.name})"
            )
    return PageShape(
        model.num_layers, num_pages, model.num_kv_heads, model.head_dim, config.page_size
    )


def _kernels(config: EngineConfig) -> tuple[Any, AttentionBackend[ForwardBatch]]:
    name = "tree" if config.attention == "auto" else config.attention
    ops = kernels.load("reference" if name == "reference" else "auto")
    return ops, ATTENTION_BACKENDS.get(name)(ops)


def _report(
    config: EngineConfig,
    core: Any,
    ops: Any,
    attention: AttentionBackend[ForwardBatch],
    transformer: Transformer,
    pages: KVPages,
) -> dict[str, str]:
    shape = pages.shape
    core_name, core_reason = core_implementation(core)
    return {
        "device": "cpu",
        "core": f"{core_name}: {core_reason}",
        "kernels": f"{ops.name}: {ops.reason}",
        "attention": f"{attention.name}: {attention.reason}",
        "linear": f"{transformer.linear.name}: {transformer.linear.reason}",
        "pages": f"{shape.num_pages} x {shape.page_size} tokens, {pages.format.name}, "
        f"{pages.total_bytes / 2**20:.0f} MiB",
        "deterministic": "yes" if config.deterministic else "no",
        "debug": "yes" if config.debug else "no",
    }
