"""Reading YAML that people write: plain data only, and no key twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

_MAX_NODES = 100_000


class StrictYamlError(ValueError):
    """Text that cannot be read; the message is one line."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would silently take the last; and bombs of aliases."""

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
