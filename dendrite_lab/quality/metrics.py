"""Numbers of one format against the reference, collected token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

# kv_formats.md, section 4.6: what SmolLM2-135M, a small model with d=64 and so a hard case, has to
# keep: perplexity in percent, mean KL in nats, top-1 agreement in percent.
GATES = {
    "bf16": (0.05, 2e-4, 99.0), "fp16": (0.05, 2e-4, 99.0),
    "fp8_e4m3": (0.5, 5e-3, 97.0), "mxfp8": (0.5, 5e-3, 97.0),
    "fp8_e5m2": (2.0, 2e-2, 93.0), "k8v4": (2.0, 2e-2, 94.0), "tq4": (6.0, 6e-2, 89.0),
}  # fmt: skip


@dataclass
class Divergence:
    """Reference and format on the same tokens.

    Attributes:
        reference: -ln p of each scored token in the reference, one array a chunk.
        delta: how much larger -ln p is with the format.
        kl: KL(reference || format) of each position, in nats.
        agrees: whether the most likely token is the same.
        probability: p(format) - p(reference) of each scored token.
        window: window of each token.
    """

    reference: list[np.ndarray] = field(default_factory=list)
    delta: list[np.ndarray] = field(default_factory=list)
    kl: list[np.ndarray] = field(default_factory=list)
    agrees: list[np.ndarray] = field(default_factory=list)
    probability: list[np.ndarray] = field(default_factory=list)
    window: list[np.ndarray] = field(default_factory=list)

    def add(
        self, window: int, expected: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
    ) -> None:
        """One chunk: log-probabilities of the reference, logits of the format [n, vocab], the
        tokens that came next [n].
        """
        found = torch.log_softmax(logits, -1)
        kl = (expected.exp() * (expected - found)).sum(-1, dtype=torch.float64).clamp_min(0)
        ours = found.gather(1, targets[:, None])[:, 0].double()
        theirs = expected.gather(1, targets[:, None])[:, 0].double()
        self.kl.append(kl.numpy())
        self.agrees.append((found.argmax(-1) == expected.argmax(-1)).numpy())
        self.reference.append(-theirs.numpy())
        self.delta.append((theirs - ours).numpy())
        self.probability.append((ours.exp() - theirs.exp()).numpy())
        self.window.append(np.full(len(targets), window))

    def summary(self, name: str) -> dict[str, Any]:
        """Means, spreads and quantiles, and whether the format's gate is kept."""
        delta, kl = np.concatenate(self.delta), np.concatenate(self.kl)
        error = _standard_error(delta, np.concatenate(self.window))
        mean = float(delta.mean())
        row = {
            "format": name,
            "tokens": len(delta),
            "perplexity": math.exp(float(np.concatenate(self.reference).mean()) + mean),
            "perplexity_percent": 100 * math.expm1(mean),
            "perplexity_percent_ci95": 100 * 1.96 * error,
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_p999": float(np.quantile(kl, 0.999)),
            "kl_max": float(kl.max()),
            "top1_percent": 100 * float(np.concatenate(self.agrees).mean()),
            "probability_rms_percent": 100
            * float(np.sqrt(np.square(np.concatenate(self.probability)).mean())),
        }
        return {**row, **_verdict(name, row)}


def _verdict(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The gate of a format, and whether it may be called neutral."""
    spread = row["perplexity_percent_ci95"]
    neutral = abs(row["perplexity_percent"]) + spread <= 0.5 and row["kl_mean"] <= 2e-3
    if name not in GATES:
        return {"neutral": bool(neutral), "gate": "none"}
    perplexity, kl, top1 = GATES[name]
    kept = (
        row["perplexity_percent"] <= perplexity
        and row["kl_mean"] <= kl
        and row["top1_percent"] >= top1
    )
    return {"neutral": bool(neutral), "gate": "kept" if kept else "MISSED"}


def _standard_error(values: np.ndarray, groups: np.ndarray) -> float:
    """Standard error of the mean, windows being the independent samples (tokens where there is one
    window only).
    """
    names = np.unique(groups)
    if len(names) < 2:
        return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
    means = np.array([values[groups == name].mean() for name in names])
    return float(means.std(ddof=1) / math.sqrt(len(means)))
