"""Ranks: the processes that train one run together, and how a network is spread over them (DDP, FSDP2).

A run is a function of its config, never of its ranks: a step's rows, noise and timesteps belong to slots of the global
batch, and each rank computes some of the slots.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.training.watch import Progress, RankLost, Watch

Result = TypeVar("Result")
Sharding = Literal["ddp", "fsdp"]
_JOINING = timedelta(minutes=10)  # in which all ranks must have started
_COLLECTIVE = timedelta(days=1)  # the watch ends what hangs
_BROKEN = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")


@dataclass(frozen=True)
class Ranks:
    """This process (`rank`) among the `size` that train together; alone by default.

    Every collective is called by all ranks in the same order. doing() names it first, for the error of a rank that does
    not come.
    """

    rank: int = 0
    size: int = 1
    progress: Progress = field(default_factory=Progress, repr=False, compare=False)

    def doing(self, activity: str, long: bool = False) -> None:
        """Name what this rank does next. long: it may take minutes without another sign of progress."""
        self.progress.doing(activity, long)

    def tick(self) -> None:
        """The activity goes on: this rank does not hang."""
        self.progress.tick()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float], activity: str) -> list[float]:
        """Each value summed over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        self.doing(activity)
        total = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def combine(self, part: Tensor, activity: str) -> Tensor:
        """The sum over the ranks of a tensor, in place: parts that are zero where another rank's are not."""
        if self.size > 1:
            self.doing(activity)
            dist.all_reduce(part)
        return part

    def wait(self, activity: str) -> None:
        """Until all ranks are here."""
        self.sum([0.0], activity)

    def from_first(self, make: Callable[[], Result], activity: str) -> Result:
        """What the first rank makes, on every rank. A UserError or OSError of the first rank is raised on all."""
        if self.size == 1:
            return make()
        self.doing(activity, long=True)
        made: list[object] = [None, None]
        error: UserError | OSError | None = None
        if self.first:
            try:
                made[0] = make()
            except (UserError, OSError) as raised:
                error, made[1] = raised, str(raised)
        dist.broadcast_object_list(made, src=0, device=_collective_device())
        if error is not None:
            raise error
        if made[1] is not None:
            raise FirstRankFailed(str(made[1]))
        return made[0]  # type: ignore[return-value]

    def first_before_others(self, act: Callable[[], Result], activity: str) -> Result:
        """act() on every rank, the first rank's done before the others begin: what it writes, they find.

        A UserError or OSError of the first rank is raised on all.
        """
        mine: list[Result] = []

        def once() -> None:
            mine.append(act())

        self.from_first(once, activity)
        if mine:
            return mine[0]
        self.doing(activity, long=True)
        return act()


class FirstRankFailed(UserError):
    """Raised on the other ranks when the first one has raised; the first one tells the user."""

    told = True


