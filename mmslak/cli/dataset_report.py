"""What `mmslak check-dataset` has found, as plain values and as a page."""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import mmslak
from mmslak.analysis.page import figure, picture_uri, table, whole_page
from mmslak.analysis.thumbnails import thumbnail
from mmslak.cli.census import text_of
from mmslak.datasets.census_table import Census
from mmslak.datasets.findings import EXAMPLES
from mmslak.datasets.guard import innermost

STYLE = """
td, th { padding: 1px 12px 1px 0; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; max-width: 460px }
figcaption { font-size: 12px; overflow-wrap: anywhere; max-width: 220px }
section { border-left: 4px solid #e0a800; padding-left: 1em; margin: 1em 0 }
section.stops { border-color: #c0392b } pre { overflow-x: auto }
"""


@dataclass
class Checked:
    """What was found in the data of a loader.

    Attributes:
        loader: Part of the config, such as 'train_dataloader'.
        census: What the annotations say.
        dataset: The dataset; None if it cannot be built.
        samples: Number of samples that were read.
        bad: Files of the samples that cannot be trained on, with the reasons.
        odd: Files of odd samples by the oddity.
    """

    loader: str
    census: Census
    dataset: object = None
    samples: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    odd: dict[str, list[str]] = field(default_factory=dict)

    @property
    def stops(self) -> bool:
        """Whether something is to be mended before training."""
        return bool(self.bad) or any(finding.stops for finding in self.census.findings)


def to_dict(config: str, checked: Iterable[Checked]) -> dict:
    """All that was found, as plain values for JSON."""
    return {
        'mmslak': mmslak.__version__,
        'config': config,
        'loaders': {
            part.loader: {
                'census': part.census.to_dict(),
                'samples': part.samples,
                'bad': [{'file': file, 'reason': reason} for file, reason in part.bad],
                'odd': part.odd,
            }
            for part in checked
        },
    }


def to_page(config: str, checked: Sequence[Checked]) -> str:
    """All that was found on a page that is whole by itself, with thumbnails of the examples."""
    censuses = [part.census for part in checked]
    body = [f'<h1>Data of {html.escape(config)}</h1>', f'<p>mmslak {mmslak.__version__}</p>']
    if any(census.unit for census in censuses):
        body += ['<h2>What there is</h2>', *_tables(censuses)]
    for part in checked:
        body += [f'<h2>{html.escape(part.loader)}</h2>', *_findings(part)]
    return whole_page(f'Data of {config}', body, STYLE)


def _tables(censuses: Sequence[Census]) -> list[str]:
    """Totals of the loaders, and a row for each class."""
    totals = text_of(censuses).splitlines()[-sum(bool(census.unit) for census in censuses) :]
    names = dict.fromkeys(row.name for census in censuses for row in census.table)
    head, columns = ['class'], []
    for census in censuses:
        split = census.loader.removesuffix('_dataloader')
        rows = {row.name: row for row in census.table}
        for heading in dict.fromkeys(('pictures', census.unit)) if rows else ():
            head.append(f'{split} {heading}')
            key = 'pictures' if heading == 'pictures' else 'amount'
            columns.append({name: f'{getattr(row, key):,}' for name, row in rows.items()})
    rows = ([name, *(column.get(name, '') for column in columns)] for name in names)
    return [*(f'<p>{html.escape(line)}</p>' for line in totals), table(head, rows)]


def _findings(part: Checked) -> list[str]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for file, reason in part.bad:
        groups.setdefault(re.sub(r'\d[\d.,×]*', '…', reason), []).append((file, reason))
    wanted = [file for finding in part.census.findings for file in finding.files]
    wanted += [file for group in groups.values() for file, _ in group[:EXAMPLES]]
    wanted += [file for files in part.odd.values() for file in files[:EXAMPLES]]
    draw = _Drawer(part.dataset, set(wanted))
    sections = [
        _section(finding.message, [(file, '') for file in finding.files], draw, finding.stops)
        for finding in part.census.findings
    ]
    for group in groups.values():
        title = f'{len(group)} of {part.samples} samples cannot be trained on: {group[0][1]}'
        sections.append(_section(title, group, draw, stops=True))
    for oddity, files in sorted(part.odd.items()):
        title = f'{len(files)} of {part.samples} samples are odd, and are trained on: {oddity}'
        sections.append(_section(title, [(file, '') for file in files], draw))
    return sections or ['<p>Nothing was found.</p>']


def _section(
    title: str,
    files: Sequence[tuple[str, str]],
    draw: Callable[[str], list[str]],
    stops: bool = False,
) -> str:
    figures = [
        figure(uri, f'{file}: {reason}' if reason else file)
        for file, reason in files[:EXAMPLES]
        for uri in draw(file) or ['']
    ]
    kind = ' class="stops"' if stops else ''
    return f'<section{kind}><p>{html.escape(title)}</p>\n' + '\n'.join(figures) + '</section>'


class _Drawer:
    """Draws files of a dataset small: pictures with their boxes, and label maps with pictures."""

    def __init__(self, dataset: object, files: set[str]) -> None:
        self.samples = {}
        for inner in innermost(dataset) if dataset is not None and files else ():
            for index in range(len(inner)):
                sample = inner.get_data_info(index)
                for key in ('img_path', 'seg_map_path'):
                    if sample.get(key) in files:
                        self.samples[sample[key]] = sample

    def __call__(self, file: str) -> list[str]:
        """Data URIs of a file; nothing if it is no picture that can be read."""
        sample = self.samples.get(file, {})
        boxes = [thing['bbox'] for thing in sample.get('instances') or () if 'bbox' in thing]
        drawn = {sample.get('img_path', file): boxes, sample.get('seg_map_path'): ()}
        uris = []
        for path in filter(None, drawn):
            try:
                uris.append(picture_uri(thumbnail(path, drawn[path])))
            except Exception:  # decoders raise what they like; the text says what is wrong
                continue
        return uris
