"""Measures which methods are the fastest for a case, and checks that their results are right."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from mmslak.ops import native
from mmslak.ops.function import DepthwiseFunction, without_autocast
from mmslak.ops.isolation import passes_alone
from mmslak.ops.methods import METHODS, compute_backward, compute_forward
from mmslak.ops.plans import Case, Plan, logger

SAMPLE = 32  # channels of the sample that tells how long a method may take
SLOW = 4.0  # times the best, by the samples, from which on a method is not tried on the whole
SHORT = 5e-4  # seconds of a sample that do not count: most of them may be around the work
BIG = 1e8  # products of a sample from which on smaller maps are tried before it
FAR = 2.0  # times slower than SLOW that a method has to be on one of them to be left out
DROP = 2.0  # times the best from which on a method has no second try
TRIES = 3  # of which the least time counts
FIRST = 0.05  # seconds that a first call may take to make what later ones use, such as code
MARGIN = 1.03  # another method counts as slower by this factor than torch's own convolution
CLEARLY = 1.1  # times faster than torch's own that a whole plan has to be, called in turns
TURNS = 9  # of which the medians count
CLOSE = 1.5  # times faster at which three turns are enough
LONG = 0.5  # seconds of all turns after which three are enough
AROUND = 3e-5  # seconds around a call of another method, where they are not measured with it
MEMORY = 4  # times the maps of a case, which a method may need beside them
# Largest error allowed, as a share of the largest absolute value.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
FAILURES = (RuntimeError, MemoryError, ValueError, NotImplementedError, ImportError, IndexError)

STOCK = ('conv',)
TORCHS = ('conv', 'native', 'turned', 'other', 'flipped')  # methods that torch's convolution does
PARTS = ('forward', 'input', 'weight')  # in the order of a plan's


def measure(case: Case, other: Callable[[Case], Plan], end: float = math.inf) -> Plan | None:
    """The fastest methods for a case, measured on random data.

    Args:
        case: What is to be computed.
        other: Gives the plan of another case, of which this one's is made: of one of its kernels,
            or of one of its parts.
        end: Value of `time.monotonic()`; what would not end before it is not tried.

    Returns:
        The plan; None if nothing could be measured in time.
    """
    try:
        with unseen():
            return _Measurement(case, other, end).plan()
    except (TimeoutError, *FAILURES) as error:  # such as no memory for the random data
        logger.info('mmslak.ops: %s was not measured: %s', case.key, error)
        return None


@contextmanager
def unseen() -> Iterator[None]:
    """Keeps what is computed from the hooks and modes that the network's call is under.

    Activation checkpointing sets hooks on saved tensors and computes the block again where one is
    taken; selective checkpointing counts calls by a mode. Where torch.compile traces, tensors have
    no values, and every call of torch goes through Python.
    """
    # The innermost hooks alone count. A saved output without detach() would hold its own graph.
    hooks = saved_tensors_hooks(Tensor.detach, lambda tensor: tensor)
    with _disable_current_modes(), torch._C._DisablePythonDispatcher(), hooks:
        yield


class _Measurement:
    def __init__(self, case: Case, other: Callable[[Case], Plan], end: float) -> None:
        self.case, self.other, self.end = case, other, end
        batch, channels = case.shape[:2]
        self.data = _Data(case, batch, channels)
        few = min(channels, max(SAMPLE, torch.get_num_threads()))
        self.sample = _Data(case, 1, few)
        self.samples = batch * channels / few  # in the whole
        self.is_slow = False  # torch's own forward pass

    def plan(self) -> Plan:
        part = self.case.part
        if not part.startswith('training'):
            names = self.fastest(part, self.candidates(part))
            plan = Plan(*(names if part == other else () for other in PARTS))
            return self.or_plain(plan) if part == 'forward' else plan
        plan = Plan(
            self.other(self.case._replace(part='forward')).forward,
            self.other(self.case._replace(part='input')).input_gradient if 'x' in part else (),
            self.other(self.case._replace(part='weight')).weight_gradient if 'w' in part else (),
        )
        if part == 'training-xw':
            pairs = [plan[1:3]]
            pairs += [((name,), (name,)) for name in self.names('weight', joint=True)]
            plan = Plan(plan.forward, *self.fastest('both', pairs))
        return self.or_plain(plan)

    def or_plain(self, plan: Plan) -> Plan:
        """The plan, or torch's own convolutions with nothing around them if they are as fast."""
        plain = Plan(*(STOCK if names else () for names in plan[:3]), plain=True)
        if self.is_plain(*plan[:3]):
            return plain
        if self.is_hopeless(plain, plan) or not self.is_faster(plain, plan):
            return plan
        return plain

    def is_faster(self, plain: Plan, plan: Plan) -> bool:
        """Whether torch's own convolutions are as fast as a plan, both as a network calls them.

        They take turns: the one finds caches and memory as the other leaves them, as in a network.
        """
        times: dict[Plan, list[float]] = {plan: [], plain: []}
        for turn in range(1 + TURNS):
            for one, several in times.items():
                seconds = self.seconds('whole', one, self.data, 0.0)
                if seconds is None:
                    if time.monotonic() > self.end:
                        raise TimeoutError
                    return one is plan
                if turn > 0:
                    several.append(seconds)
            if turn > 2:
                ratio = median(times[plain]) / median(times[plan])
                if not 1 / CLOSE < ratio < CLOSE or sum(map(sum, times.values())) > LONG:
                    break
        return median(times[plain]) < CLEARLY * median(times[plan])

    def is_hopeless(self, plain: Plan, plan: Plan) -> bool:
        """Whether torch's own convolutions take far longer than a plan, by a sample.

        Their forward pass is tried first, which alone can take too long.
        """
        if self.is_slow or not METHODS['conv'].suits(self.case):
            return True
        whole = (self.seconds('whole', plan, self.sample, math.inf) or math.inf) + SHORT
        for part, names in (('forward', STOCK), ('whole', plain)):
            if self.is_far_slower(part, names, whole):
                return True
            stock = self.seconds(part, names, self.sample, whole)
            if stock is None or stock > SLOW * whole:
                return True
        return False

    def is_plain(self, *parts: Sequence[str]) -> bool:
        """Whether torch's convolution computes all, and of whole kernels."""
        cropped = any(
            side > 2 * size - 1
            for kernel in self.case.kernels
            for side, size in zip(kernel, self.case.shape[2:], strict=True)
        )
        return not cropped and all(name == 'conv' for part in parts for name in part)

    def names(self, part: str, joint: bool) -> list[str]:
        """Methods to try: all, or those that share work between kernels or between gradients."""
        names = []
        for name, method in METHODS.items():
            computes = method.forward if part == 'forward' else method.backward
            if computes is None or (name == 'flipped' and part != 'input'):
                continue
            if (joint and not method.shares) or not method.suits(self.case):
                continue
            if method.extra_bytes(self.case) > MEMORY * self.case.map_bytes:
                logger.info('mmslak.ops: %s left out for %s: memory', name, self.case.key)
            elif not method.alone or passes_alone(name, self.case):
                names.append(name)
        return names

    def candidates(self, part: str) -> list[tuple[str, ...]]:
        """For one kernel every method; for several those that share work, and the best of each."""
        several = len(self.case.kernels) > 1
        candidates = [(name,) for name in self.names(part, joint=several)]
        if not several:
            return candidates
        index, each = PARTS.index(part), []
        for kernel in self.case.kernels:
            plan = self.other(self.case._replace(kernels=(kernel,), summed=False))
            each.append(plan[index][0])
        return [*candidates, tuple(each) if len(set(each)) > 1 else (each[0],)]

    def fastest(self, part: str, candidates: Iterable[tuple]) -> tuple:
        """The fastest candidate that is right."""
        candidates = list(dict.fromkeys(candidates))
        while candidates:
            names = self.first(part, candidates)
            if _is_stock(names) or is_right(self.data, part, names):
                return names
            candidates.remove(names)
        raise TimeoutError

    def first(self, part: str, candidates: Sequence[tuple]) -> tuple:
        """The fastest candidate; a sample tells which ones are not worth a try on the whole."""
        expected: dict[tuple, float] = {}
        for names in candidates:
            best = min(expected.values(), default=math.inf) / self.samples + SHORT
            if self.is_far_slower(part, names, best):
                self.is_slow = self.is_slow or (part == 'forward' and names == STOCK)
                continue
            seconds = self.seconds(part, names, self.sample, best)
            if seconds is not None:
                # What a call takes at least is no part of what grows with the number of samples.
                expected[names] = max(0.0, seconds - SHORT) * self.samples
        times: dict[tuple, float] = {}
        for names in sorted(expected, key=expected.get):
            best = min(times.values(), default=math.inf)
            if expected[names] <= SLOW * best:
                seconds = self.seconds(part, names, self.data, best, expected[names])
                if seconds is not None:
                    times[names] = seconds if _is_stock(names) else seconds * MARGIN + AROUND
        if not times:
            raise TimeoutError
        self.is_slow = self.is_slow or (part == 'forward' and STOCK in expected.keys() - times)
        return min(times, key=times.get)

    def is_far_slower(self, part: str, names: tuple, best: float) -> bool:
        """Whether a method would take far longer than the best on the sample, by smaller maps.

        A call cannot be stopped, and torch's own can take minutes: the weight gradient of 101×101
        on 256×256 pixels, without AVX-512. The maps grow until one tells.
        """
        parts = names[:3] if isinstance(names, Plan) else names
        by_torch = all(name in TORCHS for name in _flat(parts))
        if self.case.device.type != 'cpu' or best == math.inf or not by_torch:
            return False
        pixels = math.prod(self.case.shape[2:])
        for data in self.smaller_samples():
            most = (FAR * SLOW * best) * math.prod(data.x.shape[2:]) / pixels + SHORT
            for _ in range(TRIES):  # a first call may make what later ones use
                seconds = self.seconds(part, names, data, 0.0) or 0.0
                if not most < seconds < LONG:
                    break
            if seconds > most:
                logger.info('mmslak.ops: %s left out for %s: too slow', names, self.case.key)
                return True
        return False

    def smaller_samples(self) -> Iterator['_Data']:
        """Samples on maps of halved sides, the smallest first; none if the sample is small."""
        channels, (height, width) = self.sample.x.shape[1], self.case.shape[2:]
        products = channels * height * width * sum(map(math.prod, self.case.kernels))
        if products <= BIG:
            return
        for halvings in range(math.ceil(math.log(products / BIG, 4)) + 1, 0, -1):
            sides = max(1, height >> halvings), max(1, width >> halvings)
            yield _Data(self.case, 1, channels, sides)

    def seconds(
        self, part: str, names: tuple, data: '_Data', best: float, expected: float = 0.0
    ) -> float | None:
        """Least seconds of a few calls after one to warm up; of the first call if `best` is 0.

        There is no other call if that one is far slower than the best candidate, and by more than
        what it may make for later ones. None if the method fails, or if there is no time for it.
        """
        device, least = self.case.device, math.inf
        if time.monotonic() + expected > self.end:
            return None
        try:
            for i in range(1 + TRIES):
                seconds = elapsed(lambda: data.compute(part, names), device)
                if i > 0 or best == 0.0 or seconds > SLOW * best + FIRST:
                    least = min(least, seconds)
                if least > DROP * best and least < math.inf:
                    break
            return least
        except FAILURES as error:
            logger.info('mmslak.ops: %s left out for %s: %s', names, self.case.key, error)
            if device.type == 'cuda':
                torch.cuda.empty_cache()
            return None


