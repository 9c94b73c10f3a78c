"""tools/train.py and tools/test.py end to end on miniatures, and what they say to bad input."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmslak.apis.config import read_config
from mmslak.apis.options import apply_options
from mmslak.checkpoints import files, torch_file
from mmslak.cli import runner
from mmslak.cli.runner import enable_amp, enable_tta
from mmslak.errors import UserError
from tests import forks, miniatures
from tests.golden import ROOT

CONFIG = 'configs/upernet_slak_t_ade20k.py'
# The shipped config at the size of a miniature: nothing but --cfg-options.
SMALL = [
    'model.backbone.init_cfg=None',
    'model.backbone.width_factor=0.1',
    'model.backbone.kernel_sizes=13,11,9,7',
    'model.decode_head.in_channels=9,19,38,76',
    'model.decode_head.channels=16',
    'model.auxiliary_head.in_channels=38',
    'model.auxiliary_head.channels=8',
    'model.data_preprocessor.size=(64,64)',
    'model.test_cfg.crop_size=(64,64)',
    'model.test_cfg.stride=(48,48)',
    'train_dataloader.dataset.pipeline.2.scale=(128,64)',
    'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
    'val_dataloader.dataset.pipeline.1.scale=(128,64)',
    'test_dataloader.dataset.pipeline.1.scale=(128,64)',
    'train_dataloader.batch_size=2',
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
    'test_dataloader.num_workers=0',
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
    'env_cfg.cudnn_benchmark=False',
    'randomness.seed=0',
]


def load_main(name: str) -> Callable:
    """`main` of a command, to be called in this process: most of its time is its imports."""
    return importlib.import_module(f'mmslak.cli.{name}').main


train_tool, evaluate_tool = load_main('train'), load_main('test')


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """The commands of the README are run from the repository's root, on the CPU here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, 'get_device', lambda: 'cpu')
    monkeypatch.setenv('LOCAL_RANK', '0')


def run(*command: str | Path) -> subprocess.CompletedProcess:
    """A command in a process of its own, as a user runs it, without GPUs."""
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHON': sys.executable}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def saved(path: Path) -> dict:
    """A checkpoint that one of these tests has written."""
    return torch.load(path, map_location='cpu', weights_only=False)


@pytest.fixture(scope='module')
def ade(tmp_path_factory) -> Path:
    return miniatures.write_ade20k(tmp_path_factory.mktemp('ade') / 'ADEChallengeData2016')


@pytest.fixture(scope='module')
def small(ade) -> list[str]:
    """The command line's end that makes the shipped config small."""
    return ['--cfg-options', f'data_root={ade}', *SMALL]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, small) -> tuple[Path, subprocess.CompletedProcess]:
    """Work folder and output of `python tools/train.py CONFIG`: two iterations and a validation."""
    work_dir = tmp_path_factory.mktemp('trained')
    return work_dir, run(sys.executable, 'tools/train.py', CONFIG, '--work-dir', work_dir, *small)


# ---------------------------------------------------------------- what works


def test_train_runs_and_validates(trained):
    work_dir, process = trained
    assert process.returncode == 0, process.stderr[-2000:]
    log = process.stdout + process.stderr
    assert re.search(r'Iter\(train\) \[2/2\].* loss: \d', log)
    for noise in ('OneDL', '`reduce_zero_label` will', 'faster_coco_eval', 'FileClient'):
        assert noise not in log
    before = process.stdout.partition('Iter(train)')[0].splitlines()
    assert len(before) < 60, process.stdout  # the census has its table
    (file,) = work_dir.glob('*/*.log')
    assert f'log file, with the environment and the whole config: {file}' in before
    for listing in ('System environment:', '\nmodel = dict(', 'Hooks will be executed'):
        assert listing in file.read_text()
        assert listing not in process.stdout
    assert re.search(r'Iter\(val\) \[2/2\].* mIoU: \d', log)
    checkpoint = saved(work_dir / 'iter_2.pth')
    assert checkpoint['meta']['iter'] == 2
    assert checkpoint['state_dict']['decode_head.conv_seg.weight'].shape[0] == 150


