"""Families of models that think before they answer: their templates and control tokens, on tokenizers made in code.

Each template is the published one cut down to what it does with turn heads, system messages, its switch for thinking,
and earlier answers. Tokens are as the family has them: control tokens special or not, the marks of thinking tokens of
their own or written in several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Kind = Literal["thinking", "answer", "mark", "written"]
Piece = tuple[Kind, str]
"""Text of a response. ``mark``: no token of it is thinking or answer; ``written``: a mark in several ordinary tokens,
of which only the last is neither."""

CUT = "\0"  # where the text before and behind is encoded apart

STRIPS = "{% set content = m['content'].split('</think>')[-1].lstrip('\n') %}"
R1 = (
    "{% set ns = namespace(system='') %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endif %}{% endfor %}"
    "{{ bos_token + ns.system }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>HEAD' }}{% endif %}"
)
CHATML_TURNS = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% else %}" + STRIPS + "ASSISTANT"
    "{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}HEAD{% endif %}"
)
QWEN3 = CHATML_TURNS.replace(
    "ASSISTANT",
    "{% if loop.last %}{% set thought = m['content'].split('</think>')[0].split('<think>')[-1] "
    "if '</think>' in m['content'] else '' %}"
    "{% set content = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content %}{% endif %}",
).replace(
    "HEAD", "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
QWQ = CHATML_TURNS.replace("ASSISTANT", "").replace("HEAD", "{{ '<think>\n' }}")
SMOLLM3 = (
    "{% set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}"
    "{% if messages[0]['role'] == 'system' %}{% set own = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set own = 'You are a helpful AI assistant named SmolLM.' %}{% endif %}"
    "{{ '<|im_start|>system\n## Metadata\n\nReasoning Mode: ' + mode + '\n\n## Custom Instructions\n\n' + own + "
    "'<|im_end|>\n' }}"
) + CHATML_TURNS.replace("ASSISTANT", "").replace(
    "HEAD", "{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}"
)
HARMONY = (
    "{{ '<|start|>system<|message|>You are ChatGPT.\n\nReasoning: ' + (reasoning_effort | default('medium')) + "
    "'\n\n# Valid channels: analysis, commentary, final.<|end|>' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + m['content'] + '<|end|>' }}"
    "{% elif m['role'] == 'user' %}{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MISTRAL = (
    "{% set asked = 'First draft your thinking process, then write a response. Use this form: OPEN Your thoughts."
    "CLOSE Here, a self-contained response.' %}"
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + asked + '[/SYSTEM_PROMPT]' }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GLM = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] }}"
    "{{ '/nothink' if enable_thinking is defined and not enable_thinking else '' }}"
    "{% else %}" + STRIPS + "{{ '<|assistant|>\n<think></think>\n' + content.strip() }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking else 'HEAD' }}{% endif %}"
)
KIMI = (
    "{% for m in messages %}{{ '<|im_' + m['role'] + '|>' + m['role'] + '<|im_middle|>' }}"
    "{% if m['role'] == 'assistant' %}EMPTY{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"
)
NEMOTRON = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set own = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set own = 'detailed thinking on' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' + own + '<|eot_id|>' }}{% for m in messages %}"
    "{% set content = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI4 = (
    "{{ '<|im_start|>system<|im_sep|>You are Phi. Structure your response into two sections in this form: "
    "<think> {Thought section} </think> {Solution section}.<|im_end|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' }}"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
COHERE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + {'system': 'SYSTEM', 'user': 'USER', "
    "'assistant': 'CHATBOT'}[m['role']] + '_TOKEN|>' }}"
    "{% if m['role'] == 'assistant' %}{{ '<|START_RESPONSE|>' + m['content'] + '<|END_RESPONSE|>' }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
    "{% if reasoning is defined and not reasoning %}{{ '<|START_THINKING|><|END_THINKING|>' }}{% endif %}{% endif %}"
)
SEED = (
    "{% for m in messages %}{{ '<seed:bos>' + m['role'] + '\n' + m['content'] + '<seed:eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<seed:bos>assistant\n' }}{% endif %}"
)
MUSE = (
    "{% set effort = reasoning_strength | default('high') %}{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<|start|>assistant to=user<|message|>' + m['content'] + '<|eot|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
    "{% if m['role'] == 'system' %}{{ 'Reasoning strength: ' + effort + '. # Valid recipients: self, user.' }}"
    "{# a thought is to=self #}{% endif %}{{ '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
KIMI_K3 = (
    "{% set thinking = thinking is not defined or thinking %}{% for m in messages %}"
    "{{ '<|open|>message role=\"' + m['role'] + '\"<|sep|>' }}{% if m['role'] == 'assistant' %}"
    "{% if thinking %}{{ '<|open|>think<|sep|><|close|>think<|sep|>' }}{% endif %}"
    "{{ '<|open|>response<|sep|>' + m['content'] + '<|close|>response<|sep|>' }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|close|>message<|sep|><|end_of_msg|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|open|>message role=\"assistant\"<|sep|><|open|>' + ('think' if thinking else 'response') + '<|sep|>' }}"
    "{% endif %}"
)
APRIEL = (
    "{% set asked = 'Reason step by step, then respond after the marker [BEGIN FINAL RESPONSE].' %}{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}{{ '<|begin_system|>\n' + asked + '\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '\n<|begin_assistant|>\n' + m['content'].split('[BEGIN FINAL RESPONSE]')[-1].strip() + '\n<|end|>\n' }}"
    "{% else %}{{ '<|begin_' + m['role'] + '|>\n' + (asked + '\n' if m['role'] == 'system' else '') + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '\n<|begin_assistant|>\nHere are my reasoning steps:\n' }}{% endif %}"
)
THINK = ("<think>", "</think>")
IM = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
MISTRAL_TOKENS = ("<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
KIMI_TOKENS = ("<|im_system|>", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        template: Its chat template.
        special: Its special tokens; the first begins a text, the second ends a turn.
        plain: Tokens that are added, but not special.
        marks: What opens and what closes its thinking.
        merged: Words that are one token each, besides the bytes.
        opened: The template opens the thinking in the prompt; else the model does.
        before: What the model says before it opens its thinking.
        state: Its `ChatFormat.thinking` without and with thinking asked for.
        told: Its vocabulary or its template names the marks, so that they are known.
        heads: Its marks are heads of messages: that of an answer without thinking, and of what is neither, where it has
            them.
    """

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = THINK
    marks: tuple[str, str] = THINK
    merged: tuple[str, ...] = ()
    opened: bool = False
    before: str = ""
    state: tuple[str, str] = ("none", "none")
    told: bool = True
    heads: tuple[str, str] | None = None

    @property
    def written(self) -> bool:
        """Whether a mark is written in ordinary tokens."""
        return not any(token in self.marks[0] for token in (*self.special, *self.plain))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a byte, and those of the family; tests must leave it as they found it."""
        return _tokenizer(self)

    def made(self) -> PreTrainedTokenizerFast:
        """A fresh one."""
        tokens = [*self.special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        merges: list[tuple[str, str]] = []
        for word in map(_bytes, self.merged):
            for end in range(2, len(word) + 1):
                if word[:end] not in tokens:
                    tokens.append(word[:end])
                    merges.append((word[: end - 1], word[end - 1]))
        core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_tokens([AddedToken(token, special=False) for token in self.plain])
        make: Any = PreTrainedTokenizerFast
        made: PreTrainedTokenizerFast = make(
            tokenizer_object=core,
            bos_token=self.special[0],
            eos_token=self.special[1],
            pad_token=self.special[0],
            padding_side="left",
        )
        made.add_special_tokens({"additional_special_tokens": list(self.special[2:])})
        made.chat_template = self.template
        return made

    def block(self, text: str) -> tuple[Piece, ...]:
        """A block of thinking within a response, marks and all."""
        kind, opening = self.mark(0)
        start = self.heads[1].partition("assistant") if self.heads else ("", "", "")  # of another message
        return (kind, "".join(start[:2]) + opening), ("thinking", text), self.mark(1)

    def mark(self, side: int) -> Piece:
        """What opens, 0, or closes, 1, the thinking."""
        return "written" if self.written else "mark", self.marks[side]

    def begun(self, text: str) -> tuple[Piece, ...]:
        """Thinking from the beginning of a response."""
        head: tuple[Piece, ...] = () if self.opened else (*self.said(self.before), self.mark(0))
        return (*head, ("thinking", text))

    def said(self, text: str) -> tuple[Piece, ...]:
        """Text of the answer, if it is any."""
        return (("answer", text),) if text else ()


@cache
def _tokenizer(family: Family) -> PreTrainedTokenizerFast:
    return family.made()


def _bytes(word: str) -> str:
    """A word as a byte-level tokenizer writes it."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]


