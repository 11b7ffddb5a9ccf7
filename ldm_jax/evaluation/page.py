"""The HTML elements of a report: a self-contained page with `page.css`, `page.js` and images as data URIs.

Its Content-Security-Policy forbids every outside request.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
MIME = {".png": "image/png", ".gif": "image/gif"}


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The HTML document of `sections` (HTML; empty ones are dropped); title and subtitle are plain text."""
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
{chr(10).join(filter(None, sections))}
</main>
<script>
{(HERE / "page.js").read_text()}</script>
</body>
</html>
"""


def section(heading: str, *blocks: str, note: str = "") -> str:
    """A section of HTML blocks; "" if all are empty. `note` is plain text below the heading."""
    content = "".join(blocks)
    if not content:
        return ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(heading)}</h2>{note}{content}</section>"


def group(heading: str, content: str) -> str:
    """A subsection, with a heading if that is not empty."""
    return (f'<h3 class="group">{escape(heading)}</h3>' if heading else "") + content


def columns(*blocks: str) -> str:
    """HTML blocks in columns, or below each other on a narrow screen."""
    content = "".join(blocks)
    return f'<div class="columns">{content}</div>' if content else ""


def panel(caption: str, content: str) -> str:
    """A box with a title around a chart or table; "" if there is no content."""
    return f'<figure class="panel"><figcaption>{escape(caption)}</figcaption>{content}</figure>' if content else ""


def _data_uri(path: Path) -> str:
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image(path: Path, alt: str, caption: str = "") -> str:
    """An image with a caption below; "" if there is no such file."""
    if not path.is_file():
        return ""
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="picture"><img src="{_data_uri(path)}" alt="{escape(alt)}">{text}</figure>'


def slider(frames: Sequence[tuple[str, Path]], alt: str) -> str:
    """A slider over images (caption, file), which starts at the last; "" without images."""
    if len(frames) < 2:
        return "".join(image(path, alt, caption) for caption, path in frames)
    last = len(frames) - 1
    images = "".join(
        f'<img src="{_data_uri(path)}" alt="{escape(f"{alt}, {caption}")}" data-caption="{escape(caption)}"'
        f"{'' if k == last else ' hidden'}>"
        for k, (caption, path) in enumerate(frames)
    )
    return (
        f'<figure class="picture slider">{images}<div class="controls"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{escape(alt)}">'
        f"<output>{escape(frames[-1][0])}</output></div></figure>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, names in the first column and numbers in the others; "" without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def reveal(summary: str, content: str) -> str:
    """HTML in a box that opens with a click; "" if there is no content."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def details(summary: str, text: str) -> str:
    """Preformatted text in a box that opens with a click."""
    return reveal(summary, f"<pre>{escape(text)}</pre>")