def test_test_prints_scores_and_keeps_predictions(trained, small, ade, tmp_path):
    work_dir, process = trained
    validated = re.search(r'mIoU: ([\d.]+)', process.stdout + process.stderr)[1]
    ended = forks.run(
        *[forks.program, 'tools/test.py', CONFIG, f'{work_dir}/iter_2.pth'],
        *['--work-dir', f'{tmp_path}/work', '--out', f'{tmp_path}/out'],
        *['--show-dir', f'{tmp_path}/pictures', *small],
    )
    assert ended.statuses == [0], ended.output[-2000:]
    printed = re.search(r'^mIoU: ([\d.]+)$', ended.output, re.MULTILINE)[1]
    assert float(printed) == pytest.approx(float(validated), abs=0.01)
    assert ended.output.count('mIoU: ') == 1  # and nobody else has printed it
    assert re.search(r'^aAcc: \d+(\.\d{1,4})?$', ended.output, re.MULTILINE)  # rounded
    names = sorted(path.name for path in (ade / 'annotations/validation').iterdir())
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == names
    for name in names:
        predicted, truth = (
            cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED)
            for folder in (tmp_path / 'out', ade / 'annotations/validation')
        )
        assert predicted.shape == truth.shape
        assert 1 <= predicted.min() <= predicted.max() <= 150  # ADE20K's own numbers
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == len(names)


def test_test_time_augmentation(trained, small, tmp_path, capsys, monkeypatch):
    from mmseg.models import SegTTAModel

    views = []
    merge = SegTTAModel.merge_preds

    def merge_preds(self, samples: list) -> list:
        views.extend(len(views_of_one) for views_of_one in samples)
        return merge(self, samples)

    monkeypatch.setattr(SegTTAModel, 'merge_preds', merge_preds)
    argv = [CONFIG, f'{trained[0]}/iter_2.pth', '--work-dir', str(tmp_path), '--tta', *small]
    assert evaluate_tool([*argv, 'model.test_cfg.mode=whole']) == 0
    assert views == [12, 12]  # two pictures at six scales, each also flipped
    assert re.search(r'^mIoU: \d', capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ('library', 'dataset', 'model'),
    [
        ('mmseg', 'ade20k', 'SegTTAModel'),
        ('mmdet', 'voc0712', 'DetTTAModel'),
        ('mmpretrain', 'imagenet_bs64', 'AverageClsScoreTTA'),
    ],
)
def test_default_test_time_augmentation(config, library, dataset, model):
    """Flips where a config names nothing; unflipped first, since the annotations of that stay."""
    base = f"_base_ = ['{library}::_base_/datasets/{dataset}.py']\nmodel = dict(type='Some')\n"
    cfg = read_config(str(config(base + f"default_scope = '{library}'")))
    cfg.pop('tta_pipeline', None)
    enable_tta(cfg)
    assert cfg.model.type == model
    assert cfg.model.module.type == 'Some'
    *_, augment = cfg.test_dataloader.dataset.pipeline
    flips, [pack] = augment.transforms
    assert [flip.prob for flip in flips] == [0.0, 1.0]
    assert pack.type.startswith('Pack')
    assert 'meta_keys' not in pack


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The checkpoints that are read with all their bytes, in order."""
    paths, load = [], torch_file.load

    def counted(path: Path, tensors: bool = True) -> object:
        paths.extend([path] * tensors)
        return load(path, tensors)

    monkeypatch.setattr(torch_file, 'load', counted)
    return paths


def test_test_reads_its_file_once(trained, small, tmp_path, reads):
    path = trained[0] / 'iter_2.pth'
    assert evaluate_tool([CONFIG, str(path), '--work-dir', str(tmp_path), *small]) == 0
    assert reads == [path]
    assert files._kept == {}


@pytest.mark.parametrize('how', ['auto', 'path'])
def test_resume_goes_on(trained, small, tmp_path, reads, how):
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    shutil.copy(trained[0] / 'iter_2.pth', work_dir)
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_2.pth'))
    resume = ['--resume'] if how == 'auto' else ['--resume', str(work_dir / 'iter_2.pth')]
    options = ['train_cfg.max_iters=3', 'default_hooks.checkpoint.interval=3']
    argv = [CONFIG, '--work-dir', str(work_dir), '--no-validate', *resume, *small, *options]
    assert train_tool(argv) == 0
    assert reads == [work_dir / 'iter_2.pth']  # once by this process
    assert files._kept == {}, 'its memory is not free'
    log = next(work_dir.glob('*/*.log')).read_text()
    assert re.search(r'Iter\(train\) \[3/3\]', log)
    assert not re.search(r'Iter\(train\) \[[12]/3\]', log), 'started from the beginning'
    steps = {
        state['step'].item()
        for state in saved(work_dir / 'iter_3.pth')['optimizer']['state'].values()
    }
    assert steps == {3}


def test_resume_without_a_checkpoint_starts_from_the_beginning(small, tmp_path, capsys):
    argv = [CONFIG, '--work-dir', str(tmp_path), '--no-validate', '--resume', *small]
    assert train_tool([*argv, 'train_cfg.max_iters=1', 'default_hooks.checkpoint.interval=1']) == 0
    assert f'no checkpoint in {tmp_path}' in capsys.readouterr().out
    assert saved(tmp_path / 'iter_1.pth')['meta']['iter'] == 1


def test_auto_scale_lr(trained, small, tmp_path):
    argv = [CONFIG, '--work-dir', str(tmp_path), '--no-validate', '--auto-scale-lr', *small]
    assert train_tool(argv) == 0

    def rates(path: Path) -> np.ndarray:
        groups = saved(path)['optimizer']['param_groups']
        return np.array([group['initial_lr'] for group in groups])

    # Two pictures in a batch, where the published rate is for 16.
    ratio = rates(tmp_path / 'iter_2.pth') / rates(trained[0] / 'iter_2.pth')
    np.testing.assert_allclose(ratio, 2 / 16)


def test_two_processes_on_the_cpu(small, tmp_path):
    options = ['--launcher', 'pytorch', '--work-dir', str(tmp_path), *small]
    ended = forks.in_two_ranks(train_tool, [CONFIG, *options])
    assert ended.statuses == [0, 0], ended.output[-2000:]
    # Each of the two processes validated one of the two pictures.
    assert re.search(r'Iter\(val\) \[1/1\].* mIoU: \d', ended.output)
    assert saved(tmp_path / 'iter_2.pth')['meta']['iter'] == 2
    ended = forks.in_two_ranks(evaluate_tool, [CONFIG, f'{tmp_path}/iter_2.pth', *options])
    assert ended.statuses == [0, 0], ended.output[-2000:]
    assert len(re.findall(r'^mIoU: ', ended.output, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ('environment', 'nodes'),
    [
        (dict(), '--standalone'),
        (
            dict(NNODES='2', MASTER_ADDR='10.0.0.1', NODE_RANK='1'),
            '--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500',
        ),
    ],
)
def test_script_that_tests_with_several_processes(tmp_path, monkeypatch, environment, nodes):
    """What it calls; the same options are run by dist_train.sh in test_restarts.py."""
    (tmp_path / 'python').write_text('#!/bin/bash\necho "$@"')
    (tmp_path / 'python').chmod(0o755)
    for name, value in dict(environment, PYTHON=str(tmp_path / 'python')).items():
        monkeypatch.setenv(name, value)
    command = ['tools/dist_test.sh', CONFIG, 'x.pth', '2', '--tta']
    called = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert called == (
        f'-m torch.distributed.run {nodes} --nproc-per-node 2 {ROOT}/tools/test.py {CONFIG} x.pth '
        '--launcher pytorch --tta\n'
    )


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Callable:
    """Stubs of Slurm's commands that note their arguments; returns what was noted, by command."""
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    for name in ('sbatch', 'srun', 'scontrol'):
        (tmp_path / name).write_text(
            f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\n'
            + ('eval "$SRUN_DOES"' if name == 'srun' else '')
        )
        (tmp_path / name).chmod(0o755)

    def called(name: str) -> list[str] | None:
        file = tmp_path / f'{name}.txt'
        return file.read_text().splitlines() if file.is_file() else None

    return called


