import warnings

import datasets
import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)
from trl.experimental.utils import DPODataCollatorWithPadding

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.errors import UserError
from tests.trainer_runs import assert_same_weights, config, largest_difference, pairs, weights

TEXT_ROWS = [
    {
        "prompt": f"Question {i}: how do I reset number {i}?",
        "chosen": " Open the settings." * (1 + i % 3),
        "rejected": no,
    }
    for i, no in enumerate(
        [" No.", " I do not know, ask somebody else.", " Why?", " Later.", " Never ever.", " Hm."] * 2
    )
]


# ---------------------------------------------------------------- invariance


LAYOUTS = {
    "packed": dict(),
    "unshared": dict(prefix_sharing=False),
    "padded": dict(padding_free=False),
}


@pytest.mark.parametrize("nll_scope", ["sequence", "completion"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_cut_into_micro_batches_changes_nothing(trained, chat_tokenizer, nll_scope, layout):
    rows = pairs(20, len(chat_tokenizer))  # 8 + 8 + 4: the last global batch is smaller
    options = dict(nll_scope=nll_scope, label_smoothing=0.1, **LAYOUTS[layout])
    whole = trained(rows, per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)
    for per_device, accumulation in ((1, 8), (2, 4)):
        cut = trained(rows, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation, **options)
        assert_same_weights(weights(cut), weights(whole))
        for row, expected in zip(cut.state.log_history[:3], whole.state.log_history[:3], strict=True):
            for key in ("loss", "grad_norm", "nll_loss", "rewards/margins", "log_odds_ratio", "logits/chosen"):
                assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_the_mean_over_micro_batches_would_not_be_invariant(trained, chat_tokenizer, monkeypatch):
    """What TRL does: each micro-batch normalised by itself. The invariance test must be able to see it."""
    rows = pairs(8, len(chat_tokenizer))
    whole = trained(rows, per_device_train_batch_size=8, max_steps=1)

    def own_totals(self, epoch_iterator, num_batches, device):
        batches, _ = super(ORPOTrainer, self).get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            tokens, count = batch["orpo_layout"].counts().unbind()
            batch["orpo_layout"].tokens, batch["orpo_layout"].pairs = tokens * len(batches), count * len(batches)
        return batches, None

    monkeypatch.setattr(ORPOTrainer, "get_batch_samples", own_totals)
    cut = trained(rows, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=1)
    assert largest_difference(weights(cut), weights(whole)) > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_every_layout_gives_the_same_training(trained, chat_tokenizer, checkpointing, lora):
    rows = pairs(16, len(chat_tokenizer))
    runs = {}
    for name, options in LAYOUTS.items():
        trainer = trained(
            rows,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
            gradient_checkpointing=checkpointing,
            label_smoothing=0.1,
            **options,
        )
        assert trainer.layout.is_packed == (name != "padded")
        assert trainer.layout.prefix_sharing == (name == "packed")
        runs[name] = trainer
    for name in ("packed", "unshared"):
        assert_same_weights(weights(runs[name]), weights(runs["padded"]))
        for row, expected in zip(runs[name].state.log_history, runs["padded"].state.log_history, strict=True):
            for key in {"loss", "grad_norm", "rewards/margins", "logits/chosen", "logps/rejected"} & row.keys():
                assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=2e-6), key


def test_sharing_is_off_where_it_gains_nothing(tmp_path, chat_tokenizer, tiny_llama, caplog):
    rows = [{"prompt_ids": [5], "chosen_ids": [6] * 40, "rejected_ids": [7] * 30}] * 4
    trainer = ORPOTrainer(
        tiny_llama(len(chat_tokenizer)), config(tmp_path), train_dataset=rows, processing_class=chat_tokenizer
    )
    assert trainer.layout.is_packed and not trainer.layout.prefix_sharing
    assert "prefix_sharing is off" in caplog.text  # at the default level: no silent fallback


def test_sharing_that_cannot_apply_is_named(tmp_path, chat_tokenizer, tiny_llama, caplog):
    args = config(tmp_path, padding_free=False)
    rows = pairs(4, len(chat_tokenizer))
    ORPOTrainer(tiny_llama(len(chat_tokenizer)), args, train_dataset=rows, processing_class=chat_tokenizer)
    assert "prefix_sharing has no effect" in caplog.text


def test_a_wrong_packed_layout_is_seen_and_falls_back(tmp_path, trained, chat_tokenizer, monkeypatch, caplog):
    from orpo_dist.model.attention import interface as attention

    rows = pairs(8, len(chat_tokenizer))
    padded = weights(trained(rows, padding_free=False))
    attend = attention.packed_attention

    def sees_too_little(module, query, key, value, *args, **kwargs):
        return attend(module, query, key, value.flip(2), *args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "orpo_packed", sees_too_little)
    trainer = trained(rows)
    assert not trainer.layout.is_packed
    assert "hidden states differ by" in caplog.text
    assert_same_weights(weights(trainer), padded)
    unverified = trained(rows, verify_layout=False)
    assert unverified.layout.is_packed
    assert largest_difference(weights(unverified), padded) > 1e-4


def test_options_of_the_loss_change_the_result(trained, chat_tokenizer):
    rows = pairs(8, len(chat_tokenizer))
    plain = weights(trained(rows))
    for option in (dict(nll_scope="completion"), dict(label_smoothing=0.3), dict(beta=1.0)):
        assert largest_difference(weights(trained(rows, **option)), plain) > 1e-5, option


# ---------------------------------------------------------------- drop-in for TRL


def test_trls_usage_runs_after_changing_the_import(tmp_path, chat_tokenizer, tiny_llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = ORPOConfig(
            output_dir=str(tmp_path),
            beta=0.2,
            max_length=64,
            max_completion_length=16,
            disable_dropout=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            eval_strategy="steps",
            eval_steps=2,
            max_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
        )
    trainer = ORPOTrainer(
        model=tiny_llama(len(chat_tokenizer)),
        args=args,
        train_dataset=datasets.Dataset.from_list(TEXT_ROWS),
        eval_dataset=datasets.Dataset.from_list(TEXT_ROWS[:4]),
        processing_class=chat_tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.train()
    log = trainer.state.log_history
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    names |= {"logps/rejected", "logits/chosen", "logits/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen"}
    assert names <= log[0].keys()
    evaluation = next(row for row in log if "eval_loss" in row)
    assert {f"eval_{name}" for name in names} <= evaluation.keys()
    speed = {"pairs_per_second", "tokens_per_second", "padded_tokens_ratio", "tflops_per_second", "peak_memory_gib"}
    assert speed <= log[0].keys() and "mfu" not in log[0]  # a CPU has no peak to compare with


def test_the_data_is_audited_before_the_model_is_loaded(tmp_path, chat_tokenizer, tiny_llama, monkeypatch):
    tiny_llama(len(chat_tokenizer)).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    loaded = []
    monkeypatch.setattr("orpo_dist.trainer.load_model", lambda *a, **k: loaded.append(a))
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3)
    with pytest.raises(UserError):
        ORPOTrainer(str(tmp_path / "model"), config(tmp_path / "run"), train_dataset=rows)
    assert not loaded


def test_a_model_given_by_name_with_its_own_tokenizer(tmp_path, chat_tokenizer, tiny_llama):
    tiny_llama(len(chat_tokenizer)).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    args = config(tmp_path / "run", model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"})
    trainer = ORPOTrainer(str(tmp_path / "model"), args, train_dataset=datasets.Dataset.from_list(TEXT_ROWS))
    assert trainer.model.config._attn_implementation == "eager"
    trainer.train()
    trainer.save_model()
    ids = torch.arange(4, 30)[None]
    trainer.model.eval()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert reloaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(reloaded(ids).logits, trainer.model(ids).logits)


def test_model_init_gives_a_fresh_model_at_each_train(tmp_path, chat_tokenizer, tiny_llama):
    trainer = ORPOTrainer(
        model_init=lambda: tiny_llama(len(chat_tokenizer)),
        args=config(tmp_path, is_encoder_decoder=False),
        train_dataset=pairs(8, len(chat_tokenizer)),
        processing_class=chat_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    first = weights(trainer)
    trainer.train()
    assert_same_weights(weights(trainer), first, tolerance=0)


def test_model_init_may_return_another_size_at_each_train(tmp_path, chat_tokenizer, tiny_llama):
    """As in a hyperparameter search: figures and costs are those of the model that trains."""
    layers = iter([1, 1, 2])  # the constructor also calls model_init

    def model_init():
        model = tiny_llama(len(chat_tokenizer))
        del model.model.layers[next(layers) :]
        return model

    rows = pairs(8, len(chat_tokenizer))
    trainer = ORPOTrainer(
        model_init=model_init,
        args=config(tmp_path, is_encoder_decoder=False),
        train_dataset=rows,
        processing_class=chat_tokenizer,
    )
    totals = []
    for _ in range(2):
        trainer.train()
        totals.append(trainer.state.total_flos)
        assert trainer.layout.model_config is trainer.model.config
    assert totals[1] > totals[0]


def test_a_collator_written_for_trl_trains_to_the_same_weights(tmp_path, trained, chat_tokenizer, tiny_llama):
    rows = pairs(8, len(chat_tokenizer))
    ours = weights(trained(rows))
    trainer = ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path / "foreign"),
        data_collator=DPODataCollatorWithPadding(pad_token_id=chat_tokenizer.pad_token_id),
        train_dataset=rows,
        processing_class=chat_tokenizer,
    )
    trainer.train()
    assert_same_weights(weights(trainer), ours, tolerance=1e-6)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(preprocess_logits_for_metrics=lambda logits, labels: logits), "preprocess_logits_for_metrics"),
        (dict(args=dict(include_for_metrics=["inputs"])), "include_for_metrics"),
        (dict(args=dict(batch_eval_metrics=True)), "batch_eval_metrics"),
        (dict(args=dict(label_smoothing_factor=0.1)), "label_smoothing"),
        (dict(args=dict(router_aux_loss_coef=0.1)), "router_aux_loss_coef"),
        (dict(args=dict(model_init_kwargs={"dtype": "auto"})), "model_init_kwargs"),
        (dict(train_dataset=None), "train_dataset"),
        (dict(model=None), "model_init"),
    ],
)
def test_what_cannot_apply_is_an_error_that_names_it(tmp_path, chat_tokenizer, tiny_llama, arguments, named):
    options = dict(
        model=tiny_llama(len(chat_tokenizer)),
        train_dataset=pairs(4, len(chat_tokenizer)),
        processing_class=chat_tokenizer,
    )
    args = config(tmp_path, **arguments.pop("args", {}))
    with pytest.raises(UserError, match=named):
        ORPOTrainer(args=args, **{**options, **arguments})


