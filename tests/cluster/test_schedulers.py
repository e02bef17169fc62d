"""The variables of schedulers and MPI launchers, as they set them on a node called n2."""

import pytest

from orpo_dist.cluster.schedulers import find_place, rank_variables
from orpo_dist.errors import UserError

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-n1-7@1"}
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0", "PMI_FD": "9"}
MVAPICH = {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "1"}
PALS = {"PMI_SIZE": "2", "PMI_RANK": "1", "PALS_RANKID": "1", "PALS_LOCAL_RANKID": "0", "PMI_LOCAL_SIZE": "1"}
JSRUN = {"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "1", "PMIX_RANK": "1"}
POD = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"}
ELASTIC = {"PET_NNODES": "2:2", "PET_NPROC_PER_NODE": "8", "PET_RDZV_ENDPOINT": "job-worker-0:29400"}
ELASTIC |= {"PET_NODE_RANK": "1", "PET_RDZV_BACKEND": "c10d", "PET_MAX_RESTARTS": "3"}
SRUN = {"SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1"}
SRUN |= {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
LSF = {"LSB_JOBID": "777", "LSB_MCPU_HOSTS": "n1 16 n2 16", "LSB_HOSTS": "n1 n1 n2 n2"}


def place(environment, hostname="n2", **flags):
    found = find_place(environment, hostname, **flags)
    return found.nodes, found.node_rank, found.head, found.port


@pytest.fixture
def pbs(tmp_path):
    (tmp_path / "nodes").write_text("n1.cluster\nn1.cluster\nn2.cluster\nn2.cluster\n")
    return {"PBS_JOBID": "4242[3].server", "PBS_NODEFILE": str(tmp_path / "nodes")}


@pytest.mark.parametrize(
    ("variables", "head", "port"),
    [
        (OPEN_MPI | {"MASTER_ADDR": "n1"}, "n1", None),
        (HYDRA | {"MASTER_ADDR": "n1", "MASTER_PORT": "1234"}, "n1", 1234),
        (MVAPICH, None, None),
        (PALS | {"MASTER_ADDR": "n1"}, "n1", None),
        (JSRUN | {"LSB_JOBID": "777", "LSB_MCPU_HOSTS": "batch3 1 n1 42 n2 42"}, "n1", 10777),
        (POD, "job-master-0", 23456),
        (POD | {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4", "WORLD_SIZE": "8"}, "job-master-0",
         23456),
        (POD | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "gpu", "WORLD_SIZE": "8"}, "job-master-0", 23456),
        (ELASTIC, "job-worker-0", 29400),
        (SRUN, "n1", 11234),
        (SRUN | {"PMI_SIZE": "2", "PMI_RANK": "1", "PMIX_RANK": "1"}, "n1", 11234),
        (LSF, "n1", 10777),
        (LSF | OPEN_MPI, "n1", 10777),
        ({"LSB_JOBID": "777", "LSB_HOSTS": "n1 n2"}, "n1", 10777),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}, "10.0.0.1", None),
        ({"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "job-0.svc"}, "job-0.svc", None),
    ],
)  # fmt: skip
def test_the_second_of_two_nodes(variables, head, port):
    assert place(variables) == (2, 1, head, port)


def test_pbs(pbs):
    assert place(pbs) == (2, 1, "n1.cluster", 14242)
    assert place(pbs, "n1") == (2, 0, "n1.cluster", 14242)
    assert place(pbs | OPEN_MPI) == (2, 1, "n1.cluster", 14242)
    assert place(pbs | {"PMIX_RANK": "1"}) == (2, 1, "n1.cluster", 14242)
    assert place(pbs | {"PBS_NODENUM": "1"}, "login-7") == (2, 1, "n1.cluster", 14242)
    # pbsdsh starts tasks on nodes without the file: number and head come from the job script.
    remote = {"PBS_JOBID": "4242.server", "PBS_NODEFILE": "/var/spool/pbs/aux/4242.server", "PBS_NODENUM": "1"}
    assert place(remote, nodes=2, head="n1") == (2, 1, "n1", None)
    assert place(remote | {"PBS_NUM_NODES": "2"}, head="n1") == (2, 1, "n1", None)  # Torque


def test_lsf_by_the_number_of_blaunch():
    assert place(LSF | {"LSF_PM_TASKID": "2"}, "an-alias") == (2, 1, "n1", 10777)


def test_a_list_of_hosts_in_a_file(tmp_path):
    (tmp_path / "hosts").write_text("n1\nn2\n")
    assert place({"LSB_DJOB_HOSTFILE": str(tmp_path / "hosts")}) == (2, 1, "n1", None)
    assert place({"LSB_DJOB_RANKFILE": str(tmp_path / "hosts")}) == (2, 1, "n1", None)


def test_the_first_pod_of_an_indexed_job_is_known_by_its_name():
    index = {"NNODES": "12", "JOB_COMPLETION_INDEX": "11"}
    assert place(index, "orpo-11.orpo.ns.svc.cluster.local") == (12, 11, "orpo-0.orpo.ns.svc.cluster.local", None)
    assert place(index, "a-node-of-the-host-network")[2] is None


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        {"MASTER_ADDR": "n1", "MASTER_PORT": "nonsense"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "0"},
        {"LSB_MCPU_HOSTS": "n1 16"},
        {"PMIX_RANK": "0"},
        {"NODE_RANK": "", "NNODES": " "},
        {"NNODES": "1", "JOB_COMPLETION_INDEX": "3"},
    ],
)
def test_one_node(alone):
    found = find_place(alone, "n2")
    assert (found.nodes, found.node_rank) == (1, 0)


