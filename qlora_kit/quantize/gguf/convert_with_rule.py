"""A script: llama.cpp's converter for a tokenizer that it does not recognize.

It runs by itself beside llama.cpp's scripts, whose modules it imports, and does what
`convert_hf_to_gguf.py` does, but that the name of the rule by which the tokenizer splits text is
given. Whether the name is right is checked afterwards, by comparing token ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # type: ignore
from convert_hf_to_gguf import gguf  # type: ignore

_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--outfile", type=Path, required=True)
    parser.add_argument("--outtype", choices=list(_TYPES), required=True)
    parser.add_argument("--rule", required=True)
    parser.add_argument("--vocab-only", action="store_true")
    parser.add_argument("folder", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    settings = ModelBase.load_hparams(arguments.folder, False)
    known = get_model_class(get_model_architecture(settings, ModelType.TEXT))

    class WithRule(known):  # type: ignore
        model_arch = known.model_arch

        def get_vocab_base_pre(self, tokenizer: object) -> str:
            return str(arguments.rule)

    with torch.inference_mode():
        model = WithRule(arguments.folder, _TYPES[arguments.outtype], arguments.outfile)
        if arguments.vocab_only:
            model.write_vocab()
        else:
            model.write()


if __name__ == "__main__":
    main()
