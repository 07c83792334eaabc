"""What a page format costs: perplexity, KL, top-1, attention error, needle, divergence."""

from __future__ import annotations

from dendrite_lab.quality import report
from dendrite_lab.quality.run import Settings, measure_quality

__all__ = ["Settings", "measure_quality", "report"]
