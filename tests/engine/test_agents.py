"""Chats as branches: what is appended is what the template writes, and the context is shared."""

from __future__ import annotations

import pytest

from dendrite_engine import Engine, SamplingParams
from dendrite_engine.agents import Chat, Panel, append, reply
from dendrite_engine.errors import ContextTooLong, InvalidArgument, OutOfPages, StaleBranch

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'user' and loop.index0 % 2 == 0 %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWRITING = (
    "{{ messages | length }} messages: {% for m in messages %}{{ m['content'] }}{% endfor %}"
)
SHORT = SamplingParams(temperature=1.0, max_tokens=6)
CONTEXT = "The bridge is 40 m long and carries two lanes. Its north pier settles by 3 mm a year."


@pytest.fixture
def make_chat_engine(tiny_model, tmp_path):
    """Engines on a tiny model with a chat template of one's choice."""
    engines = []

    def make(template=CHATML, **options):
        folder = tmp_path / f"m{len(engines)}"
        folder.mkdir()
        for file in tiny_model("llama").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        options = {"num_pages": 512, "debug": True, **options}
        engines.append(Engine.from_pretrained(folder, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_integrity()
        engine.close()


def rendered(chat):
    """The tokens that a prefill of the whole conversation would hold."""
    tokenizer = chat.branch.engine.tokenizer
    text = tokenizer.apply_chat_template(chat.messages, add_generation_prompt=False)
    return text, tokenizer.encode(text)


def start(engine, text=CONTEXT):
    return Chat.start(engine, [{"role": "system", "content": text}])


def test_appended_messages_are_token_for_token_what_the_template_writes(make_chat_engine):
    shared = start(make_chat_engine())
    a, b = shared.fork(2)
    append([a, b], "Is it safe?")
    append([a], "Yes.", role="assistant")
    append([a, b], ["Why?", "Well?"])
    for chat in (a, b):
        assert chat.branch.token_ids == rendered(chat)[1]
    assert [m["content"] for m in b.messages] == [CONTEXT, "Is it safe?", "Well?"]
    assert shared.messages == [{"role": "system", "content": CONTEXT}]


def test_a_reply_is_closed_as_the_template_closes_it_and_the_chat_goes_on(make_chat_engine):
    chats = start(make_chat_engine()).fork(3)
    append(chats, "Is it safe?")
    replies = reply(chats, SHORT)
    append(chats, "Are you sure?")
    for chat, said in zip(chats, replies, strict=True):
        assert said.error is None
        assert chat.messages[2] == {"role": "assistant", "content": said.text}
        assert chat.branch.text.endswith("</s>\n<user>Are you sure?</s>\n")
        assert chat.branch.text.count("<assistant>") == 1
    assert len({tuple(chat.branch.token_ids) for chat in chats}) == 3  # each drew its own


def test_chats_answer_in_one_batch(make_chat_engine):
    engine = make_chat_engine()
    chats = start(engine).fork(4)
    append(chats, "Go.")
    before = engine.stats().steps
    reply(chats, SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True))
    assert engine.stats().steps - before <= 8  # not 4 times as many


def test_a_message_goes_to_all_chats_or_to_none(make_chat_engine):
    engine = make_chat_engine(num_pages=16)
    a, b = start(engine, "short").fork(2)
    append([b], "x" * 20)
    held = [c.branch.token_ids for c in (a, b)]
    with pytest.raises((OutOfPages, ContextTooLong)):
        append([a, b], ["fits", "y" * 900])
    assert [c.branch.token_ids for c in (a, b)] == held
    assert len(a.messages) == 1
    gone = a.fork()[0]
    gone.prune()
    with pytest.raises(StaleBranch):
        append([a, gone], "hello")
    assert a.branch.token_ids == held[0]


def test_a_chat_that_fails_alone_is_as_before_and_the_others_go_on(make_chat_engine, monkeypatch):
    engine = make_chat_engine()
    a, b = start(engine).fork(2)
    append([a, b], "Go.")
    held = a.branch.token_ids
    complete = engine.complete

    def complete_with_failure(branches, params):
        done = complete(branches, params)
        done[0].error, done[0].finish_reason = OutOfPages(1, 0, 0, 1, 1), "out_of_pages"
        return done

    monkeypatch.setattr(engine, "complete", complete_with_failure)
    failed, fine = reply([a, b], SHORT)
    assert isinstance(failed.error, OutOfPages)
    assert fine.error is None
    assert a.branch.token_ids == held
    assert [len(c.messages) for c in (a, b)] == [2, 3]


def test_what_the_template_can_not_continue_is_refused_and_nothing_changes(make_chat_engine):
    with pytest.raises(InvalidArgument, match="no chat template"):
        Chat.start(make_chat_engine(""), [{"role": "user", "content": "x"}])
    chat = start(make_chat_engine(REWRITING))
    held = chat.branch.token_ids
    with pytest.raises(InvalidArgument, match="writes earlier messages differently"):
        append([chat], "more")
    strict = start(make_chat_engine(STRICT))
    append([strict], "one")
    with pytest.raises(InvalidArgument, match="alternate"):
        append([strict], "two")
    assert chat.branch.token_ids == held
    assert len(strict.messages) == 2


def test_arguments_that_do_not_fit_are_refused(make_chat_engine):
    chat = start(make_chat_engine())
    with pytest.raises(InvalidArgument, match="1 chats but 2 messages"):
        append([chat], ["a", "b"])
    with pytest.raises(InvalidArgument, match="twice"):
        append([chat, chat], "a")
    assert reply([]) == []


# -- panels -------------------------------------------------------------------------------------

PERSONAS = {"Ada": "You are careful.", "Bo": "You are bold.", "Cy": "You ask questions."}


def test_personas_share_the_pages_of_the_context(make_chat_engine):
    engine = make_chat_engine()
    panel = Panel(engine, CONTEXT * 4, PERSONAS)
    panel.tell("Should we close the bridge?")
    panel.round(SHORT)
    sharing = panel.sharing()
    whole = sharing.context_tokens // 16
    assert sharing.separate - sharing.pages >= 2 * whole
    assert 0.4 < sharing.saved < 1
    assert sharing.pages <= engine.stats().pages_live
    panel.prune()
    assert engine.branches == []


def test_everyone_hears_what_the_others_said_and_not_themselves(make_chat_engine):
    panel = Panel(make_chat_engine(STRICT), CONTEXT, PERSONAS)
    panel.tell("Should we close it?")
    panel.tell("Only for you.", to=["Ada"])
    first = panel.round(SHORT)
    panel.round(SHORT, speakers=["Ada"])
    heard = panel.chats["Ada"].messages
    assert [m["role"] for m in heard] == ["system", "user", "assistant", "user", "assistant"]
    assert heard[1]["content"] == "You are careful.\nShould we close it?\nOnly for you."
    assert heard[3]["content"] == f"Bo: {first['Bo'].text}\nCy: {first['Cy'].text}"
    assert "Only for you" not in panel.chats["Bo"].messages[1]["content"]
    assert [name for name, _ in panel.log] == ["", "", "Ada", "Bo", "Cy", "Ada"]


def test_a_panel_without_personas_or_with_unknown_names_is_refused(make_chat_engine):
    engine = make_chat_engine()
    for personas in ({}, {"Ada": ""}):
        with pytest.raises(InvalidArgument, match="personas"):
            Panel(engine, CONTEXT, personas)
    panel = Panel(engine, CONTEXT, PERSONAS)
    with pytest.raises(InvalidArgument, match="no persona is called Zoe"):
        panel.tell("x", to=["Zoe"])
    with pytest.raises(InvalidArgument, match="they are Ada, Bo, Cy"):
        panel.round(speakers=["Zoe"])


@pytest.mark.model
def test_smollm2_holds_after_a_discussion_what_its_template_writes(smollm2):
    before = set(smollm2.branches)
    panel = Panel(smollm2, CONTEXT, {"Ada": "Answer in one short sentence.", "Bo": "Be brief."})
    panel.tell("Should the bridge be closed?")
    replies = panel.round(SamplingParams(max_tokens=24))
    panel.tell("Decide now.")
    panel.round(SamplingParams(max_tokens=8))
    for name, chat in panel.chats.items():
        assert replies[name].text
        assert chat.branch.text == rendered(chat)[0]
    panel.prune()
    assert set(smollm2.branches) == before