# ---------------------------------------------------------------- evaluation


def evaluation_of(tmp_path, chat_tokenizer, tiny_llama, rows, compute_metrics=None, **more):
    return ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path, **more),
        train_dataset=rows if not isinstance(rows, dict) else pairs(4, len(chat_tokenizer)),
        eval_dataset=rows,
        processing_class=chat_tokenizer,
        compute_metrics=compute_metrics,
    )


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, chat_tokenizer, tiny_llama):
    rows = pairs(11, len(chat_tokenizer), seed=5)
    results = [
        evaluation_of(tmp_path, chat_tokenizer, tiny_llama, rows, per_device_eval_batch_size=size).evaluate()
        for size in (1, 4, 11)
    ]
    for result in results[1:]:
        for key, value in results[0].items():
            if "runtime" not in key and "per_second" not in key and "time" not in key:
                assert result[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_evaluation_is_the_training_loss_of_the_same_pairs(tmp_path, chat_tokenizer, tiny_llama, trained):
    rows = pairs(8, len(chat_tokenizer), seed=5)
    first_step = trained(rows, per_device_train_batch_size=8, max_steps=1).state.log_history[0]
    result = evaluation_of(tmp_path, chat_tokenizer, tiny_llama, rows, per_device_eval_batch_size=3).evaluate()
    for key in ("loss", "nll_loss", "rewards/margins", "rewards/accuracies", "logits/rejected"):
        assert result[f"eval_{key}"] == pytest.approx(first_step[key], rel=1e-5, abs=1e-6), key


def test_compute_metrics_gets_log_probabilities_in_the_order_of_the_rows(tmp_path, chat_tokenizer, tiny_llama):
    rows = pairs(7, len(chat_tokenizer), seed=6)
    seen = []

    def metric(prediction):
        seen.append(prediction.predictions)
        return {"wins": float((prediction.predictions[0] > prediction.predictions[1]).mean())}

    trainer = evaluation_of(tmp_path, chat_tokenizer, tiny_llama, rows, metric, per_device_eval_batch_size=2)
    result = trainer.evaluate()
    assert result["eval_wins"] == pytest.approx(result["eval_rewards/accuracies"])
    one_by_one = [trainer.evaluate([row])["eval_logps/chosen"] for row in rows]
    np.testing.assert_allclose(seen[0][0], one_by_one, rtol=1e-4)


def test_evaluation_sets_by_name(tmp_path, chat_tokenizer, tiny_llama):
    sets = {"short": pairs(3, len(chat_tokenizer), longest=5), "long": pairs(3, len(chat_tokenizer))}
    result = evaluation_of(tmp_path, chat_tokenizer, tiny_llama, sets).evaluate()
    assert {"eval_short_loss", "eval_long_rewards/margins"} <= result.keys()
    text = datasets.DatasetDict({"a": datasets.Dataset.from_list(TEXT_ROWS[:3])})
    assert "eval_a_loss" in evaluation_of(tmp_path, chat_tokenizer, tiny_llama, text).evaluate()


def test_predict_returns_a_row_per_pair(tmp_path, chat_tokenizer, tiny_llama):
    rows = datasets.Dataset.from_list(TEXT_ROWS[:5])
    output = evaluation_of(tmp_path, chat_tokenizer, tiny_llama, rows).predict(rows)
    assert [len(side) for side in output.predictions] == [5, 5]
    assert "test_loss" in output.metrics


# ---------------------------------------------------------------- runs


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("peft", [False, True])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, chat_tokenizer, tiny_llama, peft):
    rows = pairs(22, len(chat_tokenizer))  # 3 steps per epoch, the last one smaller

    def trainer(folder, callbacks=()):
        return ORPOTrainer(
            tiny_llama(len(chat_tokenizer)),
            config(
                tmp_path / folder,
                max_steps=7,
                optim="adamw_torch",
                learning_rate=1e-3,
                save_strategy="steps",
                save_steps=1,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
            ),
            train_dataset=rows,
            processing_class=chat_tokenizer,
            callbacks=list(callbacks),
            peft_config=LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear") if peft else None,
        )

    whole = trainer("whole")
    whole.train()
    stopped = trainer("stopped", [StopAt(5)])  # in the middle of the second epoch
    stopped.train()
    assert stopped.state.global_step == 5
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    assert_same_weights(weights(resumed), weights(whole), tolerance=0)