ARGUMENTS = ('part', 'name', CONFIG, '--cfg-options', 'a=(1, 2)', 'b=3')


def test_slurm_script_submits_itself(slurm, monkeypatch):
    monkeypatch.setenv('GPUS', '4')
    monkeypatch.setenv('SBATCH_ARGS', '--time=1:00:00 --account=a')
    assert run('tools/slurm_train.sh', *ARGUMENTS).returncode == 0
    parts = slurm('sbatch')
    assert parts[:4] == ['--partition', 'part', '--job-name', 'name']
    assert parts[parts.index('--ntasks') + 1] == '4'
    assert parts[parts.index('--gres') + 1] == 'gpu:4'
    assert {'--time=1:00:00', '--account=a'} < set(parts)
    assert parts[-len(ARGUMENTS) - 1 :] == [str(ROOT / 'tools/slurm_train.sh'), *ARGUMENTS]
    assert slurm('srun') is None
    directives = (ROOT / 'tools/slurm_train.sh').read_text().split('set -euo')[0]
    for directive in ('--requeue', '--open-mode=append', '--signal=B:TERM@120'):
        assert f'\n#SBATCH {directive}\n' in directives  # Slurm reads them before any command


@pytest.mark.parametrize('restarts', [0, 2])
def test_slurm_job_trains_and_resumes_after_a_restart(slurm, monkeypatch, restarts):
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    monkeypatch.setenv('SLURM_RESTART_COUNT', str(restarts))
    monkeypatch.setenv('SRUN_ARGS', '--label')
    monkeypatch.setenv('SRUN_DOES', 'exit 3')
    assert run('tools/slurm_train.sh', *ARGUMENTS).returncode == 3
    parts = slurm('srun')
    assert '--label' in parts
    tail = [CONFIG, '--launcher', 'slurm', *ARGUMENTS[3:], *(['--resume'] if restarts else [])]
    assert parts[-len(tail) :] == tail
    assert slurm('scontrol') is None  # failed, and would fail again