def _collective_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def launched_ranks() -> int:
    """How many processes torchrun (or another launcher that sets WORLD_SIZE) started for this run; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process is the one that speaks: the launcher's first, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def rank_device(device: str) -> str:
    """The device of this rank: its own GPU where `device` is "cuda" and a launcher counted the ranks."""
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if device == "cuda" and local_rank is not None and launched_ranks() > 1 else device


@contextmanager
def joined_ranks(device: torch.device, hang_seconds: float = 30.0) -> Iterator[Ranks]:
    """The ranks that a launcher started, in one process group: NCCL on GPUs, gloo on CPUs. Alone without a launcher.

    A group that is there already (Ray Train made it) is taken as it is. Raises RankLost where another rank is gone or
    does not move for hang_seconds; where this thread cannot raise it, since a collective holds it, the process ends.
    """
    there = dist.is_available() and dist.is_initialized()
    if not there and launched_ranks() == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not there:
        _join("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    watch = _watch(ranks, hang_seconds)
    try:
        yield ranks
    except BaseException as error:
        if watch is not None and isinstance(error, RuntimeError) and _is_of_a_collective(error):
            raise watch.explain(error) from None
        if watch is not None:
            watch.leave(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        raise  # the group is left as it is: taking it down could wait for the others
    if watch is not None:
        watch.leave("its part is done")
    if not there:
        dist.destroy_process_group()


def _join(backend: str) -> None:
    """Make the process group. Raises RankLost, which names the ranks that have not come in ten minutes."""
    try:
        store, rank, size = next(cast(Any, dist).rendezvous("env://", timeout=_JOINING))
    except dist.DistError as error:
        raise RankLost(f"rank 0's address could not be reached: {str(error).splitlines()[0]}") from None
    session = store.add(f"smalti/joined/{rank}", 1)  # the store may serve several runs, one after the other
    keys = [f"smalti/joined/{session}/{other}" for other in range(size)]
    store.set(keys[rank], "")
    try:
        store.wait(keys, _JOINING)
    except dist.DistError:
        missing = ", ".join(str(other) for other, key in enumerate(keys) if not store.check([key]))
        raise RankLost(f"rank {missing} did not start within {_JOINING.seconds} s of the others") from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_COLLECTIVE)


def _watch(ranks: Ranks, hang_seconds: float) -> Watch | None:
    """A watch that has begun; None for one rank, and where the ranks were joined without a store's address."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if ranks.size == 1 or address is None or port is None:
        return None
    # A connection of its own: one that is shared waits while the other user does.
    c10d = cast(Any, dist)
    connection = c10d.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=hang_seconds))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    session = connection.add(f"smalti/watched/{attempt}/{ranks.rank}", 1)
    store = c10d.PrefixStore(f"smalti/watch/{attempt}/{session}", connection)
    watch = Watch(store, ranks.rank, ranks.size, ranks.progress, hang_seconds, _collectives_entered)
    watch.start()
    return watch


def _collectives_entered() -> int:
    """How many collectives of the process group this rank has entered."""
    group = cast(Any, dist.group.WORLD)
    return 0 if group is None else int(group._get_sequence_number_for_group())


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Whether an error came from another rank that is not there."""
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in _BROKEN)


def check_divisible(batch_size: int, gradient_accumulation_steps: int, ranks: int) -> None:
    """Raise UserError for a batch that does not divide evenly over micro-batches and ranks."""
    parts = gradient_accumulation_steps * ranks
    if batch_size % parts == 0:
        return
    below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
    near = f"{below} or {above}" if below else str(above)
    raise UserError(
        f"loop.batch_size={batch_size} must divide by loop.gradient_accumulation_steps x ranks = "
        f"{gradient_accumulation_steps} x {ranks}: take {near}"
    )


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that make up most of a network: the members of its outermost module lists."""
    blocks: list[nn.Module] = []
    for child in network.children():
        blocks += list(child) if isinstance(child, nn.ModuleList) else repeated_blocks(child)
    return blocks


def is_sharded(ranks: Ranks, sharding: Sharding) -> bool:
    """Whether each rank holds a part of the weights alone."""
    return sharding == "fsdp" and ranks.size > 1


def replicated(network: nn.Module, ranks: Ranks, sharding: Sharding) -> nn.Module:
    """What a training step calls in the network's place, so that its gradients are those of the whole batch.

    "ddp": every rank holds all weights (Li et al. 2020). A sharded network combines them itself.
    """
    if ranks.size == 1 or sharding == "fsdp":
        return network
    return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)


def shard(network: nn.Module, ranks: Ranks, trained: bool) -> None:
    """Leave each rank a part of the network's weights, in place; a block is gathered when it is run.

    trained: a backward follows each forward, so what is in no block stays gathered until then.
    Source: FSDP2 (Zhao et al. 2023), a group for each repeated block and one for the rest.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(network.parameters()).device
    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in repeated_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=not trained)


def gradients_stay_local(network: nn.Module) -> AbstractContextManager[None]:
    """A context in which a backward adds to this rank's gradients without combining them: all micro-batches but the
    last."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return network.no_sync()
    if dist.is_available() and hasattr(network, "set_requires_gradient_sync"):
        return _fsdp_without_sync(network)
    return nullcontext()


@contextmanager
def _fsdp_without_sync(network: nn.Module) -> Iterator[None]:
    network.set_requires_gradient_sync(False)  # type: ignore[operator]
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)  # type: ignore[operator]
