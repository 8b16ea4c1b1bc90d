"""Chat formats that people use, written from their descriptions, on tiny tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Pairs of line breaks and of spaces become tokens, as they do in real vocabularies.
CORPUS = [
    "turn the kitchen lamp to 30 percent, please.\n\nyes  no\n\n\nhow are you\n\n  fine",
    'the quick brown fox jumps over the lazy dog {"action":"set","value":12}\n\n    1',
    "user system assistant hello how are you fine thanks goodbye model",
    "[INST] hello [/INST] thanks <think> </think>",
]

CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SMOLLM2 = """\
{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """\
{{ bos_token }}{% for m in messages %}\
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim \
+ '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """\
{{ bos_token }}{% for m in messages %}\
{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}\
{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}\
{% endfor %}"""

# Reasoning stays only in answers behind the last question; the very last always has some.
QWEN3 = """\
{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
{% for m in messages %}{% set said = m.content %}{% set thought = '' %}\
{% if m.role == 'assistant' and '</think>' in said %}\
{% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}\
{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}\
{{ '<|im_start|>' + m.role + '\n' }}\
{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}\
{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}\
{% else %}{{ said }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# The prompt opens a reasoning block that finished answers do not have.
R1 = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}\
{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}\
{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""

PHI3 = """\
{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

NO_END = """\
{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"""

# By hand, as people write them: the prompt ends with a space, which merges with the answer.
TRAILING_SPACE = """\
{% for m in messages %}{{ '### ' + m.role + ': ' + m.content }}\
{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"""

# How many messages there are changes how the first are written.
COUNTING = "{{ messages | length }} messages\n" + CHATML
# Only the last exchange is written out.
FORGETTING = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content if loop.revindex <= 2 else '...' }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# There is no branch for the system role.
NO_SYSTEM = "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + CHATML

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_text|>",
)


@dataclass(frozen=True)
class Format:
    """A chat format: its template, its tokens, and what it makes of an answer."""

    template: str
    tokens: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    """The token that closes a turn."""
    written: Callable[[str], str] = str
    """What stands between the prompt and the end token, for the content of the last answer."""
    takes_system: bool = True


def build(
    tokens: Sequence[str] = CHATML_TOKENS,
    bos: str | None = "<|im_start|>",
    eos: str | None = "<|im_end|>",
    template: str | None = CHATML,
    *,
    adds_bos: bool = False,
    swallows_space: bool = False,
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, as GPT-2's; `swallows_space` as Phi-3's special tokens do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, rstrip=swallows_space, normalized=False) for token in tokens]
    )
    return _finish(tokenizer, bos, eos, template, adds_bos)


def build_sentencepiece(
    template: str | None = MISTRAL, *, adds_bos: bool = True, adds_eos: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer that writes a space before the first word, as Llama-2's and Mistral's do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    words = [word for line in CORPUS for word in line.split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    return _finish(tokenizer, "<s>", "</s>", template, adds_bos, adds_eos)


def _finish(
    tokenizer: Tokenizer,
    bos: str | None,
    eos: str | None,
    template: str | None,
    adds_bos: bool,
    adds_eos: bool = False,
) -> PreTrainedTokenizerBase:
    if adds_bos or adds_eos:
        single = " ".join([*[bos] * adds_bos, "$A", *[eos] * adds_eos])
        named = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=named
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


def _think_first(content: str) -> str:
    thought, closed, said = content.rpartition("</think>")
    if not closed:
        return "<think>\n\n</think>\n\n" + content.lstrip("\n")
    thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
    return f"<think>\n{thought}\n</think>\n\n" + said.lstrip("\n")


FORMATS = {
    "chatml": Format(CHATML, CHATML_TOKENS, None, "<|im_end|>", "<|im_end|>"),
    "smollm2": Format(SMOLLM2, CHATML_TOKENS, "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "llama3": Format(
        LLAMA3, LLAMA3_TOKENS, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", str.strip
    ),
    "gemma": Format(
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        str.strip,
        takes_system=False,
    ),
    "mistral": Format(
        MISTRAL,
        ("<unk>", "<s>", "</s>"),
        "<s>",
        "</s>",
        "</s>",
        lambda content: " " + content,
        takes_system=False,
    ),
    "qwen3": Format(QWEN3, CHATML_TOKENS, None, "<|im_end|>", "<|im_end|>", _think_first),
    "trailing space": Format(TRAILING_SPACE, CHATML_TOKENS, None, "<|im_end|>", "<|im_end|>"),
}


@lru_cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a format, the same object at every call."""
    form = FORMATS[name]
    return build(form.tokens, form.bos, form.eos, form.template, adds_bos=name == "llama3")
