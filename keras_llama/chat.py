"""Chat templates: messages -> text, as Transformers renders them.

A template is a Jinja program that comes with a checkpoint; it runs in Jinja's sandbox and touches nothing.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from keras_llama.config import invalid


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja, as `chat_template` of a checkpoint.
        messages: dicts with `role` and `content`.
        add_generation_prompt: whether the text ends where the assistant's answer begins.
        **variables: what else the template asks for, such as `bos_token` or `tools`.

    Raises:
        ValueError: for what is no list of messages, or if the template is broken or refuses them.

    >>> render("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}", [{"role": "user", "content": "Hi"}])
    '[user] Hi'
    """
    messages = _checked(messages)
    variables = {"tools": None, "documents": None, **variables}
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
    except Exception as error:  # a template is a program: any of Python's errors may end it
        raise invalid(
            "The checkpoint's chat template must take these messages.", f"It says: {error}", messages=messages
        ) from error


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages, without the keys that hold `None`: templates ask whether a key is there."""
    form = 'Each is a dict: {"role": "user", "content": "..."}.'
    if not isinstance(messages, (list, tuple)) or not messages:
        raise invalid("`messages` must be a list of messages that is not empty.", form, messages=messages)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise invalid(f"`messages[{i}]` must have a role.", form, message=message)
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}` marks the assistant's words for others; here it is its inside."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)  # what is set inside ends there

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message):
    import jinja2

    raise jinja2.TemplateError(message)
