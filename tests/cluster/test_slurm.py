"""Jobs on a real SLURM of two nodes: they train as one process does, through time limits, preemption and lost nodes.

The tests share the cluster and two cores. The one that waits for a time limit is submitted before the others of this
file run, and looked at last.
"""

import json
import re

import pytest

from tests.cluster.workplace import GATE, REPOSITORY, STEPS, assert_same_weights, until

pytestmark = pytest.mark.cluster

# Two nodes of one process each: the cheapest run of several nodes.
TWO = ("--nodes", "2", "--processes-per-node", "1", "--cpus-per-node", "1", "--gradient_accumulation_steps", "2")
FOUR = ("--nodes", "2", "--processes-per-node", "2", "--cpus-per-node", "2", "--gradient_accumulation_steps", "1")
SHARING = ("--share-nodes",)
DDP = ("--accelerate-config", "ddp")
AT_GATE = {"ORPO_TEST_GATE": str(GATE)}


@pytest.fixture(scope="module")
def out_of_time(slurm):
    """A job that runs into its time limit, at its gate, while others run."""
    limit = ("--time", "6:00", "--stop-before", "120")
    return slurm.submit("limit", *TWO, *SHARING, *limit, "--accelerate-config", "zero2", **AT_GATE)


def summary(folder):
    return json.loads((folder / "run_summary.json").read_text())


def outcome(folder):
    return (folder / "slurm" / "outcome").read_text().strip()


def resumed_from(slurm, name, attempt):
    """The checkpoint that an attempt says it went on from."""
    text = "".join(
        path.read_text() for path in (slurm.run_folder(name) / "slurm" / "logs").glob(f"*.{attempt}.node0.log")
    )
    line = next((line for line in text.splitlines() if line.startswith("Resuming from")), "")
    return int(line.rsplit("checkpoint-", 1)[1].split()[0].rstrip(".:")) if line else None


def test_plain_sbatch_zero2(slurm, reference):
    """The template as it is, with sbatch alone."""
    environment = {"GPUS": "0", "PROCESSES": "2", "CONFIG": "zero2"}
    folder = slurm.run_folder("zero2")
    flags = ["--gradient_accumulation_steps", "1", "--output_dir", folder, "--save_strategy", "no"]
    sbatch = ["sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=2", "--time=30:00"]
    template = REPOSITORY / "slurm" / "multi_node.sbatch"
    job_id = slurm.workplace.run(*sbatch, template, slurm.workplace.recipe, *flags, **environment).stdout.strip()
    assert_same_weights(slurm.finished("zero2", job_id, attempts=1), reference)
    assert (summary(folder)["world_size"], summary(folder)["steps"]) == (4, STEPS)
    assert outcome(folder) == "finished"
    assert len(list((folder / "slurm" / "logs").glob(f"{job_id}.1.node?.log"))) == 2


@pytest.mark.parametrize("config", ["zero3", "fsdp2", "fsdp2_hsdp", "zero3_hpz"])
def test_sharded_weights(slurm, reference, out_of_time, config):
    job_id = slurm.submit(config, *FOUR, *SHARING, "--accelerate-config", config, "--save_strategy", "no")
    folder = slurm.finished(config, job_id, attempts=1)
    assert summary(folder)["world_size"] == 4
    assert_same_weights(folder, reference)
    assert "multi_node_sharded.sbatch" in (folder / "slurm" / "job.sbatch").read_text()


def test_sweep(slurm, out_of_time):
    (slurm.workplace.folder / "sweep.txt").write_text(
        "# three runs\n--learning_rate 0.1\n--learning_rate 0.05 --beta 0.2\n\n--beta 0.3 --run_name 'two words'\n"
    )
    one = ("--processes-per-node", "1", "--cpus-per-node", "1")
    job_id = slurm.submit("sweep", *one, "--sweep", "sweep.txt", "--array", "0-2%2", "--max_steps", "2")
    assert slurm.wait_for(job_id, "COMPLETED") == "COMPLETED", slurm.story("sweep")
    until(lambda: "PENDING" not in slurm.state(job_id) and "RUNNING" not in slurm.state(job_id), "the sweep's end")
    folders = [slurm.run_folder("sweep") / str(index) for index in range(3)]
    assert [summary(folder)["steps"] for folder in folders] == [2, 2, 2], slurm.story("sweep")
    assert len({summary(folder)["train_loss"] for folder in folders}) > 1