class _Data:
    """Random inputs and output gradients of a case, for some of its images and channels.

    Args:
        case: The case.
        batch: Images.
        channels: Of each.
        sides: Height and width of the maps; None takes those of the case.
    """

    def __init__(
        self, case: Case, batch: int, channels: int, sides: tuple[int, int] | None = None
    ) -> None:
        self.case = case
        shape = (batch, channels, *(sides or case.shape[2:]))
        generator = torch.Generator(case.device if case.device.type == 'cuda' else 'cpu')
        generator.manual_seed(0)

        def random(*shape: int) -> Tensor:
            values = torch.empty(shape, device=generator.device).uniform_(
                -1, 1, generator=generator
            )
            return values.to(case.device, case.dtype)

        outputs = 1 if case.summed else len(case.kernels)
        maps = [random(*shape) for _ in range(1 + outputs)]
        self.x, *self.gradients = (m.contiguous(memory_format=case.layout) for m in maps)
        self.weights = [random(channels, 1, *kernel) for kernel in case.kernels]
        self.chosen = sorted({0, channels // 2, channels - 1})
        self._references: dict[str, list[Tensor]] = {}

    def compute(self, part: str, names: tuple) -> list[Tensor]:
        """Outputs for 'forward'; the gradient of x, of the kernels or of both for 'input', 'weight'
        and 'both'; for 'whole' what a plan gives as a network calls it, by autograd."""
        x, weights, gradients = self.x, self.weights, self.gradients
        if part == 'whole':
            return self._as_called(names)
        with torch.no_grad(), without_autocast(x):
            if part == 'forward':
                return compute_forward(names, x, weights, None, self.case.summed)
            if part == 'both':
                plan, wanted = Plan((), *names), (True, True)
            elif part == 'input':
                plan, wanted = Plan((), names), (True, False)
            else:
                plan, wanted = Plan((), (), names), (False, True)
            dx, dws = compute_backward(plan, x, weights, gradients, *wanted)
            return ([] if dx is None else [dx]) + (dws or [])

    def _as_called(self, plan: Plan) -> list[Tensor]:
        training = self.case.part.startswith('training')
        with torch.set_grad_enabled(training), without_autocast(self.x):
            wanted = self.case.part.removeprefix('training')
            x = self.x.detach().requires_grad_(training and 'x' in wanted)
            weights = [w.detach().requires_grad_(training and 'w' in wanted) for w in self.weights]
            if plan.plain:
                outputs = native.plain_branches(x, weights, None, self.case.summed)
            else:
                outputs = DepthwiseFunction.apply(x, None, plan, self.case.summed, *weights)
            if not training:
                return list(outputs)
            wanted = [tensor for tensor in (x, *weights) if tensor.requires_grad]
            return list(torch.autograd.grad(outputs, wanted, self.gradients))

    def few(self, result: Tensor) -> Tensor:
        """A few channels of a result, (C, 1, kH, kW) or of x's shape, in float64 on the CPU."""
        of_kernels = result.shape != self.x.shape
        result = result[self.chosen] if of_kernels else result[:, self.chosen]
        return result.to('cpu', torch.float64)

    def poison(self) -> None:
        """Leaves numbers that are none in the memory that results are likely to get."""
        maps = [torch.full_like(self.x, math.nan) for _ in range(1 + len(self.weights))]
        kernels = [torch.full_like(weight, math.nan) for weight in self.weights]
        del maps, kernels

    def references(self, part: str) -> list[Tensor]:
        """What `few` has to be of the results of `compute`, through FFTs in float64."""
        if part not in self._references:
            self._references[part] = self._compute_references(part)
        return self._references[part]

    def _compute_references(self, part: str) -> list[Tensor]:
        reach = [max(kernel[d] // 2 for kernel in self.case.kernels) for d in (0, 1)]
        height, width = self.case.shape[2:]
        size = (height + 2 * reach[0], width + 2 * reach[1])

        def spectrum(values: Tensor) -> Tensor:
            return torch.fft.rfft2(values, s=size)

        x = spectrum(self.few(self.x))
        gradients = [spectrum(self.few(gradient)) for gradient in self.gradients]
        kernels = []
        for weight in self.weights:
            laid = torch.zeros(len(self.chosen), *size, dtype=torch.float64)
            rows, columns = weight.shape[2:]
            laid[:, :rows, :columns] = weight[self.chosen, 0].to('cpu', torch.float64)
            kernels.append(spectrum(laid.roll((-(rows // 2), -(columns // 2)), (1, 2))))

        def maps(values: Tensor) -> Tensor:
            return torch.fft.irfft2(values, s=size)[..., :height, :width]

        if part == 'forward':
            # Lazy conjugates, as conj() makes, are lost where AOTAutograd calls the operator.
            outputs = [maps(x * kernel.conj_physical()) for kernel in kernels]
            return [sum(outputs)] if self.case.summed else outputs
        gradients = gradients * (len(kernels) // len(gradients))
        results = []
        if part != 'weight':
            pairs = zip(gradients, kernels, strict=True)
            results.append(maps(sum(gradient * kernel for gradient, kernel in pairs)))
        if part != 'input':
            for gradient, (rows, columns) in zip(gradients, self.case.kernels, strict=True):
                lags = torch.fft.irfft2((x * gradient.conj_physical()).sum(0), s=size)
                lags = lags.roll((rows // 2, columns // 2), (1, 2))[:, None, :rows, :columns]
                results.append(lags)
        return results


def is_right(data: '_Data', part: str, names: tuple) -> bool:
    """Whether the results of a method agree with those in float64, on a few channels."""
    data.poison()
    results = data.compute(part, names)
    for result, reference in zip(results, data.references(part), strict=True):
        error = float((data.few(result) - reference).abs().max() / reference.abs().max())
        if not error <= TOLERANCES.get(data.case.dtype, 0.0):  # nor if it is not a number
            logger.warning(
                'mmslak.ops: %s left out for %s: error %.1e', names, data.case.key, error
            )
            return False
    return True


def works(name: str, case: Case) -> bool:
    """Whether a method computes a case rightly: the output, and both gradients if one is wanted."""
    data = _Data(case, *case.shape[:2])
    right = is_right(data, 'forward', (name,))
    if case.part != 'forward':
        right = right and is_right(data, 'both', ((name,), (name,)))
    return right


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, its results included."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type != 'cpu':
        result[0].flatten()[0].item()  # waits for the device
    return time.perf_counter() - start


def _flat(names: Sequence) -> Iterator[str]:
    """Names of nested tuples."""
    for name in names:
        if isinstance(name, str):
            yield name
        else:
            yield from _flat(name)


def _is_stock(names: tuple) -> bool:
    """Whether torch's own convolution computes everything."""
    return names in (STOCK, (STOCK, STOCK))
