"""Jinja chat templates, rendered as transformers does, so that only the template's own text can become control ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from mixtral_jax.errors import InputError
from mixtral_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

PRIVATE_USE = range(0x100000, 0x10FFFE)
"""Code points without a meaning, of which each rendering takes some for marks that stand nowhere in its input."""

Marks = tuple[tuple[str, str], ...]
"""Names of controls and the character that stands for each."""


def render(template: str, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """What a template writes for messages that the assistant is to answer, its controls as their names.

    Raises:
      InputError: the template refuses the messages, or is none.
    """
    return _render(template, (), _plain(messages, "messages"), (), tokenizer, add_generation_prompt=True)


def encode_with_template(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], complete: bool
) -> list[int]:
    """The ids that transformers gives for the tokenizer's chat template, but that no text given becomes a control id.

    Before the template is run, each control's name in the template's own literals becomes a private character, which
    no text given has; after it, these characters alone become control ids.

    Raises:
      UnicodeEncodeError: half of a surrogate pair is in a text.
      InputError: the tokenizer has no template; the template refuses the messages; or it composes a control's name of
        several pieces, where what is the template's can't be told from what was given.
    """
    template = tokenizer.chat_template
    if template is None:
        raise InputError("format", "template", "the tokenizer has no chat template; one of v1, v2, v3 is wanted")
    plain, plain_tools = _plain(messages, "messages"), _plain(tools, "tools")
    given = json.dumps([plain, plain_tools], ensure_ascii=False)
    *free, stop = _free_characters(given + template, len(tokenizer.controls) + 1)
    marks = tuple(zip(tokenizer.controls, free, strict=True))
    continues = bool(plain and plain[-1].pop("prefix", False))
    if continues:
        plain[-1]["content"] = f"{plain[-1].get('content') or ''}{stop} "
    is_open = not complete and not continues
    text = _render(template, marks, plain, plain_tools, tokenizer, add_generation_prompt=is_open)
    if continues:
        text = _cut(text, stop)
    text.encode()  # half a character is refused here; the tokenizers' own errors do not say what is wrong
    return tokenizer.encode_parts(_parts(text, marks, tokenizer, given))


def _plain(value: Any, key: str) -> Any:
    """A copy of nothing but JSON's types, which is all that a template may see."""
    try:
        copy = json.loads(json.dumps(list(value)))
    except (TypeError, ValueError) as error:
        raise InputError(key, None, f"{error}; only what JSON can hold is possible") from None
    for place, each in enumerate(copy):
        if not isinstance(each, dict):
            raise InputError(f"{key}[{place}]", each, "a dict is wanted")
    return copy


def _free_characters(text: str, count: int) -> list[str]:
    """So many private characters that the text does not have."""
    used = {ord(character) for character in text if ord(character) in PRIVATE_USE}
    free = (chr(code) for code in PRIVATE_USE if code not in used)
    return [next(free) for _ in range(count)]


def _cut(text: str, stop: str) -> str:
    """The text up to the end of the message that is to be continued; without the blanks that the template strips."""
    before, found, after = text.rpartition(stop)
    if not found:
        raise InputError("messages[-1].prefix", True, "the chat template does not write the message as it is")
    return before if after.startswith(" ") else before.rstrip()


def _parts(text: str, marks: Marks, tokenizer: Tokenizer, given: str) -> Iterator[str | int]:
    names = {mark: name for name, mark in marks}
    for part in re.split(f"([{re.escape(''.join(names))}])" if names else "(?!)", text):
        if part in names:
            yield tokenizer.controls[names[part]]
        elif part:
            _refuse_composed(part, names.values(), given)
            yield part


def _refuse_composed(text: str, names: Any, given: str) -> None:
    for name in names:
        if name in text and name not in given:
            raise InputError("chat_template", None, f"writes {name} in pieces; only whole literals are supported")


def _render(
    template: str,
    marks: Marks,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
) -> str:
    import jinja2

    marked = dict(marks)
    tokens = {part: tokenizer.control_names.get(getattr(tokenizer, f"{part}_id")) for part in ("bos", "eos", "pad")}
    variables = {f"{part}_token": marked.get(name, name) for part, name in tokens.items() if name is not None}
    try:
        return _compile(template, marks).render(
            messages=messages,
            tools=tools or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError("chat_template", None, f"line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError("messages", None, f"the chat template refuses them: {error}") from None


@lru_cache(maxsize=8)
def _compile(template: str, marks: Marks) -> jinja2.Template:
    """The template in a sandbox, with the controls' names in its literals replaced."""
    from jinja2 import nodes

    environment = _environment()
    tree = environment.parse(template)
    marked = dict(marks)
    if marked:
        pattern = re.compile("|".join(map(re.escape, sorted(marked, key=len, reverse=True))))
        for data in tree.find_all(nodes.TemplateData):
            data.data = pattern.sub(lambda found: marked[found[0]], data.data)
        for constant in tree.find_all(nodes.Const):
            if isinstance(constant.value, str):
                constant.value = pattern.sub(lambda found: marked[found[0]], constant.value)
    return environment.from_string(tree)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """What transformers offers to templates: loop controls, `generation` blocks, and four functions."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what the assistant wrote, for masks; here its body alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
