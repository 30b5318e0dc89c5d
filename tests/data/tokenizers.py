"""Tokenizers of several kinds, made here."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.models.test_chat import make_tokenizer
from tests.tiny import CHATML, tiny_tokenizer

CORPUS = ["the exam went well, thank you 😀😀 日本語 日本 مرحبا हिन्दी \n\n so good"] * 6


def _wrapped(core: Tokenizer, *, end: str) -> PreTrainedTokenizerFast:
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = make(tokenizer_object=core, eos_token=end, unk_token="<unk>")
    made.chat_template = CHATML
    return made


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: ``▁`` for spaces, one dropped at the beginning, bytes for what else there is."""
    alphabet = sorted(set("▁abcdefghijklmnopqrstuvwxyz.,!?TUI\n"))
    words = ["▁the", "▁exam", "▁▁", "th", "he", "ex"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet, *words]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [("▁", "▁"), ("t", "h"), ("h", "e"), ("e", "x")]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return _wrapped(core, end="</s>")


def merging() -> PreTrainedTokenizerFast:
    """Byte-level, trained so that its tokens begin and end within characters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return _wrapped(core, end="<|im_end|>")


def wordpiece() -> PreTrainedTokenizerFast:
    """Words and ``##`` endings, put together with spaces that are not in the tokens."""
    names = ["<unk>", "[SEP]", "the", "exam", "##s", "##inat", "##ion", ".", "a", "日", "é", "n", "'", "t"]
    core = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    core.add_special_tokens([AddedToken("[SEP]", special=True)])
    return _wrapped(core, end="[SEP]")


TOKENIZERS = {
    "tiny": tiny_tokenizer(),
    "bos": make_tokenizer(CHATML),
    "byte_fallback": byte_fallback(),
    "merging": merging(),
    "wordpiece": wordpiece(),
}
