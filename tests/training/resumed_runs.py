"""Runs that are interrupted and go on: their settings, and the histories that must be equal."""

from transformers import TrainerCallback

STEPS = 7
RUN = dict(
    max_steps=STEPS,
    optim="adamw_torch",
    learning_rate=1e-3,
    lr_scheduler_type="linear",
    save_strategy="steps",
    save_steps=2,
    save_total_limit=2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    logging_steps=3,  # log lines and checkpoints at different steps
)
# Figures of speed are counted since the run was resumed.
OF_THE_MACHINE = ("runtime", "per_second", "memory", "preparation_time", "padded_tokens_ratio")


class At(TrainerCallback):
    """Does something during one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def history(trainer):
    """The log without figures of the machine."""
    return [
        {name: value for name, value in event.items() if not any(word in name for word in OF_THE_MACHINE)}
        for event in trainer.state.log_history
    ]


def assert_same_history(ours, theirs):
    ours, theirs = history(ours), history(theirs)
    assert [sorted(event) for event in ours] == [sorted(event) for event in theirs]
    for one, other in zip(ours, theirs, strict=True):
        differing = {name: (one[name], other[name]) for name in one if one[name] != other[name]}
        assert not differing, one["step"]