@pytest.mark.parametrize(
    ('statuses', 'ends_with'),
    [
        ((137, 1, 0), 0),  # a task that dies, another that fails for it
        ((137, 137, 137, 0), 137),  # more often than asked for
        ((137, 2, 0), 2),  # what the user has to put right
    ],
)
def test_slurm_job_starts_again_when_a_task_has_died(
    slurm, monkeypatch, tmp_path, statuses, ends_with
):
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    monkeypatch.setenv('MAX_RESTARTS', '2')
    (tmp_path / 'statuses').write_text('\n'.join(map(str, statuses)))
    monkeypatch.setenv(
        'SRUN_DOES',
        f'cd {tmp_path}; echo $MMSLAK_STARTED >> starts\n'
        'exit $(sed -n $(wc -l < starts)p statuses)',
    )
    before = time.time()
    assert run('tools/slurm_train.sh', *ARGUMENTS).returncode == ends_with
    starts = (tmp_path / 'starts').read_text().split()
    assert len(starts) == (2 if ends_with == 2 else 3)
    assert len(set(starts)) == 1  # of the job: what it has written is gone on from
    assert before < int(starts[0]) < time.time() + 2
    assert slurm('scontrol') is None


@pytest.mark.parametrize(('status', 'requeued'), [(143, True), (0, False), (2, False)])
def test_slurm_job_goes_back_to_the_queue(slurm, monkeypatch, tmp_path, status, requeued):
    """On SIGTERM to the batch script alone, as Slurm sends it: `--signal=B:…`."""
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    monkeypatch.setenv(
        'SRUN_DOES',
        f"trap 'sleep 0.2; touch {tmp_path}/told; exit {status}' TERM; touch {tmp_path}/started; "
        'for i in {1..200}; do sleep 0.05; done',
    )
    environment = {**os.environ, 'PYTHON': sys.executable}
    job = subprocess.Popen([str(ROOT / 'tools/slurm_train.sh'), *ARGUMENTS], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / 'started').exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.terminate()
    assert job.wait(60) == status
    assert (tmp_path / 'told').exists()
    assert slurm('scontrol') == (['requeue', '7'] if requeued else None)


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def refused(capsys, tmp_path) -> Callable:
    """Runs a tool on bad input; returns the one line that it says."""

    def call(main: Callable, *argv: str | Path) -> str:
        assert main([*map(str, argv), '--work-dir', str(tmp_path / 'work')]) == 2
        captured = capsys.readouterr()
        assert 'Traceback' not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith('error: ')]
        assert len(errors) == 1
        assert captured.err.splitlines()[-1] == errors[0]
        return errors[0]

    return call


@pytest.fixture
def config(tmp_path) -> Callable:
    """Writes a config file."""

    def write(text: str, name: str = 'config.py') -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_error_is_one_line_and_status_2():
    process = run(sys.executable, 'tools/train.py', 'configs/none.py')
    assert process.returncode == 2
    assert process.stderr.startswith('error: config configs/none.py not found')
    assert len(process.stderr.splitlines()) == 1


MISTAKES = {
    "type='mmslak.SparseTrainingHok'": 'mmslak.SparseTrainingHok is not in the',
    "type='mmslak.SparseTrainingHook', preset='slak-t'": "unknown preset 'slak-t'",
    "type='mmslak.SparseTrainingHook', sparsty=0.4": "unexpected keyword argument 'sparsty'",
    "type='mmslak.SparseTrainingHook', sparsity=40": 'sparsity: expected a number in [0, 1)',
}
NOT_OF_THIS_RUN = {
    "type='mmslak.SparseTrainingHook', include='backbnoe'": 'no parameter to mask',
    "type='mmslak.SparseTrainingHook', update_interval=3": 'longer than the run of 2',
}


