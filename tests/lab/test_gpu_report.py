"""BENCHMARKS.md's part about GPUs, and the script that measures it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_tables  # noqa: E402
import make_report  # noqa: E402

MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "cpu": "Xeon"}


def spread(median):
    return {"median": median, "min": 0.5 * median, "max": 2.0 * median, "n": 5}


def report(benchmark, rows, **extra):
    return {
        "benchmark": benchmark, "command": f"dendrite-lab bench {benchmark}", "date": "2026-11-24",
        "machine": MACHINE, "versions": {"torch": "2.11.0"}, "rows": rows, "shape": "tiny", **extra,
    }  # fmt: skip


def work_row(work="decode, 1 branch", unit="ms", **extra):
    return {"work": work, "unit": unit, "ours": spread(1.23456), "floor": 0.691, "of_floor": 1.79,
            **extra}  # fmt: skip


def test_work_stands_beside_its_floor_and_the_peers_of_the_same_run():
    rows = [work_row(vllm=spread(2.31), times_peer=1.87), work_row("branches", "tokens/s")]
    text = gpu_tables.render([report("decode", rows)])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| work | shape | ours | floor | of floor | peers | times peer |"
    assert lines[2] == (
        "| decode, 1 branch | tiny | 1.235 (0.6173 .. 2.469) ms | 0.691 ms | 1.79 | "
        "vLLM 2.31 (1.155 .. 4.62) | 1.87 |"
    )
    assert lines[3].endswith("tokens/s | 1.79 | - | - |")


def test_machine_and_versions_are_said_once_with_every_command():
    text = gpu_tables.render([report("decode", [work_row()]), report("tree", [work_row()])])
    assert text.count("NVIDIA H100 80GB HBM3, Xeon; torch 2.11.0:") == 1
    assert "- `dendrite-lab bench decode` on 2026-11-24" in text
    assert "- `dendrite-lab bench tree` on 2026-11-24" in text


def test_attention_shows_ours_the_peers_and_the_floor():
    row = {
        "tree": "1,64; 4096,128", "heads": "32/8 d=128", "queries": 64, "tokens": 12288,
        "floor_us": 17.1, "ours_us": spread(30.0), "ours_host_us": 40, "flat_us": spread(139.0),
        "flat_host_us": 250, "cascade_us": None, "times_peer": 4.63, "times_best": 4.63,
        "error": 0.0024, "troubles": {"cascade": "no"}, "variants": {},
    }  # fmt: skip
    summary = [{"trees": "all trees", "times_peer_mean": 4.63, "cases": 1}]
    text = gpu_tables.render(
        [report("attention", [row], summary=summary, skipped=["1; 4096 | 32/4 d=64"])]
    )
    assert "| all trees | 4.63 | 1 |" in text
    assert (
        "| 1,64; 4096,128 | 32/8 d=128 | 64 | 12,288 | 17.1 | 30 (15 .. 60) | 139 | 4.63 | 4.63 | "
        "40, 250, - | 0.0024 |"
    ) in text
    assert "Left out for want of time: 1; 4096 | 32/4 d=64." in text


def test_deterministic_mode_and_memory_have_tables_of_their_own():
    step = {"work": "decode step", "unit": "ms", "off": spread(2.0), "on": spread(2.1),
            "slower_percent": 5.0}  # fmt: skip
    again = {"mode": "on", "repeats": 1000, "different_results": 1}
    memory = {"branches": 64, "bytes_at_fork": 0, "page_copies_per_divergence": 1.0}
    text = gpu_tables.render([
        report("deterministic", [step], again=[again]),
        report("fork", [work_row()], memory=[memory]),
    ])  # fmt: skip
    assert "| tiny | on | 1,000 | 1 |" in text
    assert "| tiny | 64 | 0 | 1 |" in text


def test_page_formats_show_rates_and_what_the_store_takes():
    row = {"tree": "64; 32768", "heads": "32/8 d=128", "format": "tq4", "bytes": 2_214_592_512,
           "us": spread(900.0), "tb_per_s": 2.461, "times_unquantised": 3.1,
           "error": 0.003}  # fmt: skip
    broken = {"tree": "64; 32768", "heads": "32/8 d=128", "format": "tq2", "bytes": 1_140_850_688,
              "us": None,
              "times_unquantised": None, "trouble": "wrong: relative error 1"}  # fmt: skip
    store = {"heads": "32/8 d=128", "branches": 64, "format": "tq4", "store_us": spread(4.0),
             "times_unquantised": 1.3, "share_of_step": 0.0123}  # fmt: skip
    text = gpu_tables.render(
        [report("kv-attention", [row, broken], store=[store], copy_tb_per_s=2.99)]
    )
    assert "a large copy\nreaches 2.99 TB/s" in text
    assert "| 32/8 d=128 | tq4 | 2.215 | 900 (450 .. 1,800) | 2.461 | 3.1 | 0.003 | - |" in text
    assert "| tq2 | 1.141 | - | - | - | - | wrong: relative error 1 |" in text
    assert "| 32/8 d=128 | 64 | tq4 | 4 (2 .. 8) | 1.3 | 1.2 % |" in text


def test_a_backend_that_was_asked_for_is_named():
    engine = {"attention": "flashinfer-cascade: FlashInfer 0.6.11, cascade"}
    text = gpu_tables.render([report("tree", [work_row("branches")], engine=engine)])
    assert "| branches (attention: flashinfer-cascade) |" in text


def test_without_gpu_reports_there_is_no_gpu_part():
    assert gpu_tables.render([]) == ""


def test_the_stored_file_is_what_the_stored_reports_give():
    assert make_report.main(["--check"]) == 0


def test_gpu_reports_follow_the_cpu_sections(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for path in (ROOT / "benchmarks" / "results").glob("fork.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "gpu-decode-tiny.json").write_text(json.dumps(report("decode", [work_row()])))
    monkeypatch.setattr(make_report, "ROOT", tmp_path)
    text = make_report.render()
    assert text.index("## Fork: bookkeeping") < text.index("# On a GPU")


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_a_failing_stage_does_not_stop_the_script_but_its_exit_code_says_so(tmp_path):
    command = [
        "bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "--stages", "nonsense,decode",
        "--shapes", "nosuch,tiny", "--device", "cpu", "--peers", "", "--repeats", "1",
        str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in summary] == [
        ["decode-nosuch", "FAILED"], ["decode-tiny", "ok"],
    ]  # fmt: skip
    assert json.loads((tmp_path / "gpu-decode-tiny.json").read_text())["shape"] == "tiny"
