"""What the documentation shows exists: links, commands, options, configs, names, numbers."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmslak import config_file, registry
from mmslak.cli.main import COMMANDS
from tests import forks
from tests.golden import ROOT

DOCS = ROOT / 'docs'
PAGES = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')),
    *sorted(DOCS.rglob('*.md')),
    DOCS / 'tutorial.ipynb',
]
CONFIGS = ROOT / 'configs'
FENCED = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
WRITTEN_BY_READERS = {'mmslak/models/dilated.py'}
INDENTED = re.compile(r'(?:^ {4}.*\n)+', re.MULTILINE)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    """The Markdown of a page, that of a notebook's cells too."""
    text = page.read_text(encoding='utf-8')
    if page.suffix != '.ipynb':
        return text
    cells = [c for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown']
    return '\n\n'.join(''.join(cell['source']) for cell in cells)


README = read(ROOT / 'README.md')


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings, as GitHub and mkdocs both make them."""
    headings = re.findall(r'^#+ (.+)$', FENCED.sub('', read(page)), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-') for text in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page whose file or heading is missing."""
    broken = []
    for link in re.findall(r'\]\(([^)\s]+)\)', FENCED.sub('', text)):
        path, _, anchor = link.partition('#')
        target = (page.parent / path) if path else page
        if '://' in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def commands(text: str) -> list[str]:
    """Command lines of a page's code blocks that start a command of ours, without comments."""
    blocks = [body for kind, body in FENCED.findall(text) if kind in ('', 'bash', 'console')]
    blocks += [
        '\n'.join(line[4:] for line in block.splitlines())
        for block in INDENTED.findall(FENCED.sub('', text))
    ]
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return [line for line in lines if re.match(r'(\w+=\S+ )*(mmslak|python|tools/)', line)]


def parser_of(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(f'mmslak.cli.{command.replace("-", "_")}').build_parser()


def arguments(line: str) -> tuple[str, list[str]] | None:
    """The command that a line starts and what its parser gets; None for other programs."""
    words = shlex.split(line, comments=True)
    while '=' in words[0]:
        words.pop(0)
    if words[0] == 'python':
        words = ['mmslak', *words[3:]] if words[1:3] == ['-m', 'mmslak'] else words[1:]
    program, *words = words[: words.index('>')] if '>' in words else words
    if program == 'mmslak':
        return (words[0], words[1:]) if words else None
    script = re.fullmatch(r'tools/(\w+)\.(py|sh)', program)
    if script is None:  # of another folder
        assert (ROOT / program).is_file() or program in ('-c', '-m'), line
        return None
    assert (ROOT / program).is_file(), f'{line}: there is no {program}'
    if script[2] == 'py':
        return script[1].replace('_', '-'), words
    positional = {'dist_train': 2, 'dist_test': 3, 'slurm_train': 3}[script[1]]
    rest = words[positional:]
    given = words[2:3] if script[1] == 'slurm_train' else words[: positional - 1]
    return script[1].partition('_')[2], [*given, *rest]


def fault(line: str) -> str | None:
    """Why a command line of the documentation does not work; None if it does."""
    found = arguments(line)
    if found is None or found[0] in ('COMMAND', '--help', '--version'):
        return None
    command, words = found
    if command not in COMMANDS:
        return f'{line}: no command {command}'
    try:
        parser_of(command).parse_args(words)
    except SystemExit as stop:
        return f'{line}: not understood' if stop.code else None
    return None


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert not broken_links(page, read(page))


def test_a_dead_link_is_found():
    page = DOCS / 'train.md'
    text = '[a](nowhere.md) [b](train.md#nowhere) [c](train.md#on-a-cpu) [d](../README.md#speed)'
    assert broken_links(page, text) == ['nowhere.md', 'train.md#nowhere']


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_commands_are_understood(page):
    assert not [why for line in commands(read(page)) if (why := fault(line))]


@pytest.mark.parametrize(
    ('line', 'works'),
    [
        ('mmslak train CONFIG --resume', True),
        ('mmslak tran CONFIG', False),
        ('mmslak train CONFIG --resum-it', False),
        ('python tools/erf.py CONFIG none --size 80 80   # a comment', True),
        ('python -m mmslak erf CONFIG none --siez 80 80', False),
        ('MAX_RESTARTS=3 tools/dist_train.sh CONFIG 8 --amp', True),
        ('tools/dist_train.sh CONFIG 8 --ampere', False),
    ],
)
def test_a_wrong_command_is_found(line, works, capsys):
    assert commands(f'Type\n\n    {line}\n') == [line]
    assert (fault(line) is None) == works


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_options_in_the_text_exist(page):
    """Of `mmslak COMMAND … --option` and `tools/COMMAND.py --option` between backticks."""
    text = FENCED.sub('', read(page))
    for line in re.findall(r'`((?:mmslak |(?:python )?tools/\w)[^`]+)`', text):
        found = arguments(line)
        if found is None or found[0].startswith(('COMMAND', '-', '…')):
            continue
        assert found[0] in COMMANDS, line
        options = {word for word in found[1] if word.startswith('--') and word != '--help'}
        assert options <= parser_of(found[0])._option_string_actions.keys(), line


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_files_and_configs_exist(page):
    text = read(page)
    for config in re.findall(r'mmslak::([\w/]+)', text):
        assert config == 'NAME' or Path(config_file(f'mmslak::{config}')).is_file(), config
    places = '|'.join(('configs', 'mmslak', 'tools', 'benchmarks', 'tests', 'docs'))
    text = re.sub(r'--out \S+', '', text)  # what a command writes need not be there
    for file in re.findall(rf'(?<![\w/.-])((?:{places})/[\w/.-]*\w)', text):
        assert (ROOT / file).exists() or file in WRITTEN_BY_READERS, file


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_python_names_exist(page):
    """`mmslak.ops.depthwise_conv2d`, `type='mmslak.SLaK'`: importable or registered."""
    for room in ('models', 'engine'):
        importlib.import_module(f'mmslak.{room}')
    registered = {
        key
        for kind in (registry.MODELS, registry.HOOKS, registry.OPTIM_WRAPPER_CONSTRUCTORS)
        for key in kind.module_dict
    }
    text = read(page)
    for dotted in set(re.findall(r'(?<![\w.])mmslak((?:\.[A-Za-z_]\w*)+)', text)):
        first, *rest = dotted.strip('.').split('.')
        if first in registered or f'class {first}(' in text:
            continue
        found = importlib.import_module(f'mmslak.{first}')
        for part in rest:
            if not hasattr(found, part):
                importlib.import_module(f'{found.__name__}.{part}')
            found = getattr(found, part)


def test_commands_page_has_every_command():
    rows = re.findall(
        r'^\| `mmslak ([\w-]+)` \| (.+?) \|', read(DOCS / 'commands.md'), re.MULTILINE
    )
    assert dict(rows) == COMMANDS


def expanded(text: str) -> list[str]:
    """The names that `a_{b,c}.py` stands for."""
    braces = re.search(r'{([^}]+)}', text)
    if braces is None:
        return [text]
    return [
        name
        for choice in braces[1].split(',')
        for name in expanded(text[: braces.start()] + choice + text[braces.end() :])
    ]


def test_configs_page_has_every_config():
    named = {
        config
        for text in re.findall(r'`([\w/{},]+\.py)`', read(DOCS / 'configs.md'))
        for config in expanded(text)
    }
    shipped = {
        path.relative_to(CONFIGS).as_posix()
        for path in CONFIGS.rglob('*.py')
        if '_base_' not in path.parts
    }
    assert named == shipped


@pytest.mark.parametrize('column', [0, 1])
def test_speeds_of_the_readme_are_measured(column):
    operation = ('forward', 'training')[column]
    results = ROOT / 'benchmarks/results/epyc-avx512-2c'  # the machine that the README names
    backbones = json.loads((results / 'backbones_cpu.json').read_text())['ratios'][operation]
    cases = json.loads((results / 'depthwise_cpu.json').read_text())['cases']
    stages = [case for case in cases if case['name'].startswith('SLaK-T at 512')]
    fallback, ours = (
        total(stages, way, operation) for way in ("nn.Conv2d, authors' fallback", 'auto')
    )
    measured = [
        backbones['SLaK-T']['× the time of ConvNeXt-T, both in NCHW'],
        fallback / ours,
    ]
    table = re.search(
        r'^\| \| forward \| training step \|\n.*\n((?:\|.*\n)+)', README, re.MULTILINE
    )
    rows = [re.findall(r'\d+\.\d+', row) for row in table[1].splitlines()]
    assert [float(row[column]) for row in rows] == [pytest.approx(m, rel=5e-3) for m in measured]


def total(stages: list[dict], way: str, operation: str) -> float:
    """Milliseconds of all blocks of SLaK-T, which has 3, 3, 9 and 3 in its stages."""
    times = [stage['milliseconds'][way] for stage in stages]
    times = [one.get('NCHW', one)[operation] for one in times]
    return sum(depth * ms for depth, ms in zip((3, 3, 9, 3), times, strict=True))


@pytest.mark.parametrize('index', range(3))
def test_configs_for_own_data_are_read(index, tmp_path):
    from mmengine.config import Config

    blocks = [
        body for kind, body in FENCED.findall(read(DOCS / 'your-data.md')) if kind == 'python'
    ]
    assert len(blocks) == 3
    path = tmp_path / 'config.py'
    path.write_text(blocks[index])
    cfg = Config.fromfile(path)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root.rstrip('/') == 'data/mine'
        assert loader.dataset.pipeline[0].type == 'LoadImageFromFile'
    classes = re.findall(r"num_classes'?[=:] ?(\d+)", str(cfg.model))
    assert set(classes) == {'2'}


def test_every_page_is_in_the_menu():
    menu = re.findall(r'[\w/-]+\.md', (ROOT / 'mkdocs.yml').read_text())
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob('*.md')]
    assert sorted(menu) == sorted([*pages, 'tutorial.md'])


def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip('mkdocs', reason='the extra `docs` is not installed')
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'tutorial.html').read_text()
    assert 'effective_receptive_field' in page
    assert 'depthwise_conv2d_branches' in (tmp_path / 'api/ops.html').read_text()
    loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="?(https?:[^">\s]+)', page)
    assert not loaded, 'the site is read without a network'


def run_cells(notebook: Path) -> None:
    names = {'__name__': '__main__'}
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'code':
            exec(compile(''.join(cell['source']), cell.get('id', 'cell'), 'exec'), names)
    assert names['zeros'] / names['total'] > 0.39, names['zeros']
    assert names['classes'].shape == names['Image'].open(names['pictures'][0]).size[::-1]


def test_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = forks.run(run_cells, DOCS / 'tutorial.ipynb', MPLBACKEND='Agg')
    assert ended.statuses == [0], ended.output[-4000:]
    assert (tmp_path / 'work_dirs/tutorial/prediction.png').is_file()
    assert 'of the picture' in ended.output
