"""The GPU benchmarks on a CPU: trees, floors, shapes, jobs, peers, and every benchmark's flow."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from dendrite_engine import Engine
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.models.families import read_model_config
from dendrite_engine.models.tokenizer import Tokenizer
from dendrite_lab import bench
from dendrite_lab.bench import (
    gpu_engine,
    gpu_jobs,
    gpu_peers,
)
from dendrite_lab.bench.shapes import SHAPES, attention_floor_us, shape_of
from dendrite_lab.bench.synthetic import random_ids, write_model

CPU = torch.device("cpu")


def words(text):
    """Arguments of a command line."""
    return text.split()


# -- shapes and floors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("tinyllama-1.1b", 1.100), ("llama-3.1-8b", 8.030), ("mistral-7b", 7.248),
        ("qwen3-0.6b", 0.596), ("smollm2-135m", 0.1345),
    ],
)  # fmt: skip
def test_a_shape_has_the_parameters_of_its_model(tmp_path, name, billions):
    shape = shape_of(name)
    (tmp_path / "config.json").write_text(json.dumps(shape.config()))
    config = read_model_config(tmp_path)
    assert config.num_parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert config.head_dim == shape.head_dim
    assert config.max_context >= 32768 + 256


def test_an_unknown_shape_lists_those_there_are():
    with pytest.raises(InvalidArgument, match="qwen3"):
        shape_of("gpt-2")


def test_floors_are_those_of_the_stored_measurements():
    small, large = shape_of("tinyllama-1.1b"), shape_of("llama-3.1-8b")
    assert small.decode_floor_ms(1, 256, 256) == pytest.approx(0.69, abs=0.01)
    assert large.decode_floor_ms(1, 256, 256) == pytest.approx(5.01, abs=0.01)
    assert small.prefill_floor_ms(4096) == pytest.approx(12.0, abs=0.1)
    assert large.prefill_floor_ms(4096) == pytest.approx(77.9, abs=0.1)
    assert attention_floor_us(64, 40960, 64 * 32896, 32, 8, 128) == pytest.approx(56, abs=1)
    assert attention_floor_us(256, 20480, 256 * 4160, 32, 8, 128) == pytest.approx(29, abs=1)


def test_a_floor_is_the_larger_of_bytes_and_arithmetic():
    assert attention_floor_us(1, 3_000_000, 1, 1, 1, 100) == pytest.approx(400, rel=1e-3)
    assert attention_floor_us(1, 1, 790_000_000, 1, 1, 100) == pytest.approx(400, rel=1e-3)


def test_branches_share_their_prefix_in_the_floor_and_pay_for_their_own_tokens():
    shape = shape_of("tinyllama-1.1b")
    steps = [shape.decode_floor_ms(2, 100 + 2 * step, 100 + step) for step in (1, 2)]
    assert shape.branches_floor_ms(2, 100, 3) == pytest.approx(sum(steps))


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_the_synthetic_tokenizer_has_the_vocabulary_of_the_shape(tmp_path, name):
    shape = shape_of(name)
    tokenizer = Tokenizer(write_model(tmp_path, shape))
    assert tokenizer.vocab_size == shape.vocab
    assert tokenizer.special_ids == {shape.vocab - 1, shape.vocab - 2}
    text = "The birds, and the light itself."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = random_ids(shape, 200, 1)
    assert max(ids) < shape.vocab - 2
    assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids)


# -- engines ----------------------------------------------------------------------------------


def test_only_shape_or_device_ask_for_the_gpu_form():
    assert gpu_engine.wants_device(["--shape", "tiny"])
    assert gpu_engine.wants_device(["--device=cuda"])
    assert not gpu_engine.wants_device(["--repeats", "3", "--model", "x"])


def test_engine_options_are_read_and_unknown_ones_refused():
    words = ["attention=flashinfer", "graph_rows=512", "debug=true", "max_context=none"]
    assert gpu_engine.engine_options(words) == {
        "attention": "flashinfer", "graph_rows": 512, "debug": True, "max_context": None,
    }  # fmt: skip
    for word in ("speed=9", "debug"):
        with pytest.raises(InvalidArgument, match="OPTION=VALUE"):
            gpu_engine.engine_options([word])


def test_an_engine_of_a_shape_generates_with_random_weights():
    args = gpu_engine.parser_of("x").parse_args(["--shape", "tiny", "--device", "cpu"])
    with gpu_engine.open_engine(args, 256, seed=3) as engine:
        assert isinstance(engine, Engine)
        root = engine.prompt(random_ids(shape_of("tiny"), 20, 0))
        done = engine.complete(root.fork(2), gpu_jobs.TOKENS.replace(max_tokens=5))
        assert [len(one.token_ids) for one in done] == [5, 5]
    assert engine.is_closed


RUNS = {
    "decode": "--contexts 16 --tokens 6 --prompts 40",
    "fork": "--prefix 64 --forks 4 --branches 3",
    "first-token": "--prefixes 64 --forks 1 3",
    "tree": "--cases 3x64 2x40 --tokens 5",
    "beam": "--cases 3x32 --tokens 5",
    "deterministic": "--branches 3 --prefix 64 --tokens 5 --again 3 --neighbours 3",
}


@pytest.mark.parametrize("name", RUNS)
def test_every_benchmark_runs_on_a_tiny_shape(name):
    argv = [*RUNS[name].split(), *words("--shape tiny --device cpu --repeats 1 --peers")]
    report = bench.run(name, argv)
    json.dumps(report)
    assert report["benchmark"] == name
    assert report["shape"] == "tiny"
    assert report["rows"]
    for row in report["rows"]:
        key = "on" if name == "deterministic" else "ours"
        assert row[key]["n"] >= 1
        assert row[key]["median"] > 0


def test_first_tokens_are_compared_with_decode_steps():
    argv = words("--prefixes 64 --forks 2 --shape tiny --device cpu --repeats 1 --peers")
    rows = bench.run("first-token", argv)["rows"]
    assert ["in_decode_steps" in row for row in rows] == [False, True, True]


def test_a_fork_takes_no_memory_and_a_divergence_one_page():
    argv = "--prefix 64 --forks 2 --branches 5 --shape tiny --device cpu --repeats 1 --peers"
    (memory,) = bench.run("fork", argv.split())["memory"]
    assert memory["bytes_at_fork"] == memory["device_bytes_at_fork"] == 0
    assert memory["page_copies_per_divergence"] == 1.0
    assert memory["pages_per_divergence"] == 1.0


def test_deterministic_mode_gives_one_result_on_the_cpu():
    argv = RUNS["deterministic"] + " --shape tiny --device cpu --repeats 1 --peers"
    again = bench.run("deterministic", argv.split())["again"]
    assert [entry["mode"] for entry in again] == ["off", "on"]
    assert again[1]["different_results"] == 1


@pytest.mark.parametrize("name", ["tree", "beam"])
def test_a_malformed_case_is_refused(name):
    with pytest.raises(InvalidArgument, match=r"4096|4x256"):
        bench.run(name, ["--cases", "64", "--shape", "tiny"])


# -- peers ------------------------------------------------------------------------------------


class FakePeer:
    name = "vllm"

    def __init__(self, broken=False):
        self.calls, self.broken, self.closed = [], broken, False

    def generate(self, prompts, max_tokens):
        if self.broken:
            raise RuntimeError("no such kernel")
        self.calls.append((len(prompts), len(prompts[0]), max_tokens))

    def close(self):
        self.closed = True


@pytest.fixture
def peer(monkeypatch):
    made = FakePeer()
    monkeypatch.setattr(gpu_peers, "open_peer", lambda name, directory, longest: made)
    return made


def run_with_peer(name):
    argv = [*RUNS[name].split(), *words("--shape tiny --device cpu --repeats 1")]
    return bench.run(name, [*argv, "--peers", "vllm"])


def test_a_peer_does_the_same_work_in_the_same_run(peer):
    (first, second) = run_with_peer("tree")["rows"]
    assert peer.calls[:2] == [(1, 64, 1), (3, 65, 5)]
    assert first["vllm"]["n"] == second["vllm"]["n"] == 3
    assert first["times_peer"] < 1  # the fake takes no time
    assert peer.closed


def test_a_peers_decode_time_leaves_its_prefill_out(peer):
    run_with_peer("decode")
    assert peer.calls[:2] == [(1, 16, 1), (1, 16, 6)]


def test_a_peer_that_fails_is_named_and_the_rest_stands(peer):
    peer.broken = True
    report = run_with_peer("decode")
    assert len(report["troubles"]) == 2
    assert "no such kernel" in next(iter(report["troubles"].values()))
    assert report["rows"][0]["ours"]["n"] == 1
    assert "times_peer" not in report["rows"][0]


def test_a_peer_that_does_not_start_is_named():
    report = run_with_peer("tree")
    assert set(report["troubles"]) == {"vllm"}


def test_peers_are_called_through_their_own_interfaces(monkeypatch, tmp_path):
    seen = []

    class Llm:
        def __init__(self, **options):
            seen.append(options)

        def generate(self, requests, params, use_tqdm):
            seen.append((requests, params))

    class SglangEngine(Llm):
        def generate(self, input_ids, sampling_params):
            seen.append((input_ids, sampling_params))

        def shutdown(self):
            seen.append("shutdown")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Llm, SamplingParams=dict))
    monkeypatch.setitem(sys.modules, "sglang", SimpleNamespace(Engine=SglangEngine))
    for name in ("vllm", "sglang"):
        other = gpu_peers.open_peer(name, tmp_path, 4096)
        other.generate([[1, 2], [3]], 7)
        other.close()
    assert seen[0]["load_format"] == seen[2]["load_format"] == "dummy"
    assert seen[1][0] == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    assert seen[1][1]["max_tokens"] == seen[3][1]["max_new_tokens"] == 7
    assert seen[3][0] == [[1, 2], [3]]
    assert seen[-1] == "shutdown"


def test_the_hugging_face_peer_generates_and_searches(tmp_path):
    pytest.importorskip("transformers")
    other = gpu_peers.open_peer("hf", write_model(tmp_path, shape_of("tiny")), 512)
    other.generate([[1, 2, 3]], 2)
    other.beam([1, 2, 3], 2, 3)
    other.close()


def test_better_is_lower_for_times_and_higher_for_rates():
    def row(unit, ours, peers):
        job = gpu_jobs.Job("w", unit, lambda engine: None, floor=2.0)
        values = {name: {"w": [value]} for name, value in peers.items()}
        return gpu_jobs._row(job, gpu_jobs.Result([ours]), values)

    slow = row("ms", 4.0, {"a": 8.0, "b": 12.0})
    assert (slow["of_floor"], slow["times_peer"]) == (2.0, 2.0)
    rate = row("tokens/s", 1.0, {"a": 0.25, "b": 0.5})
    assert (rate["of_floor"], rate["times_peer"]) == (2.0, 2.0)


def test_a_stored_report_names_no_folder():
    text = {"core": "native: module /opt/x-1/lib/_core.so, page 16/4 tokens"}
    assert gpu_jobs.without_folders(text) == {"core": "native: module _core.so, page 16/4 tokens"}


def test_every_shape_is_listed():
    assert {"tinyllama-1.1b", "llama-3.1-8b", "qwen3-0.6b", "mistral-7b", "smollm2-135m"} <= set(
        SHAPES
    )
