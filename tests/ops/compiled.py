"""Compiles the launches of the Triton backend for GPUs that are not there, and says what came out.

    python tests/ops/compiled.py --arch 80 90 --parts f + --dtype float32 --shape 2 249 64 64

Runs are separated by +. A line of JSON per launch: kernel, compute capability, registers, bytes of
stack per thread (local memory: what does not fit into registers), bytes of shared memory, and how
often the machine code has an instruction. Triton reads the code with its own tools; a GPU, its
driver and a C compiler are not needed.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from mmslak.ops import triton_backend

TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
KERNELS = ('arrange', 'build_bands', 'convolve', 'march', 'correlate', 'collect')
BLOCK = [(51, 5), (5, 51), (5, 5)]
DTYPES = ('bfloat16', 'float16', 'float32')


class NoGPU:
    """Stands for CUDA's driver, of which compiling asks the target alone."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(arch: int, only: Sequence[str]) -> list[tuple[str, object]]:
    """Makes launches from now on compilations for `arch`, and returns the list they get to."""
    found = []
    modules = triton_backend._kernels()
    triton.runtime.driver.set_active(NoGPU(arch))

    def launch(name: str, like: torch.Tensor, grid: tuple[int, ...], *args, **options) -> None:
        if name not in only:
            return
        kernel = getattr(modules, name)
        kernel.device_caches.clear()  # Triton keeps kernels by the device's index, not by target
        found.append((name, kernel.warmup(*args, grid=grid, **options)))

    triton_backend._launch = launch
    triton_backend.check = lambda *_: None
    triton_backend._capability = lambda _: divmod(arch, 10)
    return found


def figures(kernel: object) -> dict[str, object]:
    """Registers, stack and shared memory of a compiled kernel, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        Path(file.name).write_bytes(kernel.asm['cubin'])
        usage = _tool('cuobjdump', '-res-usage', file.name)
        code = _tool('cuobjdump', '-sass', file.name)
    instructions = re.findall(r'^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([\w.]+)', code, re.M)
    return dict(
        registers=int(re.search(r'REG:(\d+)', usage)[1]),
        stack=int(re.search(r'STACK:(\d+)', usage)[1]),
        shared=kernel.metadata.shared,
        instructions=dict(collections.Counter(instructions)),
    )


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def compiled(
    arch: int,
    dtype: str,
    shape: tuple[int, ...],
    sizes: list[tuple[int, int]] = BLOCK,
    nhwc: bool = False,
    tile: int | None = None,
    parts: str = 'fsb',
    only: Sequence[str] = KERNELS,
) -> Iterator[tuple[str, str, object]]:
    """(part, name, kernel) of what a block launches.

    Args:
        arch: Compute capability, as 90.
        dtype: Of all tensors.
        shape: Of the input, (N, C, H, W).
        sizes: Of the kernels.
        nhwc: Whether the input and the gradients are in NHWC.
        tile: Which of `tiles`, the last one if there are fewer; None for the default.
        parts: f: forward, s: forward of the sum, b: backward.
        only: Names of the kernels to compile.
    """
    found = launches(arch, only)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    dtype = getattr(torch, dtype)
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    weights = [torch.zeros(shape[1], 1, *size, dtype=dtype) for size in sizes]
    chosen = None if tile is None else triton_backend.tiles(x, weights)[: tile + 1][-1]
    for part in parts:
        if part == 'f':
            triton_backend.forward(x, weights, tile=chosen)
        elif part == 's':
            triton_backend.forward(x, weights, x.new_zeros(shape[1]), summed=True, tile=chosen)
        else:
            triton_backend.backward(x, weights, [x] * len(weights), tile=chosen)
        for name, kernel in found:
            yield part, name, kernel
        found.clear()


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', type=int, nargs='+', default=[80, 89, 90, 100, 120])
    parser.add_argument('--dtype', choices=DTYPES, nargs='+', default=['bfloat16'])
    parser.add_argument('--shape', type=int, nargs=4, default=[2, 124, 128, 128])
    parser.add_argument('--sizes', nargs='+', default=['51x5', '5x51', '5x5'])
    parser.add_argument('--nhwc', action='store_true')
    parser.add_argument('--tile', type=int)
    parser.add_argument('--parts', default='fsb')
    parser.add_argument('--only', nargs='+', default=KERNELS)
    args = parser.parse_args(argv)
    sizes = [tuple(int(side) for side in size.split('x')) for size in args.sizes]
    wanted = tuple(args.shape), sizes, args.nhwc, args.tile, args.parts, args.only
    for arch in args.arch:
        for dtype in args.dtype:
            for part, name, kernel in compiled(arch, dtype, *wanted):
                line = dict(part=part, kernel=name, arch=arch, dtype=dtype)
                print(json.dumps(line | figures(kernel)), flush=True)


if __name__ == '__main__':
    argv = sys.argv[1:]
    while '+' in argv:
        run(argv[: argv.index('+')])
        del argv[: argv.index('+') + 1]
    run(argv)