@pytest.mark.parametrize('hook', [*MISTAKES, *NOT_OF_THIS_RUN])
def test_mistake_in_a_hook(refused, config, small, hook):
    file = config(f'_base_ = ["{ROOT / CONFIG}"]\ncustom_hooks = [dict({hook})]')
    message = refused(train_tool, file, *small)
    assert {**MISTAKES, **NOT_OF_THIS_RUN}[hook] in message
    assert (f'config {file} cannot be built' in message) == (hook in MISTAKES)


def test_mistake_in_the_model(refused, config, small, trained):
    file = config(f'_base_ = ["{ROOT / CONFIG}"]\nmodel = dict(backbone=dict(type="mmslak.SLak"))')
    for tool in ([train_tool, file], [evaluate_tool, file, trained[0] / 'iter_2.pth']):
        message = refused(*tool, *small)
        assert f'config {file} cannot be built: KeyError' in message
        assert 'mmslak.SLak is not in the' in message


def test_a_bug_keeps_its_traceback(config, small, tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise ValueError('bug')

    monkeypatch.setattr(runner.Runner, 'build_train_loop', bug)
    with pytest.raises(ValueError, match=r'^bug$') as caught:
        train_tool([CONFIG, '--work-dir', str(tmp_path), *small])
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize('base', ['upernet_r50', 'fpn_r50'])
@pytest.mark.parametrize('scope', ['mmslak.', ''])
def test_pretrained_weights_of_the_base(refused, config, small, base, scope, tmp_path):
    """mmseg would hand them to the backbone that has replaced ResNet, and that to its class."""
    backbone = f'_delete_=True, type="{scope}SLaK"' + ('' if scope else ', _scope_="mmslak"')
    file = config(
        f'_base_ = ["mmseg::_base_/models/{base}.py", "mmseg::_base_/datasets/ade20k.py",\n'
        '"mmseg::_base_/default_runtime.py", "mmseg::_base_/schedules/schedule_160k.py"]\n'
        f'model = dict(backbone=dict({backbone}))'
    )
    (tmp_path / 'some.pth').touch()
    for tool in ([train_tool, file], [evaluate_tool, file, tmp_path / 'some.pth']):
        message = refused(*tool)
        assert 'model.pretrained is open-mmlab://resnet50_v1c' in message
        assert '--cfg-options model.pretrained=None' in message
        message = refused(*tool, '--cfg-options', 'model.pretrained=None')
        assert 'model.pretrained' not in message


def test_config_not_found_names_a_near_one(refused):
    message = refused(train_tool, 'configs/upernet_slak_tiny_ade20k.py')
    assert 'configs/upernet_slak_tiny_ade20k.py not found' in message
    assert f'did you mean {CONFIG}?' in message


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('model = dict(', 'SyntaxError'),
        ('model = undefined', 'undefined'),
        ("_base_ = ['nowhere.py']\nmodel = dict()", 'nowhere.py'),
        ("_base_ = ['mmseg::a/nowhere.py']\nmodel = dict()", 'nowhere.py'),
        ('x = 1', 'has no model'),
        ("model = dict()\ndefault_scope = 'mmnowhere'", 'mmnowhere is not installed'),
        ("model = dict()\ndefault_scope = 'mmseg'", 'no train_dataloader'),
    ],
)
def test_broken_config(refused, config, text, says):
    assert says in refused(train_tool, config(text))


@pytest.mark.parametrize(
    ('option', 'nearest'),
    [
        ('model.backbone.archh=tiny', 'model.backbone.arch'),
        ('modle.backbone.arch=tiny', 'model.backbone.arch'),
        ('train_dataloader.batchsize=1', 'train_dataloader.batch_size'),
        ('train_dataloader.dataset.indicez=1', 'train_dataloader.dataset.indices'),
        ('train_cfg.max_iter=1', 'train_cfg.max_iters'),
        ('randomness.sead=1', 'randomness.seed'),
        ('model.test_cfg.strides=(1,1)', 'model.test_cfg.stride'),
        ('optim_wrapper.optimiser.lr=1', 'optim_wrapper.optimizer'),
        ('param_scheduler.0.begn=1', 'param_scheduler.0.begin'),
        ('default_hooks.checkpoint.intervall=1', 'default_hooks.checkpoint.interval'),
        ('auto_scale_lr.base_batchsize=1', 'auto_scale_lr.base_batch_size'),
    ],
)
def test_unknown_option_names_the_nearest(refused, option, nearest):
    message = refused(train_tool, CONFIG, '--cfg-options', option)
    assert f'{option.split("=")[0]}: no such key' in message
    assert re.search(rf'the nearest is {re.escape(nearest)}(\.|$)', message)


