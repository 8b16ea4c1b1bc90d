"""`model:` which base model, and how it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec

Name = Annotated[str, Field(min_length=1)]


class ModelSpec(Spec):
    """The base model and its tokenizer."""

    name_or_path: str = Field(min_length=1)
    """A hub id (`Qwen/Qwen3-8B`), a local folder, a `.gguf` file, or the built-in
    `demo/smollm2-135m-instruct`."""

    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a hub id. The commit it resolves to is recorded with the run."""

    gguf_file: str | None = Field(default=None, min_length=1)
    """Name of the GGUF file to take when a hub id or folder holds several."""

    tokenizer_name_or_path: str | None = Field(default=None, min_length=1)
    """Take the tokenizer from here instead of from the model."""

    chat_template: str | None = Field(default=None, min_length=1)
    """A Jinja file whose chat template replaces the tokenizer's own, or one that comes with the
    kit: alpaca, chatml, chatml-tools, gemma, llama3, mistral or vicuna."""

    chat_template_kwargs: dict[Name, str | bool | int] = Field(default_factory=dict)
    """Values that the chat template asks for, such as `{enable_thinking: false}` for Qwen3 or
    `{date_string: 26 Jul 2024}` for Llama 3, whose template otherwise writes today's date. They
    become part of the template, and so of the adapter and of every export."""

    attn_implementation: Literal[
        "auto",
        "sdpa",
        "eager",
        "flash_attention_2",
        "flash_attention_3",
        "flex_attention",
    ] = "auto"
    """Attention kernel; `auto` leaves the choice to transformers (SDPA where the model has it)."""

    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off: such a model is refused."""

    allow_pickle: bool = False
    """Read `.bin`/`.pt` weights, which can run code when loaded. Off: safetensors only."""

    def contradictions(self) -> Iterator[Fault]:
        is_gguf = self.name_or_path.endswith(".gguf")
        is_demo = self.name_or_path.startswith("demo/")
        if is_demo and self.gguf_file is not None:
            yield Fault("gguf_file", "the demo model is one file", "remove it")
        is_file = self.name_or_path.startswith((".", "/", "~")) or is_gguf
        if self.revision is not None and (is_demo or is_file):
            yield Fault("revision", "only a hub id has revisions", "remove it")
        if is_gguf and self.gguf_file is not None:
            message = "name_or_path already names a GGUF file"
            yield Fault("gguf_file", message, "remove gguf_file")
