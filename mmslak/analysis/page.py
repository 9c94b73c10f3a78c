"""Parts of HTML pages that load nothing from elsewhere."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

# Nothing may be loaded: the page is whole by itself.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse } img { max-width: 100% }
"""


def whole_page(
    title: str, body: Iterable[str], style: str = '', *, refers_to_files: bool = False
) -> str:
    """A page.

    Args:
        title: Text of its title; the heading is in the body.
        body: HTML, a part per line.
        style: CSS beside that of all pages.
        refers_to_files: Whether pictures are files beside the page. Otherwise they are data URIs,
            and the page forbids the browser to load anything.

    Returns:
        HTML.
    """
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<title>{html.escape(title)}</title>{"" if refers_to_files else policy}'
        f'<style>{STYLE}{style}</style></head>\n<body>\n' + '\n'.join(body) + '\n</body></html>\n'
    )


def figure(source: str, caption: str) -> str:
    """A picture, given by an address or a data URI, and the text below it."""
    source, caption = html.escape(source), html.escape(caption)
    image = f'<img src="{source}" alt="{caption}">' if source else ''
    return f'<figure>{image}<figcaption>{caption}</figcaption></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts."""
    lines = [
        '<tr>' + ''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells) + '</tr>'
        for tag, cells in [('th', head), *(('td', row) for row in rows)]
    ]
    return '<table>' + '\n'.join(lines) + '</table>'


def picture_uri(picture: Image.Image) -> str:
    """A picture as JPEG in a data URI."""
    buffer = io.BytesIO()
    picture.convert('RGB').save(buffer, 'JPEG', quality=80)
    return data_uri(buffer.getvalue(), 'jpeg')


def data_uri(content: bytes, kind: str) -> str:
    """The content of a picture's file as a data URI; the kind is that of its format, as 'png'."""
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
