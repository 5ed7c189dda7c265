"""YAML as people expect it: the core schema of YAML 1.2, no duplicate keys, no aliases, no tags.

PyYAML alone follows YAML 1.1, where `1e-3` is text, `no` is false, `1:30` is 90 and a key written twice
silently takes the last value.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from penjing.core.errors import Exit, Refused
from penjing.core.files import refusing

_LARGEST = 2**18
_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own way of declaring them

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not used here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            fault = None
            if not isinstance(key, yaml.ScalarNode):
                fault = "a key is a word or a number"
            elif key.value in seen:
                fault = f"the key {key.value!r} is written twice"
            if fault is not None:
                raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _RESOLVERS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def load_yaml(text: str, place: str) -> Any:
    """Read one YAML document; numbers like `1e-3` are numbers.

    Raises:
        Refused: no YAML, a key written twice, an alias, a tag, or more than 256 kB; with line and column.

    >>> load_yaml("ratio: 1e-3\\nname: no", "plan.yaml")
    {'ratio': 0.001, 'name': 'no'}
    """
    if len(text) > _LARGEST:
        raise Refused(
            "a YAML file must have at most 256 kB",
            value=len(text),
            place=place,
            code=Exit.USAGE,
            fix="write the data into a file of its own, and its path here",
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = place if mark is None else f"{place}:{mark.line + 1}:{mark.column + 1}"
        what = getattr(error, "problem", None) or error
        raise Refused(
            "the file must hold YAML", value=what, place=where, fix="correct that line", code=Exit.USAGE
        ) from error


def read_yaml(path: Path | str) -> Any:
    """Read a YAML file in UTF-8; raises as `load_yaml`."""
    with refusing(path, "read"), open(path, "rb") as file:
        data = file.read(4 * _LARGEST + 1)  # in UTF-8, a character has at most 4 bytes
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(
            "the file must be UTF-8 text",
            value=error.reason,
            place=str(path),
            code=Exit.USAGE,
            fix="save it as UTF-8",
        ) from error
    return load_yaml(text, str(path))


def dump_yaml(value: Any) -> str:
    """Write plain data as YAML that `load_yaml` reads back equal."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