def test_prefetch_then_train(slurm, out_of_time):
    cache = slurm.workplace.folder / "other_cache"
    one = ("--processes-per-node", "1", "--cpus-per-node", "1", "--max_steps", "2")
    job_id = slurm.submit("fetched", *one, "--prefetch", ORPO_DIST_CACHE=str(cache))
    folder = slurm.finished("fetched", job_id, attempts=1)
    logs = {path.name: path.read_text() for path in (folder / "slurm" / "logs").glob("*.log")}
    first, second = (json.loads(line)["job_id"] for line in (folder / "slurm" / "jobs.jsonl").read_text().splitlines())
    assert "Tokenised: 32 pairs to train on" in logs[f"{first}.log"]
    assert int(first) < int(second) == int(job_id)
    assert "Tokenising" not in "".join(text for name, text in logs.items() if name.startswith(second))


def test_a_failing_recipe_is_not_requeued(slurm, out_of_time):
    (slurm.workplace.folder / "broken.jsonl").write_text('{"prompt": "a", "chosen": "b"\n')
    data = ("--dataset_name", str(slurm.workplace.folder / "broken.jsonl"))
    job_id = slurm.submit("broken", *TWO, *SHARING, *DDP, *data)
    assert slurm.wait_for(job_id) == "FAILED"
    assert slurm.restarts(job_id) == 0
    folder = slurm.run_folder("broken")
    assert outcome(folder).startswith("failed (2): bad input"), slurm.story("broken")
    assert "broken.jsonl" in (folder / "slurm" / "logs" / f"{job_id}.log").read_text()


def test_a_time_limit_is_survived(slurm, reference, out_of_time):
    folder = slurm.finished("limit", out_of_time, attempts=2)
    assert slurm.restarts(out_of_time) == 1
    assert resumed_from(slurm, "limit", 2) in (GATE, GATE + 1), slurm.story("limit")
    assert_same_weights(folder, reference)
    # A second job of a run that is finished has nothing to do.
    code, said = slurm.workplace.here("submit", str(slurm.workplace.recipe), "--output_dir", str(folder))
    assert code == 2 and "is already finished" in said
    again = slurm.command("sbatch", "--parsable", str(folder / "slurm" / "job.sbatch")).strip()
    assert slurm.wait_for(again) == "COMPLETED"
    assert (folder / "slurm" / "attempt").read_text().strip() == "2"


def test_preemption_is_survived(slurm, reference):
    job_id = slurm.submit("preempted", *TWO, *DDP, "--partition", "low", **AT_GATE)
    slurm.wait_for_gate("preempted")
    options = ["--parsable", "--partition=high", "--nodes=2", "--exclusive", "--time=5:00", "--output=/dev/null"]
    rival = slurm.command("sbatch", *options, "--wrap", "sleep 3").strip()
    assert slurm.wait_for(rival, "RUNNING") in ("RUNNING", "COMPLETED")
    folder = slurm.finished("preempted", job_id, attempts=2)
    assert slurm.state(rival) == "COMPLETED" and slurm.restarts(job_id) == 1
    assert resumed_from(slurm, "preempted", 2) in (GATE, GATE + 1), slurm.story("preempted")
    assert_same_weights(folder, reference)


