"""Ranks, device and precision: launch, collectives, stop flags. The only file that imports Fabric."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nearkin.errors import ConfigError, NearkinError
from nearkin.process import exit_if_importing_main

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.optim import Optimizer


def gather_rows(x: Tensor) -> Tensor:
    """The rows of every rank, rank after rank, with gradient.

    x: `[n, ...]`, the same n and dtype on all W ranks -> `[W * n, ...]`. The gradient of x is the sum over
    ranks of the gradients of its rows: with the same loss L on every rank that is W dL/dx, which the mean
    over ranks that DDP takes of parameter gradients turns into dL/dx. Without a process group, x itself.
    """
    if not dist.is_initialized():
        return x
    gathered: Tensor = _GatherRows.apply(x)
    return gathered


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, without gradient. Without a process group, x itself."""
    if not dist.is_initialized():
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        gathered = x.new_empty((dist.get_world_size() * ctx.rows, *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.rows
        return sum_over_ranks(grad)[first : first + ctx.rows]


T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16", "fp64"]
_FABRIC_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp64": "64-true"}
# A rank that hangs is noticed in minutes; gloo's own default is half an hour.
PATIENCE = timedelta(minutes=5)
LONG_PATIENCE = timedelta(days=2)


class Launch(NamedTuple):
    """How many processes were started for us, and by whom."""

    by: Literal["torchrun", "slurm", "alone"]
    nodes: int
    per_node: int


def launched() -> Launch:
    """Read the environment that torchrun or srun set. Raises nothing: without either we are alone."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env and "WORLD_SIZE" in env:
        world, local = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", max(1, world // local), local)
    tasks = int(env.get("SLURM_NTASKS", "1"))
    if (
        tasks > 1
        and "SLURM_PROCID" in env
        and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    ):
        nodes = int(env.get("SLURM_NNODES", "1"))
        return Launch("slurm", nodes, tasks // nodes)
    return Launch("alone", 1, 1)


def choose_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu. Raises ConfigError for a device that is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, present in there.items() if present)
    if not there[device]:
        raise ConfigError(f"--device {device} is not available here; use --device cpu or auto.")
    return device


def choose_precision(precision: str, device: str) -> Precision:
    """`auto` becomes bf16 on a GPU that has it, fp16 on one that has not, fp32 elsewhere."""
    if precision == "auto":
        if device != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "fp16" and device == "cpu":
        raise ConfigError("--precision fp16 does not train on a CPU; use --precision bf16 or fp32.")
    if precision == "fp64" and device == "mps":
        raise ConfigError("--precision fp64 does not exist on mps; use --device cpu.")
    return precision  # type: ignore[return-value]  # pydantic's Literal allows nothing else


class Runtime:
    """The processes, the device and the precision of one run."""

    def __init__(self, *, device: str, precision: Precision) -> None:
        exit_if_importing_main()
        self.precision = precision
        self._fabric = _start_fabric(device, precision)
        if self.world_size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)

    def at(self, precision: Precision) -> Runtime:
        """The same processes and device with another precision."""
        same = precision == self.precision
        return self if same else Runtime(device=self.device.type, precision=precision)

    @property
    def rank(self) -> int:
        return int(self._fabric.global_rank)

    @property
    def world_size(self) -> int:
        return int(self._fabric.world_size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        device: torch.device = self._fabric.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and buffers: float32, but for the proofs in float64."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def place(self, module: nn.Module) -> None:
        """Move a module to the device and the dtype of the run."""
        module.to(self.device, self.dtype)

    def wrap(self, network: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """The network under DDP and autocast, and its optimizer under the gradient scaler."""
        with warnings.catch_warnings():
            # torch 2.15 renames the option to one that earlier versions do not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
            wrapped = self._fabric.setup_module(network)
        return wrapped, self._fabric.setup_optimizers(optimizer)  # type: ignore[return-value]

    def autocast(self) -> AbstractContextManager[Any]:
        """For what runs outside the wrapped network: the teacher and evaluation."""
        return self._fabric.autocast()

    def accumulating(self, network: nn.Module, unfinished: bool) -> AbstractContextManager[Any]:
        """Keeps gradients on this rank while `unfinished` parts of the batch remain."""
        return self._fabric.no_backward_sync(cast("Any", network), enabled=unfinished)

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)

    def clip(self, network: nn.Module, optimizer: Optimizer, max_norm: float) -> None:
        """Scale the gradient down to `max_norm`, never raising: a non-finite loss is reported by the loop."""
        self._fabric.clip_gradients(network, optimizer, max_norm=max_norm, error_if_nonfinite=False)

    def gather(self, rows: Tensor, views: int = 1) -> Tensor:
        """`[V * b, ...]` of each rank -> `[V * B, ...]`, view after view; the backward sums over ranks."""
        if self.world_size == 1:
            return rows
        gathered = gather_rows(rows)
        if views == 1:
            return gathered
        parts = gathered.view(self.world_size, views, -1, *rows.shape[1:])
        return parts.transpose(0, 1).flatten(0, 2)

    def share(self, value: Any) -> Any:
        """What rank 0 holds, on every rank. Picklable objects of our own only."""
        return self._fabric.broadcast(value) if self.world_size > 1 else value

    def collect(self, value: Any) -> list[Any]:
        """What each rank holds, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def collect_patiently(self, value: Any) -> list[Any]:
        """As `collect`, where some may work for hours before they come: a scan of all images, say."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=cast("dist.ProcessGroup", self._patient))
        return values

    def once_per_node(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first process of each node, on all processes of that node.

        Raises its NearkinError on all of them.
        """
        node, made, problem = self._fabric.node_rank, None, None
        if self._fabric.local_rank == 0:
            try:
                made = work()
            except NearkinError as error:
                problem = error
        leads = self._fabric.local_rank == 0
        told = self.collect_patiently((node, made, problem) if leads else None)
        failed = next((one[2] for one in told if one is not None and one[2] is not None), None)
        if failed is not None:
            raise failed
        if made is None:
            made = next(one[1] for one in told if one is not None and one[0] == node)
        return cast("T", made)

    def barrier(self) -> None:
        self._fabric.barrier()

    def scaler_state(self) -> dict[str, Any]:
        """State of the fp16 gradient scaler; empty for the other precisions."""
        return dict(self._fabric.strategy.precision.state_dict())

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        self._fabric.strategy.precision.load_state_dict(state)

    def close(self) -> None:
        """Leave the process group, so that a second run in this process can start its own."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _start_fabric(device: str, precision: Precision) -> Fabric:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    launch = launched()
    environments = {
        "torchrun": TorchElasticEnvironment,
        "slurm": SLURMEnvironment,
        "alone": LightningEnvironment,
    }
    world = launch.nodes * launch.per_node
    # Our statistics are the same on every rank already, so DDP has no buffers to send.
    ddp = DDPStrategy(broadcast_buffers=False, timeout=PATIENCE)
    fabric = Fabric(
        accelerator=device,
        devices=launch.per_node,
        num_nodes=launch.nodes,
        strategy=ddp if world > 1 else "auto",
        precision=_FABRIC_PRECISION[precision],  # type: ignore[arg-type]
        plugins=[environments[launch.by]()],
    )
    with _quiet():
        fabric.launch()
    return fabric


@contextmanager
def _quiet() -> Iterator[None]:
    """Fabric announces every rank; our own first lines say it."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(level)


class Flags:
    """What any rank may ask of all: read one step later, so that no step waits for it.

    On a GPU the flags travel on a stream of their own: reading those of the last step does not wait for this one.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._alone = runtime.world_size == 1
        self._device = runtime.device
        self._stream = torch.cuda.Stream() if runtime.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._sent: tuple[Tensor, Any] | None = None

    def post(self, stop: bool, bad: Tensor) -> None:
        """Send this rank's wish to stop and whether its loss is not finite (`[]` bool, on the device)."""
        wish = torch.full((), stop, dtype=torch.bool, device=self._device)
        flags = torch.stack([wish, bad]).to(torch.int32)
        if self._stream is not None:
            self._sent = self._to_host(flags, self._stream)
        elif self._alone:
            self._sent = flags, None
        else:
            self._sent = flags, dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)

    def read(self) -> tuple[bool, bool]:
        """(stop, bad) of the last post, over all ranks; (False, False) before the first."""
        if self._sent is None:
            return False, False
        flags, arrival = self._sent
        if isinstance(arrival, torch.cuda.Event):
            arrival.synchronize()
        elif arrival is not None:
            arrival.wait()
        self._sent = None
        stop, bad = flags.tolist()
        return bool(stop), bool(bad)

    def _to_host(self, flags: Tensor, stream: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            flags.record_stream(stream)
            if not self._alone:
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            host = torch.empty(2, dtype=torch.int32, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(stream)
        return host, arrival