@pytest.mark.parametrize(
    ('option', 'says'),
    [
        ('param_scheduler.2.end=1', 'param_scheduler is a list of 2'),
        ('param_scheduler.end=1', 'param_scheduler is a list of 2'),
        ('model.backbone.arch.depths=1', "model.backbone.arch is 'tiny'"),
        ('norm_cfg.type=BN', 'set where it went: model.decode_head.norm_cfg.type'),
        ('data_preprocessor.size=1', 'model.data_preprocessor.size'),
        ('crop_size=(64,64)', 'model.test_cfg.crop_size'),
    ],
)
def test_option_that_would_change_nothing(refused, option, says):
    assert says in refused(train_tool, CONFIG, '--cfg-options', option)


@pytest.mark.parametrize('option', ['model', 'a=[1,2'])
def test_malformed_option(option, capsys):
    with pytest.raises(SystemExit) as error:
        train_tool([CONFIG, '--cfg-options', option])
    assert error.value.code == 2
    assert '--cfg-options' in capsys.readouterr().err.splitlines()[-1]


def test_options_may_add_what_a_place_can_take():
    options = {
        'model.backbone.with_cp': True,
        'model.backbone.frozen_stages': 1,
        'model.decode_head.ignore_index': 0,
        'model.test_cfg.batched_slide': True,
        'model_wrapper_cfg.find_unused_parameters': True,
        'randomness.seed': 0,
        'train_dataloader.dataset.indices': 16,
        'train_dataloader.prefetch_factor': 4,
        'optim_wrapper.accumulative_counts': 2,
        'optim_wrapper.clip_grad.max_norm': 1.0,
        'optim_wrapper.optimizer.fused': True,
        'param_scheduler.0.end_factor': 1.0,
        'default_hooks.checkpoint.max_keep_ckpts': 1,
        'default_hooks.early_stopping.type': 'EarlyStoppingHook',
        'train_cfg.dynamic_intervals': [(1, 1)],
        'val_cfg.fp16': True,
        'custom_hooks': [],
        'val_evaluator.nan_to_num': 0,
    }
    cfg = read_config(CONFIG)
    apply_options(cfg, options)
    for key, value in options.items():
        node = cfg
        for part in key.split('.'):
            node = node[int(part) if isinstance(node, list) else part]
        assert node == value


def test_a_variable_of_the_config_is_replaced_wherever_it_went(config):
    path = config(
        "_base_ = ['mmdet::_base_/datasets/coco_instance.py']\nmodel = dict()\n"
        "default_scope = 'mmdet'"
    )
    cfg = read_config(str(path))
    apply_options(cfg, {'data_root': '/elsewhere'})
    assert cfg.data_root == cfg.train_dataloader.dataset.data_root == '/elsewhere'
    assert cfg.val_evaluator.ann_file == '/elsewhere/annotations/instances_val2017.json'
    assert cfg.val_dataloader.dataset.ann_file == 'annotations/instances_val2017.json'
    assert 'data/coco' not in cfg.pretty_text


def test_pretrained_weights_missing(refused):
    message = refused(train_tool, CONFIG)
    assert 'checkpoints/slak_tiny_in1k.pth not found (model.backbone.init_cfg)' in message
    assert 'https://drive.google.com/file/d/' in message
    assert 'train without: --cfg-options model.backbone.init_cfg=None' in message
    message = refused(train_tool, CONFIG, '--cfg-options', 'checkpoint=/elsewhere.pth')
    assert '/elsewhere.pth not found' in message


def test_pretrained_weights_of_another_model(refused, small, ade, tmp_path):
    other = tmp_path / 'other.pth'
    torch.save({'state_dict': {'stages.0.0.gamma': torch.ones(3), 'x': torch.ones(3, 3)}}, other)
    options = [option for option in small if 'init_cfg' not in option]
    message = refused(train_tool, CONFIG, *options, f'checkpoint={other}')
    assert str(other) in message
    assert 'SLaK' in message


def test_ade20k_missing(refused, small, ade, tmp_path):
    options = ['--cfg-options', *SMALL]
    message = refused(train_tool, CONFIG, *options, f'data_root={tmp_path}/none')
    assert f'dataset folder {tmp_path}/none not found' in message
    assert 'images/{training,validation}/*.jpg' in message
    assert '--cfg-options data_root=PATH' in message

    shutil.copytree(ade, tmp_path / 'half')
    shutil.rmtree(tmp_path / 'half/annotations/validation')
    message = refused(train_tool, CONFIG, *options, f'data_root={tmp_path}/half')
    assert f'{tmp_path}/half/annotations/validation not found (val_dataloader.dataset' in message
    (tmp_path / 'half/annotations/validation').mkdir()
    message = refused(train_tool, CONFIG, *options, f'data_root={tmp_path}/half')
    assert f'{tmp_path}/half/annotations/validation is empty' in message