def test_lora_dropout_stays_live_and_the_bases_does_not(trained, chat_tokenizer):
    trainer = trained(
        pairs(4, len(chat_tokenizer)), peft_config=LoraConfig(r=4, lora_dropout=0.25, target_modules="all-linear")
    )
    probabilities = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert probabilities == {0.25}


def test_a_smaller_batch_that_fits_keeps_the_global_batch(tmp_path, chat_tokenizer, tiny_llama, monkeypatch):
    rows = pairs(16, len(chat_tokenizer))
    limit = 3
    step = ORPOTrainer.training_step

    def runs_out_of_memory(self, model, inputs, *args):
        if len(inputs["orpo_layout"].index) > limit:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(ORPOTrainer, "training_step", runs_out_of_memory)
    trainer = ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path, per_device_train_batch_size=8, auto_find_batch_size=True, max_steps=2),
        train_dataset=rows,
        processing_class=chat_tokenizer,
    )
    trainer.train()
    limit = 8
    whole = ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path, per_device_train_batch_size=8, max_steps=2),
        train_dataset=rows,
        processing_class=chat_tokenizer,
    )
    whole.train()
    assert trainer.args.gradient_accumulation_steps > 1
    assert trainer.state.global_step == 2
    assert_same_weights(weights(trainer), weights(whole))


