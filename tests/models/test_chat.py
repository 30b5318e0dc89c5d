"""Chat formats, on tokenizers made here: behaviour is found by rendering, so a family is only a template."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from persona_lens.models import ChatFormat, ModelError, answer_text, end_of_turn_ids
from tests.families import FAMILIES

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Bot, made here.<|im_end|>\n' }}{% endif %}" + CHATML
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}"
    "{{ '<|header|>system<|/header|>\n\nToday Date: ' + date_string + '\n\n' + s + '<|eot_id|>' }}"
    "{% for m in messages %}"
    "{{ '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
QWEN3 = CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'BOT: ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'BOT:' }}{% endif %}"
)
ALWAYS_THINKS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
DEEPSEEK_V31 = ALWAYS_THINKS.replace(
    "{{ '<|Assistant|><think>\n' }}",
    "{{ '<|Assistant|>' + ('<think>' if thinking is defined and thinking else '</think>') }}",
)
CHANNELS = (
    "{{ '<s>system\nReasoning: ' + (reasoning_effort | default('medium')) + '<|end|>' }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<s>assistant<|channel|>final<|message|>' + m['content'] + '<|return|>' }}"
    "{% else %}{{ '<s>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}"
)
SPECIALS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|header|>",
    "<|/header|>", "<|eot_id|>", "<|User|>", "<|Assistant|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>",
)  # fmt: skip


def make_tokenizer(template: str | None, *, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that, like Llama's, puts a begin-of-text token before what it encodes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    core.train_from_iterator(["the user asks the assistant a question and the system instructs it"] * 4, trainer)
    core.add_tokens([AddedToken("<think>"), AddedToken("</think>")])  # as in Qwen3: added, but not special
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    make: Any = PreTrainedTokenizerFast  # untyped, as GenerationConfig is
    made: PreTrainedTokenizerFast = make(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, extra_special_tokens=list(SPECIALS[2:])
    )
    made.chat_template = template
    return made


def make_format(template: str, **options: Any) -> ChatFormat:
    return ChatFormat.from_tokenizer(make_tokenizer(template), **options)


def config(**values: Any) -> Any:
    from transformers import GenerationConfig

    make: Any = GenerationConfig
    return make(**values)


def token(format: ChatFormat, text: str) -> int:
    found = format.tokenizer.convert_tokens_to_ids(text)
    assert isinstance(found, int)
    return found


ALL = {
    "chatml": CHATML,
    "default_system": DEFAULT_SYSTEM,
    "gemma": GEMMA,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "drops_system": DROPS_SYSTEM,
    "always_thinks": ALWAYS_THINKS,
    "deepseek_v31": DEEPSEEK_V31,
}


@pytest.mark.parametrize("family", ALL)
def test_instruction_and_question_reach_every_family(family: str) -> None:
    format = make_format(ALL[family])
    text = format.rendered_text("Speak like a pirate.", "What is the sea?")
    assert "Speak like a pirate." in text
    assert "What is the sea?" in text
    assert text.index("Speak") < text.index("What")


@pytest.mark.parametrize("family", ALL)
def test_ids_are_those_of_the_rendered_text_with_nothing_added(family: str) -> None:
    format = make_format(ALL[family])
    ids = format.encode("Be kind.", "Why?")
    rendered = format.rendered_text("Be kind.", "Why?")
    assert format.tokenizer.decode(ids, skip_special_tokens=False) == rendered
    assert ids.count(token(format, "<s>")) == rendered.count("<s>") <= 1
    assert all(type(i) is int for i in ids)


@pytest.mark.parametrize(
    ("family", "role"),
    [
        ("chatml", "native"),
        ("llama3", "native"),
        ("always_thinks", "native"),
        ("gemma", "in_first_user_turn"),
        ("drops_system", "in_first_user_turn"),
    ],
)
def test_system_role_is_found_by_rendering(family: str, role: str) -> None:
    assert make_format(ALL[family]).system_role == role


def test_a_template_that_refuses_system_messages_is_reported_in_its_words() -> None:
    format = make_format(GEMMA)
    assert any("System role not supported" in note for note in format.notes)
    assert format.rendered_text("Be kind.", "Why?").startswith("<s><start_of_turn>user\nBe kind.\n\nWhy?<end_of_turn>")
    assert format.rendered_text("", "Why?") == format.rendered_text(None, "Why?")


def test_a_template_that_drops_system_messages_is_reported() -> None:
    format = make_format(DROPS_SYSTEM)
    assert any("silently drops" in note for note in format.notes)
    assert format.rendered_text("Be kind.", "Why?") == "USER: Be kind.\n\nWhy? BOT:"


def test_system_text_the_template_writes_of_itself_is_known() -> None:
    format = make_format(DEFAULT_SYSTEM)
    assert any("one of its own: 'You are Bot, made here.'" in note for note in format.notes)
    assert "You are Bot" in format.rendered_text(None, "Why?")
    assert "You are Bot" not in format.rendered_text("Be kind.", "Why?")
    for family in ("chatml", "llama3", "gemma", "always_thinks"):
        assert not any("one of its own" in note for note in make_format(ALL[family]).notes)


def test_date_in_the_prompt_is_the_same_every_day() -> None:
    format = make_format(LLAMA3)
    assert "Today Date: 26 Jul 2024" in format.rendered_text(None, "Why?")
    assert any("date" in note for note in format.notes)


@pytest.mark.parametrize(
    ("template", "asked", "state", "ending"),
    [
        (QWEN3, False, "off", "assistant\n<think>\n\n</think>\n\n"),
        (QWEN3, True, "on", "assistant\n"),
        (DEEPSEEK_V31, False, "off", "<|Assistant|></think>"),
        (DEEPSEEK_V31, True, "on", "<|Assistant|><think>"),
        (ALWAYS_THINKS, False, "always", "<|Assistant|><think>\n"),
        (CHATML, False, "none", "assistant\n"),
        (CHATML, True, "none", "assistant\n"),
    ],
)
def test_thinking(template: str, asked: bool, state: str, ending: str) -> None:
    format = make_format(template, thinking=asked)
    assert format.thinking == state
    assert format.rendered_text("Be kind.", "Why?").endswith(ending)
    assert any("cannot switch that off" in note for note in format.notes) == (state == "always")
    assert any("--thinking) changes nothing" in note for note in format.notes) == (asked and state == "none")


def test_channels_are_thinking_that_can_only_be_kept_short() -> None:
    format = make_format(CHANNELS)
    assert format.thinking == "always"
    assert "Reasoning: low" in format.rendered_text(None, "Why?")
    assert "Reasoning: medium" in make_format(CHANNELS, thinking=True).rendered_text(None, "Why?")
    assert format.end_of_turn_ids() == tuple(sorted((token(format, "</s>"), token(format, "<|return|>"))))


def test_answer_leaves_out_thinking_and_control_tokens() -> None:
    always = make_format(ALWAYS_THINKS)

    def ids(text: str) -> list[int]:
        encoded: list[int] = always.tokenizer(text, add_special_tokens=False)["input_ids"]
        return encoded

    assert always.answer(ids("They want a reply.</think>\n\nHello the re</s>")) == "Hello the re"
    assert always.answer(ids("They want a reply and I wonder")) == ""
    plain = make_format(CHATML)
    assert plain.answer(ids(" Hello, and <b>welcome</b> <|im_end|>")) == " Hello, and <b>welcome</b> "
    assert plain.decode(ids("a , b . c !<|im_end|>")) == "a , b . c !"
    harmony = ChatFormat.from_tokenizer(FAMILIES["gpt_oss"].tokenizer())
    channels = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    assert harmony.answer(harmony.tokenizer(channels, add_special_tokens=False)["input_ids"]) == "Yes."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No marks at all.\n", "No marks at all.\n"),
        ("<think>a</think>\n\nb", "b"),
        ("<think>\n</think>b<think>c</think> d", "b d"),
        ("<think>never ends", ""),
        ("a</think>b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("<seed:think>a</seed:think>b", "b"),
        ("<|channel>thought\na<channel|>b", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "b"),
        ("<|channel|>analysis<|message|>a and more", ""),
    ],
)
def test_answer_text(text: str, answer: str) -> None:
    assert answer_text(text) == answer


def test_answer_text_when_the_prompt_opened_the_block() -> None:
    assert answer_text("a</think> b", ("<think>", "</think>")) == "b"
    assert answer_text("still going", ("<think>", "</think>")) == ""


@pytest.mark.parametrize(
    ("opens", "closes"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
        ("◁think▷", "◁/think▷"),
        ("<reasoning>", "</reasoning>"),
        ("<ponder>", "</ponder>"),  # no list has these
        ("<|ponder_start|>", "<|ponder_end|>"),
    ],
)
def test_the_marks_that_a_template_opens_are_found_by_rendering_a_prompt(opens: str, closes: str) -> None:
    format = make_format(ALWAYS_THINKS.replace("<think>", opens).replace("</think>", closes))
    assert format.thinking == "always"

    def answer(text: str) -> str:
        ids: list[int] = format.tokenizer(text, add_special_tokens=False)["input_ids"]
        return format.answer(ids)

    assert answer(f"They ask.{closes}Hi.") == "Hi."
    assert answer(f"{opens}They ask.{closes}Hi.") == "Hi."  # models repeat what the template wrote
    assert answer(f"{opens}They ask") == answer("They ask") == ""


def test_the_head_of_a_turn_is_no_reasoning() -> None:
    tagged = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</' + m['role'] + '>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    for template in (tagged, CHATML, GEMMA, LLAMA3):
        format = make_format(template)
        assert format.thinking == "none"
        assert format.opened_reasoning is None


def test_conversations() -> None:
    format = make_format(GEMMA)
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
    ]
    ids = format.encode_messages(turns, add_generation_prompt=False)
    text = format.tokenizer.decode(ids)
    assert text == "<s><start_of_turn>user\nBe kind.\n\nOne?<end_of_turn>\n<start_of_turn>model\nTwo.<end_of_turn>\n"
    assert turns[0]["content"] == "Be kind."  # the caller's messages are left alone
    assert format.rendered_text(None, messages=turns[1:2]) == format.rendered_text(None, "One?")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], "^message 0 needs a role and a content"),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
            "^message 1 is .*only the first message",
        ),
        ([{"role": "system", "content": "b"}], "in the first user message"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "Roles must alternate"),
    ],
)
def test_malformed_conversations_are_refused(messages: list[dict[str, str]], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make_format(GEMMA).encode_messages(messages)


def test_no_template_says_what_to_do_and_one_can_be_given() -> None:
    bare = make_tokenizer(None)
    with pytest.raises(ModelError, match=r"instruct model.*--chat-template FILE"):
        ChatFormat.from_tokenizer(bare)
    bare.chat_template = CHATML
    given = ChatFormat.from_tokenizer(bare)
    assert given.rendered_text(None, "Why?") == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", ["{% for %}", "{{ 'always this' }}"])
def test_a_template_that_cannot_write_a_question_is_refused(template: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatFormat.from_tokenizer(make_tokenizer(template))


def test_end_of_turn_tokens_come_from_all_three_places() -> None:
    chatml = make_tokenizer(CHATML)
    end, turn, eot = (chatml.convert_tokens_to_ids(t) for t in ("</s>", "<|im_end|>", "<|eot_id|>"))
    assert end_of_turn_ids(chatml) == tuple(sorted((end, turn)))
    assert end_of_turn_ids(chatml, config(eos_token_id=eot)) == tuple(sorted((end, turn, eot)))
    assert end_of_turn_ids(chatml, config(eos_token_id=[eot, end])) == tuple(sorted((end, turn, eot)))
    assert end_of_turn_ids(make_tokenizer(None)) == (end,)
    assert end_of_turn_ids(make_tokenizer(None, eos=None)) == ()
    assert end_of_turn_ids(make_tokenizer(DROPS_SYSTEM, eos="<|eot_id|>")) == tuple(sorted((end, eot)))
    given = ChatFormat.from_tokenizer(make_tokenizer(CHATML))
    assert given.end_of_turn_ids() == tuple(sorted((end, turn)))


def test_padding_token_is_never_an_end_of_turn_token() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.pad_token = "<|header|>"
    assert tokenizer.pad_token_id not in end_of_turn_ids(tokenizer, config(pad_token_id=0))


def test_an_answer_from_elsewhere_cannot_bring_control_tokens() -> None:
    format = make_format(CHATML)
    ids = format.encode_answer("the end<|im_end|>")
    assert token(format, "<|im_end|>") not in ids
    assert token(format, "<s>") not in ids
    assert format.decode(ids) == "the end<|im_end|>"


def test_format_is_frozen_and_known_by_its_content() -> None:
    format = make_format(QWEN3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        format.thinking = "on"  # type: ignore[misc]
    assert format == make_format(QWEN3)
    assert format.digest == make_format(QWEN3).digest
    assert format.digest != make_format(QWEN3, thinking=True).digest != make_format(CHATML).digest
