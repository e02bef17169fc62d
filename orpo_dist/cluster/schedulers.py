"""The place of this node in a run, as the variables of a scheduler or an MPI launcher have it.

| from | nodes | this node | head |
|---|---|---|---|
| SLURM (srun) | SLURM_STEP_NUM_NODES | SLURM_NODEID | SLURM_STEP_NODELIST |
| PBS, Torque | PBS_NODEFILE | its line in PBS_NODEFILE, PBS_NODENUM | PBS_NODEFILE |
| LSF | LSB_MCPU_HOSTS, LSB_HOSTS, LSB_DJOB_HOSTFILE | its place there, LSF_PM_TASKID | the same |
| Open MPI | OMPI_COMM_WORLD_SIZE | OMPI_COMM_WORLD_RANK | MASTER_ADDR |
| MPICH, Intel MPI, Cray PALS, MVAPICH | PMI_SIZE, MV2_COMM_WORLD_SIZE | PMI_RANK, ..., PALS_RANKID | MASTER_ADDR |
| PMIx, jsrun | JSM_NAMESPACE_SIZE | PMIX_RANK, JSM_NAMESPACE_RANK | MASTER_ADDR |
| Kubernetes, indexed Job | NNODES | JOB_COMPLETION_INDEX | MASTER_ADDR, or the name of the pod |
| PyTorchJob | PET_NNODES, NNODES, WORLD_SIZE | PET_NODE_RANK, NODE_RANK, RANK | PET_MASTER_ADDR, MASTER_ADDR |

The sources are in docs/clusters.md. Flags override variables; variables that contradict each other are refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from orpo_dist.errors import UserError

# What tells a process its place. The ranks get theirs from their own launcher: accelerate and DeepSpeed would take
# these for it (accelerate/state.py reads PMI_SIZE before WORLD_SIZE), and torchrun reads PET_* as its options.
_OF_A_PROCESS = re.compile(
    r"OMPI_COMM_WORLD_\w+|PMI_\w+|PMIX_\w+|MV2_COMM_WORLD_\w+|MPI_LOCAL(RANKID|NRANKS)|PALS_\w*RANKID|JSM_NAMESPACE_\w+"
    r"|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|NODE_RANK"
    r"|PET_(NNODES|NPROC_PER_NODE|NODE_RANK|MASTER_ADDR|MASTER_PORT|RDZV_BACKEND|RDZV_ENDPOINT|RDZV_CONF|STANDALONE"
    r"|MAX_RESTARTS)"
)


@dataclass(frozen=True)
class Place:
    """The place of this node; None: neither a flag nor a variable says it.

    Attributes:
        processes: of this node.
        said_by: the variables that were used.
    """

    nodes: int = 1
    node_rank: int = 0
    head: str | None = None
    port: int | None = None
    processes: int | None = None
    said_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Claim:
    """A value of one variable, or one derived from it."""

    name: str
    text: str

    @property
    def value(self) -> int:
        if not re.fullmatch(r"\d{1,9}", self.text.strip()):
            raise UserError(f"{self.name}={self.text} is not a number: correct the variable, or pass the flag instead.")
        return int(self.text)


@dataclass(frozen=True)
class _Hosts:
    """The hosts of a job, each once, as one of its variables lists them."""

    name: str
    hosts: tuple[str, ...]
    job: str = ""

    @property
    def port(self) -> int | None:
        """Different for the jobs on one node, the same on all nodes of a job, below the ephemeral range."""
        number = re.match(r"\d+", self.job)
        return 10000 + int(number[0]) % 20000 if number else None


def rank_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that the processes of a run must not inherit."""
    return sorted(name for name in environment if _OF_A_PROCESS.fullmatch(name))


