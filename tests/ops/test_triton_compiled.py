"""The Triton kernels, compiled for GPUs that are not there: what the interpreter cannot tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmslak.ops import triton_backend

ROOT = Path(__file__).parents[2]
TARGETS = {80: 'HMMA', 89: 'HMMA', 90: 'HGMMA', 100: 'UTCHMMA', 120: 'HMMA'}  # by tensor cores
SMALL = (89, 120)  # 99 KB of shared memory for a program
# All dtypes, and the tiles and shapes of a network on five targets: a quarter of an hour.
THOROUGH = os.environ.get('MMSLAK_THOROUGH') == '1'


def compile_for(tmp_path: Path, *options: str) -> list[dict]:
    """What compiled.py says of each launch."""
    try:
        triton_backend._kernels()
    except ValueError as error:
        pytest.skip(str(error))
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])  # of another Triton
    environment = dict(TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET='0', PYTHONPATH=path)
    command = [sys.executable, str(Path(__file__).with_name('compiled.py')), *options]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def count(launch: dict, start: str, end: str = '') -> int:
    """How many instructions begin and end so."""
    found = launch['instructions'].items()
    return sum(n for name, n in found if name.startswith(start) and name.endswith(end))


def check_products(launches: list[dict], stack: int = 0, small: bool = False) -> None:
    """Registers hold all, shared memory suffices, and loads and products are the fast ones."""
    for launch in launches:
        assert launch['stack'] <= stack, launch
        assert launch['shared'] <= (101_376 if launch['arch'] in SMALL else 166_912), launch
        found = count(launch, TARGETS[launch['arch']])
        assert found or (small and count(launch, 'HMMA')), launch  # of fewer than 64 rows
        assert count(launch, 'LDGSTS') == count(launch, 'LDGSTS', '.128') > 0, launch


def test_products_on_every_target(tmp_path):
    only = ['--only', 'convolve', 'march', 'correlate']
    marching = ['--parts', 'f', '--shape', '16', '124', '128', '128', '--tile', '2']
    launches = compile_for(tmp_path, '--parts', 'fb', *only, '+', *marching, *only)
    assert [launch['kernel'] for launch in launches] == [
        *['convolve', 'convolve', 'correlate'] * len(TARGETS),
        *['march', 'march', 'march'] * len(TARGETS),
    ]
    check_products(launches)
    for launch in launches:
        if launch['kernel'] != 'correlate':
            assert count(launch, 'STG') == count(launch, 'STG', '.128') > 0


@pytest.mark.skipif(not THOROUGH, reason='takes a quarter of an hour: MMSLAK_THOROUGH=1')
@pytest.mark.parametrize('tile', ['0', '1', '2'])
@pytest.mark.parametrize('shape', ['16 124 128 128', '16 249 64 64', '16 499 32 32'])
@pytest.mark.parametrize('sizes', ['51x5 5x51 5x5', '51x51', '1x31'])
def test_every_tile_on_every_target(tmp_path, tile, shape, sizes):
    options = ['--shape', *shape.split(), '--sizes', *sizes.split(), '--tile', tile]
    launches = compile_for(tmp_path, *options, '--only', 'convolve', 'march', 'correlate')
    # ptxas gives up two registers for one more warp at times.
    check_products(launches, stack=16, small=shape.endswith(' 32'))


def test_float32_on_hopper(tmp_path):
    options = ['--arch', '90', '--dtype', 'float32', '--parts', 'sb']
    launches = compile_for(tmp_path, *options)
    assert [launch['kernel'] for launch in launches] == [
        *['arrange', 'build_bands', 'convolve', 'arrange', 'build_bands', 'convolve'],
        *['arrange', 'correlate', 'collect'],
    ]
    check_products([one for one in launches if one['kernel'] in ('convolve', 'correlate')])


def test_widths_that_are_no_multiple_of_16(tmp_path):
    """Lines are stored in the largest pieces that their addresses allow."""
    options = ['--arch', '90', '--parts', 'f', '--only', 'convolve', '--shape', '16', '124']
    launches = compile_for(
        tmp_path,
        *[*options, '56', '56', '+', *options, '28', '28', '+'],
        *[*options, '56', '56', '--nhwc', '+', *options, '28', '28', '--nhwc'],
    )
    for launch, size in zip(launches, ['.128', '.64', '.128', '.128'], strict=True):
        assert launch['stack'] == 0
        assert count(launch, 'STG') == count(launch, 'STG', size) > 0, launch


def test_maps_are_copied_in_large_pieces(tmp_path):
    """124 channels are a multiple of 4: in NHWC, pieces of 8 bytes."""
    options = ['--arch', '90', '--shape', '16', '124', '56', '56', '--parts', 'f']
    options += ['--only', 'arrange']
    launches = compile_for(tmp_path, *options, '+', *options, '--nhwc')
    sizes = [('.128', '.128'), ('.64', '.128'), ('.128', '.64')]
    for launch, (load, store) in zip(launches, sizes, strict=True):
        assert count(launch, 'LDG') == count(launch, 'LDG', load) > 0, launch
        assert count(launch, 'STG') == count(launch, 'STG', store) > 0, launch
