"""Does a folder come back in plain transformers as what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.export.trained import TrainedAdapter
from qlora_kit.model.quantized import never_repacked
from qlora_kit.model.without_bars import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_kit.environment import Hardware

# Where tokenizers differ when a part of them was lost: digits, white space, scripts, specials.
_PROBES = (
    "Hello, world!  It's 12:34 on 2024-05-06.",
    "\tdef f(x):\n    return x ** 2  # ok\n\n",
    "naïve café — “quotes” … 東京 Привет 🙂",
    " a  12\n    1 ",
)

# Beyond this share of the free memory a model is spread over devices and disk instead.
_MEMORY_SHARE = 0.8


def load_plain(
    folder: Path, dtype: torch.dtype, hardware: Hardware, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """The model as anybody would load it, and what was wrong with its weights, in words."""
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=_placement(num_bytes, hardware),
            offload_folder=folder.with_name(f"{folder.name}.offload"),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    model, info = loaded
    never_repacked(model)
    faults = [
        f"{len(found)} {kind.replace('_', ' ')}: {', '.join(sorted(map(str, found))[:3])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (found := info[kind])
    ]
    return model.eval(), faults


def _placement(num_bytes: int, hardware: Hardware) -> Any:
    """One device where it fits, else wherever there is room, disk included."""
    if hardware.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return {"": "cuda:0"} if num_bytes < free * _MEMORY_SHARE else "auto"
    free = psutil.virtual_memory().available
    return {"": hardware.device} if num_bytes < free * _MEMORY_SHARE else "auto"


def measuring_dtype(stored: torch.dtype, hardware: Hardware) -> torch.dtype:
    """What a merged model is measured in: as stored where that is native, else float32."""
    native = {torch.bfloat16: hardware.native_bf16, torch.float16: hardware.native_fp16}
    return stored if native.get(stored, False) else torch.float32


def reload_faults(
    model: PreTrainedModel, folder: Path, trained: TrainedAdapter, tied: bool
) -> list[str]:
    """What a user who loads `folder` would get otherwise than it was trained, in words."""
    found = []
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if (ends[1] is not None and ends[0].weight is ends[1].weight) != tied:
        found.append(f"embedding and head come back {'apart' if tied else 'tied'}")
    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trained.trust_remote_code, local_files_only=True
    )
    found += tokenizer_faults(tokenizer, trained.tokenizer)
    stops = model.generation_config.eos_token_id
    wanted = trained.tokenizer.eos_token_id
    if wanted is not None and wanted not in (stops if isinstance(stops, list) else [stops]):
        found.append(f"generation does not stop at {trained.tokenizer.eos_token}")
    return found


def tokenizer_faults(
    reloaded: PreTrainedTokenizerBase, wanted: PreTrainedTokenizerBase
) -> list[str]:
    """How one tokenizer differs from another, in words."""
    found = []
    added = [str(token) for token in wanted.added_tokens_decoder.values()]
    for text in (*_PROBES, " ".join(added)):
        if reloaded(text)["input_ids"] != wanted(text)["input_ids"]:
            found.append(f"the tokenizer reads {text[:40]!r} otherwise")
    if len(reloaded) != len(wanted):
        found.append(f"the tokenizer knows {len(reloaded)} tokens instead of {len(wanted)}")
    if reloaded.chat_template != wanted.chat_template:
        found.append("the chat template is another one")
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if getattr(reloaded, name) != getattr(wanted, name):
            found.append(f"{name} is {getattr(reloaded, name)} instead of {getattr(wanted, name)}")
    return found
