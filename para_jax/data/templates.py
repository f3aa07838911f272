"""Prompt templates: how a row of any columns becomes a prompt, its response, and the choices there are.

A template is a JSON file of jinja2 texts over the columns of a row; those that ship are in assets/templates, by the
names of TensorFlow Datasets.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from para_jax.errors import ParaJaxError, unknown

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

FOLDER = Path(__file__).parents[1] / "assets" / "templates"
NEEDED = ("prompt", "response")
TEXTS = (*NEEDED, "system", "tenant")
LISTS = ("choices", "references")
FIELDS = (*TEXTS, *LISTS)
EXAMPLE = '{"prompt": "Question: {{question}}\\nAnswer:", "response": "{{answer}}"}'


class Template:
    r"""A prompt and a response as jinja2 texts over the columns of a row, and perhaps more.

    `system` and `tenant` are texts as well: a system message, and whose row it is.

    Choices and references are each a list of texts, or a jinja2 expression whose value is a list. Prompt and response
    see the choices of their row as `choices`, so that a label can be a place among them. `row` is the whole row, for
    columns whose names are no names in jinja2: row["label-coarse"].

    >>> template = Template({"prompt": "{{text}}\nMood:", "response": "{{choices[label]}}", "choices": ["bad", "good"]})
    >>> template.row({"text": "What a film!", "label": 1})
    {'prompt': 'What a film!\nMood:', 'response': 'good', 'choices': ['bad', 'good']}
    >>> template.check(["txt", "label"])
    Traceback (most recent call last):
    ...
    para_jax.errors.ParaJaxError: unknown column in template 'text'; did you mean 'txt'? Known: label, txt
    """

    def __init__(self, fields: Mapping[str, Any], name: str = "template") -> None:
        """Raises ParaJaxError for a field that there is not, one that is missing, or one that is not jinja2."""
        self.name, self.fields = name, dict(fields)
        for key, value in fields.items():
            if key not in FIELDS:
                raise unknown(f"field of {name}", key, FIELDS)
            texts = value if isinstance(value, list) and key in LISTS else [value]
            if not all(isinstance(text, str) for text in texts):
                raise ParaJaxError(f"{name}: {key} has to be a text" + (" or a list of them" if texts is value else ""))
        if missing := [key for key in NEEDED if key not in fields]:
            raise ParaJaxError(f"{name} has no {' and no '.join(missing)}; a template is such as {EXAMPLE}")
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
        """The template of a JSON file, or the one that ships under this name, such as squad or glue/sst2.

        Raises ParaJaxError if there is neither, or if it is no template.
        """
        path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
        if not path.is_file():
            if name.endswith(".json"):
                raise ParaJaxError(f"{path} is no file; write a template to it, such as {EXAMPLE}")
            raise unknown("template (a name without .json)", name, shipped())
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ParaJaxError(f"{path} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ParaJaxError(f"{path} holds no template, such as {EXAMPLE}")
        return cls(fields, name)

    def check(self, columns: Collection[str]) -> None:
        """Raises ParaJaxError for a column that is used and is not there."""
        from jinja2 import meta

        environment = _environment()
        for key, value in self.fields.items():
            texts = value if isinstance(value, list) else [value]
            if key in LISTS and not isinstance(value, list):
                texts = ["{{" + value + "}}"]
            own = {"row", "choices"} if key in TEXTS and "choices" in self.fields else {"row"}
            for text in texts:
                for used in sorted(meta.find_undeclared_variables(environment.parse(text))):
                    if used not in columns and used not in own and used not in environment.globals:
                        raise unknown(f"column in {self.name}", used, columns)

    def row(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The prompt, the response, and what else the template has, of one row. Raises ParaJaxError if it fails."""
        seen = {"row": columns, **columns}
        made: dict[str, Any] = {}
        try:
            for key, value in self._lists.items():
                made[key] = [t.render(seen) for t in value] if isinstance(value, list) else _listed(key, value(seen))
            if "choices" in made:
                seen["choices"] = made["choices"]
            texts = {key: text.render(seen) for key, text in self._texts.items()}
        except Exception as error:  # a template is a program of the user's, and may fail in any way
            raise ParaJaxError(f"{self.name}: {error} (columns: {', '.join(columns)})") from error
        return texts | {key: value for key, value in made.items() if value}


def shipped() -> dict[str, Path]:
    """The templates that ship, by name.

    >>> shipped()["super_glue/copa"].name
    'copa.json'
    """
    return {p.relative_to(FOLDER).with_suffix("").as_posix(): p for p in sorted(FOLDER.rglob("*.json"))}


def _listed(key: str, values: Any) -> list[str]:
    """The texts of an expression's value. Raises ParaJaxError for what is no list, such as one text: no letters."""
    if not isinstance(values, list | tuple):
        raise ParaJaxError(f"{key} is a {type(values).__name__} in this row, not a list of texts")
    return [str(_written(value)) for value in values]


def _written(value: Any) -> Any:
    """What a template writes. Raises ParaJaxError for a value that would become Python's spelling of it."""
    if value is None or isinstance(value, list | tuple | dict | bytes):
        what = "null" if value is None else f"a {type(value).__name__}"
        raise ParaJaxError(f"a value is {what} in this row, not a text; choose what the template writes of it")
    return value


def _environment() -> SandboxedEnvironment:
    """As strict as can be: a template may come from someone else, and an unknown name in it is a mistake."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_written)
