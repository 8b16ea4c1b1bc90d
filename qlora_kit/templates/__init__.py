"""Chat templates for models that come without one: their formats are the field's, the Jinja ours.

A template named in `model.chat_template` goes with the tokenizer into the adapter and every
export. One whose turns end with a token that the tokenizer lacks needs it in `lora.new_tokens`.
"""

from __future__ import annotations

from pathlib import Path


def library() -> dict[str, Path]:
    """Templates that come with the kit: name → Jinja file."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.jinja"))}
