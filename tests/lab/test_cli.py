"""The command line: exit codes, messages, and what each subcommand prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dendrite_engine.errors import DendriteError, InvalidArgument
from dendrite_lab import cli, doctor, launch

COMMANDS = (
    "lab", "generate", "golden", "bench", "quality", "calibrate", "capacity", "tree", "doctor",
    "fetch", "version",
)  # fmt: skip


def run(*argv: str) -> int:
    return cli.main([str(argument) for argument in argv])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    assert command in capsys.readouterr().out


def test_version_is_the_version_of_the_package(capsys):
    import dendrite_lab

    assert run("version") == 0
    assert capsys.readouterr().out == f"dendrite-lab {dendrite_lab.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["nope"], ["version", "--nope"], ["generate", "m"]])
def test_bad_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2
    assert "usage: dendrite-lab" in capsys.readouterr().err


def test_an_error_is_one_message_on_stderr_and_exit_code_2(capsys):
    assert run("fetch", "no-such-model") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dendrite-lab: no model 'no-such-model'")
    assert "Traceback" not in captured.err


def test_debug_lets_the_error_through():
    with pytest.raises(DendriteError, match="no-such-model"):
        run("--debug", "fetch", "no-such-model")


def test_ctrl_c_exits_with_130(monkeypatch):
    def interrupted(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_version", interrupted)
    assert run("version") == 130


def test_a_reader_that_goes_away_is_not_a_crash(tiny_model):
    script = "import sys; from dendrite_lab.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "generate", str(tiny_model()), "x", "--raw"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    process.wait()
    assert b"Traceback" not in errors


def test_fetch_prints_the_directory(tiny_model, capsys):
    assert run("fetch", tiny_model("llama")) == 0
    assert capsys.readouterr().out.strip() == str(tiny_model("llama").resolve())


def test_generate_prints_the_same_text_each_time(tiny_model, capsys):
    outputs = []
    for _ in range(2):
        argv = ["generate", tiny_model("llama"), "hello", "--raw", "--max-tokens", "12"]
        assert run(*argv, "--temperature", "1", "--seed", "7") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].endswith("\n")


def test_generate_prints_every_branch(tiny_model, capsys):
    argv = ["generate", tiny_model("llama"), "hello", "--max-tokens", "6", "--branches", "3"]
    assert run(*argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("--- branch ") for line in lines) == 3
    assert lines[-1].startswith("--- 3 branches on ")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--branches", "0"), ("--max-tokens", "0"), ("--temperature", "-1"), ("--top-p", "2")],
)
def test_generate_refuses_what_makes_no_sense(tiny_model, capsys, option, value):
    assert run("generate", tiny_model("llama"), "hello", option, value) == 2
    assert option.strip("-").replace("-", "_") in capsys.readouterr().err


def test_generate_refuses_an_empty_prompt(tiny_model, capsys):
    assert run("generate", tiny_model("llama"), "") == 2
    assert capsys.readouterr().err != ""


def test_golden_finds_a_tiny_model_identical(tiny_model, capsys):
    assert run("golden", tiny_model("llama"), "--prompts", "3", "--tokens", "8") == 0
    output = capsys.readouterr().out
    assert "3 of 3 prompts identical" in output
    assert "DIFFERS" not in output


def test_golden_exits_with_1_and_says_where_when_a_token_differs(tiny_model, capsys, monkeypatch):
    from dendrite_lab import golden

    honest = golden._engine_tokens

    def broken(*args):
        rows = honest(*args)
        wrong = (rows[1][2] + 1) % 200
        return [rows[0], (*rows[1][:2], wrong, *rows[1][3:])]

    monkeypatch.setattr(golden, "_engine_tokens", broken)
    assert run("golden", tiny_model("llama"), "--prompts", "2", "--tokens", "8") == 1
    output = capsys.readouterr().out
    assert "DIFFERS at 2 (logit gap" in output
    assert "1 of 2 prompts identical" in output


@pytest.mark.parametrize(("option", "value"), [("--prompts", "0"), ("--prompts", "51"),
                                               ("--tokens", "0")])  # fmt: skip
def test_golden_refuses_counts_out_of_range(tiny_model, capsys, option, value):
    assert run("golden", tiny_model("llama"), option, value) == 2
    assert option.strip("-") in capsys.readouterr().err


def test_bench_passes_its_arguments_on_and_writes_json(tmp_path, monkeypatch):
    from dendrite_lab import bench

    calls = []
    monkeypatch.setattr(bench, "run", lambda name, argv: calls.append((name, argv)) or {"a": 1})
    target = tmp_path / "fork.json"
    assert run("bench", "fork", "--quick", "--json", target, "--repeat", "3") == 0
    assert calls == [("fork", ["--quick", "--repeat", "3"])]
    assert json.loads(target.read_text()) == {"a": 1}


def test_bench_prints_json_without_a_file(capsys, monkeypatch):
    from dendrite_lab import bench

    monkeypatch.setattr(bench, "run", lambda name, argv: {"name": name})
    assert run("bench", "tree") == 0
    assert json.loads(capsys.readouterr().out) == {"name": "tree"}


def test_an_unknown_benchmark_lists_the_known_ones(capsys):
    assert run("bench", "nope") == 2
    assert "first-token" in capsys.readouterr().err


def test_doctor_prints_sections_and_no_problem(capsys):
    assert run("doctor") == 0
    output = capsys.readouterr().out
    words = ("torch", "ipykernel", "page core", "cpu kernels", "gpu kernels", "folder")
    for word in (*words, "no problems found"):
        assert word in output


def test_doctor_speaks_json(capsys):
    assert run("doctor", "--json") == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["packages"]["torch"]
    assert findings["problems"] == []
    assert {"kernels", "cuda", "cache", "memory", "cpu", "notes"} <= set(findings)


def test_doctor_counts_a_missing_package_as_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "ipykernel", "no-such-package"))
    assert run("doctor") == 2
    assert "PROBLEM: no-such-package is not installed" in capsys.readouterr().out


def test_doctor_says_when_the_model_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("DENDRITE_CACHE", str(tmp_path / "empty"))
    findings = doctor.examine()
    assert findings["cache"]["smollm2-135m-instruct"] == "not fetched yet"
    assert any("dendrite-lab fetch" in note for note in findings["notes"])


def test_lab_opens_the_quickstart_without_news_and_as_told(tmp_path):
    (tmp_path / launch.QUICKSTART).write_text("{}")
    command = launch.lab_command(tmp_path, port=8899, open_browser=False)
    assert "--LabApp.default_url=/lab/tree/00_quickstart.ipynb" in command
    assert {"--ServerApp.port=8899", "--no-browser", "--LabApp.news_url=None"} <= set(command)
    assert "--no-browser" not in launch.lab_command(tmp_path, port=None, open_browser=True)


def test_lab_lets_root_in_only_when_it_is_root(tmp_path, monkeypatch):
    for user, expected in ((0, True), (1000, False)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user, raising=False)
        command = launch.lab_command(tmp_path, port=None, open_browser=False)
        assert ("--allow-root" in command) is expected


@pytest.mark.parametrize("port", [-1, 65536])
def test_lab_refuses_a_port_that_does_not_exist(port):
    with pytest.raises(InvalidArgument, match=str(port)):
        launch.launch_lab(port=port)


def test_lab_refuses_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(InvalidArgument, match="not a folder"):
        launch.launch_lab(folder=tmp_path / "missing")


def test_lab_returns_the_exit_code_of_its_child(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        launch, "lab_command", lambda *_a, **_k: [sys.executable, "-c", "import sys; sys.exit(5)"]
    )
    assert run("lab", "--dir", tmp_path) == 5
    assert str(tmp_path) in capsys.readouterr().out


def test_copied_notebooks_keep_the_edits_of_their_user(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("a.ipynb", "b.ipynb"):
        (source / name).write_text("new")
    (target / "a.ipynb").write_text("edited")
    launch.copy_notebooks(source, target)
    assert (target / "a.ipynb").read_text() == "edited"
    assert (target / "b.ipynb").read_text() == "new"


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, False), ({"DISPLAY": ":0"}, True), ({"BROWSER": "x"}, True)]
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the rule is about Linux")
def test_no_display_means_no_browser(monkeypatch, variables, expected):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch.webbrowser, "get", lambda: type("B", (), {"name": "firefox"})())
    assert launch.has_browser() is expected
