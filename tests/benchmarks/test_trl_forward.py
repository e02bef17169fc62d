"""The benchmark's written-out TRL against TRL's own trainer: loss, gradients and metrics of the same pairs."""

import pytest
import torch

from benchmarks.gpu_harness import rows_of
from benchmarks.trl_forward import concatenated_batch, trl_loss
from orpo_dist.packing.lengths import PairLengths

LENGTHS = [PairLengths(11, 7, 9), PairLengths(5, 6, 3), PairLengths(1, 1, 4)]


@pytest.fixture
def trl_trainer(tmp_path, chat_tokenizer, tiny_llama):
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    args = ORPOConfig(
        str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        remove_unused_columns=False,
    )  # fmt: skip
    return ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        args,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=chat_tokenizer,
    )


def test_equal_to_trl(trl_trainer, chat_tokenizer, tiny_llama):
    rows = rows_of(LENGTHS, len(chat_tokenizer))
    features = []
    for row in rows:
        prompt = row["prompt_ids"]
        feature = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            completion = row[f"{side}_ids"]
            feature[f"{side}_input_ids"] = prompt + completion
            feature[f"{side}_attention_mask"] = [1] * (len(prompt) + len(completion))
            feature[f"{side}_labels"] = [-100] * len(prompt) + completion
        features.append(feature)
    theirs_model = trl_trainer.model
    theirs, their_metrics = trl_trainer.get_batch_loss_metrics(theirs_model, trl_trainer.data_collator(features))
    theirs.backward()
    model = tiny_llama(len(chat_tokenizer))
    ours, our_metrics = trl_loss(model, concatenated_batch(rows), beta=0.3)
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for (name, parameter), other in zip(model.named_parameters(), theirs_model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert our_metrics == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in their_metrics.items()}