DETECTOR = """
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/{0}.py',
          'mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py']
"""


def test_voc_missing(refused, config, tmp_path):
    path = config(DETECTOR.format('voc0712'))
    message = refused(train_tool, path, '--cfg-options', f'data_root={tmp_path}/none')
    assert f'dataset folder {tmp_path}/none not found' in message
    assert 'JPEGImages/*.jpg' in message
    assert '--cfg-options data_root=PATH' in message

    # A wrapper in a wrapper: RepeatDataset of ConcatDataset of 2007, which is there, and 2012.
    miniatures.write_voc(tmp_path / 'voc', 2007)
    message = refused(train_tool, path, '--cfg-options', f'data_root={tmp_path}/voc')
    assert 'wrong number of classes' in message  # of 2007, which is looked at first
    options = ['model.roi_head.bbox_head.num_classes=20', f'data_root={tmp_path}/voc']
    message = refused(train_tool, path, '--cfg-options', *options)
    assert f'{tmp_path}/voc/VOC2012/JPEGImages not found' in message
    assert 'train_dataloader.dataset.dataset.datasets.1' in message


def test_coco_missing(refused, config, tmp_path):
    path = config(DETECTOR.format('coco_instance'))
    message = refused(train_tool, path, '--cfg-options', f'data_root={tmp_path}/none')
    assert f'dataset folder {tmp_path}/none not found' in message
    assert 'annotations/instances_{train2017,val2017}.json' in message

    root = miniatures.write_coco(tmp_path / 'coco')
    (root / 'annotations/instances_val2017.json').unlink()
    message = refused(train_tool, path, '--cfg-options', f'data_root={root}')
    assert f'annotation file {root}/annotations/instances_val2017.json not found' in message


CLASSIFIER = """
_base_ = ['mmpretrain::_base_/datasets/imagenet_bs64.py',
          'mmpretrain::_base_/schedules/imagenet_bs256.py',
          'mmpretrain::_base_/default_runtime.py']
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmslak.SLaK', out_indices=3, gap_before_final_norm=True),
    head=dict(type='LinearClsHead', num_classes={0}, in_channels=998))
"""


def test_imagenet_missing(refused, config, tmp_path):
    path = config(CLASSIFIER.format(1000))
    option = f'train_dataloader.dataset.data_root={tmp_path}/none'
    message = refused(train_tool, path, '--cfg-options', option)
    assert f'dataset folder {tmp_path}/none not found' in message
    assert '{train,val}/CLASS/*.JPEG' in message
    assert '--cfg-options train_dataloader.dataset.data_root=PATH' in message
    (tmp_path / 'none').mkdir()
    message = refused(train_tool, path, '--cfg-options', option)
    assert f'dataset folder {tmp_path}/none/train not found' in message


def test_folder_of_classes_missing(refused, config, tmp_path):
    dataset = dict(
        type='CustomDataset', data_root=str(tmp_path / 'digits'), data_prefix='train', pipeline=[]
    )
    path = config(
        CLASSIFIER.format(10) + f'train_dataloader = dict(dataset=dict(_delete_=True, **{dataset}))'
    )
    (tmp_path / 'digits').mkdir()
    message = refused(train_tool, path)
    assert f'dataset folder {tmp_path}/digits/train not found' in message
    assert f'expected in {tmp_path}/digits: train/CLASS/*' in message
    for i in range(12):
        (tmp_path / f'digits/train/{i}').mkdir(parents=True)
    message = refused(train_tool, path)
    assert 'model.head.num_classes is 10, but CustomDataset has 12 classes' in message


def test_wrong_number_of_classes(refused, config, small, tmp_path):
    message = refused(train_tool, CONFIG, *small, 'model.decode_head.num_classes=19')
    assert 'model.decode_head.num_classes is 19, but ADE20KDataset has 150 classes' in message
    assert '--cfg-options model.decode_head.num_classes=150' in message

    root = miniatures.write_coco(tmp_path / 'coco')
    path = config(DETECTOR.format('coco_detection') + 'data_preprocessor = dict()')
    options = [f'data_root={root}', 'model.roi_head.bbox_head.num_classes=20']
    message = refused(train_tool, path, '--cfg-options', *options)
    assert 'model.roi_head.bbox_head.num_classes is 20, but CocoDataset has 80' in message

    root = miniatures.write_imagenet(tmp_path / 'imagenet')
    path = config(CLASSIFIER.format(10))
    message = refused(
        train_tool, path, '--cfg-options', f'train_dataloader.dataset.data_root={root}'
    )
    assert 'model.head.num_classes is 10, but ImageNet has 1000 classes' in message


