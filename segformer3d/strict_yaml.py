"""Reading YAML that people write: plain data only, and no key twice."""

from __future__ import annotations

from typing import Any

import yaml


class StrictYamlError(ValueError):
    """Text that cannot be read; the message is one line."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                message = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse one document of plain data.

    Raises:
        StrictYamlError: It is not YAML, asks for an object, or has a key twice in one mapping.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise StrictYamlError(f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise StrictYamlError("not YAML: nested too deeply") from None