def find_place(
    environment: Mapping[str, str],
    hostname: str,
    *,
    nodes: int | None = None,
    node_rank: int | None = None,
    head: str | None = None,
    port: int | None = None,
) -> Place:
    """The place of this node. hostname: of this node, with its domain where it has one. The other arguments are flags.

    Raises:
        UserError: variables that contradict each other, are incomplete or hold no numbers.
    """
    known = {name: value for name, value in environment.items() if value.strip()}
    processes = _processes(known)
    if nodes == 1:
        return Place(1, node_rank or 0, head, port, processes)
    hosts = _hosts(known)
    if nodes is None or node_rank is None:
        _refuse_several_launchers(known)
    used: list[_Claim] = []
    indices = [] if node_rank is not None else [*_indices(known), *_index_in(hosts, hostname, known)]
    if nodes is None:
        listed = [_Claim(hosts.name, str(len(hosts.hosts)))] if hosts else _claims(known, "PBS_NUM_NODES")
        counts = [*_counts(known), *listed]
        count = _agreed(counts, "nodes")
        if count is None:
            return Place(1, _alone(indices, node_rank), head, port, processes)
        used.append(count)
        nodes = count.value
    if nodes > 1 and node_rank is None:
        index = _agreed(indices, "as this node's number")
        if index is None and used:
            named = f" ({', '.join(hosts.hosts)})" if hosts else ""
            raise UserError(
                f"{used[0].name} says {nodes} nodes{named}, and nothing says which of them {hostname} is: pass "
                "--node-rank (launch/multi_node.sh: NODE_RANK)."
            )
        if index is not None:
            used.append(index)
            node_rank = index.value
    if nodes == 1:
        _refuse_others(used, indices)
    if used and node_rank is not None and not 0 <= node_rank < max(nodes, 1):
        raise UserError(
            f"{' and '.join(f'{claim.name}={claim.text}' for claim in used)}: node {node_rank} of {nodes} nodes does "
            "not exist, they count from 0."
        )
    if nodes > 1:
        head, port, said = _address(known, hosts, hostname, head, port)
        used += said
    return Place(nodes, node_rank or 0, head, port, processes, tuple(dict.fromkeys(claim.name for claim in used)))


def _agreed(claims: list[_Claim], what: str) -> _Claim | None:
    for other in claims[1:]:
        if other.value != claims[0].value:
            raise UserError(
                f"{claims[0].name} says {claims[0].value} {what}, and {other.name} says {other.value}: unset one of "
                "them, or pass --nodes and --node-rank."
            )
    if claims:
        claims[0].value  # noqa: B018  raises if it is no number
    return claims[0] if claims else None


def _alone(indices: list[_Claim], node_rank: int | None) -> int:
    """The number of the only node. An index of a run of unknown size is refused: each node would train on its own."""
    for index in indices:
        if index.value > 0 or index.name == "JOB_COMPLETION_INDEX":
            raise UserError(
                f"{index.name}={index.text} says that this is node {index.value}, and nothing says of how many: pass "
                "--nodes N (launch/multi_node.sh: NODES), or --nodes 1 if it trains alone."
            )
    return node_rank or 0


def _refuse_others(counts: list[_Claim], indices: list[_Claim]) -> None:
    """An index above 0 of a run of one node. Pods of an indexed Job may each train on their own."""
    for index in indices:
        if index.value > 0 and index.name != "JOB_COMPLETION_INDEX":
            raise UserError(
                f"{counts[0].name} says 1 node, and {index.name}={index.text} that this is node {index.value}: unset "
                "one of them, or pass --nodes and --node-rank."
            )


def _claims(environment: Mapping[str, str], *names: str) -> Iterator[_Claim]:
    return (_Claim(name, environment[name]) for name in names if name in environment)


def _counts(environment: Mapping[str, str]) -> Iterator[_Claim]:
    for claim in _claims(environment, "PET_NNODES"):  # 2, or 2:2 from an elastic job
        least, _, most = claim.text.partition(":")
        yield _Claim(claim.name, least if least == most else claim.text)
    yield from _claims(environment, "NNODES")
    if _is_of_a_pod(environment) and not _counts_processes(environment):
        yield from _claims(environment, "WORLD_SIZE")
    yield from _claims(
        environment, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE",
        "SLURM_STEP_NUM_NODES",
    )  # fmt: skip


