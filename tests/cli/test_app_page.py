"""The page of `mmslak app` in a browser: one server with tiny models, for all tests."""

import io
import re
import socket
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmslak.cli import app
from tests import forks
from tests.analysis.test_report import BROWSER, FLAGS
from tests.cli.test_analysis_commands import DETECTOR, SEGMENTOR, TINY, save
from tests.cli.test_analysis_commands import options as parsed
from tests.cli.test_app import bad_pictures, data  # noqa: F401
from tests.golden import ROOT

pytest.importorskip('gradio', reason='the extra `app` is not installed')
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason='no Chromium or Chrome here: MMSLAK_BROWSER=1 make env gets one'
)
SECONDS = 30


class Server(NamedTuple):
    """A running `mmslak app`: its address, and the file of its output."""

    address: str
    log: Path


def write_config(path: Path, base: str, options: list[str]) -> str:
    """A config on another one, with the settings of `--cfg-options`."""
    cfg = Config.fromfile(ROOT / base)
    cfg.merge_from_dict(parsed(options))
    cfg.dump(path)
    return str(path)


@pytest.fixture(scope='module')
def server(data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp('app')
    (folder / 'data').mkdir()
    (folder / 'data/digit_scenes').symlink_to(data)
    segmentor = write_config(folder / 'segmentor.py', SEGMENTOR, TINY)
    checkpoint = save(folder / 'iter_1.pth', segmentor, [])
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    words = [segmentor, str(checkpoint), segmentor, 'none', str(ROOT / DETECTOR), 'none']
    words += ['--names', 'saved', 'random', 'detector', '--device', 'cpu']
    words += ['--port', port, '--max-upload', '1']
    log = folder / 'log.txt'
    log.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        process = forks.start(app.main, words, log=log, TMPDIR=str(folder))
    end = time.monotonic() + 100
    while 'mmslak app:' not in log.read_text():
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    yield Server(f'http://127.0.0.1:{port}', log)
    process.terminate()
    process.join(10)
    assert process.exitcode == 0, log.read_text()
    assert 'Traceback' not in log.read_text()
    assert not list(folder.glob('mmslak_app_*'))  # uploads are gone


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield running
        running.close()


class Client:
    """A page of one visitor, ready with its first answer."""

    def __init__(self, browser: object, address: str, width: int = 1280) -> None:
        context = browser.new_context(viewport=dict(width=width, height=900))
        self.page = context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.asked: list[str] = []
        self.page.on('request', lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.wait('Row ')

    def text(self) -> str:
        return self.page.inner_text('#place-text')

    def wait(self, text: str) -> str:
        """Waits until the text on a place has something, and returns it."""
        self.page.wait_for_function(
            "text => document.querySelector('#place-text')?.innerText.includes(text)", arg=text
        )
        return self.text()

    def source(self, name: str) -> str | None:
        """Address of a picture; it changes with its content."""
        image = self.page.query_selector(f'#{name} img')
        return image and image.get_attribute('src')

    def changed(self, name: str, before: str | None) -> str:
        """Waits until a picture is another one."""
        self.page.wait_for_function(
            '([name, before]) => { const i = document.querySelector(`#${name} img`);'
            ' return i && i.complete && i.naturalWidth && i.getAttribute("src") !== before }',
            arg=[name, before],
        )
        return self.source(name)

    def pixels(self, name: str) -> np.ndarray:
        """(H, W, 3) of a picture."""
        body = self.page.request.get(self.page.eval_on_selector(f'#{name} img', 'i => i.src'))
        return np.asarray(Image.open(io.BytesIO(body.body())).convert('RGB'))

    def times(self) -> int:
        """How many times larger the prediction is sent than the picture is."""
        rows = int(re.search(r'of (\d+) rows', self.text())[1])
        return self.pixels('prediction').shape[0] // rows

    def click(self, row: int, column: int) -> str:
        """Clicks a pixel of the prediction, and waits for the answer."""
        self.start_click(row, column)
        return self.wait(f'Row {row}, column {column} of')

    def start_click(self, row: int, column: int) -> None:
        """Clicks a pixel of the prediction."""
        image, times = self.page.locator('#prediction img'), self.times()
        box = image.bounding_box()
        height, width = self.pixels('prediction').shape[:2]
        scale = min(box['width'] / width, box['height'] / height, 1)  # it can have a border
        x = (box['width'] - scale * width) / 2 + (column + 0.4) * times * scale
        y = (box['height'] - scale * height) / 2 + (row + 0.4) * times * scale
        image.click(position=dict(x=x, y=y))

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture(scope='module')
def client(server, browser):
    visitor = Client(browser, server.address)
    yield visitor
    visitor.close()


def test_the_page_begins_with_an_answer(client):
    assert client.changed('prediction', None)
    assert client.changed('truth', None)
    assert client.changed('field', None)
    assert client.changed('field2', None)
    found = client.page.inner_text('#found')
    assert 'share' in found
    assert 'GMACs dense' in found
    assert 'saved' in client.text()
    assert 'random' in client.text()


def test_an_example_is_chosen(client):
    before = client.source('prediction'), client.source('truth')
    client.page.locator('#examples button.thumbnail-item').nth(1).click()
    assert client.changed('prediction', before[0])
    assert client.changed('truth', before[1])


def test_the_field_moves_with_the_click(client):
    client.changed('field', None)
    size = client.pixels('prediction').shape
    for at in ((12, 30), (30, 12)):
        before = client.source('field')
        client.click(*at)
        client.changed('field', before)
        field = client.pixels('field')
        assert field.shape == size
        times = client.times()
        row, column = (times * position + times // 2 for position in at)
        assert (field[row, column - 3] == 255).all()  # the cross
        assert (field[row + 3, column] == 255).all()
    assert client.page.input_value('#row input') == '30'


def test_the_keyboard_looks_at_a_place(client):
    page = client.page
    page.focus('#row input')
    for key in ('Control+A', '7', 'Tab', 'Control+A', '9', 'Enter'):
        page.keyboard.press(key)
    client.wait('Row 7, column 9 of')
    page.focus('#row input')
    page.keyboard.press('Control+A')
    page.keyboard.type('11')
    page.focus('#look')
    page.keyboard.press('Enter')
    client.wait('Row 11, column 9 of')


def choose(client: Client, name: str, value: str) -> None:
    """Chooses in a list by the keyboard alone."""
    client.page.focus(f'#{name} input')
    client.page.keyboard.press('Control+A')
    client.page.keyboard.type(value)
    client.page.keyboard.press('Enter')


def test_the_second_model_and_the_stage(client):
    choose(client, 'other', '(none)')
    client.page.wait_for_selector('#field2', state='hidden')
    assert 'random' not in client.text()
    before = client.source('field')
    choose(client, 'stage', 'stage 0')
    before = client.changed('field', before)
    client.page.get_by_label('linear').check()
    client.changed('field', before)
    choose(client, 'other', 'random')
    client.page.wait_for_selector('#field2 img')
    client.wait('random')


def test_a_threshold_and_another_model(client):
    choose(client, 'model', 'detector')
    client.page.wait_for_function("document.querySelector('#found').innerText.includes('objects')")
    slider = client.page.locator('#threshold input[type=range]')
    slider.focus()
    client.page.keyboard.press('End')
    client.page.wait_for_function(
        "document.querySelector('#found').innerText.includes('0 objects')"
    )
    client.page.keyboard.press('Home')
    client.page.wait_for_function(
        "/[1-9]\\d* objects/.test(document.querySelector('#found').innerText)"
    )
    choose(client, 'model', 'saved')
    client.page.wait_for_function("document.querySelector('#found').innerText.includes('share')")


def test_pictures_of_ones_own(client, tmp_path):
    before = client.source('prediction')
    upload = client.page.locator('#upload input[type=file]')
    Image.effect_noise((90, 60), 90).save(tmp_path / 'mine.png')
    upload.set_input_files(tmp_path / 'mine.png')
    client.changed('prediction', before)
    client.page.wait_for_selector('#truth', state='hidden')
    client.wait('Row 30, column 45 of 60 rows and 90 columns')


def test_what_is_no_picture_is_told_on_the_page(client, server, tmp_path):
    text, *_ = bad_pictures(tmp_path)
    for path, says in (
        (text, 'text.jpg: not a picture that can be read'),
        (tmp_path / 'cut.jpg', 'cut.jpg: truncated'),
        (tmp_path / 'large.png', 'size'),
    ):
        if path.stem == 'large':
            Image.effect_noise((1500, 1500), 90).save(path)
        remove = client.page.locator('#upload button[aria-label="Clear"]')
        if remove.count():
            remove.click()
        client.page.locator('#upload input[type=file]').set_input_files(path)
        message = client.page.locator('.toast-body').last
        message.wait_for()
        assert says in message.inner_text()
        client.page.locator('.toast-close').last.click()
        message.wait_for(state='detached')
    assert 'Traceback' not in server.log.read_text()
    client.click(10, 10)  # the picture before is still there


def test_kernels(client):
    client.page.get_by_role('button', name='Kernels').first.click()
    client.page.click('#show-kernels')
    client.page.wait_for_selector('#kernels-text img')
    assert 'vertical' in client.page.inner_text('#kernels-text')
    client.page.click('#show-training')
    client.page.wait_for_function(
        "document.querySelector('#kernels-text').innerText.includes('iter_1.pth')"
    )


def test_two_clients_at_once(client, server, browser):
    """Each gets the answers to its own clicks, on its own picture, all of them."""
    other = Client(browser, server.address)
    assert other.pixels('prediction').shape != client.pixels('prediction').shape
    sizes = [c.pixels('prediction').shape for c in (client, other)]
    places = [[(5, 6), (15, 16), (25, 26)], [(30, 8), (20, 9), (10, 10)]]
    for turn in range(3):
        for visitor, clicks in zip((client, other), places):
            visitor.start_click(*clicks[turn])
    for visitor, clicks, size in zip((client, other), places, sizes):
        row, column = clicks[-1]
        assert visitor.wait(f'Row {row}, column {column} of')
        visitor.page.wait_for_timeout(300)
        assert visitor.text().startswith(f'Row {row}, column {column} of')
        assert visitor.pixels('field').shape == size
    other.close()


def test_nothing_is_asked_of_another_host(client, server):
    own = urlparse(server.address).netloc
    others = {url for url in client.asked if urlparse(url).scheme not in ('data', 'blob')}
    assert {urlparse(url).netloc for url in others} == {own}


def test_files_of_the_machine_are_not_served(client, server):
    for path in (server.log, ROOT / 'setup.py', Path('/etc/hostname')):
        answer = client.page.request.get(f'{server.address}/gradio_api/file={path}')
        assert answer.status == 403, path


def test_all_controls_have_names(client):
    """As a screen reader sees the page."""
    if not client.page.is_visible('#layer'):
        client.page.get_by_role('button', name='Kernels').first.click()
    client.page.wait_for_selector('#layer')
    session = client.page.context.new_cdp_session(client.page)
    nodes = session.send('Accessibility.getFullAXTree')['nodes']
    roles = {'button', 'combobox', 'textbox', 'spinbutton', 'slider', 'radio', 'checkbox', 'link'}
    found = {}
    for node in nodes:
        role = node.get('role', {}).get('value')
        if not node['ignored'] and role in roles:
            found.setdefault(role, []).append(node['name']['value'])
    assert all(name.strip() for names in found.values() for name in names), found
    for name in ('Model', 'Second model', 'Feature map', 'Layer'):
        assert name in found['combobox']
    for name in ('Row of the place', 'Column of the place'):
        assert name in found['spinbutton']


def test_the_page_fits_wide_and_narrow_screens(client, browser, server):
    narrow = Client(browser, server.address, width=400)
    for visitor, width in ((client, 1280), (narrow, 400)):
        assert visitor.page.evaluate('document.scrollingElement.scrollWidth') <= width
        for name in ('model', 'upload', 'examples', 'opacity', 'prediction', 'look', 'field'):
            box = visitor.page.locator(f'#{name}').bounding_box()
            assert box['x'] >= 0
            assert box['x'] + box['width'] <= width
            assert box['width'] >= 100
    narrow.click(20, 20)
    narrow.close()
