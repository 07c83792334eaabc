"""Runs the protocol: every format on the same windows, chunk by chunk beside the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dendrite_engine.cache.formats.choice import layer_format
from dendrite_engine.cache.key_mean import FILE, load_key_mean
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.scoring import AttentionProbe, Scorer, ScoringModel
from dendrite_lab.bench import measure
from dendrite_lab.quality import tasks
from dendrite_lab.quality.calibrate import key_mean
from dendrite_lab.quality.metrics import Divergence
from dendrite_lab.quality.text import read_text, windows

REFERENCE = "fp32"
FORMATS = (
    "fp16", "bf16", "fp8_e4m3", "mxfp8", "fp8_e5m2", "k8v4", "tq4", "k4v2", "tq3", "tq2",
)  # fmt: skip
PROTECTED = ("fp8_e4m3", "mxfp8", "fp8_e5m2", "k8v4", "tq4", "k4v2", "tq3", "tq2")
ABLATED = ("tq4", "tq3", "tq2", "fp8_e4m3")
SAFE = " + safe"  # kv_center=True, kv_first_page="bf16"
CALIBRATION_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure.

    Attributes:
        formats: names for `kv_format`; the reference, fp32, is added.
        ablate: formats that are also measured for K only and for V only.
        contexts: lengths of the windows; the latter half of each is scored.
        tokens: scored tokens for each context length at least.
        needle_lengths, needle_depths: the grid of needle retrieval; empty leaves it out.
        greedy_tokens: tokens of each greedy run; 0 leaves divergence out.
        probe_tokens: tokens on which each layer's attention error is measured; 0 leaves it out.
        layers: another format for single layers, for every format measured.
        protect: formats that are also measured with what a sensitive model needs: K centred by its
            calibrated mean, and first pages in bf16.
        text: a UTF-8 file; None takes Python's language reference.
        seed: of the needles.
        progress: show a progress bar.
    """

    formats: tuple[str, ...] = FORMATS
    ablate: tuple[str, ...] = ABLATED
    contexts: tuple[int, ...] = (512, 2048)
    tokens: int = 16384
    needle_lengths: tuple[int, ...] = (256, 512)
    needle_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    greedy_tokens: int = 48
    probe_tokens: int = 1024
    layers: Mapping[int, str] | None = None
    protect: tuple[str, ...] = PROTECTED
    text: Path | None = None
    seed: int = 0
    progress: bool = True

    def names(self) -> list[str]:
        """What is measured, in order: formats, protected ones, K-only and V-only pairs."""
        names = [name for name in self.formats if name != REFERENCE]
        names += [f"{name}{SAFE}" for name in self.protect]
        for name in self.ablate:
            names += [f"{name}/{REFERENCE}", f"{REFERENCE}/{name}"]
        return list(dict.fromkeys(names))


def measure_quality(model: str | Path, settings: Settings) -> dict[str, Any]:
    """Measure formats on a model.

    Args:
        model: what `Engine.from_pretrained` takes.
        settings: what to measure.

    Returns:
        A report as plain JSON values: `rows` (one for each format and context length),
        `attention` (relative error of each layer), `needle` and `divergence`.

    Raises:
        UnknownName: a format is unknown.
        InvalidArgument: a format does not fit the model, or the text is too short.
    """
    names = settings.names()
    for name in names:
        layer_format(name.removesuffix(SAFE))
    loaded = ScoringModel.load(model)
    text, source = read_text(settings.text)
    ids = loaded.tokenizer.encode(text)
    run = _Run(loaded, settings, names, ids)
    started = time.perf_counter()
    with run.bar:
        rows = [row for context in settings.contexts for row in run.windows(context)]
        attention = run.attention()
        needle, divergence = run.needle(), run.divergence()
    return {
        "benchmark": "quality",
        "command": _command(Path(loaded.path).name, settings),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "model": Path(loaded.path).name,
        "text": source,
        "text_tokens": len(ids),
        "settings": {**asdict(settings), "text": source, "names": names},
        "seconds": round(time.perf_counter() - started, 1),
        "machine": measure.machine(),
        "versions": measure.versions(),
        "rows": rows,
        "attention": attention,
        "needle": needle,
        "divergence": divergence,
    }


