"""The report's building blocks: one self-contained HTML page with `page.css` and `page.js` in it. It knows no runs.

The page forbids itself every outside request (Content-Security-Policy); images are data URIs.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
MIME = {".png": "image/png", ".gif": "image/gif"}


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The whole document. `sections` are HTML, empty ones are dropped; title and subtitle are plain text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{(HERE / "page.css").read_text()}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
<main>
{chr(10).join(section for section in sections if section)}
</main>
<script>
{(HERE / "page.js").read_text()}</script>
</body>
</html>
"""


def section(heading: str, *blocks: str, note: str = "") -> str:
    """A part of the page; "" if all its blocks are empty. `note` is one sentence of plain text below the heading."""
    content = "".join(block for block in blocks if block)
    if not content:
        return ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(heading)}</h2>{note}{content}</section>"


def group(heading: str, content: str) -> str:
    """A part of a section, with a heading if that is not empty."""
    return (f'<h3 class="group">{escape(heading)}</h3>' if heading else "") + content


def columns(*blocks: str) -> str:
    """Blocks side by side where there is room, below each other on a phone."""
    content = "".join(block for block in blocks if block)
    return f'<div class="columns">{content}</div>' if content else ""


def panel(caption: str, content: str) -> str:
    """A titled box around a chart or table; "" if there is no content."""
    return f'<figure class="panel"><figcaption>{escape(caption)}</figcaption>{content}</figure>' if content else ""


def data_uri(path: Path) -> str:
    """An image file as a data URI."""
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image(path: Path, alt: str, caption: str = "") -> str:
    """An image with a caption below; "" if there is no such file."""
    if not path.is_file():
        return ""
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="picture"><img src="{data_uri(path)}" alt="{escape(alt)}">{text}</figure>'


def slider(moments: Sequence[tuple[str, Path]], alt: str) -> str:
    """Images (caption, file) of the same at different moments, behind one slider that starts at the last."""
    if not moments:
        return ""
    if len(moments) == 1:
        return image(moments[0][1], alt, moments[0][0])
    last = len(moments) - 1
    images = "".join(
        f'<img src="{data_uri(path)}" alt="{escape(f"{alt}, {caption}")}" data-caption="{escape(caption)}"'
        f"{'' if k == last else ' hidden'}>"
        for k, (caption, path) in enumerate(moments)
    )
    return (
        f'<figure class="picture slider">{images}<div class="controls"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{escape(alt)}">'
        f"<output>{escape(moments[-1][0])}</output></div></figure>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, whose first column holds names and the others numbers; "" without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, text: str) -> str:
    """Preformatted text that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
