"""The page of a demo's results: what it reached, drew and wrote, and how to go on."""

import html
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mmslak
from mmslak.analysis.page import figure, whole_page

PARTS = ('segmentation', 'detection', 'compact')  # of the page, in this order
STYLE = """
td, th { padding: 1px 12px 1px 0; text-align: left }
figure { margin: 1em 0 } pre { background: #f2f2f2; overflow-x: auto; padding: 1em }
"""


@dataclass
class Part:
    """What one demo has to show.

    Args:
        title: Its heading.
        scores: Name, value and bar of each score; the bar is None where nothing is asked for.
        notes: Sentences below the scores.
        pictures: Picture files by their captions.
        files: Other files and folders of the results by what they are.
        commands: Each a list of words, to go on with.
        judged: Whether the scores mean anything; those of a quick run do not.
    """

    title: str
    scores: Sequence[tuple[str, float, float | None]]
    notes: Sequence[str]
    pictures: dict[str, Path]
    files: dict[str, Path]
    commands: Sequence[Sequence[str]]
    judged: bool = True


def write_page(folder: Path, name: str, part: Part) -> Path:
    """Writes `index.html` of a work folder: this part and those that earlier demos left there.

    The page loads nothing but pictures of the folder, and its links are relative: the folder can
    be moved and read from disk.

    Args:
        folder: The work folder, with all files of the part in it.
        name: One of `PARTS`; an earlier part of this name is replaced.
        part: What there is to show.

    Returns:
        The page.
    """
    saved = asdict(part)
    for key in ('pictures', 'files'):
        saved[key] = {
            what: path.relative_to(folder).as_posix() for what, path in saved[key].items()
        }
    (folder / f'{name}.json').write_text(json.dumps(saved))
    found = [folder / f'{name}.json' for name in PARTS]
    body = [_section(Part(**json.loads(file.read_text()))) for file in found if file.is_file()]
    page = folder / 'index.html'
    heading = f'<h1>mmslak {mmslak.__version__}: demo</h1>'
    text = whole_page('mmslak demo', [heading, *body], STYLE, refers_to_files=True)
    page.write_text(text, encoding='utf-8')
    return page


def _section(part: Part) -> str:
    rows = [_row(name, score, bar, part.judged) for name, score, bar in part.scores]
    head = '<tr><th>score</th><th>measured</th><th>at least</th><th></th></tr>'
    lines = [f'<h2>{html.escape(part.title)}</h2>', f'<table>{head}', *rows, '</table>']
    if not part.judged:
        lines.append('<p>A quick run: a few steps on a few images, which teach nothing.</p>')
    lines += [f'<p>{html.escape(note)}</p>' for note in part.notes]
    lines += [figure(path, caption) for caption, path in part.pictures.items()]
    files = [f'<li>{_link(what, path)}</li>' for what, path in part.files.items()]
    commands = [shlex.join(words) for words in part.commands]
    if sys.prefix != sys.base_prefix:
        commands.insert(0, shlex.join(['.', os.path.join(sys.prefix, 'bin/activate')]))
    commands = html.escape('\n'.join(commands))
    lines += ['<h3>Files</h3>', '<ul>', *files, '</ul>', '<h3>Go on</h3>', f'<pre>{commands}</pre>']
    return '\n'.join(lines)


def _row(name: str, score: float, bar: float | None, judged: bool) -> str:
    verdict = ('reached' if score >= bar else 'missed') if judged and bar is not None else ''
    cells = [name, f'{score:.3g}', '' if bar is None else f'{bar:g}', verdict]
    return '<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in cells) + '</tr>'


def _link(what: str, path: str) -> str:
    return f'<a href="{html.escape(path)}">{html.escape(what)}</a>: {html.escape(path)}'
