"""Reading YAML that people write: plain data only, and no key twice."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_MAX_NODES = 100_000
_MAX_DIGITS = 1000
# To YAML 1.1, `010` is eight and `1:30` is ninety; few people know.
_SURPRISING = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9_]+(:[0-9_.]+)+")


class StrictYamlError(ValueError):
    """Text that cannot be read; the message is one line."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses what would surprise: keys that stand twice, tags, odd numbers, bombs of aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"no tags like {event.tag} here", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        self._refuse_surprises(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        self._refuse_surprises(node)
        return super().construct_yaml_float(node)

    def _refuse_surprises(self, node: yaml.ScalarNode) -> None:
        text = node.value
        if len(text) > _MAX_DIGITS:
            message = f"a number of {len(text)} characters"
        elif _SURPRISING.fullmatch(text):
            message = f"the number {text} means another one to YAML: write it in decimals"
        else:
            return
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MAX_NODES:
            message = f"its aliases stand for more than {_MAX_NODES} values"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                message = "a key is no plain value"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
            if key in seen:
                message = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes there would be if every alias were written out; more than any for a ring."""
    known = sizes.get(id(node))
    if known is not None:
        return known
    sizes[id(node)] = _MAX_NODES + 1  # where it is met again within itself
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [item for pair in node.value for item in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def parse_yaml(text: str) -> Any:
    """Parse one document of plain data.

    Raises:
        StrictYamlError: It is not YAML, asks for an object, or has a key twice in one mapping.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - safe  # nosec B506
    # What PyYAML's constructors raise of a tag or a number that is none.
    except (
        *(yaml.YAMLError, ValueError, TypeError),
        *(LookupError, AttributeError, ArithmeticError),
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StrictYamlError(f"not YAML: {reason}") from None
    except RecursionError:
        raise StrictYamlError("not YAML: nested too deeply") from None
