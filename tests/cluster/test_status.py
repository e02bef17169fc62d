"""What a run's folder says about it. Jobs that wait and run: test_slurm.py."""

import json

from orpo_dist.cluster.status import RunState


def test_a_run_folder_tells_its_state(tmp_path):
    for step, files in ((5, ["complete.json"]), (10, ["complete.json"]), (15, [])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for file in files:
            (tmp_path / f"checkpoint-{step}" / file).touch()
    events = [{"step": 14, "loss": 5.0}, {"step": 15, "loss": 4.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"step": 16, "lo')
    state = tmp_path / "slurm"
    state.mkdir()
    for name, text in (("attempt", "2"), ("outcome", "restarting: unhealthy: n2"), ("excluded", "n2\nn1\nn2")):
        (state / name).write_text(text + "\n")
    read = RunState.read(tmp_path)
    assert (read.attempt, read.step, read.loss, read.checkpoint) == (2, 15, 4.5, "checkpoint-10")
    assert read.lines() == [
        "  attempt 2, step 15, loss 4.5000, newest checkpoint: checkpoint-10",
        "  last outcome: restarting: unhealthy: n2",
        "  excluded nodes: n1 n2",
    ]


def test_what_a_full_disk_has_left_is_passed_over(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "attempt").write_text("one")
    (tmp_path / "slurm" / "outcome").write_bytes(b"\xff\xfe")
    odd = [
        "[1, 2]",
        "7",
        "null",
        "[" * 100000,
        '{"step": "x", "loss": [1]}',
        '{"step": 3, "loss": 2.5}',
        '{"loss": "nan"}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(odd))
    read = RunState.read(tmp_path)
    assert (read.attempt, read.outcome, read.step, read.loss) == (0, "", 3, 2.5)
