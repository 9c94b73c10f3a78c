"""The demo's page: every part, escaped, with nothing from elsewhere."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from mmslak.cli.demo_page import Part, write_page


class Links(HTMLParser):
    """All addresses of a page, and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses, self.text = [], ''
        self.feed(page.read_text(encoding='utf-8'))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.addresses += [value for name, value in attrs if name in ('href', 'src')]

    def handle_data(self, data: str) -> None:
        self.text += data


def check_addresses(page: Path) -> list[str]:
    """The page's addresses: each is relative and exists."""
    addresses = Links(page).addresses
    for address in addresses:
        assert not address.startswith(('/', 'http', 'file:'))
        assert (page.parent / unquote(address)).exists(), address
    return addresses


def part(folder: Path, title: str, judged: bool = True) -> Part:
    (folder / 'run').mkdir(exist_ok=True)
    (folder / 'run/a.png').touch()
    (folder / 'run/b.pth').touch()
    return Part(
        title,
        scores=[('mIoU, %', 71.84, 60.0), ('AP', 0.4, 0.5), ('from scratch', 33.9, None)],
        notes=['3 of 5 are < 1'],
        pictures={'scenes & truth': folder / 'run/a.png'},
        files={'Checkpoint': folder / 'run/b.pth'},
        commands=[['mmslak', 'demo', str(folder / 'a b')]],
        judged=judged,
    )


def test_scores_files_and_commands_are_on_the_page(tmp_path):
    folder = tmp_path / 'a <b> & "c"'
    folder.mkdir()
    page = write_page(folder, 'segmentation', part(folder, 'UperNet <script>'))
    assert page == folder / 'index.html'
    assert check_addresses(page) == ['run/a.png', 'run/b.pth']
    text = page.read_text()
    assert '<td>mIoU, %</td><td>71.8</td><td>60</td><td>reached</td>' in text
    assert '<td>AP</td><td>0.4</td><td>0.5</td><td>missed</td>' in text
    assert '<td>from scratch</td><td>33.9</td><td></td><td></td>' in text
    assert '<script>' not in text
    assert 'alt="scenes &amp; truth"' in text
    said = Links(page).text
    assert 'UperNet <script>' in said
    assert '3 of 5 are < 1' in said
    assert f"mmslak demo '{folder}/a b'" in said


def test_both_demos_share_one_page(tmp_path):
    write_page(tmp_path, 'detection', part(tmp_path, 'Detectors', judged=False))
    write_page(tmp_path, 'segmentation', part(tmp_path, 'Old'))
    page = write_page(tmp_path, 'segmentation', part(tmp_path, 'Segmentor'))
    text = page.read_text()
    assert text.index('Segmentor') < text.index('Detectors')
    assert 'Old' not in text
    assert text.count('reached') == 1  # a quick run is not judged
    assert text.count('A quick run') == 1
