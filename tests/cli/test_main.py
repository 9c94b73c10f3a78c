"""`mmslak` itself: help, version and wrong commands, without torch; and its completion."""

import subprocess
import sys

import pytest

import mmslak
from mmslak.cli import completion
from mmslak.cli.main import COMMANDS, main
from tests.golden import ROOT

TINY = 'mmslak::upernet_slak_t_ade20k'


def test_help_fits_a_screen(capsys):
    assert main(['--help']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == list(COMMANDS)


def test_every_command_has_its_module_and_tool():
    names = {path.stem for path in (ROOT / 'mmslak/cli').glob('*.py')}
    for command in COMMANDS:
        assert command.replace('-', '_') in names
    commands = {command.replace('-', '_') for command in COMMANDS}
    assert {path.stem for path in (ROOT / 'tools').glob('*.py')} <= commands


@pytest.mark.parametrize(
    ('argv', 'status', 'says'),
    [
        (['--help'], 0, 'usage: mmslak COMMAND'),
        ([], 0, 'usage: mmslak COMMAND'),
        (['--version'], 0, f'mmslak {mmslak.__version__}'),
        (['ops-path'], 0, '/mmslak/ops/drop_in\n'),
        (['trian', 'x.py'], 2, 'error: no command trian; did you mean train?'),
        (['test', 'no.py', 'no.pth'], 2, 'error: config no.py not found\n'),
        (['train', 'mmslak::no'], 2, 'error: config mmslak::no not found\n'),
        (['train', 'setup.py/x.py', '--amp'], 2, 'error: config setup.py/x.py not found\n'),
        (['test', TINY, 'no.pth'], 2, 'error: no.pth: no such checkpoint file\n'),
        (['app', TINY, 'no.pth'], 2, 'error: no.pth: no such checkpoint file\n'),
        (['demo', 'no.jpg', TINY, 'none'], 2, 'error: no.jpg: no such picture, folder or video\n'),
        (['qqq'], 2, 'error: no command qqq; mmslak --help lists them'),
    ],
)
def test_without_torch(argv, status, says):
    code = (
        'import sys\n'
        'from mmslak.cli.main import main\n'
        f'status = main({argv!r})\n'
        'print("torch" in sys.modules, "mmengine" in sys.modules, file=sys.stderr)\n'
        'sys.exit(status)'
    )
    command = [sys.executable, '-c', code]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == status
    assert says in process.stdout + process.stderr
    assert process.stderr.splitlines()[-1] == 'False False'


def test_as_a_module():
    command = [sys.executable, '-m', 'mmslak', 'trian']
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 2
    assert process.stderr == 'error: no command trian; did you mean train?\n'


# ---------------------------------------------------------------- completion


@pytest.fixture(scope='module')
def bash_script(tmp_path_factory) -> str:
    """The script of `mmslak completion bash`, as a file."""
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr('builtins.print', lambda text, **options: printed.append(text))
        assert completion.main(['bash']) == 0
    path = tmp_path_factory.mktemp('completion') / 'mmslak'
    path.write_text(printed[0])
    return str(path)


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    code = (
        f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        'function=$(complete -p mmslak | sed "s/.*-F \\([^ ]*\\).*/\\1/"); '
        '$function mmslak "${@: -1}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ['bash', '-c', code, 'bash', *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_bash_accepts_the_script(bash_script):
    subprocess.run(['bash', '-n', bash_script], check=True)


def test_commands_and_options_are_completed(bash_script):
    assert completed(bash_script, 'mmslak', 'tr') == ['train']
    assert completed(bash_script, 'mmslak', 'train', '--on-b') == ['--on-bad-sample']
    assert completed(bash_script, 'mmslak', 'prepare-data', 'lab') == ['labels']
    assert completed(bash_script, 'mmslak', 'prepare-data', 'labels', '--near') == ['--nearest']
    assert completed(bash_script, 'mmslak', 'get-checkpoint', 'slak_ti') == [
        *('slak_tiny', 'slak_tiny_120e', 'slak_tiny_120e_k31', 'slak_tiny_120e_k61')
    ]


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        completion.main(['cmd'])
    assert stop.value.code == 2
    assert "invalid choice: 'cmd'" in capsys.readouterr().err
