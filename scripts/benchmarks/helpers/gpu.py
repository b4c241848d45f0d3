"""The sections of scripts/gpu_check.sh: each prints its table, and fails if something is wrong.

Each imports no more than it needs: a machine with a GPU may hold little beside PyTorch.
"""

import sys
import tempfile
import time
import warnings

import torch
from torch import Tensor, nn

from helpers.arguments import Parser
from helpers.measure import describe_machine, seconds, table
from lib.deq import DEQ, DEQWarning
from lib.errors import InputError
from lib.solvers import SOLVERS
from lib.solvers.precision import allow_tf32

GRADIENTS = ("ift", "shine", "jfb", "phantom", "phantom:form=neumann", "reversible", "unroll")
FORMS = ("plain", "fast", "fast-bf16", "fast-graph", "fast-gmres", "fast-compile")
# The first ones matter most: time may not be enough for all.
SETTINGS = (
    "wt103_deq_transformer", "cifar/cls_mdeq_TINY", "imagenet/cls_mdeq_SMALL",
    "cityscapes/seg_mdeq_SMALL", "cifar/cls_mdeq_LARGE", "wt103_deq_transformer_reg",
)  # fmt: skip
TOLERANCE = 1e-8  # of digits in float64, solved to 1e-12
STEPS, WARMUP = 3, 2


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="helpers.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("section", choices=tuple(SECTIONS))
    parser.add_argument("--settings", help="names; or language, images, all")
    parser.add_argument("--seconds", type=float, default=540.0, help="to begin something new in")
    try:
        args = parser.parse_args(argv)
        warnings.simplefilter("ignore", DEQWarning)  # thresholds cut adjoints short, as published
        return SECTIONS[args.section](args)
    except InputError as error:
        print(f"gpu_check: {error}")
        return 2


# ---- machine -------------------------------------------------------------------------------------


def machine(args) -> int:
    print(describe_machine(args.device))
    if args.device.type == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        print(
            f"{properties.total_memory / 2**30:.0f} GiB, capability {properties.major}."
            f"{properties.minor}, {torch.cuda.device_count()} GPU(s), CUDA {torch.version.cuda}, "
            f"cuDNN {torch.backends.cudnn.version()}"
        )
    return 0


# ---- digits --------------------------------------------------------------------------------------