class _Run:
    """One measurement: the model, a scorer for each format, the progress bar."""

    def __init__(
        self, model: ScoringModel, settings: Settings, names: list[str], ids: Sequence[int]
    ) -> None:
        self._model, self._settings, self._names, self._ids = model, settings, names, ids
        longest = max([*settings.contexts, *settings.needle_lengths, 0])
        if longest >= model.config.max_context:
            raise InvalidArgument(
                f"windows of {longest} tokens are more than this model's {model.config.max_context}"
            )
        self._room = max(longest, settings.greedy_tokens, settings.probe_tokens) + 64
        self._mean = _key_mean(model) if settings.protect else None
        self._scorers = {REFERENCE: Scorer(model, model.pages(REFERENCE, self._room))}
        for name in names:
            self._scorers[name] = Scorer(model, self._pages(name))
        self.bar = tqdm(
            total=self._total(), unit="token", disable=not settings.progress, smoothing=0.05
        )

    def _pages(self, name: str) -> Any:
        pages, layers = self._model.pages, self._settings.layers
        if name.endswith(SAFE):
            return pages(name.removesuffix(SAFE), self._room, layers, self._mean, "bf16")
        return pages(name, self._room, layers)

    def _count(self, context: int) -> int:
        """Windows of a context length."""
        return -(-self._settings.tokens // (context - context // 2))

    def _total(self) -> int:
        settings, count = self._settings, len(self._scorers)
        total = sum(self._count(context) * context for context in settings.contexts)
        total += sum(settings.needle_lengths) * len(settings.needle_depths)
        return (total + 8 * settings.greedy_tokens) * count + settings.probe_tokens * count

    def windows(self, context: int) -> list[dict[str, Any]]:
        """Every format on windows of one length, scored in their latter half."""
        found = {name: Divergence() for name in self._names}
        for number, window in enumerate(windows(self._ids, context, self._count(context))):
            for scorer in self._scorers.values():
                scorer.reset()
            for begin in range(0, context, tasks.CHUNK):
                end = min(begin + tasks.CHUNK, context)
                scored = min(end - begin, max(0, end - context // 2))
                targets = torch.tensor(window[end - scored + 1 : end + 1])
                self._chunk(number, window[begin:end], scored, targets, found)
        summaries = [
            {**found[name].summary(name.removesuffix(SAFE)), "format": name} for name in self._names
        ]
        return [{"context": context, **self._size(row["format"]), **row} for row in summaries]

    def _chunk(
        self, window: int, ids: list[int], scored: int, targets: torch.Tensor,
        found: dict[str, Divergence],
    ) -> None:  # fmt: skip
        expected = torch.log_softmax(self._scorers[REFERENCE].feed(ids, scored), -1)
        self.bar.update(len(ids))
        for name in self._names:
            logits = self._scorers[name].feed(ids, scored)
            if scored:
                found[name].add(window, expected, logits, targets)
            self.bar.update(len(ids))

    def _size(self, name: str) -> dict[str, Any]:
        pages = self._scorers[name].pages
        return {
            "bytes_per_token": pages.format.bytes_per_token(pages.shape),
            "ratio": round(pages.format.ratio(pages.shape), 2),
        }

    def attention(self) -> dict[str, list[float]]:
        """Relative error of each layer's attention output, for the K and V of a reference run."""
        if not self._settings.probe_tokens:
            return {}
        pools = {name: self._pages(name) for name in self._names}
        probe = AttentionProbe(self._model, pools)
        scorer = Scorer(self._model, self._model.pages(REFERENCE, self._room), probe)
        tasks.feed_all(scorer, windows(self._ids, self._settings.probe_tokens, 1)[0][:-1], 0)
        self.bar.update(self._settings.probe_tokens * len(self._scorers))
        return probe.errors()

    def needle(self) -> list[dict[str, Any]]:
        """Hits of a code hidden at each length and depth, the reference's included."""
        settings = self._settings
        cases = tasks.needle_prompts(
            self._ids, self._encode, settings.needle_lengths, settings.needle_depths, settings.seed
        )
        return tasks.retrieve(self._scorers, cases, self.bar.update)

    def divergence(self) -> list[dict[str, Any]]:
        """Where greedy decoding first differs from the reference's."""
        if not self._settings.greedy_tokens:
            return []
        count, update = self._settings.greedy_tokens, self.bar.update
        return tasks.diverge(self._scorers, REFERENCE, self._encode, count, update)

    @property
    def _encode(self) -> Callable[[str], list[int]]:
        return self._model.tokenizer.encode


def _key_mean(model: ScoringModel) -> torch.Tensor:
    """The stored mean of K, or where the model was not calibrated one found now."""
    if (model.path / FILE).exists():
        return load_key_mean(model.path, model.unit())
    return key_mean(model, CALIBRATION_TOKENS, 0)


def _command(model: str, settings: Settings) -> str:
    """The command line that measures the same."""
    words = ["dendrite-lab", "quality", model, "--tokens", str(settings.tokens)]
    words += ["--contexts", *map(str, settings.contexts), "--formats", *settings.formats]
    for option, names in (("--protect", settings.protect), ("--ablate", settings.ablate)):
        words += [option, *names] if names else []
    words += ["--no-tasks"] if not settings.greedy_tokens else []
    return " ".join(words)
