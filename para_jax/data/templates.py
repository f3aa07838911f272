"""Prompt templates, which convert rows with any columns into prompts, responses and choices.

A template is a JSON file with jinja2 texts over the columns of a row. The templates that ship are in assets/templates,
named like the data sets of TensorFlow Datasets.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from para_jax.errors import ParaJaxError, check_known, unknown

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

FOLDER = Path(__file__).parents[1] / "assets" / "templates"
NEEDED = ("prompt", "response")
TEXTS = (*NEEDED, "system", "tenant")
LISTS = ("choices", "references")
FIELDS = (*TEXTS, *LISTS)
EXAMPLE = '{"prompt": "Question: {{question}}\\nAnswer:", "response": "{{answer}}"}'


class Template:
    r"""A prompt and a response as jinja2 texts over the columns of a row, and optional fields.

    `system` (a system message) and `tenant` (the tenant of the row) are texts too.

    `choices` and `references` are each a list of texts, or a jinja2 expression whose value is a list. The other texts
    can use the choices of their row as `choices`, for instance indexed by a label. `row` is the row as a dict, for
    column names that are not identifiers: row["label-coarse"].

    >>> template = Template({"prompt": "{{text}}\nMood:", "response": "{{choices[label]}}", "choices": ["bad", "good"]})
    >>> template.row({"text": "What a film!", "label": 1})
    {'prompt': 'What a film!\nMood:', 'response': 'good', 'choices': ['bad', 'good']}
    >>> template.check(["txt", "label"])
    Traceback (most recent call last):
    ...
    para_jax.errors.ParaJaxError: unknown column in template 'text'; did you mean 'txt'? Known: label, txt
    """

    def __init__(self, fields: Mapping[str, Any], name: str = "template") -> None:
        """Raises ParaJaxError for an unknown or missing field, or one that is not valid jinja2."""
        self.name, self.fields = name, dict(fields)
        for key, value in fields.items():
            check_known(f"field of {name}", [key], FIELDS)
            texts = value if isinstance(value, list) and key in LISTS else [value]
            if not all(isinstance(text, str) for text in texts):
                raise ParaJaxError(f"{name}: {key} must be a text" + (" or a list of them" if texts is value else ""))
        if missing := [key for key in NEEDED if key not in fields]:
            raise ParaJaxError(f"{name} has no {' and no '.join(missing)}; write a template such as {EXAMPLE}")
        import jinja2

        environment = _environment()
        try:
            self._texts = {key: environment.from_string(fields[key]) for key in TEXTS if key in fields}
            self._lists = {
                key: [environment.from_string(text) for text in fields[key]]
                if isinstance(fields[key], list)
                else environment.compile_expression(fields[key], undefined_to_none=False)
                for key in LISTS
                if key in fields
            }
        except jinja2.TemplateSyntaxError as error:
            raise ParaJaxError(f"{name} is not jinja2: {error.message}") from None

    @classmethod
    def load(cls, name: str) -> Template:
        """Loads a JSON file, or a template that ships, by its name such as squad or glue/sst2.

        Raises ParaJaxError if it does not exist or is not a template.
        """
        path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
        if not path.is_file():
            if name.endswith(".json"):
                raise ParaJaxError(f"{path} is not a file; write a template to it, such as {EXAMPLE}")
            raise unknown("template (a name without .json)", name, shipped())
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ParaJaxError(f"{path} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ParaJaxError(f"{path} is not a template, such as {EXAMPLE}")
        return cls(fields, name)

    def check(self, columns: Collection[str]) -> None:
        from jinja2 import meta

        environment = _environment()
        for key, value in self.fields.items():
            texts = value if isinstance(value, list) else [value]
            if key in LISTS and not isinstance(value, list):
                texts = ["{{" + value + "}}"]
            special = {"row", "choices"} if key in TEXTS and "choices" in self.fields else {"row"}
            for text in texts:
                used = meta.find_undeclared_variables(environment.parse(text)) - special - environment.globals.keys()
                check_known(f"column in {self.name}", sorted(used), columns)

    def row(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of one row. Raises ParaJaxError if the template fails."""
        scope = {"row": columns, **columns}
        lists: dict[str, Any] = {}
        try:
            for key, value in self._lists.items():
                lists[key] = (
                    [t.render(scope) for t in value] if isinstance(value, list) else _as_list(key, value(scope))
                )
            if "choices" in lists:
                scope["choices"] = lists["choices"]
            fields = {key: text.render(scope) for key, text in self._texts.items()}
        except Exception as error:  # a template is the user's program, and may raise anything
            raise ParaJaxError(f"{self.name}: {error} (columns: {', '.join(columns)})") from error
        return fields | {key: value for key, value in lists.items() if value}


def shipped() -> dict[str, Path]:
    """The templates that ship, by name.

    >>> shipped()["super_glue/copa"].name
    'copa.json'
    """
    return {p.relative_to(FOLDER).with_suffix("").as_posix(): p for p in sorted(FOLDER.rglob("*.json"))}


def _as_list(key: str, values: Any) -> list[str]:
    """The texts in the value of an expression. Raises ParaJaxError unless it is a list; a string is not split."""
    if not isinstance(values, list | tuple):
        raise ParaJaxError(f"{key} is a {type(values).__name__} in this row, not a list of texts")
    return [str(_finalize(value)) for value in values]


def _finalize(value: Any) -> Any:
    """Checks a value that a template writes. Raises ParaJaxError instead of writing it as a Python literal."""
    if value is None or isinstance(value, list | tuple | dict | bytes):
        what = "null" if value is None else f"a {type(value).__name__}"
        raise ParaJaxError(f"a value is {what} in this row, not a text; change the template so that it writes a text")
    return value


def _environment() -> SandboxedEnvironment:
    """A strict, sandboxed environment: templates may come from others, and unknown names are mistakes."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_finalize)
