"""In the API reference, a field shows its default value, not the call that makes the field."""

import ast
from pathlib import Path
from typing import Any

import griffe

_SETTINGS = Path(__file__).parent.parent / "smoot_hf" / "training" / "settings.py"


class ArgumentDefaults(griffe.Extension):
    """Replaces `_argument(default, help)` and `_setting(default, help)` by the default, which the help would hide.

    `_of_settings(name)` stands for the default that the field of this name has in `SmootSettings`.
    """

    def __init__(self) -> None:
        tree = ast.parse(_SETTINGS.read_text(encoding="utf-8"))
        calls = [
            node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)
        ]
        self._defaults = {ast.unparse(node.target): ast.unparse(node.value.args[0]) for node in calls}

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called for every attribute, before the signatures of dataclasses are made of them."""
        if not isinstance(attr.value, griffe.ExprCall):
            return
        maker = str(attr.value.function)
        if maker in ("_argument", "_setting"):
            attr.value = attr.value.arguments[0]
        elif maker == "_of_settings":
            attr.value = self._defaults[attr.name]
