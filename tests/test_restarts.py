"""tools/dist_train.sh on one machine and two, whose processes die: torchrun starts them again."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmslak.checkpoints.files import read_checkpoint
from mmslak.checkpoints.runs import MARKER
from mmslak.cli import runner
from mmslak.cli.runner import set_resume
from mmslak.errors import CheckpointError
from tests.golden import ROOT
from tests.toy import assert_same

CONFIG = """
custom_imports = dict(imports=['restarts'])
model = dict(type='RestartedToy')
train_dataloader = dict(
    batch_size=2, num_workers=1, dataset=dict(type='RestartedData'),
    sampler=dict(type='DefaultSampler', shuffle=True), collate_fn=dict(type='default_collate'))
train_cfg = dict(by_epoch=False, max_iters=8)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))
custom_hooks = [dict(type='Dies')]
randomness = dict(seed=0)
"""
SECONDS = 300  # for what takes 20 on an idle machine


class Launches:
    """Runs of tools/dist_train.sh, on this machine alone, of which no process outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config, self.log = folder, folder / 'config.py', folder / 'log.txt'
        self.config.write_text(CONFIG)

    def start(self, gpus: int, work: Path, *arguments: str, **environment: str) -> subprocess.Popen:
        """One launcher; its output goes to the log."""
        own = dict(
            **dict(PET_LOCAL_ADDR='127.0.0.1', MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo'),
            **dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHON=sys.executable),
            PYTHONPATH=str(ROOT / 'tests'),  # of the modules that the config imports
            LAUNCHED_BY=str(self.folder),
        )
        command = ['tools/dist_train.sh', self.config, str(gpus), '--work-dir', work, *arguments]
        with self.log.open('a') as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **own, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def expect(self, launch: subprocess.Popen, status: int) -> None:
        """Waits for the end."""
        assert launch.wait(SECONDS) == status, self.log.read_text()[-5000:]

    def left(self) -> list[int]:
        """Processes that still run."""
        mark = f'LAUNCHED_BY={self.folder}\0'.encode()
        found = []
        for file in Path('/proc').glob('[0-9]*/environ'):
            with suppress(OSError):  # ended in between, or of another user
                found += [int(file.parent.name)] if mark in file.read_bytes() else []
        return found


@pytest.fixture(scope='module')
def launches(tmp_path_factory) -> Iterator[Launches]:
    launches = Launches(tmp_path_factory.mktemp('launches'))
    yield launches
    try:
        wait_for(lambda: not launches.left())  # data workers see the end of theirs after seconds
    finally:
        for process in launches.left():
            os.kill(process, signal.SIGKILL)


def two_machines(**environment: str) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return dict(NNODES='2', MASTER_PORT=str(probe.getsockname()[1]), **environment)


def ended(work: Path) -> dict:
    """What a run of two processes ended with."""
    checkpoint = read_checkpoint((work / MARKER).read_text())
    assert checkpoint['meta']['iter'] == 8
    assert checkpoint['exact_resume']['world_size'] == 2
    return {key: checkpoint[key] for key in ('state_dict', 'optimizer', 'exact_resume')}


@pytest.fixture(scope='module')
def whole(launches) -> dict:
    """How a run of two machines ends of which nothing dies."""
    work, machines = launches.folder / 'whole', two_machines()
    nodes = [launches.start(1, work, NODE_RANK=rank, **machines) for rank in ('1', '0')]
    for node in nodes:
        launches.expect(node, 0)
    return ended(work)


def test_two_machines(whole):
    assert whole['exact_resume']['place'] == 8


def test_a_worker_that_dies(launches, whole):
    work = launches.folder / 'worker'
    launches.expect(launches.start(2, work, MAX_RESTARTS='1', DIES='worker'), 0)
    assert f'started again: goes on from {work}/iter_4.pth' in launches.log.read_text()
    assert_same(ended(work), whole)


def test_a_machine_that_dies_and_comes_back(launches, whole):
    """The one without the rendezvous; nobody tells the new torchrun that it is not the first."""
    work = launches.folder / 'machine'
    machines = two_machines(MAX_RESTARTS='1', PET_RDZV_CONF='keep_alive_interval=2')
    stays = launches.start(1, work, **machines)
    wait_for(lambda: listens(int(machines['MASTER_PORT'])))
    launches.expect(launches.start(1, work, DIES='agent', **machines), -signal.SIGKILL)
    back = launches.start(1, work, **machines)
    launches.expect(stays, 0)
    launches.expect(back, 0)
    assert launches.log.read_text().count(f'started again: goes on from {work}/iter_4.pth') == 2
    assert_same(ended(work), whole)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) == 0