class Layer(nn.Module):
    """tanh(W z + x), a contraction, in float64."""

    def __init__(self, size: int = 64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.w = nn.Parameter(0.9 * w / torch.linalg.matrix_norm(w, ord=2))
        self.x = nn.Parameter(torch.randn(8, size, generator=generator, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + self.x)


def digits(args) -> int:
    """Every solver and gradient on the CPU and on the device."""
    rows, worst = [], 0.0
    for name, run in _digit_cases():
        (expected, nfe, _), (found, nfe_there, waits) = (run(d) for d in ("cpu", args.device))
        error = max(
            ((a.cpu() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)
        )
        worst = max(worst, error)
        rows.append([name, nfe, nfe_there, f"{error:.1e}", waits, "" if error < TOLERANCE else "!"])
    print(table(["solver or gradient", "nfe CPU", "nfe", "difference", "waits", ""], rows))
    print(
        f"\ndifference: relative, in float64, solved to 1e-12 (SHINE: 1e-6); at most "
        f"{TOLERANCE:.0e} is allowed. waits: how often the host waited for the GPU."
    )
    return int(not worst < TOLERANCE)


def _digit_cases():
    for name, solver in SOLVERS.items():

        def solve(device, solver=solver):
            layer = Layer().to(device)
            z0 = torch.zeros_like(layer.x)
            with _Waits(device) as waits:
                solution = solver(layer, z0, threshold=60, eps=1e-12)
            return [solution["result"]], solution["nfe"], waits.count

        yield name, solve
    pairs = [(grad, "broyden") for grad in GRADIENTS] + [("ift", "gmres"), ("ift", "bicgstab")]
    for grad, b_solver in pairs:

        def differentiate(device, grad=grad, b_solver=b_solver):
            layer = Layer().to(device)
            # SHINE's gradient depends on every step of the solve, and the last steps before 1e-12
            # are rounding: changing w by 1e-16 changes it by 1e-4 (by 1e-10 at 1e-6).
            eps = 1e-6 if grad == "shine" else 1e-12
            deq = DEQ(f"broyden:eps={eps}", f"{b_solver}:eps=1e-12", grad=grad)
            with _Waits(device) as waits:
                z = deq(layer, torch.zeros_like(layer.x), f_thres=24, b_thres=60).z
                z.square().sum().backward()
            nfe = deq.stats.forward.nfe + deq.stats.backward.nfe
            return [z.detach(), layer.w.grad, layer.x.grad], nfe, waits.count

        yield f"{grad}, {b_solver}" if grad == "ift" else grad, differentiate


class _Waits:
    """Counts, in a ``with`` block, the operations for which the host waits for a GPU."""

    def __init__(self, device):
        self._gpu, self.count = torch.device(device).type == "cuda", 0

    def __enter__(self):
        self._catcher = warnings.catch_warnings(record=True)
        self._caught = self._catcher.__enter__()
        warnings.simplefilter("always")
        if self._gpu:
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error):
        if self._gpu:
            torch.cuda.set_sync_debug_mode("default")
        self._catcher.__exit__(*error)
        self.count = sum("synchroniz" in str(w.message) for w in self._caught)


# ---- processes -----------------------------------------------------------------------------------


def nccl(args) -> int:
    """A process group of one: sums, averaged gradients, batch norm over processes."""
    import torch.distributed as dist

    from mdeq_vision.sync_batchnorm import convert_sync_batchnorm

    backend = "nccl" if args.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1
        )
        x = torch.arange(6.0, device=args.device)
        total = x.clone()
        dist.all_reduce(total)
        torch.manual_seed(0)
        images = torch.randn(4, 3, 8, 8).to(args.device)
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(args.device)
        plain(images).square().mean().backward()
        expected = [p.grad.clone() for p in plain.parameters()]
        plain.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(convert_sync_batchnorm(plain))
        parallel(images).square().mean().backward()
        found = [p.grad for p in parallel.parameters()]
        errors = [
            ((a - b).norm() / b.norm().clamp(min=1e-6)).item()
            for a, b in zip(found, expected, strict=True)
        ]
        verdict = "right" if torch.equal(total, x) else "WRONG"
        print(f"{backend}: sum {verdict}, gradients differ by {max(errors):.1e} at most")
        dist.destroy_process_group()
    return int(not (torch.equal(total, x) and max(errors) < 1e-3))


# ---- steps ---------------------------------------------------------------------------------------


def steps(args) -> int:
    """A step of each setting in each form."""
    from helpers.settings import chosen_settings

    allow_tf32(False)
    names = chosen_settings(args.settings or "all")
    if not args.settings:
        names = [*SETTINGS, *(name for name in names if name not in SETTINGS)]
    deadline, wrong = time.monotonic() + args.seconds - 5, False
    print(
        "Sizes are the published ones of one GPU.\n"
        if args.device.type == "cuda"
        else "Tiny sizes.\n"
    )
    head = "setting,form,step ms,per second,ratio,peak MiB,nfe f / b,loss diff".split(",")
    print(table(head, []), flush=True)
    for name in names:
        first = None
        for form in FORMS:
            if time.monotonic() > deadline:
                print(f"| {name} | {form} | left out: no time left |")
                return int(wrong)
            try:
                row, first = _form_row(name, form, args.device, first)
            except torch.OutOfMemoryError:
                row = ["does not fit in memory"]
            except InputError as error:  # no compiler
                row = [str(error)]
            except ModuleNotFoundError:
                raise
            except Exception as error:  # of one form: the others go on
                row = [f"! {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
            wrong |= row[-1].startswith("!")
            print(f"| {name} | {form} | {' | '.join(row)} |", flush=True)
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
    return int(wrong)


def _task(name: str, form: str, device: torch.device):
    from helpers.settings import FORMS as ALL
    from helpers.settings import SIZES, Options
    from helpers.tasks import make_task

    size = SIZES["full" if device.type == "cuda" else "tiny"]
    return make_task(name, ALL[form], Options(size=size, device=device))


def _form_row(name: str, form: str, device: torch.device, first) -> tuple[list[str], tuple]:
    """The cells of a form; the losses and the time of the first form of the setting."""
    from helpers.steps import run_step

    task = _task(name, form, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for index in range(WARMUP + STEPS):
        parts, loss = run_step(task, index)
        losses.append(loss)
        times += [sum(parts)] if index >= WARMUP else []
    step = sorted(times)[len(times) // 2]
    first = first or (step, losses)
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, first[1], strict=True))
    peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}" if device.type == "cuda" else ""
    stats = task.model.deq.stats
    finite = all(loss == loss and abs(loss) != float("inf") for loss in losses)
    return [
        f"{1e3 * step:.0f}",
        f"{task.units / step:.1f} {task.unit}",
        f"{first[0] / step:.2f}",
        peak,
        f"{stats.forward.last['nfe']} / {stats.backward.last['nfe']}",
        f"{difference:.1e}" if finite else "! not finite",
    ], first


# ---- profile -------------------------------------------------------------------------------------


def profile(args) -> int:
    """Kernels that take most of a step of ours."""
    import torch.profiler as profiler

    from helpers.settings import chosen_settings
    from helpers.steps import run_step

    allow_tf32(False)
    gpu = args.device.type == "cuda"
    kind = profiler.ProfilerActivity
    activities = [kind.CPU, kind.CUDA] if gpu else [kind.CPU]
    names = chosen_settings(args.settings) if args.settings else SETTINGS[:2]
    deadline = time.monotonic() + args.seconds - 20
    for name in names:
        if time.monotonic() > deadline:
            print(f"{name}: left out, no time left")
            break
        task = _task(name, "fast", args.device)
        for index in range(WARMUP):
            run_step(task, index)
        whole = seconds(lambda task=task: run_step(task, WARMUP), args.device)
        with profiler.profile(activities=activities) as found:
            run_step(task, WARMUP + 1)
        events = [(e.key, e.count, _own_time(e, gpu)) for e in found.key_averages()]
        events.sort(key=lambda event: -event[2])
        total = sum(event[2] for event in events)
        rows = []
        for key, count, own in events[:12]:
            share = 100 * own / (total or 1)
            rows.append([key[:70].replace("|", "/"), count, f"{own / 1e3:.2f}", f"{share:.1f}"])
        busy = f"; the GPU is busy for {total / 1e3:.0f} ms of a profiled step" if gpu else ""
        print(f"{name}: a step takes {1e3 * whole:.0f} ms{busy}\n")
        print(
            table(["kernel" if gpu else "operation", "calls", "ms", "%"], rows) + "\n", flush=True
        )
    return 0


def _own_time(event, gpu: bool) -> float:
    """Microseconds of the event itself, in kernels or on the CPU."""
    if not gpu:
        return event.self_cpu_time_total
    on_device = str(getattr(event, "device_type", "")).endswith("CUDA")
    own = getattr(event, "self_device_time_total", None)
    own = event.self_cuda_time_total if own is None else own
    return own if on_device else 0.0


SECTIONS = {"machine": machine, "digits": digits, "nccl": nccl, "steps": steps, "profile": profile}

if __name__ == "__main__":
    sys.exit(main())
