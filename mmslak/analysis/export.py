"""Export to ONNX and TorchScript: what a graph of any height and width needs, and its check."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmslak.errors import UserError

TOLERANCE = 1e-4  # of the largest relative error
OPSET = 17


class ExportError(UserError):
    """An export that failed; the message is one line that says where."""


class AveragingPool2d(nn.Module):
    """nn.AdaptiveAvgPool2d as two matrix products, for graphs of any height and width.

    Bin i of n over a side of s pixels averages those from floor(i·s / n) to below
    ceil((i + 1)·s / n). Exporters support the original only where s is a known multiple of n.

    Args:
        output_size: (n_h, n_w).
    """

    def __init__(self, output_size: tuple[int, int]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, n_h, n_w)."""
        rows = _bins(x.shape[2], self.output_size[0], x)
        columns = _bins(x.shape[3], self.output_size[1], x)
        return torch.matmul(torch.matmul(rows, x), columns.transpose(0, 1))


def _bins(side: int, bins: int, like: Tensor) -> Tensor:
    """Averaging matrix (bins, side); in a traced graph its size follows the input's."""
    pixel = torch.arange(side, device=like.device)
    begin = torch.arange(bins, device=like.device)[:, None]
    # In integers: pixel ≥ floor(i·s / n) and pixel < ceil((i + 1)·s / n).
    inside = ((pixel + 1) * bins > begin * side) & (pixel * bins < (begin + 1) * side)
    inside = inside.to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class WholeModel(nn.Module):
    """A segmentor or classifier as a graph: pictures in, class scores out.

    Args:
        model: With `mode='tensor'` in its forward, as OpenMMLab's have.
        resize: Whether to resize scores (N, C, h, w) to the picture's size, as segmentors do before
            they choose classes.
        align_corners: Of that interpolation.
    """

    def __init__(self, model: nn.Module, resize: bool, align_corners: bool = False) -> None:
        super().__init__()
        self.model, self.resize, self.align_corners = model, resize, align_corners

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), normalised, to scores (N, classes, H, W) or (N, classes)."""
        scores = self.model(x, mode='tensor')
        scores = scores if isinstance(scores, Tensor) else scores[-1]
        if self.resize:
            size = x.shape[2:]
            scores = F.interpolate(scores, size, mode='bilinear', align_corners=self.align_corners)
        return scores


def deployed(model: nn.Module) -> nn.Module:
    """A copy for export: kernels fused, pooling to fixed sizes as matrix products, eval mode."""
    model = copy.deepcopy(model)
    model.eval()
    _fuse(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            size = getattr(child, 'output_size', None)
            if isinstance(child, nn.AdaptiveAvgPool2d) and size not in (1, (1, 1)):
                pair = (size, size) if isinstance(size, int) else tuple(size)
                if None not in pair:
                    setattr(parent, name, AveragingPool2d(pair))
    return model


def _fuse(module: nn.Module) -> None:
    """Calls the outermost `switch_to_deploy`, which knows what its parts need."""
    if hasattr(module, 'switch_to_deploy'):
        module.switch_to_deploy()
        return
    for child in module.children():
        _fuse(child)


def outputs_of(model: Callable, x: Tensor) -> list[Tensor]:
    """The model's outputs as a list, without gradients."""
    with torch.no_grad():
        found = model(x)
    return [found] if isinstance(found, Tensor) else list(found)


