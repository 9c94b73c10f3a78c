"""MMEngine's ways to load weights, which run no code of a file."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader

from mmslak.checkpoints.schemes import load_without_code
from mmslak.errors import CheckpointError
from tests.file_server import running
from tests.toy import assert_same, build_runner, records


def test_a_one_cycle_run_resumes(tmp_path):
    """Its function is a name in the file; the one of the scheduler that was built stays."""
    load_without_code()

    def run(**options) -> tuple[dict, dict]:
        runner = build_runner(
            tmp_path,
            save_every=4,
            hooks=[dict(type='mmslak.ExactResumeHook')],
            param_scheduler=[
                dict(type='OneCycleLR', eta_max=0.2, total_steps=8, by_epoch=False),
                dict(type='ConstantMomentum', factor=0.5, begin=2, end=6, by_epoch=False),
            ],
            **options,
        )
        runner.train()
        return records(runner)[-1], runner.optim_wrapper.get_lr()

    whole = run()
    resumed = run(resume=True, load_from=str(tmp_path / 'iter_4.pth'))
    assert_same(resumed, whole)


def download(rank: int, folder: Path, url: str, results) -> None:
    """What a process of a machine of its own gets, of two."""
    os.environ.update(LOCAL_RANK='0')
    torch.hub.set_dir(folder / f'machine{rank}')
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    load_without_code()
    try:
        results.put((rank, list(CheckpointLoader.load_checkpoint(url))))
    except CheckpointError as error:
        results.put((rank, str(error)))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.mark.parametrize('name', ['x.pth', 'missing.pth'])
def test_every_machine_downloads_and_fails_with_the_others(tmp_path, name):
    torch.save({'w': torch.ones(1)}, tmp_path / 'x.pth')
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    with running() as server:
        server.files['/x.pth'] = (tmp_path / 'x.pth').read_bytes()
        arguments = tmp_path, server.url(name), results
        processes = [context.Process(target=download, args=(r, *arguments)) for r in range(2)]
        try:
            for process in processes:
                process.start()
            found = dict(results.get(timeout=100) for _ in processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
    if name == 'x.pth':
        assert found == {0: ['w'], 1: ['w']}
        assert (tmp_path / 'machine1/checkpoints/x.pth').is_file()
    else:
        assert all('missing.pth: 404' in said for said in found.values())
