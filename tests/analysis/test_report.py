"""The report: its numbers, that it stands alone, and that a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmslak.analysis.page import POLICY
from mmslak.analysis.report import pattern_shares, read_sparse_log, sparsity_report

BROWSER = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-sync']
FLAGS += ['--disable-background-networking', '--disable-component-update', '--hide-scrollbars']
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason='no Chromium or Chrome here: MMSLAK_BROWSER=1 make env gets one'
)
STRIPS = ['stages.0.0.large_kernel.vertical.conv.weight']
STRIPS += ['stages.0.0.large_kernel.horizontal.conv.weight']


def masks() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    vertical = torch.rand(16, 1, 51, 5, generator=rng) < 0.6
    vertical[:, :, 25] = True
    return {
        STRIPS[0]: vertical,
        STRIPS[1]: vertical.transpose(2, 3).contiguous(),
        'stages.0.0.pwconv1.weight': torch.arange(8).reshape(4, 2) < 6,  # 0.75
        'head <b>&': torch.zeros(3, 3, dtype=torch.bool),
    }


def write_log(folder: Path, *records: dict) -> None:
    file = folder / 'vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text('\n'.join(map(json.dumps, records)) + '\n{"cut": ')


def record(step: int, churn: float | None = None) -> dict:
    values = {'sparse/density': 0.6, 'sparse/exploration_rate': 0.6 + step / 1000, 'step': step}
    return values if churn is None else {**values, 'sparse/churn': churn}


LOG = [record(0), record(100, 0.3), record(200, 0.2)]


@pytest.fixture
def page() -> str:
    known = masks()
    ever = {name: torch.ones_like(mask) for name, mask in known.items()}
    return sparsity_report('A run & more', known, ever, LOG, ['A note.'])


def test_log_of_a_resumed_run(tmp_path):
    write_log(tmp_path / '20260101_000000', {'loss': 1.0, 'step': 1}, *LOG, record(300, 0.9))
    write_log(tmp_path / '20260102_000000', record(250), record(300, 0.1))  # resumed at 250
    write_log(tmp_path / '20260103_000000', {'mIoU': 3.0, 'step': 0})  # a test run
    log = read_sparse_log(tmp_path)
    assert [r['step'] for r in log] == [0, 100, 200, 250, 300]
    assert log[-1]['sparse/churn'] == 0.1


def test_log_of_a_run_begun_anew_and_of_none(tmp_path):
    assert read_sparse_log(tmp_path) == []
    write_log(tmp_path / '1', *LOG)
    write_log(tmp_path / '2', record(0))
    assert [r['step'] for r in read_sparse_log(tmp_path)] == [0]


def test_pattern_is_the_share_of_channels():
    mask = torch.zeros(4, 1, 7, 3, dtype=torch.bool)
    mask[:3, 0, 2, 1] = True
    others = dict(
        small=torch.ones(4, 1, 3, 3).bool(), dense=torch.ones(4, 4, 7, 7).bool(), flat=mask[0, 0]
    )
    shares = pattern_shares({'a.b.vertical.conv.weight': mask, **others})
    assert list(shares) == ['a.b']
    assert list(shares['a.b']) == ['vertical']
    wanted = np.zeros((7, 3))
    wanted[2, 1] = 0.75
    np.testing.assert_array_equal(shares['a.b']['vertical'], wanted)


def test_numbers(page):
    text = re.sub(r'<[^>]+>', ' ', page)
    assert re.search(r'stages\.0\.0\.pwconv1\.weight\s+4×2\s+8\s+6\s+0\.7500\s+1\.0000', text)
    assert re.search(r'Churn: 0\.2000 at the end', text)
    assert re.search(r'Rs: 0\.8000 at the end', text)
    assert 'vertical 51×5, horizontal 5×51' in text
    total, active = 2 * 16 * 255 + 8 + 9, sum(int(m.sum()) for m in masks().values())
    assert re.search(rf'all\s+4 tensors\s+{total:,}\s+{active:,}\s+{active / total:.4f}', text)


def test_it_stands_alone(page):
    assert 'head &lt;b&gt;&amp;' in page
    sources = re.findall(r'src="([^"]{0,40})', page)
    assert len(sources) == 3  # a block's patterns, churn, Rs
    assert all(source.startswith('data:image/png;base64,') for source in sources)
    assert not re.search(r'https?://|<script|<link|@import|url\(', page)
    assert POLICY in page


def test_without_log_and_history():
    page = sparsity_report('t', {'a': torch.ones(2, 2).bool()})
    assert 'No log of sparse training' in page
    assert 'No depthwise kernel' in page
    assert '<img' not in page
    fixed = sparsity_report('t', {'a': torch.ones(2, 2).bool()}, log=[record(0)])
    assert 'masks never changed' in fixed
    with pytest.raises(ValueError, match='no weights'):
        sparsity_report('t', {})


def test_hidden_units_over_training():
    units = [{'sparse/units/a.fc1': 8 - i, 'sparse/units/b.fc1': 4} for i in range(3)]
    log = [{**one, **more} for one, more in zip(LOG, units)]
    page = sparsity_report('t', {'a': torch.ones(2, 2).bool()}, log=log)
    assert '10 of 12 hidden units at the end' in page
    assert len(re.findall('<img', page)) == 3  # churn, Rs, units
    assert 'hidden units' not in sparsity_report('t', {'a': torch.ones(2, 2).bool()}, log=LOG)


def browse(page: Path, *flags: str) -> str:
    """What a headless browser prints about a page."""
    profile = page.parent / f'profile_{page.stem}'
    command = [BROWSER, *FLAGS, f'--user-data-dir={profile}', *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@needs_browser
def test_a_browser_has_every_picture_and_loads_nothing(page, tmp_path):
    """The page, with a script that says what the browser made of it."""
    script = """<script>addEventListener('load', () => {
        const loaded = performance.getEntriesByType('resource').map(entry => entry.name)
        const sizes = [...document.images].map(image => [image.naturalWidth, image.naturalHeight])
        const bars = [...document.querySelectorAll('.bar div')].map(bar => bar.clientWidth)
        const found = document.createElement('pre')
        found.id = 'found'
        found.textContent = JSON.stringify({
            sizes, bars, title: document.title, rows: document.querySelectorAll('tr').length,
            loaded: loaded.filter(name => !name.startsWith('data:'))})
        document.body.append(found)
    })</script></body>"""
    file = tmp_path / 'page.html'
    probed = page.replace(POLICY, POLICY + "; script-src 'unsafe-inline'")
    file.write_text(probed.replace('</body>', script), encoding='utf-8')
    dom = browse(file, '--virtual-time-budget=5000', '--dump-dom')
    match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert match, dom[-2000:]
    found = json.loads(html.unescape(match[1]))
    assert found['title'] == 'A run & more'
    assert found['rows'] == 1 + 1 + 4
    assert found['loaded'] == []
    assert len(found['sizes']) == 3
    assert all(width > 100 and height > 100 for width, height in found['sizes'])
    assert found['bars'][-1] == 0 < found['bars'][3]


@needs_browser
def test_a_browser_shows_it_as_it_is(page, tmp_path):
    file, shot = tmp_path / 'page.html', tmp_path / 'shot.png'
    file.write_text(page, encoding='utf-8')
    browse(file, '--window-size=1200,1800', f'--screenshot={shot}')
    picture = np.asarray(Image.open(shot).convert('RGB')).astype(int)
    assert picture.shape == (1800, 1200, 3)

    def count(colour: list[int]) -> int:
        return int((np.abs(picture - colour).sum(-1) < 8).sum())

    assert count([59, 110, 165]) > 2000  # the bars of the table
    assert count([31, 119, 180]) > 300  # the curves: pictures are shown under the page's own policy