def _indices(environment: Mapping[str, str]) -> Iterator[_Claim]:
    yield from _claims(environment, "PET_NODE_RANK", "NODE_RANK")
    if _is_of_a_pod(environment):
        yield from _claims(environment, "RANK")
    yield from _claims(
        environment, "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK", "PALS_RANKID",
        "PMIX_RANK", "JOB_COMPLETION_INDEX",
    )  # fmt: skip
    if "SLURM_STEP_NUM_NODES" in environment:  # SLURM_NODEID is also that of a batch script
        yield from _claims(environment, "SLURM_NODEID")


def _is_of_a_pod(environment: Mapping[str, str]) -> bool:
    """RANK and WORLD_SIZE of a PyTorchJob, and not of a process that torchrun has started."""
    return {"RANK", "WORLD_SIZE"} <= environment.keys() and not {"LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & {*environment}


def _counts_processes(environment: Mapping[str, str]) -> bool:
    """Newer training operators multiply WORLD_SIZE by nprocPerNode."""
    nodes, each, world = (environment.get(name, "") for name in ("PET_NNODES", "PET_NPROC_PER_NODE", "WORLD_SIZE"))
    if not (nodes.isdigit() and each and world.isdigit() and int(nodes) < int(world)):
        return False
    return int(world) == int(nodes) * int(each) if each.isdigit() else int(world) % int(nodes) == 0


def _processes(environment: Mapping[str, str]) -> int | None:
    """A number of PET_NPROC_PER_NODE; its words (auto, gpu) mean one per GPU, the default."""
    text = environment.get("PET_NPROC_PER_NODE", "")
    return int(text) if text.isdigit() and int(text) else None


def _refuse_several_launchers(environment: Mapping[str, str]) -> None:
    names = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE",
             "JSM_NAMESPACE_LOCAL_SIZE")  # fmt: skip
    claims = list(_claims(environment, *names))
    if "SLURM_STEP_NUM_NODES" in environment:  # 8(x2): eight tasks on each of two nodes
        claims += [_Claim(c.name, c.text.split("(")[0]) for c in _claims(environment, "SLURM_STEP_TASKS_PER_NODE")]
    for claim in claims:
        if claim.value > 1:
            raise UserError(
                f"{claim.name}={claim.text}: {claim.text} launchers run on this node, and each starts one process per "
                "GPU. Start one per node (mpirun --map-by ppr:1:node, mpiexec -ppn 1, srun --ntasks-per-node=1)."
            )


def _hosts(environment: Mapping[str, str]) -> _Hosts | None:
    """The hosts of the job, of the scheduler that lists them."""
    if "SLURM_STEP_NUM_NODES" in environment and "SLURM_STEP_NODELIST" in environment:
        first = _first_of(environment["SLURM_STEP_NODELIST"])
        number = _Claim("SLURM_STEP_NUM_NODES", environment["SLURM_STEP_NUM_NODES"]).value
        others = tuple("" for _ in range(number - 1))  # only the first has to be known by name
        return _Hosts("SLURM_STEP_NODELIST", (first, *others), environment.get("SLURM_JOB_ID", ""))
    if "PBS_NODEFILE" in environment:
        # pbsdsh starts tasks on nodes that do not have the file.
        words = _words_of(Path(environment["PBS_NODEFILE"]))
        return _Hosts("PBS_NODEFILE", _unique(words), environment.get("PBS_JOBID", "")) if words else None
    job = environment.get("LSB_JOBID", "")
    hosts: tuple[str, ...] = ()
    names = ("LSB_MCPU_HOSTS", "LSB_HOSTS", "LSB_DJOB_HOSTFILE", "LSB_DJOB_RANKFILE")
    name = next((name for name in names if name in environment), "")
    if name == "LSB_MCPU_HOSTS":  # n1 16 n2 16
        hosts = _unique(environment[name].split()[::2])
    elif name == "LSB_HOSTS":
        hosts = _unique(environment[name].split())
    elif name:
        hosts = _unique(_words_of(Path(environment[name])))
    if environment.get("JSM_NAMESPACE_SIZE") == str(
        len(hosts) - 1
    ):  # jsrun's launch node comes first and does not train
        hosts = hosts[1:]
    return _Hosts(name, hosts, job) if hosts else None


