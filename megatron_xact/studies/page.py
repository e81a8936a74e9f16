"""One HTML page out of sections of text, tables and pictures: plain HTML, a few lines of CSS, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; } .answer { border-left: 4px solid #3b6ea5; padding: .4rem 1rem; background: #f3f6fa; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; }
th { font-weight: 600; white-space: nowrap; } td { font-variant-numeric: tabular-nums; }
figure { margin: 1.2rem 0; overflow-x: auto; } figure img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #444; max-width: 46rem; }
nav a { margin-right: 1rem; } footer { margin-top: 3rem; font-size: .9rem; color: #444; }
"""


@dataclass
class Section:
    """`facts`: rows of two cells, subject and sentence; `table`: a header and rows; `pictures`: (file, caption)."""

    title: str
    name: str  # of the anchor
    answers: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    level: int = 2


def page(title: str, lead: str, sections: Sequence[Section], files: Sequence[tuple[str, str]]) -> str:
    """The document; `files`: (path, what it is), listed at the end."""
    links = "".join(f'<a href="#{s.name}">{escape(s.title)}</a> ' for s in sections if s.level == 2)
    body = "\n".join(_section(s) for s in sections)
    listed = "\n".join(f'<li><a href="{escape(p)}">{escape(p)}</a>: {escape(what)}</li>' for p, what in files)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(lead)}</p><nav>{links}</nav></header>
<main>
{body}
</main>
<footer><h2>Files</h2>
<ul>
{listed}
</ul></footer>
</body>
</html>
"""


def _section(s: Section) -> str:
    parts = [f'<section id="{s.name}">', f"<h{s.level}>{escape(s.title)}</h{s.level}>"]
    parts += [f'<p class="answer">{escape(line)}</p>' for line in s.answers]
    parts += [f"<p>{escape(line)}</p>" for line in s.text]
    if s.facts:
        rows = "\n".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in s.facts)
        parts.append(f"<table>\n{rows}\n</table>")
    if s.table:
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in s.table[0])
        rows = "\n".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in s.table[1:])
        parts.append(f"<table>\n<tr>{head}</tr>\n{rows}\n</table>")
    for file, caption in s.pictures:
        parts.append(f'<figure><img src="{escape(file)}" alt="{escape(caption)}" loading="lazy">'
                     f"<figcaption>{escape(caption)}</figcaption></figure>")  # fmt: skip
    return "\n".join([*parts, "</section>"])
