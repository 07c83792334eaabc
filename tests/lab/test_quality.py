"""`dendrite-lab quality` and `calibrate` on tiny models: the protocol does what it says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dendrite_engine import Engine
from dendrite_engine.errors import InvalidArgument, UnknownName
from dendrite_engine.scoring import AttentionProbe, Scorer, ScoringModel
from dendrite_lab import cli
from dendrite_lab.quality import Settings, measure_quality, report
from dendrite_lab.quality.calibrate import calibrate
from dendrite_lab.quality.metrics import Divergence
from dendrite_lab.quality.tasks import feed_all, greedy
from dendrite_lab.quality.text import licensed_text, read_text, windows

SMALL = Settings(
    formats=("bf16", "tq4", "tq2"), ablate=("tq2",), protect=("tq4",), contexts=(64,), tokens=96,
    needle_lengths=(200,), needle_depths=(0.5,), greedy_tokens=6, probe_tokens=40, progress=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model) -> ScoringModel:
    return ScoringModel.load(tiny_model("llama"))


@pytest.fixture(scope="module")
def found(tiny_model) -> dict:
    return measure_quality(tiny_model("llama"), SMALL)


def ids(count: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def test_a_scored_token_reads_itself_and_its_own_chunk_as_the_pages_hold_them(model):
    """The usual false 'lossless' is a prompt that attends to K and V before they are quantised.
    Here a prompt in one chunk gives the logits of the same tokens one by one.
    """
    tokens = ids(40)
    quantised = Scorer(model, model.pages("tq2", 64))
    chunk = feed_all(quantised, tokens, 40)
    quantised.reset()
    single = torch.cat([quantised.feed([token]) for token in tokens])
    torch.testing.assert_close(chunk, single, rtol=1e-3, atol=1e-3)
    plain = feed_all(Scorer(model, model.pages("fp32", 64)), tokens, 40)
    assert float((plain[0] - chunk[0]).abs().max()) > 0.01, "already the first token is quantised"


def test_the_scorer_gives_the_logits_of_the_engine(model, make_engine):
    engine = make_engine(kv_format="tq4")
    branch = engine.prompt(ids(40))
    scorer = Scorer(model, model.pages("tq4", 64))
    logprobs = torch.log_softmax(feed_all(scorer, ids(40), 1)[0], -1)
    for best in engine.top_tokens([branch], 5)[0]:
        assert best.logprob == pytest.approx(float(logprobs[best.token_id]), abs=1e-4)


def test_greedy_tokens_are_those_of_the_engine(model, make_engine):
    from dendrite_engine import SamplingParams

    engine = make_engine(kv_format="tq4")
    (done,) = engine.complete(
        [engine.prompt(ids(20))], SamplingParams(max_tokens=6, ignore_eos=True)
    )
    assert greedy(Scorer(model, model.pages("tq4", 64)), ids(20), 6) == done.token_ids


def test_a_report_ranks_formats_by_what_they_keep(found):
    kl = {row["format"]: row["kl_mean"] for row in found["rows"]}
    assert 0 < kl["bf16"] < 1e-3 < kl["tq4"] < kl["tq2"]
    assert kl["tq2/fp32"] < kl["tq2"]
    assert kl["fp32/tq2"] < kl["tq2"]
    errors = {name: np.mean(layers) for name, layers in found["attention"].items()}
    assert errors["bf16"] < 0.01 < errors["tq4"] < errors["tq2"]
    assert all(len(layers) == 3 for layers in found["attention"].values())


def test_a_report_counts_what_it_scored_and_says_on_what(found):
    assert {row["tokens"] for row in found["rows"]} == {96}
    assert "PSF-2.0" in found["text"]
    assert "sha256" in found["text"]
    assert {row["format"] for row in found["needle"]} == {"fp32", *SMALL.names()}
    assert {row["of"] for row in found["divergence"]} == {6}
    assert all(0 <= row["position"] <= 6 for row in found["divergence"])
    json.dumps(found)


def test_first_pages_and_a_centred_k_change_the_result(found):
    rows = {row["format"]: row for row in found["rows"]}
    assert rows["tq4 + safe"]["kl_mean"] != rows["tq4"]["kl_mean"]
    assert rows["tq4 + safe"]["gate"] in ("kept", "MISSED")


def test_figure_and_table_show_every_format(found):
    text = report.table(found)
    figure = report.figure(found)
    for name in SMALL.names():
        assert name in text
        assert name in {trace.name for trace in figure.data}
    assert len(figure.data) == 1 + len(SMALL.names())


def test_the_numbers_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    expected = torch.log_softmax(torch.randn(50, 9, generator=generator), -1)
    logits = expected + 0.3 * torch.randn(50, 9, generator=generator)
    targets = torch.randint(0, 9, (50,), generator=generator)
    divergence = Divergence()
    divergence.add(0, expected[:20], logits[:20], targets[:20])
    divergence.add(1, expected[20:], logits[20:], targets[20:])
    row = divergence.summary("tq4")
    p, q = expected.double().numpy(), torch.log_softmax(logits.double(), -1).numpy()
    places = np.arange(50), targets.numpy()
    assert row["kl_mean"] == pytest.approx(float((np.exp(p) * (p - q)).sum(1).mean()), rel=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(-q[places].mean()), rel=1e-5)
    percent = 100 * (math.exp(p[places].mean() - q[places].mean()) - 1)
    assert row["perplexity_percent"] == pytest.approx(percent, rel=1e-3)
    assert row["top1_percent"] == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).mean())
    rms = 100 * math.sqrt(((np.exp(q[places]) - np.exp(p[places])) ** 2).mean())
    assert row["probability_rms_percent"] == pytest.approx(rms, rel=1e-3)
    assert row["gate"] == ("kept" if percent <= 6 and row["top1_percent"] >= 89 else "MISSED")


def test_a_format_that_changes_nothing_is_neutral_and_one_that_misses_is_said_to():
    expected = torch.log_softmax(torch.randn(40, 9, generator=torch.Generator().manual_seed(0)), -1)
    targets = torch.zeros(40, dtype=torch.int64)
    same, other = Divergence(), Divergence()
    for window in range(4):
        rows = slice(10 * window, 10 * window + 10)
        same.add(window, expected[rows], expected[rows], targets[rows])
        other.add(window, expected[rows], expected[rows].flip(1), targets[rows])
    assert same.summary("bf16")["gate"] == "kept"
    assert same.summary("bf16")["neutral"]
    assert other.summary("bf16")["gate"] == "MISSED"
    assert not other.summary("tq2")["neutral"]
    assert other.summary("tq2")["gate"] == "none"


def test_watching_the_attention_changes_no_logit(model):
    probe = AttentionProbe(model, {"tq4": model.pages("tq4", 64)})
    watched = feed_all(Scorer(model, model.pages("fp32", 64), probe), ids(40), 40)
    assert torch.equal(watched, feed_all(Scorer(model, model.pages("fp32", 64)), ids(40), 40))


def test_the_text_is_long_enough_and_windows_do_not_overlap():
    assert len(licensed_text()) > 300_000
    found = windows(list(range(1000)), 99, 7)
    assert [len(window) for window in found] == [100] * 7
    assert len({token for window in found for token in window}) == 700
    with pytest.raises(InvalidArgument, match="the text has 1000"):
        windows(list(range(1000)), 99, 11)


def test_a_text_of_ones_own_is_read_and_a_bad_one_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("abc", encoding="utf-8")
    assert read_text(tmp_path / "mine.txt")[1].startswith("mine.txt, sha256 ba7816bf8f01")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for name in ("bad.txt", "none.txt"):
        with pytest.raises(InvalidArgument, match=name):
            read_text(tmp_path / name)


def test_unknown_formats_and_windows_beyond_the_context_are_refused(tiny_model):
    with pytest.raises(UnknownName, match="int1"):
        measure_quality(tiny_model("llama"), Settings(formats=("int1",), progress=False))
    with pytest.raises(InvalidArgument, match="windows of 4096 tokens are more than"):
        measure_quality(
            tiny_model("llama"),
            Settings(formats=("tq4",), ablate=(), protect=(), contexts=(4096,), progress=False),
        )


@pytest.fixture
def own_copy(tiny_model, tmp_path):
    """A model folder that may be written to."""
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_calibration_stores_the_mean_of_k_and_the_engine_reads_it(own_copy, capsys):
    assert cli.main(["calibrate", str(own_copy), "--tokens", "80"]) == 0
    path = own_copy / "kv_mean.safetensors"
    assert capsys.readouterr().out.strip() == str(path)
    first = path.read_bytes()
    calibrate(own_copy, 80)
    assert path.read_bytes() == first, "the same seeds give the same mean"
    with Engine.from_pretrained(own_copy, kv_format="tq4", kv_center=True, num_pages=30) as engine:
        key, value = engine._parts.pages.views()[0]
        assert key.mean.abs().max() > 0.01
        assert value.mean is None


def test_the_mean_is_that_of_the_keys_in_the_pages(model):
    probe = AttentionProbe(model, {})
    scorer = Scorer(model, model.pages("fp32", 64), probe)
    feed_all(scorer, ids(48), 0)
    pages = torch.from_numpy(scorer._core.page_tables([scorer._branch])[1]).long()
    keys = scorer.pages.k[:, pages].permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :48]
    torch.testing.assert_close(probe.key_mean(), keys.mean(1), rtol=1e-4, atol=1e-5)


def test_the_command_writes_json_and_a_page_and_fails_on_a_missed_gate(
    tiny_model, tmp_path, capsys
):
    options = [
        "quality", str(tiny_model("llama")), "--formats", "bf16", "tq4", "--contexts", "64",
        "--tokens", "64", "--no-tasks", "--layers", "0=bf16",
        "--json", str(tmp_path / "q.json"), "--html", str(tmp_path / "q.html"),
    ]  # fmt: skip
    code = cli.main(options)
    saved = json.loads((tmp_path / "q.json").read_text())
    assert [row["format"] for row in saved["rows"]] == ["bf16", "tq4"]
    assert code == int(any(row["gate"] == "MISSED" for row in saved["rows"]))
    assert "plotly" in (tmp_path / "q.html").read_text(encoding="utf-8")
    assert "tq4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "int1"], "unknown page format 'int1'"),
        (["--layers", "first=bf16"], "LAYER=FORMAT"),
        (["--layers", "99=bf16"], "names layer 99"),
    ],
)
def test_bad_arguments_are_said_by_name(tiny_model, capsys, arguments, message):
    assert cli.main(["quality", str(tiny_model("llama")), "--no-tasks", *arguments]) == 2
    assert message in capsys.readouterr().err
