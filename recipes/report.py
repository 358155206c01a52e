"""The report: one HTML file that a person opens and understands, with nothing to load from elsewhere."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smoot_hf.markup import one_line
from smoot_hf.results import Results

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
.verdict { border-left: 4px solid #0072b2; padding: 0.5em 1em 0.5em 2em; background: #f4f8fb; }
"""


def write_report(
    path: Path,
    *,
    title: str,
    introduction: Sequence[str],
    verdict: Sequence[str],
    evidence: str,
    table: str,
    figures: Sequence[tuple[str, str, Path]],
    results: Results,
) -> None:
    """Write the file.

    Args:
        path: of the file.
        title: heading.
        introduction: paragraphs that say what was compared and how.
        verdict: sentences that answer the question of the comparison.
        evidence: HTML of what the verdict rests on.
        table: HTML of the main table.
        figures: heading, caption and PNG file of each.
        results: whose settings and environment are listed.
    """
    sections = {
        "What was compared, and how": paragraphs(introduction),
        "The answer": _list(verdict),
        "Table": table,
        "Differences between the methods": evidence,
        **{heading: _figure(heading, caption, picture) for heading, caption, picture in figures},
        "Settings": _pairs(results.settings),
        "Versions": _pairs(results.environment),
    }
    body = "\n".join(f"<h2>{_escaped(heading)}</h2>{content}" for heading, content in sections.items())
    head = f'<meta charset="utf-8"><title>{_escaped(title)}</title><style>{_STYLE}</style>'
    body = f"<h1>{_escaped(title)}</h1>\n{body}"
    path.write_text(f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n', "utf-8")


def html_table(heads: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """A table of given texts, in groups of lines with a heading each."""
    lines = ["".join(f"<th>{_escaped(text)}</th>" for text in heads)]
    for heading, group in groups.items():
        lines.append(f'<td class="group" colspan="{len(heads)}">{_escaped(heading)}</td>')
        lines += ["".join(f"<td>{_escaped(text)}</td>" for text in line) for line in group]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"


def paragraphs(texts: Sequence[str]) -> str:
    """One paragraph each."""
    return "".join(f"<p>{_escaped(text)}</p>" for text in texts)


def _escaped(text: str) -> str:
    """A text as HTML shows it, whatever a name in it holds."""
    return html.escape(one_line(text))


def _list(texts: Sequence[str]) -> str:
    return '<ul class="verdict">' + "".join(f"<li>{_escaped(text)}</li>" for text in texts) + "</ul>"


def _figure(heading: str, caption: str, picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="{_escaped(heading)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{_escaped(caption)}</figcaption></figure>"


def _pairs(values: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><td>{_escaped(name)}</td><td>{_escaped(_text(value))}</td></tr>" for name, value in values.items()
    )
    return f'<table class="settings">{lines}</table>'


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