FAMILIES = {
    "deepseek_r1": Family(
        R1.replace("HEAD", "<think>\n"),
        DEEPSEEK,
        ("<｜User｜>", "<｜Assistant｜>", *THINK),
        opened=True,
        state=("always", "on"),
    ),
    "deepseek_r1_first": Family(R1.replace("HEAD", ""), DEEPSEEK, ("<｜User｜>", "<｜Assistant｜>", *THINK)),
    "qwen3": Family(QWEN3, ("<|endoftext|>", "<|im_end|>", "<|im_start|>"), state=("off", "on")),
    "qwq": Family(
        QWQ, ("<|endoftext|>", "<|im_end|>", "<|im_start|>"), opened=True, state=("always", "on")
    ),
    "gpt_oss": Family(
        HARMONY,
        ("<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        (),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        state=("always", "on"),
        heads=("<|channel|>final<|message|>", "<|end|><|start|>assistant<|channel|>commentary<|message|>"),
    ),
    "magistral": Family(
        MISTRAL.replace("OPEN", "[THINK]").replace("CLOSE", "[/THINK]"),
        (*MISTRAL_TOKENS, "[THINK]", "[/THINK]"),
        (),
        ("[THINK]", "[/THINK]"),
    ),
    "magistral_2506": Family(
        MISTRAL.replace("OPEN", "<think>\n").replace("CLOSE", "\n</think>\n"),
        MISTRAL_TOKENS,
        (),
        merged=("</", ".</", "think", ">\n"),
    ),
    "glm_45": Family(
        GLM.replace("HEAD", ""),
        ("<|endoftext|>", "<|user|>", "[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
        (*THINK, "/nothink"),
        before="\n",
        state=("off", "on"),
    ),
    "glm_46": Family(
        GLM.replace("HEAD", "\n<think>"),
        ("<|endoftext|>", "<|user|>", "[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
        (*THINK, "/nothink"),
        opened=True,
        state=("off", "on"),
    ),
    "kimi_k2": Family(KIMI.replace("EMPTY", "{{ '<think></think>' }}"), KIMI_TOKENS),
    "kimi_vl": Family(KIMI.replace("EMPTY", ""), KIMI_TOKENS, (), ("◁think▷", "◁/think▷"), told=False),
    "kimi_vl_named": Family(
        "{# ◁think▷ and ◁/think▷ #}" + KIMI.replace("EMPTY", ""),
        KIMI_TOKENS,
        (),
        ("◁think▷", "◁/think▷"),
        merged=("think", "◁/"),
    ),
    "nemotron": Family(NEMOTRON, LLAMA3, (), merged=("</", ".</", "think", ">\n\n", ">\n")),
    "smollm3": Family(SMOLLM3, ("<|begin_of_text|>", "<|im_end|>", "<|im_start|>"), state=("off", "on")),
    "phi4_reasoning": Family(PHI4, ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>", *THINK), ()),
    "cohere": Family(
        COHERE,
        (
            "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_THINKING|>", "<|END_THINKING|>",
        ),
        (),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        state=("off", "on"),
    ),
    "seed": Family(
        SEED,
        ("<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"),
        (),
        ("<seed:think>", "</seed:think>"),
    ),
    "muse": Family(
        MUSE,
        ("<|begin|>", "<|eot|>", "<|start|>", "<|message|>", "<|eom|>"),
        (),
        (" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
        heads=(" to=user<|message|>", "<|eom|><|start|>assistant to=tools.find<|message|>"),
    ),
    "kimi_k3": Family(
        KIMI_K3,
        ("<|begin|>", "<|end_of_msg|>", "<|open|>", "<|close|>", "<|sep|>"),
        (),
        ("<|open|>think<|sep|>", "<|close|>think<|sep|><|open|>response<|sep|>"),
        opened=True,
        state=("off", "on"),
        heads=("", ""),
    ),
    "apriel": Family(
        APRIEL,
        ("<s>", "<|end|>", "<|begin_system|>", "<|begin_user|>", "<|begin_assistant|>"),
        (),
        ("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),
        merged=("[BEGIN", "]\n"),
        opened=True,
        state=("always", "on"),
    ),
}  # fmt: skip


def encoded(family: Family, tokenizer: Any, pieces: Sequence[Piece]) -> tuple[list[int], list[str]]:
    """A response's token ids, and of each token what it is: ``thinking``, ``answer``, or ``mark`` for neither."""
    texts, kinds, ends = "", [], set()
    before = "thinking" if family.opened else "answer"
    for kind, text in pieces:
        texts += text
        kinds += [before if kind == "written" else kind] * len(text)
        if kind == "written":
            ends.add(len(texts) - 1)
            before = "thinking" if text == family.marks[0] else "answer"
        elif kind != "mark":
            before = kind
    ids: list[int] = []
    found: list[str] = []
    start = 0
    for part in texts.split(CUT):
        made = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [(start + a, start + b) for a, b in made["offset_mapping"]]
        for place, (a, b) in enumerate(offsets):
            last = place + 1 == len(offsets) or offsets[place + 1][0] >= b  # of the bytes of a character
            found.append("mark" if last and ends.intersection(range(a, b)) else kinds[a])
        ids += made["input_ids"]
        start += len(part) + len(CUT)
    return ids, found
