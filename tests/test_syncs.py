"""Nothing in a micro-step waits for the device, and a step has one collective of this project's."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_dist import ORPOTrainer
from tests.trainer_runs import config, pairs

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class HostReads(TorchDispatchMode):
    """Counts the operations that bring a value from the device to the host; on a CPU, `tolist` and `numpy` dispatch
    none, so they are counted where they are called."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __enter__(self):
        self._patches = [self._counting(name) for name in ("tolist", "numpy", "cpu")]
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self._patches:
            patch.stop()
        return super().__exit__(*error)

    def _counting(self, name):
        method = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            self.count += 1
            return method(tensor, *args, **kwargs)

        return mock.patch.object(torch.Tensor, name, counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def trainer(tmp_path, chat_tokenizer, tiny_llama):
    return ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, logging_steps=3, max_steps=3),
        train_dataset=pairs(24, len(chat_tokenizer)),
        processing_class=chat_tokenizer,
    )


def test_a_micro_step_reads_nothing_from_the_device(trainer, monkeypatch):
    reads = []
    step = ORPOTrainer.training_step

    def counted(self, *args):
        with HostReads() as counter:
            loss = step(self, *args)
        reads.append(counter.count)
        return loss

    monkeypatch.setattr(ORPOTrainer, "training_step", counted)
    trainer.train()
    assert len(reads) == 12
    # The first step measures once what the model does to its logits (model/head/install.py).
    assert reads[1:] == [0] * 11


def test_the_counter_sees_a_read():
    for read in (torch.Tensor.item, torch.Tensor.nonzero, lambda x: x.tolist(), lambda x: x.numpy()):
        with HostReads() as counter:
            read(torch.ones(1).sum())
        assert counter.count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_micro_step_waits_for_nothing_on_a_gpu(tmp_path, chat_tokenizer, tiny_llama, monkeypatch):
    steps = []
    step = ORPOTrainer.training_step

    def guarded(self, *args):
        steps.append(1)
        torch.cuda.set_sync_debug_mode("default" if len(steps) == 1 else "error")
        try:
            return step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ORPOTrainer, "training_step", guarded)
    ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path, use_cpu=False, bf16=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
               max_steps=2),
        train_dataset=pairs(24, len(chat_tokenizer)),
        processing_class=chat_tokenizer,
    ).train()  # fmt: skip
    assert len(steps) == 4


def test_one_reduction_per_optimizer_step_and_two_per_log_line(trainer):
    with mock.patch.object(trainer.accelerator, "reduce", wraps=trainer.accelerator.reduce) as reduce:
        trainer.train()
    assert reduce.call_count == 3 + 2  # three steps; at the log line metrics and throughput


class Operations(TorchDispatchMode):
    """Counts every operation that does something: views and allocations are left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func in (torch.ops.aten.empty.memory_format, torch.ops.aten.detach.default))
        return func(*args, **(kwargs or {}))


def test_a_step_adds_few_operations_to_the_bare_forward_and_backward(trainer):
    """The times are in benchmarks/overhead.py; what can be tested without a clock is what is computed."""
    trainer.model.train()
    (batch,), tokens = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch, tokens)  # measures the logit transform
    with trainer.layout.in_force(), Operations() as bare:
        trainer.model(**batch, use_cache=False).backward()
    with Operations() as step:
        trainer.training_step(trainer.model, batch, tokens)
    added = step.count - bare.count
    assert 0 < added < 100  # 82: the metrics, per micro-batch and not per layer


class WidestLogits(TorchDispatchMode):
    """Most rows that a tensor with the vocabulary as its last dimension has."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_new = isinstance(out, torch.Tensor) and not func.is_view  # the head's weight, transposed, is a view
        if is_new and out.dim() > 1 and out.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, out.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("padding_free", [True, False])
def test_evaluation_forms_logits_by_the_chunk(tmp_path, chat_tokenizer, tiny_llama, padding_free):
    vocabulary = len(chat_tokenizer)
    trainer = ORPOTrainer(
        tiny_llama(vocabulary),
        config(tmp_path, loss_chunk_size=8, per_device_eval_batch_size=4, padding_free=padding_free),
        eval_dataset=pairs(8, vocabulary),
        processing_class=chat_tokenizer,
    )
    trainer.evaluate()  # the first one compares the layouts on a tiny batch, with its logits
    with WidestLogits(vocabulary) as widest:
        metrics = trainer.evaluate()
    assert metrics["eval_logits/chosen"] == metrics["eval_logits/chosen"]  # a number, although no row was kept
    assert 0 < widest.rows <= 8
