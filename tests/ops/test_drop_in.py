"""The stand-in for the CUDA extension, found in the ways that other repositories look for it."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mmslak.cli.ops_path import main
from tests.golden import ROOT

# A model's file finds the extension by an environment variable or on the module path.
NET = """
import os
import sys

import torch
from torch import nn

if 'LARGE_KERNEL_CONV_IMPL' in os.environ:
    sys.path.append(os.environ['LARGE_KERNEL_CONV_IMPL'])
try:
    from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM as Large
except ImportError:
    def Large(channels, kernel, bias=False):
        padding = [side // 2 for side in kernel]
        return nn.Conv2d(channels, channels, kernel, 1, padding, groups=channels, bias=bias)

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 1), Large(4, (13, 5)), Large(4, (7, 7), bias=True))
torch.manual_seed(0)
print(type(net[1]).__name__, *net.state_dict())
torch.save(dict(state=net.state_dict(), out=net(torch.randn(1, 3, 16, 16))), sys.argv[1])
"""


@pytest.fixture(scope='module')
def folder() -> str:
    return str(ROOT / 'mmslak/ops/drop_in')


def run(tmp_path, **environment: str) -> tuple[str, dict]:
    (tmp_path / 'net.py').write_text(NET)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), **environment}
    command = [sys.executable, tmp_path / 'net.py', tmp_path / 'out.pth']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout, torch.load(tmp_path / 'out.pth', weights_only=True)


@pytest.fixture(scope='module')
def stock(tmp_path_factory) -> tuple[str, dict]:
    """What the file prints and computes with torch's convolution."""
    return run(tmp_path_factory.mktemp('stock'))


@pytest.mark.parametrize('variable', ['LARGE_KERNEL_CONV_IMPL', 'PYTHONPATH'])
def test_is_found_and_computes_the_same(variable, stock, folder, tmp_path):
    path = os.pathsep.join([folder, str(ROOT)]) if variable == 'PYTHONPATH' else folder
    printed, ours = run(tmp_path, **{variable: path})
    assert stock[0].split()[0] == 'Conv2d'
    assert printed.split()[0] == 'DepthWiseConv2dImplicitGEMM'
    assert printed.split()[1:] == stock[0].split()[1:]
    torch.testing.assert_close(ours['state'], stock[1]['state'], rtol=0, atol=0)
    torch.testing.assert_close(ours['out'], stock[1]['out'], rtol=1e-4, atol=1e-5)


def test_class(folder, monkeypatch):
    """Attributes that RepLKNet's and UniRepLKNet's files read when they merge kernels."""
    monkeypatch.syspath_prepend(folder)
    from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM

    layer = DepthWiseConv2dImplicitGEMM(6, 31)
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is None
    assert layer.weight.shape == (6, 1, 31, 31)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (6, 6, 6)
    assert (layer.kernel_size, layer.padding) == ((31, 31), (15, 15))
    assert (layer.stride, layer.dilation) == ((1, 1), (1, 1))
    assert DepthWiseConv2dImplicitGEMM(6, (51, 5), bias=True).bias.shape == (6,)


def test_command_prints_the_folder(folder, capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == f'{folder}\n'
