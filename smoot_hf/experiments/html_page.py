"""A page of HTML with nothing to load from elsewhere: headings, tables, texts and pictures."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..markup import one_line

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 960px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 14px; margin: 1em 0; }
.wide { overflow-x: auto; }
th, td { padding: 4px 9px; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
th { vertical-align: bottom; white-space: normal; }
td.group { background: #f4f6f8; font-size: 13px; text-align: left; white-space: normal; }
.settings td { text-align: left; white-space: normal; }
.settings td:first-child { white-space: nowrap; vertical-align: top; }
img { max-width: 100%; } figure { margin: 1em 0; } figcaption, .note { color: #555; font-size: 14px; }
.pictures figure { display: inline-block; margin: 0 10px 10px 0; vertical-align: top; max-width: 308px; }
.pictures img { height: 150px; margin-right: 4px; } table.pictures img { height: 64px; }
table.pictures figure { margin: 0 4px 0 0; text-align: center; } table.pictures td { padding: 4px 6px; }
.verdict { border-left: 4px solid #0072b2; padding: 0.5em 1em 0.5em 2em; background: #f4f8fb; }
"""


def write_page(path: Path, title: str, sections: Mapping[str, str]) -> None:
    """Write the file.

    Args:
        path: of the file.
        title: heading of the page.
        sections: heading -> HTML.
    """
    body = "\n".join(f"<h2>{escaped(heading)}</h2>{content}" for heading, content in sections.items())
    head = f'<meta charset="utf-8"><title>{escaped(title)}</title><style>{_STYLE}</style>'
    body = f"<h1>{escaped(title)}</h1>\n{body}"
    path.write_text(f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n', "utf-8")


def html_table(heads: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """A table of given texts, in groups of lines with a heading each."""
    lines = ["".join(f"<th>{escaped(text)}</th>" for text in heads)]
    for heading, group in groups.items():
        lines.append(f'<td class="group" colspan="{len(heads)}">{escaped(heading)}</td>')
        lines += ["".join(f"<td>{escaped(text)}</td>" for text in line) for line in group]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"


def paragraphs(texts: Sequence[str]) -> str:
    """One paragraph each."""
    return "".join(f"<p>{escaped(text)}</p>" for text in texts)


def escaped(text: str) -> str:
    """A text as HTML shows it, whatever a name in it holds."""
    return html.escape(one_line(text))


def sentences(texts: Sequence[str]) -> str:
    """An emphasised list, one item each."""
    return '<ul class="verdict">' + "".join(f"<li>{escaped(text)}</li>" for text in texts) + "</ul>"


def figure(heading: str, caption: str, picture: Path) -> str:
    """A PNG file with its caption; the heading is what it is called where it cannot be seen."""
    image = _image(picture.read_bytes(), heading)
    return f"<figure>{image}<figcaption>{escaped(caption)}</figcaption></figure>"


def picture_html(picture: Image.Image, description: str) -> str:
    """A picture with its content in the page."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _image(file.getvalue(), description)


def _image(png: bytes, description: str) -> str:
    content = base64.b64encode(png).decode()
    return f'<img class="picture" alt="{escaped(description)}" src="data:image/png;base64,{content}">'


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    lines = "".join(
        f"<tr><td>{escaped(name)}</td><td>{escaped(_text(value))}</td></tr>" for name, value in values.items()
    )
    return f'<table class="settings">{lines}</table>'


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
