"""tools/cxx_with_header.sh, by which mmcv's operators are compiled."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which('g++')

pytestmark = pytest.mark.skipif(not COMPILER or not shutil.which('flock'), reason='needs g++')


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A header at torch's place, and two files that use it without including it."""
    (tmp_path / 'include/torch').mkdir(parents=True)
    (tmp_path / 'include/torch/types.h').write_text('inline int seven() { return 7; }\n')
    for name in 'ab':
        (tmp_path / f'{name}.cpp').write_text(f'int {name}() {{ return seven(); }}\n')
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Calls the compiler as ninja and setuptools do."""
    environment = dict(os.environ, MMSLAK_CXX=COMPILER, MMSLAK_HEADER=str(folder / 'header.h'))
    command = [str(ROOT / 'tools/cxx_with_header.sh'), *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def compile_file(folder: Path, name: str, *options: str) -> subprocess.Popen:
    flags = ['-O3', '-fPIC', '-Iinclude', '-Winvalid-pch', '-Werror', '-c', '-c', f'{name}.cpp']
    dependencies = ['-MMD', '-MF', f'{name}.o.d']
    return start(folder, *dependencies, *flags, '-o', f'{name}.o', *options)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


def test_jobs_share_a_header_that_is_compiled_once(sources: Path) -> None:
    jobs = [compile_file(sources, name, '-DNAME=_ext') for name in 'ab']
    for job in jobs:
        finish(job)
    made = (sources / 'header.h.gch').stat().st_mtime_ns
    # -Winvalid-pch with -Werror: it would fail if the compiled header did not fit.
    (sources / 'include/torch/types.h').write_text('#error read again')
    finish(compile_file(sources, 'a', '-DNAME=_ext'))
    assert (sources / 'header.h.gch').stat().st_mtime_ns == made


def test_linking_is_left_as_it_is(sources: Path) -> None:
    for name in 'ab':
        finish(compile_file(sources, name))
    finish(start(sources, '-shared', 'a.o', 'b.o', '-o', 'both.so'))
    assert (sources / 'both.so').is_file()


def test_a_file_with_other_options_reads_the_header_itself(sources: Path) -> None:
    finish(compile_file(sources, 'a'))
    finish(start(sources, '-O0', '-Iinclude', '-c', 'b.cpp', '-o', 'b.o'))
    assert (sources / 'b.o').is_file()


def test_an_error_of_the_compiler_is_passed_on(sources: Path) -> None:
    (sources / 'a.cpp').write_text('int a() { return eight(); }\n')
    process = compile_file(sources, 'a')
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'eight' in output