def test_flags_win():
    every = OPEN_MPI | SRUN | {"MASTER_ADDR": "n9", "MASTER_PORT": "9"}
    assert place(every, nodes=3, node_rank=2, head="n1", port=29500) == (3, 2, "n1", 29500)
    assert place(every, nodes=1) == (1, 0, None, None)
    assert place(OPEN_MPI | {"MASTER_ADDR": "n9"}, head="n1", port=5) == (2, 1, "n1", 5)
    assert place(OPEN_MPI | {"NNODES": "many"}, nodes=2, head="n1", port=5) == (2, 1, "n1", 5)
    several = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    assert place(several, nodes=2, node_rank=0, head="n1", port=5) == (2, 0, "n1", 5)
    assert place({"JOB_COMPLETION_INDEX": "4"}, nodes=1) == (1, 0, None, None)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (OPEN_MPI | {"NNODES": "3"}, "NNODES says 3 nodes, and OMPI_COMM_WORLD_SIZE says 2"),
        (OPEN_MPI | {"NODE_RANK": "0"}, "NODE_RANK says 0 as this node's number, and OMPI_COMM_WORLD_RANK says 1"),
        (OPEN_MPI | {"LSB_HOSTS": "n2 n1"}, "OMPI_COMM_WORLD_RANK says 1 as this node's number, and LSB_HOSTS says 0"),
        (OPEN_MPI | {"LSB_HOSTS": "n1 n2 n3"}, "OMPI_COMM_WORLD_SIZE says 2 nodes, and LSB_HOSTS says 3"),
        (HYDRA | {"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE says 4 nodes, and PMI_SIZE says 2"),
        (POD | {"PET_NNODES": "3"}, "PET_NNODES says 3 nodes, and WORLD_SIZE says 2"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, "OMPI_COMM_WORLD_LOCAL_SIZE=8: 8 launchers run on this node"),
        (HYDRA | {"MPI_LOCALNRANKS": "2"}, "MPI_LOCALNRANKS=2: 2 launchers"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, "SLURM_STEP_TASKS_PER_NODE=8: 8 launchers"),
        ({"PET_NNODES": "1:4"}, "PET_NNODES=1:4 is not a number"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE=two is not a number"),
        ({"NNODES": "2", "NODE_RANK": "-1", "MASTER_ADDR": "n1"}, "NODE_RANK=-1 is not a number"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NNODES=2 and NODE_RANK=2: node 2 of 2 nodes does not exist"),
        ({"NNODES": "1", "NODE_RANK": "1"}, "NNODES says 1 node, and NODE_RANK=1 that this is node 1"),
        ({"NNODES": "2"}, "NNODES says 2 nodes, and nothing says which of them n2 is"),
        ({"LSB_HOSTS": "n7 n8"}, r"LSB_HOSTS says 2 nodes \(n7, n8\), and nothing says which of them n2 is"),
        (
            {"JOB_COMPLETION_INDEX": "0"},
            "JOB_COMPLETION_INDEX=0 says that this is node 0, and nothing says of how many",
        ),
        (POD | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "WORLD_SIZE": "6"}, "PET_NNODES says 2 nodes, and WORLD"),
        ({"PBS_JOBID": "7.s", "PBS_NODEFILE": "/gone", "PBS_NODENUM": "1"}, "PBS_NODENUM=1 says that this is node 1"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1 says that this is node 1, and nothing says of how many"),
        (OPEN_MPI | {"MASTER_ADDR": "n1", "PET_MASTER_ADDR": "n3"}, "PET_MASTER_ADDR=n3 and MASTER_ADDR=n1"),
        (OPEN_MPI | {"MASTER_ADDR": "n1", "MASTER_PORT": "http"}, "MASTER_PORT=http is not a number"),
    ],
)
def test_refused_by_name_in_one_line(variables, said):
    with pytest.raises(UserError, match=said) as refused:
        find_place(variables, "n2")
    assert "\n" not in str(refused.value)


def test_hosts_by_address_and_by_name():
    assert place({"LSB_HOSTS": "10.0.0.1 10.0.0.2"}, "10.0.0.2") == (2, 1, "10.0.0.1", None)
    assert place({"LSB_HOSTS": "N1 N2"}, "n2.some.where") == (2, 1, "N1", None)
    # n2 is not n20, and 10.0.0.2 is not 10.1.1.1
    with pytest.raises(UserError, match="nothing says which"):
        place({"LSB_HOSTS": "n10 n20"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n[1-2]", "n1"), ("n[03-05,9],m1", "n03"), ("n7,n9", "n7"), ("n7", "n7"), ("gpu[1,3]-ib", "gpu1-ib")],
)
def test_the_first_host_of_slurms_lists(nodes, first):
    assert place(SRUN | {"SLURM_STEP_NODELIST": nodes})[2] == first


def test_the_number_of_processes_of_a_pytorchjob():
    assert find_place(POD | {"PET_NPROC_PER_NODE": "4"}, "n2").processes == 4
    assert find_place(POD | {"PET_NPROC_PER_NODE": "auto"}, "n2").processes is None


def test_what_the_processes_of_a_run_do_not_inherit():
    kept = {"PET_RDZV_ID": "7", "PET_SIGNALS_TO_HANDLE": "SIGQUIT", "MASTER_ADDR": "n1", "OMPI_MCA_btl": "tcp"}
    hidden = OPEN_MPI | HYDRA | POD | ELASTIC
    assert set(rank_variables(kept | hidden)) == hidden.keys() - {"MASTER_ADDR", "MASTER_PORT"}