# ---------------------------------------------------------------- other families


def test_encoder_decoder(tmp_path, chat_tokenizer):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(chat_tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )
    trainer = ORPOTrainer(
        model,
        config(tmp_path, max_steps=30, learning_rate=3e-3, optim="adamw_torch"),
        train_dataset=datasets.Dataset.from_list(TEXT_ROWS),
        eval_dataset=datasets.Dataset.from_list(TEXT_ROWS),
        processing_class=chat_tokenizer,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_nll_loss"] < before["eval_nll_loss"] - 0.1
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]


def moe(vocab):
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.05,
            output_router_logits=True,
        )
    )


def test_router_aux_loss_by_its_definition(tmp_path, chat_tokenizer):
    """Per micro-batch, weighted by its share of the global batch's tokens; unset, with the model's own coefficient."""
    rows = pairs(4, len(chat_tokenizer))
    trainer = ORPOTrainer(
        moe(len(chat_tokenizer)),
        config(tmp_path, padding_free=False),
        train_dataset=rows,
        processing_class=chat_tokenizer,
    )
    plain = ORPOTrainer(
        moe(len(chat_tokenizer)),
        config(tmp_path, router_aux_loss_coef=0.0, padding_free=False),
        train_dataset=rows,
        processing_class=chat_tokenizer,
    )
    micro = trainer.data_collator([{**row, "weight": 1.0, "index": i} for i, row in enumerate(rows)])
    tokens, count = micro["orpo_layout"].counts().unbind()
    micro["orpo_layout"].tokens, micro["orpo_layout"].pairs = tokens * 4, count * 4  # a quarter of its global batch
    trainer.model.eval()
    plain.model.eval()
    with torch.no_grad():
        difference = trainer.compute_loss(trainer.model, micro) - plain.compute_loss(plain.model, micro)
        inputs = {key: micro[key] for key in ("input_ids", "attention_mask")}
        aux_loss = trainer.model(**inputs, output_router_logits=True).aux_loss
    assert difference.item() == pytest.approx(0.05 * aux_loss.item() / 4, rel=1e-4)


