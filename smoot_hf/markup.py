"""Escaping of names from outside (of classes, data sets, models), so that they are shown as plain text.

A class name of a downloaded data set may hold anything: Markdown, HTML, TeX, line breaks. HTML is left to
`html.escape`, YAML to the Hub's `ModelCardData`, shell lines to `shlex`.
"""

import re
import unicodedata
from typing import Any
from urllib.parse import quote

# Characters that reverse the direction of the text around them.
_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Written as character references: in HTML, tables and formulas a backslash does not take their meaning from them.
_REFERENCED = frozenset("\\$<>&|`:@.")
# Everything that Markdown may read as more than text. An underscore between letters or digits, a colon before a space,
# and a single sign of equality within a line mean nothing.
_SPECIAL = re.compile(
    r"[\\$<>&|`@*\[\]~#!^{}]|:(?=\S)|^=|=(?==)|(?<==)=|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", re.IGNORECASE
)
# What begins an item of a list or a rule: its last character is escaped.
_ITEM = re.compile(r"^(\d*)([-+](?!\d)|(?<=\d)[.)](?=\s|$))")
# Code between backticks, wherever it stands.
_PLAIN_CODE = re.compile(r"[^`|\\]+")


def one_line(value: Any) -> str:
    """The text of a value in one line: spaces are single, and what cannot be shown or encoded is replaced."""
    text = " ".join(str(value).split())
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDIRECTIONAL else c for c in text)


def markdown_text(value: Any) -> str:
    """A value as plain text in Markdown: in a paragraph, a heading, a list item, a table's cell or a link's text."""
    return _ITEM.sub(r"\1\\\2", _SPECIAL.sub(_escaped, one_line(value)))


def _escaped(match: re.Match[str]) -> str:
    character = match.group()
    return f"&#{ord(character)};" if character in _REFERENCED else f"\\{character}"


def markdown_code(value: Any) -> str:
    """A value in the type of code, in Markdown, wherever `markdown_text` may stand."""
    text = one_line(value)
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else f"<code>{markdown_text(text)}</code>"


def markdown_link(text: Any, address: str) -> str:
    """A link; `address` is a full one, of which anything may be part of the path."""
    return f"[{markdown_text(text)}]({quote(one_line(address), safe=':/')})"


def figure_text(value: Any, most: int = 60) -> str:
    """A value as plain text in a figure of matplotlib, of at most `most` characters.

    A dollar sign would begin a formula, a long name makes a figure wider than can be drawn, and matplotlib leaves
    labels that begin with an underscore out of legends.
    """
    text = one_line(value)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
