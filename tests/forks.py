"""Processes that start at once: the imports, most of a start, are done before in a server.

They are forked from it, and not from the process of the tests: they know nothing of earlier tests.
"""

import functools
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import Pipe, connection, forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from tests.golden import ROOT

SECONDS = 250  # for what takes 5 to 20 on an idle machine


@functools.cache
def _server() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where it finds tests/warm.py
        patch.setenv('CUDA_VISIBLE_DEVICES', '')
        forkserver.set_forkserver_preload(['tests.warm'])
        forkserver.ensure_running()


def start(main: Callable, *args: object, log: Path | Connection, **environment: str) -> BaseProcess:
    """Calls a function in a process of its own, in this one's folder and environment.

    Args:
        main: A function at the top of a module; its result is the exit status.
        args: Its arguments.
        log: File or pipe that takes all output.
        environment: More of the environment.
    """
    _server()
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', **environment}
    process = get_context('forkserver').Process(target=_run, args=(log, environment, main, args))
    process.start()
    return process


def _run(log: Path | Connection, environment: dict[str, str], main: Callable, args: tuple) -> None:
    with log.open('a') if isinstance(log, Path) else log as output:
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(main(*args))


class Ended(NamedTuple):
    """Exit statuses, negative for a signal, and the output of all processes."""

    statuses: list[int]
    output: str


def run(main: Callable, *args: object, **environment: str) -> Ended:
    """`start` until it has ended."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, 'log.txt')
        return _wait([start(main, *args, log=log, **environment)], [log])


def in_two_ranks(main: Callable, *args: object, **environment: str) -> Ended:
    """Calls a function in two processes that can form a group.

    As under torchrun, once one fails the other is told to end.
    """
    with ExitStack() as stack:
        probe = stack.enter_context(socket.socket())
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
        probe.close()
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        logs = [Path(folder, f'{rank}.txt') for rank in range(2)]
        processes = [
            start(
                *(main, *args),
                log=log,
                **dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2'),
                **dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, **environment),
            )
            for rank, log in enumerate(logs)
        ]
        return _wait(processes, logs)


def _wait(processes: list[BaseProcess], logs: list[Path]) -> Ended:
    try:
        connection.wait([process.sentinel for process in processes], SECONDS)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            process.kill()
    statuses = [process.exitcode for process in processes]
    return Ended(statuses, ''.join(log.read_text() for log in logs))


def program(path: str, *argv: str) -> None:
    """A script as `python PATH ARGV…` runs it, after `-m` a module, after `-c` code."""
    if path == '-m':
        path, *argv = argv
    sys.argv = [path, *argv]
    if path == '-c':
        exec(sys.argv.pop(1), {'__name__': '__main__'})
    elif Path(path).is_file():
        runpy.run_path(path, run_name='__main__')
    else:
        runpy.run_module(path, run_name='__main__', alter_sys=True)


class Popen:
    """Of subprocess.Popen what `mmslak.cli.run_demo` needs, for `[sys.executable, …]`."""

    def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
        reader, writer = Pipe(duplex=False)
        with reader, writer:
            self._process = start(program, *command[1:], log=writer, **env)
            self.stdout = os.fdopen(os.dup(reader.fileno()), encoding='utf-8', errors='replace')

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> 'Popen':
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join()
        self.stdout.close()


# In the place of the module.
SUBPROCESS = SimpleNamespace(Popen=Popen, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