def test_router_loss_trains(tmp_path, chat_tokenizer, trained):
    trainer = trained(pairs(8, len(chat_tokenizer)), model=moe(len(chat_tokenizer)))
    assert np.isfinite(trainer.state.log_history[0]["loss"])


# ---------------------------------------------------------------- the config that was given


def test_the_given_config_is_not_changed(tmp_path, chat_tokenizer, tiny_llama):
    """Reused for a second trainer it means the same again."""
    args = config(
        tmp_path,
        save_total_limit=1,
        gradient_checkpointing=True,
        ddp_find_unused_parameters=None,
        max_prompt_length=8,
        warmup_steps=0.1,
    )
    before = dict(vars(args))
    for _ in range(2):
        trainer = ORPOTrainer(
            tiny_llama(len(chat_tokenizer)),
            args,
            train_dataset=datasets.Dataset.from_list(TEXT_ROWS),
            processing_class=chat_tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )
        trainer.train()
        assert vars(args) == before
    assert trainer.args is not args


def test_max_length_is_what_was_decided_for_the_model(tmp_path, chat_tokenizer, tiny_llama):
    """For the model card and out-of-memory errors."""
    trainer = ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path),
        train_dataset=pairs(8, len(chat_tokenizer)),
        processing_class=chat_tokenizer,
    )
    assert type(trainer.args.max_length) is int and trainer.args.max_length == 1024


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("launched, said", [("fp16", {}), ("fp16", {"bf16": False}), ("bf16", {}), ("no", {})])
def test_the_precision_that_accelerate_launch_asks_for_is_seen(tmp_path, monkeypatch, launched, said):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    args = config(tmp_path, **said)
    assert (args.bf16, args.fp16) == (launched == "bf16", launched == "fp16")
    assert args.mixed_precision == launched


def test_the_configs_own_precision_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    args = config(tmp_path, bf16=True)
    assert args.bf16 and not args.fp16 and args.mixed_precision == "bf16"


def test_a_precision_that_is_not_supported_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="mixed_precision=fp8"):
        config(tmp_path)


@pytest.fixture
def no_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_fsdp_is_refused_in_version_1_and_missed_where_it_is_not_in_force(
    tmp_path, chat_tokenizer, tiny_llama, no_accelerator, monkeypatch, caplog
):
    """Without an accelerator, accelerate trains without FSDP, and says nothing."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    rows = pairs(4, len(chat_tokenizer))

    def build():
        return ORPOTrainer(
            tiny_llama(len(chat_tokenizer)), config(tmp_path), train_dataset=rows, processing_class=chat_tokenizer
        )

    with pytest.raises(UserError, match=r"FSDP1 is not supported.*Set fsdp_version: 2 in the accelerate config"):
        build()
    monkeypatch.setenv("FSDP_VERSION", "2")
    build()
    assert "FSDP was asked for and is not in force: accelerate runs NO here" in caplog.text


def test_what_the_accelerator_runs_in_is_believed(tmp_path, chat_tokenizer, tiny_llama, no_accelerator):
    """accelerate was set up by the process, and the trainer is told to use that."""
    Accelerator(mixed_precision="bf16", cpu=True)
    trainer = ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path, max_steps=1, accelerator_config={"use_configured_state": True}),
        train_dataset=pairs(4, len(chat_tokenizer)),
        processing_class=chat_tokenizer,
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.args.bf16 and trainer.layout.options.compute_dtype == torch.bfloat16
    trainer.train()
