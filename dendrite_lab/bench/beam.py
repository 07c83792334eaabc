"""beam: beam search from prompt to result, beside `generate(num_beams=...)` on the same prompts.

Both get a prompt that neither has seen, prefill it, and search by the same rules (fp32, length
penalty 1, no early stopping), so that the texts are compared too. Ours forks a beam where it
splits; transformers keeps a cache of `width` rows and reorders it in every step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import BeamSearch, Budget
from dendrite_lab.bench import gpu_beam, measure
from dendrite_lab.bench.gpu_engine import case_of, wants_device
from dendrite_lab.bench.workload import hugging_face, make_engine, prompt_ids

CASES = ("4x128", "4x1024", "16x256")


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines. `--shape` runs its GPU form.

    Raises:
        InvalidArgument: a count is not positive, or a case is malformed.
    """
    if wants_device(argv):
        return gpu_beam.run(argv)
    parser = argparse.ArgumentParser(prog="dendrite-lab bench beam")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="WIDTHxPROMPT")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(list(argv))
    for name in ("tokens", "repeats"):
        if getattr(args, name) < 1:
            raise InvalidArgument(f"--{name} must be at least 1, got {getattr(args, name)}")
    cases = [case_of(text, "WIDTHxPROMPT") for text in args.cases]
    need = max(2 * prompt + 3 * width * (args.tokens + 32) for width, prompt in cases)
    engine = make_engine(args.model, need)
    peer = hugging_face(engine.model_path)
    rows = [_case(engine, peer, width, prompt, args) for width, prompt in cases]
    engine.close()
    return measure.report("beam", argv, rows, tokens=args.tokens)


def _case(
    engine: Engine, peer: Any, width: int, prompt: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One width and prompt length, ours and theirs in turns so that a slow spell hits both."""
    ours: list[float] = []
    theirs: list[float] = []
    same = 0
    most_pages = 0
    for turn in range(args.repeats + 1):  # the first is a warm-up
        ids = prompt_ids(engine.tokenizer, prompt + 5 * (turn + 1))[-prompt:]
        elapsed, tokens, pages = _ours(engine, ids, width, args.tokens)
        other, expected = _theirs(engine, peer, ids, width, args.tokens)
        if turn:
            ours.append(elapsed)
            theirs.append(other)
            same += expected[: len(tokens)] == tokens
            most_pages = max(most_pages, pages)
    return {
        "width": width,
        "prompt": prompt,
        "seconds": measure.spread(ours, 2),
        "hf_seconds": measure.spread(theirs, 2),
        "times_faster": round(statistics.median(theirs) / statistics.median(ours), 2),
        "same_text": f"{same}/{args.repeats}",
        "pages": most_pages,
        "pages_if_copied": width * -(-(prompt + args.tokens) // engine.config.page_size),
    }


def _ours(engine: Engine, ids: list[int], width: int, tokens: int) -> tuple[float, list[int], int]:
    """Seconds, the best text, and the most pages that were live."""
    most = 0

    def watch(event: Any) -> None:
        nonlocal most
        if event.kind == "budget":
            most = max(most, engine.stats().pages_live)

    search = BeamSearch(width=width, max_tokens=tokens)
    start = time.perf_counter()
    root = engine.prompt(ids)
    result = engine.search(root, search, Budget(), on_event=watch).wait()
    elapsed = time.perf_counter() - start
    result.prune()
    root.prune()
    return elapsed, list(result.token_ids), most


def _theirs(
    engine: Engine, peer: Any, ids: list[int], width: int, tokens: int
) -> tuple[float, list[int]]:
    """Seconds, and the best text, padded."""
    import torch

    start = time.perf_counter()
    with torch.inference_mode():
        out = peer.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            num_beams=width,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=engine.model_config.eos_token_ids[0],
        )
    return time.perf_counter() - start, out[0, len(ids) :].tolist()
