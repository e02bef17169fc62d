"""launch/multi_node.sh on two machines: network namespaces with addresses of their own and a cable between them."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.workplace import REPOSITORY, SECONDS, assert_same_weights

pytestmark = pytest.mark.cluster
SCRIPT = REPOSITORY / "launch" / "multi_node.sh"
ADDRESSES = ("10.77.6.1", "10.77.6.2")


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[str, str]]:
    """Names of two namespaces; the interface is called orpo0 in both."""
    names = (f"orpo{os.getpid()}a", f"orpo{os.getpid()}b")
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, timeout=60)

    try:
        ip("netns", "add", names[1])
        ip("link", "add", "orpo0", "netns", names[0], "type", "veth", "peer", "name", "orpo0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "orpo0")
            ip("-n", name, "link", "set", "orpo0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=60)


def start(workplace, machine, rank, *arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        ["ip", "netns", "exec", machine, str(SCRIPT), "--cpu", *arguments],
        env=workplace.environment
        | {"NODES": "2", "NODE_RANK": str(rank), "HEAD": ADDRESSES[0], "PORT": "29511", "GPUS": "1", "CONFIG": "ddp"}
        | {"GLOO_SOCKET_IFNAME": "orpo0"}
        | environment,
        cwd=workplace.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ends(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def test_two_machines_train_as_one_process(workplace, reference, machines):
    folder = workplace.folder / "two_machines"
    flags = ["--gradient_accumulation_steps", "2", "--output_dir", str(folder), "--save_strategy", "no"]
    nodes = [start(workplace, name, rank, str(workplace.recipe), *flags) for rank, name in enumerate(machines)]
    for code, text in ends(*nodes):
        assert code == 0, text
        assert f"--master_addr={ADDRESSES[0]} --master_port=29511" in text
    assert_same_weights(folder, reference)


def test_a_head_that_is_not_there(workplace, machines):
    arguments = ["--wait", "3", str(workplace.recipe), "--output_dir", str(workplace.folder / "nowhere")]
    ((code, text),) = ends(start(workplace, machines[1], 1, *arguments, HEAD="10.77.6.9"))
    assert code == 1 and "head node did not answer at 10.77.6.9:29511 within 3 s" in text


def test_a_node_too_few_and_a_number_that_differs(workplace, machines):
    recipe = ["--wait", "5", str(workplace.recipe), "--output_dir", str(workplace.folder / "nowhere")]
    ((code, text),) = ends(start(workplace, machines[0], 0, *recipe))
    assert code == 1 and "1 of 2 nodes connected within 5 s; missing node ranks: 1." in text
    recipe[1] = "120"
    for code, text in ends(
        start(workplace, machines[0], 0, *recipe), start(workplace, machines[1], 1, *recipe, NODES="3")
    ):
        assert code == 1 and "was started for 3 nodes, the head" in text


def test_a_port_in_use(workplace, machines):
    listen = "import socket, time; s = socket.create_server(('', 29511)); print('listens', flush=True); time.sleep(600)"
    other = subprocess.Popen(
        ["ip", "netns", "exec", machines[0], "python3", "-c", listen], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "listens\n"
        arguments = [str(workplace.recipe), "--output_dir", str(workplace.folder / "nowhere")]
        ((code, text),) = ends(start(workplace, machines[0], 0, *arguments))
        assert code == 1 and "Port 29511 is in use on the head node" in text
    finally:
        other.kill()
        other.wait()
