"""`mmslak env`."""

import re
from importlib import metadata

import mmcv
import torch

import mmslak
from mmslak.cli import env


def test_it_prints_what_is_installed(capsys):
    assert env.main([]) == 0
    lines = dict(
        line.split(': ', 1) for line in capsys.readouterr().out.splitlines() if ': ' in line
    )
    assert lines['mmslak'].startswith(f'{mmslak.__version__}, a clone: ')
    assert lines['PyTorch'] == torch.__version__
    stack = 'onedl-mmcv' if 'onedl-mmcv' in lines else 'mmcv'
    assert lines[stack] == metadata.version(stack) == mmcv.__version__
    assert lines['numpy'] == metadata.version('numpy')
    assert re.search(r'\d+ threads$', lines['CPU'])


def test_it_tells_whether_mmcv_has_its_operators(monkeypatch, capsys):
    try:
        import mmcv.ops  # noqa: F401

        expected = 'compiled'
    except ImportError:
        expected = 'not there ('
    assert env.mmcv_operators().startswith(expected)
    monkeypatch.setitem(__import__('sys').modules, 'mmcv.ops', None)
    assert env.mmcv_operators().startswith('not there (ModuleNotFoundError: ')
