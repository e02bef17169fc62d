import pytest

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.training.best_metric import check_best_metric
from tests.trainer_runs import config, pairs

EVALUATED = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True)
ONE, TWO = [{}], {"helpful": [{}], "safe": [{}]}


def check(folder, metric, rows, compute_metrics=None, **more):
    check_best_metric(config(folder, **{**EVALUATED, "metric_for_best_model": metric, **more}), rows, compute_metrics)


@pytest.mark.parametrize(
    "metric, rows",
    [
        ("loss", ONE),
        ("eval_rewards/accuracies", ONE),
        ("nll_loss", ONE),
        (None, ONE),  # transformers takes the loss
        ("helpful_loss", TWO),
        ("eval_safe_rewards/margins", TWO),
    ],
)
def test_a_metric_that_will_exist_is_accepted(tmp_path, metric, rows):
    check(tmp_path, metric, rows)


@pytest.mark.parametrize(
    "metric, rows, named",
    [
        ("accuracy", ONE, "eval_accuracy.*rewards/accuracies"),
        ("eval_helpful_loss", ONE, "eval_helpful_loss"),
        ("eval_rewards/accuracies", TWO, "eval_helpful_loss"),
        ("safer_loss", TWO, "helpful, safe"),
        (None, TWO, "eval_helpful_loss"),  # the loss of which set?
    ],
)
def test_one_that_will_not_is_named(tmp_path, metric, rows, named):
    with pytest.raises(UserError, match=rf"(?s)metric_for_best_model.*{named}"):
        check(tmp_path, metric, rows)


def test_compute_metrics_may_bring_any_name_of_a_set(tmp_path):
    check(tmp_path, "mine", ONE, len)
    check(tmp_path, "safe_mine", TWO, len)
    with pytest.raises(UserError, match="mine"):
        check(tmp_path, "mine", TWO, len)


def test_without_evaluations_there_is_nothing_to_check(tmp_path):
    check(tmp_path, "mine", None)
    check(tmp_path, "mine", ONE, eval_strategy="no", load_best_model_at_end=False)


def test_it_is_found_before_rows_are_read(tmp_path, chat_tokenizer, tiny_llama):
    with pytest.raises(UserError, match="metric_for_best_model"):
        ORPOTrainer(
            tiny_llama(len(chat_tokenizer)),
            config(tmp_path, **EVALUATED, metric_for_best_model="rewards/accuracy"),
            train_dataset="not read",
            eval_dataset=pairs(2, 50),
            processing_class=chat_tokenizer,
        )
