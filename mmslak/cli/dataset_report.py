"""What `mmslak check-dataset` has found, as plain values and as a page."""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

import mmslak
from mmslak.analysis.page import figure, picture_uri, table, whole_page
from mmslak.analysis.thumbnails import thumbnail
from mmslak.cli.census import text_of
from mmslak.datasets.census_table import Census
from mmslak.datasets.findings import EXAMPLES, of
from mmslak.datasets.scan import files_of, sample_at

SHOWN = 6  # samples of each part that are shown whatever was found
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
        places: Numbers of samples by their files, of those that something was found in.
    """

    loader: str
    census: Census
    dataset: object = None
    samples: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    odd: dict[str, list[str]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)

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
    draw = partial(_draw, part)
    sections = [
        _section(finding.message, [(file, '') for file in finding.files], draw, finding.stops)
        for finding in part.census.findings
    ]
    for group in groups.values():
        title = f'{len(group)} of {of(part.samples, "sample")} cannot be trained on: {group[0][1]}'
        sections.append(_section(title, group, draw, stops=True))
    for oddity, files in sorted(part.odd.items()):
        title = f'odd, and trained on: {len(files)} of {of(part.samples, "sample")}: {oddity}'
        sections.append(_section(title, [(file, '') for file in files], draw))
    return [*_examples(part), *(sections or ['<p>Nothing was found.</p>'])]


def _examples(part: Checked) -> list[str]:
    """Some samples with their labels, from all parts of the data, whatever was found."""
    if not part.samples:
        return []
    places = np.linspace(0, part.samples - 1, min(SHOWN, part.samples)).astype(int).tolist()
    names, figures = part.dataset.metainfo.get('classes') or (), []
    for sample in (sample_at(part.dataset, place) for place in places):
        label = sample.get('gt_label')
        name = f'{names[label]}: ' if isinstance(label, int) and label < len(names) else ''
        figures += [figure(uri, f'{name}{sample.get("img_path")}') for uri in _drawn(sample)]
    return ['<p>Examples:</p>', '\n'.join(figures)] if figures else []


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


def _draw(part: Checked, file: str) -> list[str]:
    """Data URIs of a file of a dataset: of the whole sample, if it belongs to one."""
    place = part.places.get(file)
    return _drawn({'img_path': file} if place is None else sample_at(part.dataset, place))


def _drawn(sample: dict) -> list[str]:
    """Data URIs of a sample: of its picture with its boxes, and of its label map.

    What is no picture that can be read has none.
    """
    boxes = [thing['bbox'] for thing in sample.get('instances') or () if 'bbox' in thing]
    uris = []
    for path in files_of(sample):
        try:
            uris.append(picture_uri(thumbnail(path, boxes if path == sample['img_path'] else ())))
        except Exception:  # decoders raise what they like; the text says what is wrong
            continue
    return uris
