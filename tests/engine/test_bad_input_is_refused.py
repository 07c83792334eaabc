"""Every bad input tried gets a typed error that names it, and changes nothing."""

from __future__ import annotations

import json
import math

import pytest

from dendrite_engine import Engine, SamplingParams
from dendrite_engine.errors import (
    BudgetExceeded,
    ContextTooLong,
    DendriteError,
    EmptyPrompt,
    InvalidArgument,
    ModelError,
    OutOfPages,
    StaleBranch,
    UnknownName,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", {-1: 0.5}),
        ("logit_bias", {"3": 0.5}),
        ("stop", [""]),
        ("stop", [3]),
        ("stop_token_ids", [-2]),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("logprobs", 65),
        ("seed", 1.5),
    ],
)
def test_sampling_params_name_the_bad_field(field, value):
    with pytest.raises(InvalidArgument, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"page_size": 12}, "page_size"),
        ({"page_size": 0}, "page_size"),
        ({"kv_budget": "lots"}, "kv_budget"),
        ({"kv_budget": -5}, "kv_budget"),
        ({"kv_budget": 10}, "kv_budget of 10 bytes holds no page"),
        ({"num_pages": 0}, "num_pages"),
        ({"device": "tpu"}, "device"),
        ({"kv_format": "int1"}, "unknown page format 'int1'; known: bf16"),
        ({"attention": "magic"}, "unknown attention backend 'magic'"),
        ({"pages": 3}, "unknown option pages"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_engine_options_name_the_bad_option(tiny_model, options, named):
    with pytest.raises(InvalidArgument, match=named):
        Engine.from_pretrained(tiny_model("llama"), **options)


def test_an_unknown_architecture_lists_the_known_ones(tiny_model, tmp_path):
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["MysteryForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match=r"MysteryForCausalLM.*LlamaForCausalLM, Mistral"):
        Engine.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(tiny_model, tmp_path):
    for file in tiny_model("llama").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        Engine.from_pretrained(tmp_path)


def test_a_truncated_weight_file_is_refused(tiny_model, tmp_path):
    for file in tiny_model("llama").iterdir():
        data = file.read_bytes()
        cut = data[: len(data) // 2] if file.suffix == ".safetensors" else data
        (tmp_path / file.name).write_bytes(cut)
    with pytest.raises(ModelError, match="safetensors"):
        Engine.from_pretrained(tmp_path)


def test_a_tensor_of_another_shape_is_refused(tiny_model, tmp_path):
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] = 96
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="gate_proj"):
        Engine.from_pretrained(tmp_path)


def test_bad_prompts(make_engine):
    engine = make_engine()
    with pytest.raises(EmptyPrompt):
        engine.prompt("")
    with pytest.raises(EmptyPrompt):
        engine.prompt([])
    with pytest.raises(InvalidArgument, match="token id 99999"):
        engine.prompt([1, 99999])
    with pytest.raises(InvalidArgument, match="role"):
        engine.prompt([{"content": "no role"}])
    with pytest.raises(ContextTooLong, match="2561") as caught:
        engine.prompt([1] * 2561)
    assert (caught.value.num_tokens, caught.value.max_context) == (2561, 2560)
    assert engine.branches == []
    assert engine.stats().pages_live == 0


def test_a_prompt_that_does_not_fit_the_pool_changes_nothing(make_engine):
    engine = make_engine(num_pages=4)
    kept = engine.prompt("kept")
    with pytest.raises(OutOfPages) as caught:
        engine.prompt([7] * 100)
    assert (caught.value.need, caught.value.free, caught.value.budget) == (7, 3, 4)
    assert engine.branches == [kept]
    assert engine.stats().pages_live == 1


def test_forking_and_using_a_pruned_branch(make_engine):
    engine = make_engine()
    branch = engine.prompt("gone")
    child = branch.fork()[0]
    assert branch.prune() == 0
    assert branch.prune() == 0
    for use in (
        branch.fork,
        lambda: branch.fork(2),
        lambda: branch.fork(at=1),
        lambda: branch.extend("x"),
        lambda: branch.rollback(1),
        lambda: branch.text,
        lambda: branch.num_tokens,
        lambda: branch.pages,
        lambda: engine.complete([branch]),
        lambda: engine.top_tokens([branch], 1),
    ):
        with pytest.raises(StaleBranch, match=f"branch {branch.id} was pruned"):
            use()
    assert child.text == "gone"
    assert child.prune() == 1


def test_bad_fork_and_rollback_counts(make_engine):
    branch = make_engine().prompt("0123456789")
    for n in (0, -1, True, 1.5, 10**9):
        with pytest.raises(InvalidArgument, match="n must be"):
            branch.fork(n)
    for at in (0, 11, -3, True):
        with pytest.raises(InvalidArgument, match=r"at must be a position in 1\.\.10"):
            branch.fork(at=at)
    for n in (0, 10, -1):
        with pytest.raises(InvalidArgument, match=r"1\.\.9"):
            branch.rollback(n)
    with pytest.raises(EmptyPrompt):
        branch.extend("")


def test_a_branch_of_another_engine(make_engine):
    one, two = make_engine(), make_engine()
    branch = one.prompt("mine")
    with pytest.raises(StaleBranch, match="another engine"):
        two.complete([branch])


def test_a_branch_listed_twice_or_already_generating(make_engine):
    engine = make_engine()
    branch = engine.prompt("busy")
    with pytest.raises(InvalidArgument, match="listed twice"):
        engine.complete([branch, branch])
    job = engine.submit([branch], SamplingParams(max_tokens=300, ignore_eos=True))
    with pytest.raises(InvalidArgument, match="already generating"):
        engine.submit([branch])
    with pytest.raises(InvalidArgument, match="is generating"):
        branch.extend("x")
    with pytest.raises(InvalidArgument, match="is generating"):
        branch.rollback(1)
    job.cancel()
    job.result(timeout=60)
    branch.extend("x")


def test_params_that_do_not_match_the_branches(make_engine):
    engine = make_engine()
    branches = engine.prompt("p").fork(2)
    with pytest.raises(InvalidArgument, match="2 branches but 3"):
        engine.complete(branches, [SamplingParams()] * 3)
    with pytest.raises(InvalidArgument, match="outside the vocabulary"):
        engine.complete(branches, SamplingParams(logit_bias={5000: 1.0}))
    with pytest.raises(InvalidArgument, match="SamplingParams"):
        engine.complete(branches, ["greedy", "greedy"])
    with pytest.raises(InvalidArgument, match="k must be"):
        engine.top_tokens(branches, 0)


def test_the_context_limit_ends_a_branch_and_then_refuses_more(make_engine):
    engine = make_engine(max_context=24)
    branch = engine.prompt([5] * 20)
    (result,) = engine.complete([branch], SamplingParams(max_tokens=50, ignore_eos=True))
    assert result.finish_reason == "context_full"
    assert branch.num_tokens == 24
    with pytest.raises(ContextTooLong):
        engine.complete([branch])
    with pytest.raises(ContextTooLong):
        branch.extend("x")


def test_the_branch_budget_is_hard(make_engine):
    engine = make_engine(max_branches=3)
    root = engine.prompt("budget")
    root.fork(2)
    for use in (root.fork, lambda: root.fork(at=2), lambda: engine.prompt("x")):
        with pytest.raises(BudgetExceeded, match="3 branches"):
            use()
    assert len(engine.branches) == 3
    engine.check_integrity()


def test_every_error_is_a_dendrite_error_and_value_errors_are_value_errors():
    assert issubclass(UnknownName, InvalidArgument)
    assert issubclass(InvalidArgument, ValueError)
    for error in (OutOfPages, StaleBranch, ModelError, BudgetExceeded, InvalidArgument):
        assert issubclass(error, DendriteError)
