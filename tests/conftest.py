"""Small models and tokenizers that tests share. Nothing here needs a network or a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_kit.model.base import Base
    from qlora_kit.quantize.gguf.scripts import LlamaCpp
    from qlora_kit.quantize.method import Made
    from qlora_kit.recipe import QuantizationSpec

    GgufFiles = dict[str, tuple[Path, Made]]

# Before torch is imported: two cores, and other processes on them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is compared closely is in float32 on any machine; tests/integration/test_bfloat16.py is not.
os.environ.setdefault("QLORA_KIT_CPU_BFLOAT16", "off")

import pytest

DATA = Path(__file__).parents[2] / "shared" / "data"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = [
    "turn the kitchen lamp to 30 percent, please",
    'the quick brown fox jumps over the lazy dog {"action":"set","value":12}',
    "user system assistant hello how are you fine thanks goodbye",
]


def build_tokenizer(folder: Path, chat_template: str | None = CHATML) -> None:
    """A byte-level BPE tokenizer with ChatML's special tokens, saved to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def build_llama(folder: Path, *, tied: bool = True, seed: int = 0, **config: object) -> Path:
    """A random two-layer Llama with the tokenizer above, saved to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    build_tokenizer(folder)
    torch.manual_seed(seed)
    values: dict[str, object] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**{**values, **config})).save_pretrained(folder)
    return folder


def load_tiny(folder: Path, quantization: QuantizationSpec | None = None, **options: Any) -> Base:
    """A base in float32, 4 bits unless told otherwise; options of `load_base`."""
    import torch

    from qlora_kit.environment import probe_hardware
    from qlora_kit.model.base import load_base
    from qlora_kit.recipe import ModelSpec, QuantizationSpec

    return load_base(
        ModelSpec(name_or_path=str(folder)),
        quantization or QuantizationSpec(),
        torch.float32,
        "a test",
        probe_hardware(),
        **options,
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One compute thread: the suite measures nothing, and two oversubscribe a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written to the user's cache, but for what is fetched once: the demo model and
    llama.cpp's scripts."""
    from qlora_kit.environment import cache_dir

    folder = tmp_path_factory.mktemp("cache")
    for name in ("demo", "llama.cpp"):
        kept = cache_dir() / name
        kept.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(kept, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_KIT_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def adapted_llama(tiny_llama: Path) -> Any:
    """In float32, with a fresh adapter on all linear layers, ready to train."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base.requires_grad_(False)
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).train()


@pytest.fixture
def stirred_llama(adapted_llama: Any) -> Any:
    """The same, with an adapter that does something."""
    import torch

    with torch.no_grad():
        for name, one in adapted_llama.named_parameters():
            if "lora_B" in name:
                one.normal_(std=0.05)
    return adapted_llama


@pytest.fixture(scope="session")
def tiny_llama_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("tiny-llama-untied"), tied=False)


@pytest.fixture(scope="session")
def llama_scripts() -> LlamaCpp:
    """llama.cpp's scripts; tests that need them skip visibly where they cannot be had."""
    from qlora_kit.errors import QloraKitError
    from qlora_kit.quantize.gguf.scripts import find_llama_cpp

    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    try:
        return find_llama_cpp()
    except QloraKitError as error:
        pytest.skip(f"llama.cpp's scripts are not to be had: {error}")


@pytest.fixture(scope="session")
def loud_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose weights are large, so that rounding them shows in its logits."""
    return build_llama(
        tmp_path_factory.mktemp("loud-llama"), initializer_range=0.25, intermediate_size=256
    )


@pytest.fixture(scope="session")
def made_gguf(
    loud_llama: Path, llama_scripts: LlamaCpp, tmp_path_factory: pytest.TempPathFactory
) -> GgufFiles:
    """`loud_llama` through the methods `gguf:F16` and `gguf:Q8_0`, as `quantize` calls them."""
    from qlora_kit.environment import probe_hardware
    from qlora_kit.quantize.methods import resolve_method
    from qlora_kit.quantize.options import parse_options
    from qlora_kit.quantize.source import open_source
    from qlora_kit.recipe import ModelSpec
    from qlora_kit.report.reporter import SILENT

    source = open_source(ModelSpec(name_or_path=str(loud_llama)), probe_hardware())
    made: dict[str, tuple[Path, Made]] = {}
    for kind in ("F16", "Q8_0"):
        method = resolve_method(f"gguf:{kind}")
        options = parse_options(method, ())
        if not made:
            method.check(source, options)
        draft = tmp_path_factory.mktemp(kind)
        made[kind] = draft, method.make(source, options, None, draft, SILENT)
    return made


@pytest.fixture
def shared_data() -> Path:
    """Real data sets; tests that need them skip visibly where they are absent."""
    if not DATA.is_dir():
        pytest.skip(f"the shared data sets are not at {DATA}")
    return DATA
