"""The step that a rank writes down for the launcher."""

from orpo_dist.run.callbacks import LastStep
from orpo_dist.run.step_file import VARIABLE, StepFile, last_step


class State:
    global_step = 0


def test_the_last_step_of_all_ranks(tmp_path, monkeypatch):
    assert last_step(tmp_path) is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for rank, steps in ((0, (1, 9)), (1, (1, 10))):
        monkeypatch.setenv("RANK", str(rank))
        callback, state = LastStep(StepFile.asked_for()), State()
        for state.global_step in steps:
            callback.on_step_end(None, state, None)
    assert last_step(tmp_path) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.0", "step.1"]


def test_only_where_a_launcher_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert StepFile.asked_for() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    assert StepFile.asked_for() is None