def test_a_node_set_down_is_survived(slurm, reference):
    job_id = slurm.submit("down", *TWO, *DDP, **AT_GATE)
    slurm.wait_for_gate("down")
    slurm.command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        until(lambda: slurm.restarts(job_id) == 1, "the requeue", lambda: slurm.story("down"))
    finally:
        # It may have returned to service by itself, which SLURM then calls an error.
        slurm.workplace.run("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)
    folder = slurm.finished("down", job_id, attempts=2)
    # The last that was saved before, or one that the processes saved when SLURM ended them.
    assert resumed_from(slurm, "down", 2) in (10, GATE, GATE + 1), slurm.story("down")
    assert_same_weights(folder, reference)


def test_an_ill_node_is_excluded(slurm, reference):
    """Of three nodes, the second fails its health check: the job starts again on the others."""
    (slurm.workplace.folder / "ill.n2").touch()
    try:
        job_id = slurm.submit("ill", *TWO, *DDP, "--partition", "spare", "--sbatch=--nodelist=n2")
        until(lambda: slurm.run_folder("ill").joinpath("slurm", "excluded").exists(), "the exclusion", slurm.story)
        until(lambda: slurm.state(job_id) == "PENDING", "the requeue", lambda: slurm.story("ill"))
        assert "ExcNodeList=n2" in slurm.command("scontrol", "show", "job", job_id)
        slurm.command("scontrol", "update", f"JobId={job_id}", "ReqNodeList=")
        folder = slurm.finished("ill", job_id, attempts=2)
    finally:
        (slurm.workplace.folder / "ill.n2").unlink()
    assert "node n2: site_health_check failed" in (folder / "slurm" / "logs" / f"{job_id}.log").read_text()
    assert "NodeList=n[1,3]" in slurm.command("scontrol", "show", "job", job_id)
    assert_same_weights(folder, reference)


def test_scancel_leaves_a_run_that_can_be_resumed(slurm, reference):
    job_id = slurm.submit("scancelled", *TWO, *DDP, **AT_GATE)
    slurm.wait_for_gate("scancelled")
    slurm.command("scancel", job_id)
    assert slurm.wait_for(job_id) == "CANCELLED"
    until(lambda: not slurm.command("squeue", "-h", "-j", job_id, "-t", "CG"), "the end of its processes")
    assert slurm.restarts(job_id) == 0
    again = slurm.submit("scancelled", *TWO, *DDP)
    folder = slurm.finished("scancelled", again, attempts=2)
    assert resumed_from(slurm, "scancelled", 2) >= 10
    assert_same_weights(folder, reference)


def test_submit_status_cancel(slurm):
    job_id = slurm.submit("cancelled", *TWO, *DDP, **AT_GATE)
    folder = slurm.run_folder("cancelled")
    waiting = slurm.submit("waiting", *TWO, *DDP, "--dependency", f"afterok:{job_id}")
    slurm.wait_for_gate("cancelled")
    said = slurm.workplace.orpo_dist("status").stdout
    assert f"job {job_id} running in low, nodes: 2" in said and f"job {waiting} pending" in said
    assert f"attempt 1, step {GATE - 1}" in said and "newest checkpoint: checkpoint-10" in said
    flags = ["--gpus-per-node", "0", "--output_dir", str(folder)]
    code, told = slurm.workplace.here("submit", str(slurm.workplace.recipe), *flags)
    assert code == 2 and f"Job {job_id} (running) already trains this run" in told
    assert "saves a checkpoint and ends" in slurm.workplace.orpo_dist("cancel", job_id).stdout
    assert slurm.wait_for(job_id) == "CANCELLED", slurm.story("cancelled")
    assert slurm.restarts(job_id) == 0
    assert slurm.wait_for(waiting) == "CANCELLED"
    assert outcome(folder) in (f"cancelled at checkpoint-{GATE}", f"cancelled at checkpoint-{GATE + 1}")
    said = slurm.workplace.orpo_dist("status", folder).stdout
    assert "last outcome: cancelled at checkpoint-" in said and "job " not in said
    code, told = slurm.workplace.here("cancel", job_id)
    assert code == 2 and "is not a waiting or running job of orpo-dist" in told


def test_autotrain_backend(slurm):
    folder = slurm.run_folder("autotrain")
    data = ["--data-path", str(slurm.workplace.folder / "pairs.jsonl"), "--prompt-text-column", "prompt"]
    columns = ["--text-column", "chosen", "--rejected-text-column", "rejected"]
    where = ["--model", str(slurm.workplace.folder / "model"), "--project-name", str(folder), "--log", "none"]
    flags = ["--epochs", "1", "--block-size", "64", "--save-strategy", "no", "--token", "hf_abcdefghijk"]
    resources = ["--slurm", "--gpus-per-node 0 --processes-per-node 1 --time 30:00"]
    command = ["llm", "--train", "--backend", "slurm", *where, *data, *columns, *flags, *resources]
    code, said = slurm.workplace.here(*command)
    assert code == 0, said
    job_id = re.search(r"^Submitted job (\d+)$", said, re.MULTILINE)[1]
    slurm.finished("autotrain", job_id, attempts=1)
    assert summary(folder)["pairs"] == 32
    assert not any("hf_abcdefghijk" in path.read_text() for path in (folder / "slurm").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nodes", "9"], "--nodes 9: the default partition has 2 nodes"),
        (["--gpus-per-node", "4"], "--gpus-per-node 4: the nodes of the default partition have 2 at most"),
        (["--partition", "gpu"], "the partitions here are low, high, spare"),
        (["--output_dir", "/var/tmp/run"], "is in none of the shared folders"),
        (["--dataset_name", "/nowhere/pairs.jsonl"], "dataset_name: /nowhere/pairs.jsonl does not exist"),
        (["--bete", "0.2"], "Unknown option --bete"),
        (["--array", "0-3"], "--array needs --sweep FILE"),
    ],
)
def test_refused_on_the_login_node(slurm, options, said):
    flags = ["--gpus-per-node", "0", "--output_dir", str(slurm.run_folder("refused")), *options]
    code, told = slurm.workplace.here("submit", str(slurm.workplace.recipe), *flags)
    assert code == 2 and said in told, told
    assert not slurm.run_folder("refused").exists()