# ---------------------------------------------------------------- what a run goes on from


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A work folder; there is no launcher."""
    for name in 'MMSLAK_STARTED', 'TORCHELASTIC_MAX_RESTARTS', 'TORCHELASTIC_RESTART_COUNT':
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('LOCAL_RANK', '0')
    return tmp_path / 'work'


def save(path: Path, age: float = 0, damaged: bool = False) -> str:
    """A checkpoint that can be resumed from, written that many seconds ago."""
    path.parent.mkdir(exist_ok=True)
    torch.save(dict(meta={}, state_dict={}, message_hub={}), path)
    if damaged:
        path.write_bytes(path.read_bytes()[:100])
    written = time.time() - age
    os.utime(path, (written, written))
    return str(path)


def gone_on_from(work: Path, resume: str | None, load_from: str | None = None) -> str | None:
    """The file that a run of the tool goes on from."""
    cfg = Config(dict(work_dir=str(work), launcher='none', resume=False, load_from=load_from))
    set_resume(cfg, resume)
    return cfg.load_from if cfg.resume else None


def start_again(monkeypatch, launcher: str) -> None:
    """As what `launcher` starts for the second time, a minute after the first."""
    if launcher == 'script':
        monkeypatch.setenv('MMSLAK_STARTED', str(int(time.time()) - 60))
    else:
        monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')


LAUNCHERS = pytest.mark.parametrize('launcher', ['script', 'torchrun'])


@LAUNCHERS
def test_started_again_it_goes_on_from_its_newest_checkpoint(work, monkeypatch, capsys, launcher):
    """However it was started the first time."""
    start_again(monkeypatch, launcher)
    given = save(work.parent / 'given_1.pth')
    save(work / 'iter_2.pth', 30)
    newest = save(work / 'iter_4.pth', 20)
    save(work / 'iter_6.pth', 10, damaged=True)
    for resume in None, 'auto', given:
        assert gone_on_from(work, resume, given) == newest
        said = capsys.readouterr().out
        assert f'goes on from {newest}' in said
        assert f'passed over {work}/iter_6.pth' in said


@LAUNCHERS
def test_started_again_without_a_checkpoint_it_starts_as_it_did(work, monkeypatch, launcher):
    start_again(monkeypatch, launcher)
    given = save(work.parent / 'given_1.pth')
    assert gone_on_from(work, None) is None
    assert gone_on_from(work, 'auto') is None
    assert gone_on_from(work, given) == given


def test_checkpoints_of_an_earlier_run_are_not_gone_on_from(work, monkeypatch):
    """Unless asked for; nor do they have to be intact."""
    start_again(monkeypatch, 'script')
    given = save(work / 'iter_1.pth', 200)
    newer = save(work / 'iter_3.pth', 100)
    assert gone_on_from(work, None) is None
    assert gone_on_from(work, given) == given
    assert gone_on_from(work, 'auto') == newer
    save(work / 'iter_3.pth', 100, damaged=True)
    save(work / 'iter_1.pth', 200, damaged=True)
    assert gone_on_from(work, None) is None


def test_a_first_start_by_torchrun_is_none_again(work, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    save(work / 'iter_3.pth')
    assert gone_on_from(work, None) is None


@LAUNCHERS
def test_all_damaged_is_no_new_start(work, monkeypatch, launcher):
    start_again(monkeypatch, launcher)
    save(work / 'iter_2.pth', damaged=True)
    with pytest.raises(CheckpointError, match='no intact checkpoint'):
        gone_on_from(work, None)


def find(rank: int, folder: Path, store: str, resume: str | None, results) -> None:
    """What each of two processes goes on from; each on a machine with a disk of its own."""
    os.environ['LOCAL_RANK'] = '0'
    os.chdir(folder / str(rank))
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{store}', rank=rank, world_size=2
    )
    try:
        results.put((rank, gone_on_from(Path('work'), resume)))
    except CheckpointError as error:
        results.put((rank, str(error)))
    results.close()
    results.join_thread()
    os._exit(0)


def found_by_two(folder: Path, resume: str | None) -> list[str | None]:
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    store = tempfile.mktemp(dir=folder)  # a new one, without the addresses of those before
    for rank in 0, 1:
        context.Process(target=find, args=(rank, folder, store, resume, results)).start()
    return [found for _, found in sorted(results.get(timeout=SECONDS) for _ in range(2))]


@pytest.mark.parametrize('resume', [None, 'auto'])
def test_all_processes_go_on_from_the_same(work, monkeypatch, resume):
    """From what the first one finds, by the start of the machine that has run for longest."""
    start_again(monkeypatch, 'script')
    for rank in 0, 1:
        (work.parent / str(rank)).mkdir()
        save(work.parent / f'{rank}/work/iter_2.pth', 30)
    save(work.parent / '1/work/iter_4.pth')  # which the first one does not see
    assert found_by_two(work.parent, resume) == ['work/iter_2.pth'] * 2
    save(work.parent / '0/work/iter_6.pth')
    first, second = found_by_two(work.parent, resume)
    assert first == 'work/iter_6.pth'
    assert 'on a disk that all machines share' in second
    save(work.parent / '0/work/iter_6.pth', damaged=True)
    save(work.parent / '0/work/iter_2.pth', damaged=True)
    for said in found_by_two(work.parent, resume):
        assert 'no intact checkpoint' in said


def test_processes_join_as_mmengine_lets_them(work, monkeypatch):
    """Before the runner is built, which would change how data workers are started."""
    done = []
    monkeypatch.setattr(runner, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(runner, 'set_multi_processing', lambda **given: done.append(given))
    monkeypatch.setattr(
        runner, 'init_dist', lambda launcher, **given: done.append((launcher, given))
    )
    monkeypatch.setenv('RANK', '0')
    several, group = dict(mp_start_method='fork'), dict(backend='nccl', timeout=9)
    env_cfg = dict(mp_cfg=several, dist_cfg=group)
    cfg = Config(dict(work_dir=str(work), launcher='pytorch', env_cfg=env_cfg))
    set_resume(cfg, 'auto')
    assert done == [dict(several, distributed=True), ('pytorch', group)]
