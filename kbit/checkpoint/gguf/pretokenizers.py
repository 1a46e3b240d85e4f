"""How byte-level BPE vocabularies split text into words, by GGUF's `tokenizer.ggml.pre`.

A GGUF file names its pre-tokenizer instead of storing it. The patterns are those of the models' own tokenizer.json
files, which llama.cpp (src/llama-vocab.cpp) restates for its narrower regex engine; each is applied in turn to the
pieces the previous one left, and what matches becomes a piece of its own. The names listed are those whose patterns
are known exactly, or as llama.cpp has them (`tools/judges/pretokenizers.py` compares ids); any other is refused,
because a wrong split gives wrong tokens without any visible error.
"""

from __future__ import annotations

from dataclasses import dataclass

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"\p{N}"  # stands for the `Digits` pre-tokenizer that the models' own files use: each digit by itself

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
# Marks are among letters.
_QWEN35 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SEED_CODER = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# Words split where lower case turns into upper case; the tail allows "/" after punctuation.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\\p{{N}}" + _TAIL
_GPT4O = f"{_LEAD}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_LEAD}{_UPPER}+{_LOWER}*{_ENDINGS}?|\\p{{N}}{{1,3}}" + _TAIL

# Letters with two cases, as DeepSeek's tokenizer.json lists them (an older Unicode's, without those of mathematics).
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    "ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳ"
    "Ꙁ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Likewise, with line breaks one by one.
_SPARK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
    r"|[\r\n]|\s+(?!\S)|\s+"
)
_KANA_KANJI = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split.

    Attributes:
        patterns: regular expressions (Oniguruma syntax), applied in order.
        ignore_merges: a piece that is itself a token is taken whole.
        add_bos: whether a beginning-of-sequence token is added when the metadata does not say.
        nfc: whether text is brought into Unicode normal form C first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_LLAMA3_RULES = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
# BLOOM's tokenizer.json: whatever is no space, bracket, bar or punctuation that ends sentences, with a space before it.
_BLOOM_RULES = PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",))
_DIGITS_GPT2 = PreTokenizer((DIGITS, GPT2))
_DEEPSEEK_V3_RULES = PreTokenizer((r"\p{N}{1,3}", _KANA_KANJI, _DEEPSEEK_V3))
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_BAILING_RULES = PreTokenizer((_BAILING,))
# Threes of digits counted from their end.
_AYA_RULES = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))
_EXAONE_MOE = (
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
_MINICPM5 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+" + _REST
_UFAKZEKA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
# Llama 3's, but for spaces: runs of powers of two.
_JAIS2 = _LLAMA3.removesuffix(r"|\s+(?!\S)|\s+")
_JAIS2 += "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
# GPT-4o's, with Chinese characters by themselves (of Kimi's tokenizer, by tiktoken).
_NOT_HAN = "&&[^\\p{Han}]]"
_KIMI_UPPER, _KIMI_LOWER = _UPPER[:-1] + _NOT_HAN, _LOWER[:-1] + _NOT_HAN
_KIMI = (
    rf"[\p{{Han}}]+|{_LEAD}{_KIMI_UPPER}*{_KIMI_LOWER}+{_ENDINGS}?|{_LEAD}{_KIMI_UPPER}+{_KIMI_LOWER}*{_ENDINGS}?"
    r"|\p{N}{1,3}" + _REST
)
_GLM4_RULES = PreTokenizer((_LLAMA3,), ignore_merges=True)

PRE_TOKENIZERS = {
    # llama.cpp's choice for vocabularies of unknown origin (close to Falcon's).
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((GPT2,)),
    "phi-2": PreTokenizer((GPT2,)),
    "mpt": PreTokenizer((GPT2,)),
    # Falcon's tokenizer.json: runs of ASCII and Unicode punctuation, then words, then digits by threes.
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")),
    "jais": PreTokenizer((GPT2,)),
    "gigachat": PreTokenizer((GPT2,)),
    "a.x-4.0": PreTokenizer((GPT2,)),
    "mellum": PreTokenizer((GPT2,)),
    "trillion": PreTokenizer((GPT2,)),
    "granite-docling": PreTokenizer((GPT2,)),
    "jina-es": PreTokenizer((GPT2,)),
    "jina-de": PreTokenizer((GPT2,)),
    "jina-v2-es": PreTokenizer((GPT2,)),
    "jina-v2-de": PreTokenizer((GPT2,)),
    # As GPT-NeoX's and ModernBERT's tokenizer.json have it; llama.cpp leaves NFC out here, too.
    "modern-bert": PreTokenizer((GPT2,), nfc=True),
    "bloom": _BLOOM_RULES,
    "poro-chat": _BLOOM_RULES,
    "gpt3-finnish": _BLOOM_RULES,
    "viking": PreTokenizer((*_BLOOM_RULES.patterns, DIGITS)),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "minerva-7b": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "exaone": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "mellum2": _DIGITS_GPT2,
    "exaone4": PreTokenizer((GPT2,)),
    "olmo": PreTokenizer((GPT2,)),
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "llama-bpe": _LLAMA3_RULES,
    "falcon3": _LLAMA3_RULES,
    # (As llama.cpp has it; Falcon-H1's tokenizer.json was not at hand.)
    "falcon-h1": _LLAMA3_RULES,
    "pixtral": _LLAMA3_RULES,
    "jina-v5-nano": _LLAMA3_RULES,
    "jais-2": PreTokenizer((_JAIS2,)),
    "midm-2.0": _LLAMA3_RULES,
    "lfm2": _LLAMA3_RULES,
    "glm4": _GLM4_RULES,
    "glm5": _GLM4_RULES,
    "chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    # Qwen2's tokenizer.json normalizes to NFC, which llama.cpp leaves out; the model was trained with it.
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "stablelm2": PreTokenizer((_QWEN2,), nfc=True),
    "f2llmv2": PreTokenizer((_QWEN2,), nfc=True),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    "kormo": PreTokenizer((_QWEN2,)),
    "hunyuan": PreTokenizer((_QWEN2,)),
    "solar-open": PreTokenizer((_QWEN2,)),
    "grok-2": PreTokenizer((_QWEN2,)),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "ufakzeka": PreTokenizer((_UFAKZEKA,)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _MINICPM5), ignore_merges=True),
    "bailingmoe": _BAILING_RULES,
    "bailingmoe2": _BAILING_RULES,
    "llada-moe": _BAILING_RULES,
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "megrez": PreTokenizer((_QWEN2,)),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, DIGITS)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _DEEPSEEK_CJK,
            DIGITS,
        )
    ),
    "deepseek-v3": _DEEPSEEK_V3_RULES,
    "hunyuan-dense": _DEEPSEEK_V3_RULES,
    "hy_v4": _DEEPSEEK_V3_RULES,
    "joyai-llm": _DEEPSEEK_V3_RULES,
    "spark2_5": PreTokenizer((r"\p{N}{1,3}", _KANA_KANJI, _SPARK, DIGITS)),
    "kimi-k2": PreTokenizer((_KIMI,)),
    "youtu": PreTokenizer((_YOUTU_SCRIPTS, _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}")), ignore_merges=True),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "llama4": PreTokenizer((_GPT4O,)),
    "kanana2": PreTokenizer((_GPT4O,)),
    "talkie": PreTokenizer((_GPT4O,)),
    "minimax-m2": PreTokenizer((_GPT4O,)),
    "granite-embed-multi-97m": PreTokenizer((_GPT4O,), ignore_merges=True),
    "tiny_aya": _AYA_RULES,
    "cohere2moe": _AYA_RULES,
}