def to_torchscript(
    model: nn.Module, example: Tensor, path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Traces a model and writes it.

    Args:
        model: In eval mode, fused.
        example: An input (N, 3, H, W) to trace with.
        path: The file.
        metadata: Goes into the file, as its extra files.

    Raises:
        ExportError: If it cannot be traced.
    """
    try:
        with torch.no_grad(), _no_warnings():
            traced = torch.jit.trace(model, example, check_trace=False)
            torch.jit.save(traced, str(path), _extra_files=metadata or {})
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ExportError(f'{path}: tracing failed: {_reason(error)}') from error


def to_onnx(model: nn.Module, example: Tensor, path: Path, names: Sequence[str]) -> None:
    """Writes an ONNX graph whose batch, height and width are free.

    Args:
        model: In eval mode, fused.
        example: An input (N, 3, H, W) to trace with.
        path: The file.
        names: Names of the outputs. Whether one is (N, C, h, w) or (N, C) is read from the example.

    Raises:
        ExportError: If an operator has no ONNX form; the message names it.
    """
    free = {0: 'batch', 2: 'height', 3: 'width'}
    axes = {'input': free}
    for name, output in zip(names, outputs_of(model, example), strict=True):
        axes[name] = {0: 'batch'}
        if output.dim() == 4:
            axes[name] |= {2: f'{name}_height', 3: f'{name}_width'}
    options = {}
    if 'dynamo' in torch.onnx.export.__annotations__:
        # The tracing exporter: torch 2.1 has no other, and its graphs are plain Conv nodes.
        options['dynamo'] = False
    try:
        with _no_warnings():
            torch.onnx.export(
                model,
                (example,),
                str(path),
                input_names=['input'],
                output_names=list(names),
                dynamic_axes=axes,
                opset_version=OPSET,
                **options,
            )
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ExportError(f'{path}: no ONNX for this model: {_reason(error)}') from error


def annotate(path: Path, metadata: dict[str, str]) -> None:
    """Writes metadata into an ONNX file."""
    import onnx

    graph = onnx.load(str(path))
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=value)
    onnx.save(graph, str(path))


def onnx_runner(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """The graph of a file, run by onnxruntime on the CPU.

    Raises:
        ExportError: If onnxruntime cannot load it; the message names the node.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(
            str(path), settings, providers=['CPUExecutionProvider']
        )
    except Exception as error:  # onnxruntime's errors derive from Exception alone
        raise ExportError(f'{path}: onnxruntime cannot load it: {_reason(error)}') from error
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {'input': x.numpy()})]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude of what is expected."""
    got, expected = got.detach(), expected.detach()
    difference = (got.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def check(
    run: Callable[[Tensor], Sequence[Tensor]],
    reference: Callable,
    sizes: Sequence[tuple[int, int]],
    names: Sequence[str],
    what: str,
) -> dict[tuple[int, int], float]:
    """Compares an export with its original on noise of several sizes.

    Args:
        run: The export: from an input to its outputs.
        reference: The original model.
        sizes: (H, W) of the inputs.
        names: Names of the outputs.
        what: Name of the export in messages.

    Returns:
        The largest relative error of any output, by size.

    Raises:
        ExportError: If the export does not run at a size (the message has the node), or an output
            has another shape or differs by more than `TOLERANCE`.
    """
    errors = {}
    noise = torch.Generator().manual_seed(0)
    for size in sizes:
        x = torch.randn(1, 3, *size, generator=noise)
        where = f'{what} at {size[0]}×{size[1]}'
        try:
            got = list(run(x))
        except Exception as error:  # whatever the runtime raises
            raise ExportError(f'{where} does not run: {_reason(error)}') from error
        worst = 0.0
        for name, one, other in zip(names, got, outputs_of(reference, x), strict=True):
            if one.shape != other.shape:
                raise ExportError(
                    f'{where}: output {name!r} is {tuple(one.shape)}, expected {tuple(other.shape)}'
                )
            error = relative_error(one, other)
            if not error <= TOLERANCE:  # NaN fails too
                fixed = '' if size == sizes[0] else ' (the model itself fixes sizes while traced)'
                raise ExportError(
                    f'{where}: output {name!r} differs from PyTorch by {error:.2g} relative, '
                    f'more than {TOLERANCE:g}{fixed}'
                )
            worst = max(worst, error)
        errors[size] = worst
    return errors


def other_size(size: tuple[int, int]) -> tuple[int, int]:
    """A second size for the check: taller, narrower or wider, and no multiple of 32."""
    return size[0] + 27, max(33, math.ceil(1.5 * size[1]) + 5)


@contextmanager
def _no_warnings():
    """Silences tracers, which warn of every Python value; `check` finds a wrong constant."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def _reason(error: Exception) -> str:
    """The lines of an error that say what went wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ' '.join(lines[:2])[:400] or type(error).__name__
