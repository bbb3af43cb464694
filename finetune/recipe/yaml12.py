"""YAML as recipes use it: the core schema of YAML 1.2, with the line of every key.

Why not `yaml.safe_load`: it reads YAML 1.1, where `save_strategy: no` is false, `2e-4` is a string and `010` is 8;
it keeps the last of two equal keys silently; and it forgets lines. Editors (yaml-language-server) read 1.2, so
what the editor accepts is what a run sees. PyYAML's scanner and parser do the work; the resolver is ours.

Left out on purpose: anchors and aliases (a recipe says everything where it stands, and nothing can expand without
bound), tags, and several documents in a file. Each is refused with its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from yaml.composer import Composer
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from finetune.errors import FinetuneError
from finetune.values import KeyPath, dotted, shown

_DEEPEST = 32  # a recipe is four levels deep; the bound keeps a hostile file from exhausting the stack
_TAG = "tag:yaml.org,2002:"
_INT, _FLOAT = r"[-+]?[0-9]+", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_HEX_OR_OCTAL = r"0x[0-9a-fA-F]+|0o[0-7]+"
_SPECIAL = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
NUMBER = re.compile(_FLOAT)

# Tag, plain scalars it covers, the characters they can start with; the first that matches wins.
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", rf"{_INT}|{_HEX_OR_OCTAL}", tuple("-+0123456789")),
    ("float", rf"{_FLOAT}|{_SPECIAL}", tuple("-+.0123456789")),
)


class _Resolver(BaseResolver):
    """Plain scalars to types by the core schema of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Writes YAML that reads the same under 1.1 and 1.2: quotes what either would take for another type."""


for _tag, _pattern, _first in _CORE_SCHEMA:
    _Resolver.add_implicit_resolver(_TAG + _tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
    _Dumper.add_implicit_resolver(_TAG + _tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    # PyYAML takes these for line breaks and loses them, unless escaped.
    return dumper.represent_scalar(_TAG + "str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(tuple, _Dumper.represent_list)


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    """Text to a tree of nodes that keep their marks."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(AliasEvent):
            self._refuse("anchors and aliases are not used in recipes")
        if self._depth == _DEEPEST:
            self._refuse(f"nested deeper than {_DEEPEST} levels")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, problem: str) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)


@dataclass
class Document:
    """A parsed document: plain values, where each path was written, and the faults of its notation."""

    value: Any = None
    places: dict[KeyPath, str] = field(default_factory=dict)
    faults: list[FinetuneError] = field(default_factory=list)


def parse(text: str, at: Callable[[int, int | None], str]) -> Document:
    """Reads one YAML document.

    Args:
        at: the place of a line (from 1) and, for a fault of the notation itself, a column (from 1).
    """
    document = Document()
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        assert mark is not None, "PyYAML's scanner, parser and composer always mark the problem"
        document.faults.append(_not_yaml(error.problem or str(error), at(mark.line + 1, mark.column + 1)))
    except ReaderError as error:
        before = text[: error.position]
        place = at(before.count("\n") + 1, error.position - before.rfind("\n"))
        document.faults.append(_not_yaml(f"the character {chr(error.character)!r} is not allowed", place))
    except (ValueError, OverflowError):  # from chr(), which PyYAML lets complain about an escape like "\UFFFFFFFF"
        place = at(loader.line + 1, loader.column + 1)
        document.faults.append(_not_yaml("an escape names no Unicode character", place))
    else:
        if root is not None:
            document.places[()] = at(root.start_mark.line + 1, None)
            document.value = _Converter(document, at).value(root, ())
    return document


def dump(value: Any) -> str:
    """YAML text, keys in the order given."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _not_yaml(problem: str, where: str) -> FinetuneError:
    return FinetuneError(f"not valid YAML: {problem}", where=where, fix="correct the line, or quote the text in it")


class _Converter:
    """Nodes to values, noting places and faults on the way. Recursion is bounded by the composer."""

    def __init__(self, document: Document, at: Callable[[int, int | None], str]) -> None:
        self._document, self._at = document, at

    def value(self, node: Node, path: KeyPath) -> Any:
        if isinstance(node, MappingNode):
            self._check_tag(node, path, "map")
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            self._check_tag(node, path, "seq")
            return [self._item(item, (*path, i)) for i, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, path)

    def _item(self, node: Node, path: KeyPath) -> Any:
        self._document.places[path] = self._line(node)
        return self.value(node, path)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node, path) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                what = f"{shown(key)} is not a name" if isinstance(key_node, ScalarNode) else "a key is not a name"
                self._fault(key_node, path, what, "keys that are text", "write a name, or quote it")
            elif key in result:
                first = self._document.places[(*path, key)]
                what = f"`{key}` is written twice, first at {first}"
                self._fault(key_node, (*path, key), what, None, "keep one of the two")
            else:
                self._document.places[(*path, key)] = self._line(key_node)
                result[key] = self.value(value_node, (*path, key))
        return result

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        text = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        # Python refuses decimal text of more than 4300 digits, both ways; whatever reads a recipe's number has 64 bits.
        if kind == "int" and len(text) < 1000 and re.fullmatch(f"{_INT}|{_HEX_OR_OCTAL}", text):
            number = int(text, base=0) if text[1:2] in ("x", "o") else int(text)
            if -(2**63) <= number < 2**63:
                return number
            self._fault(node, path, f"{shown(text)} is too large", "whole numbers of 64 bits", "write a smaller number")
            return 0
        if kind == "float" and re.fullmatch(_FLOAT, text) and math.isfinite(float(text)):
            return float(text)
        if kind in ("int", "float"):
            self._fault(node, path, f"{shown(text)} is not a usable number", "finite numbers", "write a finite number")
        elif kind != "str":
            self._check_tag(node, path, "str")
        elif "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            self._fault(node, path, f"{shown(text)} holds a character that no file can hold", None, "remove it")
            return ascii(text)
        return text

    def _check_tag(self, node: Node, path: KeyPath, expected: str) -> None:
        if node.tag != _TAG + expected:
            tag = "!!" + node.tag.removeprefix(_TAG) if node.tag.startswith(_TAG) else node.tag
            self._fault(node, path, f"the YAML tag `{tag}` is not used in recipes", None, "write the value without it")

    def _line(self, node: Node) -> str:
        return self._at(node.start_mark.line + 1, None)

    def _fault(self, node: Node, path: KeyPath, what: str, allowed: str | None, fix: str) -> None:
        where = f"{self._line(node)}: {dotted(path)}" if path else self._line(node)
        self._document.faults.append(FinetuneError(what, where=where, allowed=allowed, fix=fix))
