"""The rank of this process, the ranks that share a batch, and the sharding of the weights. The only place to ask.

    world rank   any process. Sharding, saving and barriers count world ranks.
    data rank    a rank with its own pairs. Pairs, tokens and the global batch count data ranks.

Every world rank is a data rank unless several ranks work on one pair (sequence_parallel_size): then neighbouring world
ranks are one data rank.

What is known depends on the stage: the launcher's variables (`launched_rank`), then the sharding that models are loaded
for (`loading_sharding`, once TrainingArguments exist), then the accelerator (`sharding_of`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from orpo_dist.errors import UserError

if TYPE_CHECKING:  # the command line asks for its rank before torch is imported
    from accelerate import Accelerator
    from transformers import TrainingArguments

_USE_FSDP = "ACCELERATE_USE_FSDP"  # how `accelerate launch` tells its processes, read by accelerate and transformers


class Sharding(Enum):
    """How weights, gradients and optimizer states are sharded over the world ranks. The values are written into
    checkpoints."""

    REPLICATED = "replicated"
    ZERO0 = "zero0"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    FSDP = "fsdp"

    @property
    def is_zero(self) -> bool:
        return self in (Sharding.ZERO0, Sharding.ZERO1, Sharding.ZERO2, Sharding.ZERO3)

    @property
    def partitions_weights(self) -> bool:
        """Whether each forward gathers its weights, so that all ranks must run the same modules."""
        return self in (Sharding.ZERO3, Sharding.FSDP)


@dataclass(frozen=True)
class LaunchedRank:
    """This process as set by its launcher (torchrun, accelerate launch, srun with its variables)."""

    rank: int
    world_size: int
    local_rank: int | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def speaks_for_node(self) -> bool:
        """Whether this process reports messages that are the same on all ranks of its node."""
        return self.local_rank in (None, 0)


def launched_rank() -> LaunchedRank | None:
    """This process as set by its launcher; None without one. Does not import torch."""
    if "RANK" not in os.environ:
        return None
    local_rank = os.environ.get("LOCAL_RANK")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return LaunchedRank(int(os.environ["RANK"]), world_size, None if local_rank is None else int(local_rank))


def is_launched_with_others() -> bool:
    """Whether a launcher has started this process and others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def starts_on_cpu_alone() -> bool:
    """Whether a launcher has started this process and others on a machine without an accelerator.

    accelerate starts no process group there unless it is told to use the CPU, and each process would train on its own,
    all of them in one folder. (accelerate/state.py, PartialState._prepare_backend)
    """
    import torch
    from accelerate.utils import is_torch_xla_available

    launched = launched_rank()
    if launched is None or launched.world_size == 1:
        return False
    return not torch.accelerator.is_available() and not is_torch_xla_available()


def check_world_size(world_size: int) -> None:
    """world_size: of the process group.

    Raises:
        UserError: the launcher started another number of processes, so each would train on its own.
    """
    launched = launched_rank()
    if launched is not None and launched.world_size != world_size:
        raise UserError(
            f"The launcher started {launched.world_size} processes (WORLD_SIZE), and this one trains among "
            f"{world_size}: each would train on its own and write into one folder. Start one process, or set "
            "use_cpu=true where the accelerator has no distributed backend (Apple's). A launcher also has to set "
            "LOCAL_RANK: torchrun, accelerate launch and orpo-dist launch do."
        )


def check_sequence_parallel(size: int, world_size: int) -> None:
    """size: `sequence_parallel_size`.

    Raises:
        UserError: the processes cannot be shared out in groups of that size.
    """
    if size < 1 or world_size % size:
        raise UserError(
            f"sequence_parallel_size={size} does not divide the number of processes, {world_size}: each packed row is "
            "shared by that many of them."
        )


@dataclass(frozen=True)
class Environment:
    """The rank of this process, and how the run is sharded.

    Attributes:
        world_rank, world_size: of all processes.
        local_rank: among the processes of this node.
        data_rank, data_ranks: the position among the ranks with their own pairs, and their number.
        sequence_size, sequence_place: how many neighbouring ranks share one packed row, and the position among them.
    """

    world_rank: int
    world_size: int
    local_rank: int
    data_rank: int
    data_ranks: int
    sharding: Sharding
    sequence_size: int = 1
    sequence_place: int = 0

    @classmethod
    def of(cls, args: Any, sharding: Sharding) -> "Environment":
        """args: an ORPOConfig."""
        size = args.sequence_parallel_size
        return cls(
            world_rank=args.process_index,
            world_size=args.world_size,
            local_rank=args.local_process_index,
            data_rank=args.process_index // size,
            data_ranks=args.world_size // size,
            sharding=sharding,
            sequence_size=size,
            sequence_place=args.process_index % size,
        )

    @property
    def speaks_for_pairs(self) -> bool:
        """Whether this rank reports its pairs: one of those that share them."""
        return self.sequence_place == 0

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.world_rank == 0

    @property
    def is_first_on_node(self) -> bool:
        return self.local_rank == 0

    def global_batch(self, args: "TrainingArguments") -> int:
        """Pairs of one optimizer step."""
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.data_ranks


def loading_sharding() -> Sharding:
    """The sharding that models are loaded for. DeepSpeed's is known once TrainingArguments exist."""
    from transformers.integrations.deepspeed import deepspeed_config

    config = deepspeed_config()
    if config is not None:
        return Sharding(f"zero{config.get('zero_optimization', {}).get('stage', 0)}")
    return Sharding.FSDP if os.environ.get(_USE_FSDP, "false") == "true" else Sharding.REPLICATED


def asked_fsdp_version(args: "TrainingArguments") -> int | None:
    """The version of FSDP that the arguments or the accelerate config ask for, 1 where a config names none; None
    without FSDP. What is in force, `sharding_of` tells.

    https://github.com/huggingface/accelerate/blob/main/src/accelerate/utils/dataclasses.py (fsdp_version)
    """
    if args.fsdp:
        plugin: dict[str, Any] = vars(args).get("fsdp_plugin_args") or {}
        return int(plugin.get("fsdp_version", 2))
    return int(os.environ.get("FSDP_VERSION", "1")) if os.environ.get(_USE_FSDP, "false") == "true" else None


def why_not_sharded(args: "TrainingArguments", accelerator: "Accelerator") -> str | None:
    """What to tell if FSDP was asked for and accelerate runs something else, which it does in silence."""
    if asked_fsdp_version(args) is None or sharding_of(accelerator).partitions_weights:
        return None
    return (
        f"FSDP was asked for and is not in force: accelerate runs {accelerator.distributed_type.value} here (it knows "
        "FSDP on accelerators alone), so every process holds the whole model."
    )


def sharding_of(accelerator: "Accelerator") -> Sharding:
    """The sharding that the accelerator uses."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin: Any = accelerator.state.deepspeed_plugin
        return Sharding(f"zero{plugin.zero_stage}")
    return Sharding.FSDP if accelerator.distributed_type == DistributedType.FSDP else Sharding.REPLICATED


@contextmanager
def fsdp_hidden() -> Iterator[None]:
    """Within it, models are loaded as if FSDP were not set up."""
    fsdp = os.environ.pop(_USE_FSDP, None)
    try:
        yield
    finally:
        if fsdp is not None:
            os.environ[_USE_FSDP] = fsdp