def _index_in(hosts: _Hosts | None, hostname: str, environment: Mapping[str, str]) -> Iterator[_Claim]:
    if hosts is None or hosts.name == "SLURM_STEP_NODELIST":
        if hosts is None and "PBS_JOBID" in environment:  # below pbsdsh, without the file
            yield from _claims(environment, "PBS_NODENUM")
        return
    places = [place for place, host in enumerate(hosts.hosts) if _same_host(host, hostname)]
    if len(places) == 1:
        yield _Claim(hosts.name, str(places[0]))
    elif hosts.name == "PBS_NODEFILE":
        yield from _claims(environment, "PBS_NODENUM")
    else:
        for claim in _claims(environment, "LSF_PM_TASKID"):  # blaunch counts from 1
            yield _Claim(claim.name, str(claim.value - 1))


def _address(
    environment: Mapping[str, str], hosts: _Hosts | None, hostname: str, head: str | None, port: int | None
) -> tuple[str | None, int | None, list[_Claim]]:
    """Address and port of the head, and the variables that say them."""
    said: list[_Claim] = []
    of_the_job: int | None = None
    if head is None:
        named = list(_claims(environment, "PET_MASTER_ADDR", "MASTER_ADDR"))
        if len({claim.text for claim in named}) > 1:
            raise UserError(
                f"{named[0].name}={named[0].text} and {named[1].name}={named[1].text}: unset one of them, or pass "
                "--head-address."
            )
        named += [
            _Claim(c.name, c.text.rpartition(":")[0] or c.text) for c in _claims(environment, "PET_RDZV_ENDPOINT")
        ]
        if not named and hosts is not None:
            named, of_the_job = [_Claim(hosts.name, hosts.hosts[0])], hosts.port
        if not named:
            named = list(_first_pod(environment, hostname))
        head = named[0].text if named else None
        said += named[:1]
    if port is None:
        ports = list(_claims(environment, "PET_MASTER_PORT", "MASTER_PORT"))
        if len({claim.value for claim in ports}) > 1:
            raise UserError(f"PET_MASTER_PORT={ports[0].text} and MASTER_PORT={ports[1].text}: unset one of them.")
        if not ports and said and said[0].name == "PET_RDZV_ENDPOINT" and ":" in environment["PET_RDZV_ENDPOINT"]:
            ports = [_Claim("PET_RDZV_ENDPOINT", environment["PET_RDZV_ENDPOINT"].rpartition(":")[2])]
        port = ports[0].value if ports else of_the_job
        said += ports[:1]
    return head, port, said


def _first_pod(environment: Mapping[str, str], hostname: str) -> Iterator[_Claim]:
    """Pods of an indexed Job are called JOB-INDEX, in the domain of its headless service."""
    index = environment.get("JOB_COMPLETION_INDEX")
    name, dot, domain = hostname.partition(".")
    if index is not None and name.endswith(f"-{index}"):
        yield _Claim("JOB_COMPLETION_INDEX", f"{name.removesuffix(index)}0{dot}{domain}")


def _first_of(nodes: str) -> str:
    """The first host of SLURM's notation: n[03-05,9],m1 begins with n03."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes.strip())
    return f"{match[1]}{match[2] or ''}{match[3] or ''}" if match else nodes


def _same_host(one: str, other: str) -> bool:
    """Whether two names are of one host; one of them may lack the domain. Addresses are compared whole."""
    first, second = one.lower().split("."), other.lower().split(".")
    if first[0].isdigit() or second[0].isdigit():
        return first == second
    length = min(len(first), len(second))
    return first[:length] == second[:length]


def _words_of(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []


def _unique(words: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))