def test_checkpoint_not_found(refused, small, tmp_path):
    file = tmp_path / 'none.pth'
    assert f'{file}: no such checkpoint' in refused(evaluate_tool, CONFIG, file, *small)
    assert f'{file}: no such checkpoint' in refused(train_tool, CONFIG, '--resume', file, *small)
    message = refused(train_tool, CONFIG, *small, f'load_from={file}')
    assert f'{file}: no such checkpoint' in message

    (tmp_path / 'work').mkdir(exist_ok=True)
    (tmp_path / 'work/last_checkpoint').write_text(str(file))
    assert f'{file}: no such checkpoint' in refused(train_tool, CONFIG, *small, '--resume')


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'text'])
def test_checkpoint_unreadable(refused, trained, small, tmp_path, damage):
    content = (trained[0] / 'iter_2.pth').read_bytes()
    file = tmp_path / f'{damage}.pth'
    file.write_bytes(dict(truncated=content[:-1000], empty=b'', text=b'a page of HTML')[damage])
    for message in (
        refused(evaluate_tool, CONFIG, file, *small),
        refused(train_tool, CONFIG, '--resume', file, *small),
    ):
        assert str(file) in message
        assert ('empty' if damage == 'empty' else 'damaged') in message


def test_checkpoint_of_another_model(refused, trained, small, tmp_path):
    file = trained[0] / 'iter_2.pth'
    message = refused(evaluate_tool, CONFIG, file, *small, 'model.decode_head.channels=8')
    assert f'checkpoint {file} does not fit the config: decode_head.' in message
    file = tmp_path / 'other.pth'
    torch.save({'state_dict': {'stem.weight': torch.ones(3, 3)}}, file)
    message = refused(evaluate_tool, CONFIG, file, *small)
    assert re.search(r'(\d+) of \1 weights of the model are not in it', message)


def test_amp_without_an_accelerator(refused, small):
    assert 'needs an accelerator' in refused(train_tool, CONFIG, '--amp', *small)
    options = [*small, 'optim_wrapper.type=AmpOptimWrapper']
    assert 'needs an accelerator' in refused(train_tool, CONFIG, *options)


def test_amp_with_an_accelerator_changes_the_wrapper():
    cfg = read_config(CONFIG)
    enable_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'


@pytest.mark.parametrize('variable', ['LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'])
def test_one_process_of_a_machine_says_what_is_wrong(variable, monkeypatch, capsys):
    """Whatever starts the processes, torchrun, srun or mpirun; `--local_rank` hides none of it."""
    for place in '0', '1':
        monkeypatch.delenv('LOCAL_RANK')
        monkeypatch.setenv(variable, place)
        assert train_tool(['configs/missing.py', '--launcher', 'mpi']) == 2
        assert ('not found' in capsys.readouterr().err) == (place == '0')


def test_launcher_without_torchrun(refused, small, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    assert 'tools/dist_train.sh' in refused(train_tool, CONFIG, '--launcher', 'pytorch', *small)


@pytest.mark.parametrize(
    ('launcher', 'lacks'), [('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_LOCAL_RANK')]
)
def test_launcher_that_did_not_start_the_process(refused, small, monkeypatch, launcher, lacks):
    monkeypatch.setattr(runner, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(runner, 'set_multi_processing', lambda **options: None)
    monkeypatch.delenv(lacks, raising=False)
    for resume in [], ['--resume']:
        options = ['--launcher', launcher, *resume, *small]
        assert f'lacks {lacks}' in refused(train_tool, CONFIG, *options)


def test_auto_scale_lr_without_a_batch_size(refused, small):
    options = [*small, 'auto_scale_lr.base_batch_size=None']
    assert 'auto_scale_lr.base_batch_size=16' in refused(
        train_tool, CONFIG, '--auto-scale-lr', *options
    )


def test_output_of_the_wrong_kind(refused, trained, small):
    file = trained[0] / 'iter_2.pth'
    assert '--out is a folder' in refused(
        evaluate_tool, CONFIG, file, *small, '--out', 'predictions.pkl'
    )
