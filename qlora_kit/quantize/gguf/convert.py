"""A folder of safetensors as a GGUF file, by llama.cpp's own converter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError
from qlora_kit.quantize.gguf.scripts import CONVERT, LlamaCpp, ScriptFailed, last_line, run_script

# Converts with the splitting rule that it is given, where llama.cpp does not know the tokenizer.
_WITH_RULE = Path(__file__).with_name("convert_with_rule.py")
_UNKNOWN_TOKENIZER = "BPE pre-tokenizer was not recognized"


@dataclass(frozen=True)
class Converter:
    """How one model folder is converted; `rule` where its tokenizer has to be told apart."""

    llama: LlamaCpp
    folder: Path
    rule: str | None = None

    def convert(self, outfile: Path, outtype: str, vocab_only: bool = False) -> str:
        """Write the file; `outtype` is f32, f16, bf16 or q8_0.

        Returns:
            The converter's log.

        Raises:
            ModelError: llama.cpp cannot take the model; says why.
        """
        options = ["--outfile", str(outfile.resolve()), "--outtype", outtype]
        options += ["--vocab-only"] if vocab_only else []
        script = self.llama.folder / CONVERT
        if self.rule is not None:
            script, options = _WITH_RULE, [*options, "--rule", self.rule]
        with _as_the_converter_reads(self.folder.resolve()) as folder:
            try:
                return run_script(self.llama, script, [*options, str(folder)])
            except ScriptFailed as failed:
                raise _fault(self.folder, failed) from failed


@contextmanager
def _as_the_converter_reads(folder: Path) -> Iterator[Path]:
    """The folder, or one of links with another config.json where the converter stumbles over it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not _amend(config, folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        beside = Path(scratch) / folder.name  # the file is named after it
        beside.mkdir()
        for path in folder.iterdir():
            if path.name != "config.json":
                (beside / path.name).symlink_to(path)
        (beside / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield beside


def _amend(config: dict[str, Any], folder: Path) -> bool:
    """Whether something had to be changed: GPT-2's context under its old name, which transformers
    no longer writes; and Gemma 3's vocabulary, where it is padded beyond the tokens: the converter
    leaves such rows out of the embedding, but not out of the vocabulary.
    """
    text = config.get("text_config", config)
    kind = text.get("model_type")
    if kind == "gpt2" and "n_ctx" not in text and "n_positions" in text:
        text["n_ctx"] = text["n_positions"]
        return True
    path = folder / "tokenizer.json"
    is_cut = not (folder / "tokenizer.model").is_file() and path.is_file()
    if kind not in ("gemma3", "gemma3_text") or not is_cut:
        return False
    described = json.loads(path.read_text(encoding="utf-8"))
    rows = len(described["model"]["vocab"]) + len(described["added_tokens"])
    if rows >= text.get("vocab_size", rows):
        return False
    text["vocab_size"] = rows
    return True


def open_converter(llama: LlamaCpp, folder: Path, tokenizer: Any, vocabulary: Path) -> Converter:
    """Find out whether llama.cpp knows the architecture and the tokenizer, in seconds.

    Args:
        tokenizer: the folder's, as it is loaded.
        vocabulary: a GGUF file with the tokenizer and no weights that is written for that.

    Raises:
        ModelError: llama.cpp cannot take the model; says why.
    """
    converter = Converter(llama, folder)
    try:
        converter.convert(vocabulary, "f16", vocab_only=True)
        return converter
    except ModelError as fault:
        failed = fault.__cause__
        unknown = isinstance(failed, ScriptFailed) and _UNKNOWN_TOKENIZER in failed.log
        rule = splitting_rule(tokenizer) if unknown else None
        if rule is None:
            raise
    converter = Converter(llama, folder, rule)
    converter.convert(vocabulary, "f16", vocab_only=True)
    return converter


def splitting_rule(tokenizer: Any) -> str | None:
    """llama.cpp's name for how this tokenizer splits text before it merges, None if unknown.

    llama.cpp recognizes the tokenizers of known models by a hash of their ids, so one with a
    vocabulary of its own is unknown to it even where it splits as GPT-2's does. Asked is the
    tokenizer as it is loaded: of some architectures (Qwen2) transformers takes the vocabulary
    from tokenizer.json, and puts the family's own splitting in place of what the file says.
    """
    from qlora_kit.model.gguf_tokenizer import PRE_TOKENIZERS, splitting_of

    if not tokenizer.is_fast:
        return None
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described.get("model", {}).get("type") != "BPE":
        return None
    ignores_merges = bool(described["model"].get("ignore_merges", False))
    mine = (described.get("normalizer"), described.get("pre_tokenizer"), ignores_merges)
    return next((name for name, rule in PRE_TOKENIZERS.items() if splitting_of(rule) == mine), None)


def _fault(folder: Path, failed: ScriptFailed) -> ModelError:
    """Why the converter failed, in our words where the reason is known."""
    log = failed.log
    said = last_line(log)
    if "is not supported" in said:
        known = said.partition("Model ")[2].partition(" is not")[0]
        return ModelError(
            f"llama.cpp does not know the architecture {known} of {folder}, so no GGUF file can "
            "be made of it. Take another method, or a newer llama.cpp (llama_cpp=PATH)."
        )
    if _UNKNOWN_TOKENIZER in log:
        return ModelError(
            f"llama.cpp does not know the tokenizer of {folder}: by which rule it splits text "
            "before merging is not written in it. Name a newer llama.cpp (llama_cpp=PATH), or use "
            "another method."
        )
    if "No module named" in said:
        missing = said.rpartition(" ")[2].strip("'\"")
        return ModelError(
            f"llama.cpp's converter needs {missing}, which is not installed: "
            "pip install 'qlora-kit[gguf]'."
        )
    if "Can not map tensor" in said:
        return ModelError(
            f"llama.cpp has no place for a tensor of {folder} ({said.partition(': ')[2]}), so no "
            "GGUF file can be made of it. Take another method."
        )
    return ModelError(f"llama.cpp's converter cannot take {folder}: {said}.")
