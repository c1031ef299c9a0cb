"""YAML files that may come from anywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from nearkin.errors import ConfigError, printable

LARGEST = 1 << 20  # bytes


def load_yaml(path: Path) -> Any:
    """The plain values of a YAML file. Raises ConfigError when it cannot be read, is too large or is not valid."""
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)  # a device has no size
        if len(data) > LARGEST:
            raise ConfigError(f"{shown} is larger than 1 MiB; give a nearkin config.")
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"Cannot read the config {shown}: {reason}.") from None
    try:
        return yaml.load(text, Loader=_StrictLoader)
    # Of values such as the date 2026-02-30 or `!!bool maybe`, PyYAML raises what Python does.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        reason = printable(" ".join(str(error).split()))[:200] or "it is nested too deeply"
        raise ConfigError(f"{shown} is not valid YAML: {reason}.") from None


class _StrictLoader(yaml.SafeLoader):
    """safe_load that refuses aliases, which can expand without limit, and a key given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases; write the values out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(str(key.value) for key, _ in node.value)
        twice, times = next(iter(keys.most_common(1)), ("", 0))
        if times > 1:
            raise yaml.YAMLError(f"the key {twice} is given twice")
        return super().construct_mapping(node, deep)
