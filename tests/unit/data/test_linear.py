"""Which templates are proved to do nothing with contents but write them."""

from __future__ import annotations

import pytest

from qlora_kit.data.linear import is_linear
from qlora_kit.templates import library

from .formats import FORMATS, tokenizer_of

LOOP = "{% for m in messages %}BODY{% endfor %}"


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "qwen3"])
def test_formats_that_copy(name: str) -> None:
    assert is_linear(str(tokenizer_of(name).chat_template))


def test_a_format_that_looks_for_reasoning() -> None:
    assert not is_linear(str(tokenizer_of("qwen3").chat_template))


@pytest.mark.parametrize("name", library())
def test_the_library(name: str) -> None:
    assert is_linear(library()[name].read_text())


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content }}",
        "{{ m['content'] | trim }}",
        "{{ m.content.strip() }}",
        "{{ m.get('content') }}",
        "{{ '<' + m.role + '>' ~ m.content }}",
        "{% if m.content %}{{ m.content }}{% endif %}",
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
        "{% if m.content is not string %}{{ m | tojson }}{% else %}{{ m.content }}{% endif %}",
        "{% set said = m.content %}{{ said }}",
        "{% if m.role == 'user' and not loop.last %}{{ m.content }}{% endif %}",
        "{{ m.content if m.role == 'user' else '' }}",
        "{% generation %}{{ m.content }}{% endgeneration %}",
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ m.content }}",
        "{{ messages[0].content }}{{ loop.index0 }}",
        "{% if loop.previtem and loop.previtem.role == 'user' %}x{% endif %}{{ m.content }}",
    ],
)
def test_uses_that_copy(body: str) -> None:
    assert is_linear(LOOP.replace("BODY", body))


@pytest.mark.parametrize(
    "body",
    [
        "{% if 'think' in m.content %}x{% endif %}",
        "{% if m.content == 'x' %}x{% endif %}",
        "{% if m.content.startswith('x') %}x{% endif %}",
        "{{ m.content | length }}",
        "{{ m.content | upper }}",
        "{{ m.content.split('</think>')[-1] }}",
        "{{ m.content[:10] }}",
        "{{ m | tojson }}",
        "{{ messages | tojson }}",
        "{{ m.values() | list }}",
        "{% for part in m.content %}{{ part }}{% endfor %}",
        "{% set said = m.content %}{% if said[0] == 'x' %}y{% endif %}",
        "{% set said = [m.content] %}{{ said }}",
        "{{ '%s' | format(m.content) }}",
        "{{ m.content * 2 }}",
        "{{ m[key] }}",
        "{{ raise_exception(m.content) }}",
        "{% macro f(x) %}{{ x | upper }}{% endmacro %}{{ f(m.content) }}",
        "{% if m.content is string and '/no_think' in m.content %}x{% endif %}",
        "{% set ns = namespace(t='') %}{% set ns.t = m.content %}{% if 'x' in ns.t %}y{% endif %}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{% set said %}{{ m.content }}{% endset %}{{ said | upper }}",
    ],
)
def test_uses_that_look_into_it(body: str) -> None:
    assert not is_linear(LOOP.replace("BODY", body))


def test_what_a_loop_finds_out_late() -> None:
    """A variable that is read above the line that puts a content into it."""
    template = LOOP.replace("BODY", "{% if 'x' in said %}y{% endif %}{% set said = m.content %}")
    assert not is_linear(template)
