"""`generate_during_eval`: a few sampled replies at each evaluation, in `<run>/samples.jsonl` and in the trackers."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from orpo_dist.config import ORPOConfig
from orpo_dist.errors import UserError
from orpo_dist.model.loading.processor import tokenizer_of
from orpo_dist.packing.images import process_prompts
from orpo_dist.run.jsonl import keep_lines

SAMPLES_NAME = "samples.jsonl"
PROMPTS = 4
MAX_REPLY_TOKENS = 128
Generate = Callable[..., torch.Tensor]
_COLUMNS = ("step", "prompt", "reply", "chosen")


@dataclass(frozen=True)
class Sample:
    """The model's reply to a prompt at `step`, and the chosen completion of the pair."""

    step: int
    prompt: str
    reply: str
    chosen: str


class SampleReplies(TrainerCallback):
    """Writes sampled replies after each evaluation, always for the same prompts, so that they can be compared.

    Every rank generates, since sharded parameters (ZeRO-3, FSDP2) need all ranks; the main process writes.

    Args:
        rows: tokenised evaluation pairs.
        generate: the model's generate() in evaluation mode; returns only the new tokens, (rows, tokens).
        callbacks: of the trainer; TensorBoard's may be among them.

    Raises:
        UserError: there are no evaluation pairs.
    """

    def __init__(
        self,
        rows: Any,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        generate: Generate,
        callbacks: CallbackHandler,
        seed: int,
    ) -> None:
        if rows is None:
            raise UserError("generate_during_eval needs evaluation pairs: pass eval_dataset.")
        self._processing_class, self._generate = processing_class, generate
        self._callbacks, self._seed = callbacks, seed
        chosen = random.Random(seed).sample(range(len(rows)), k=min(PROMPTS, len(rows)))
        self._rows = [rows[index] for index in chosen]
        self._written_step: int | None = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._written_step == state.global_step:  # one event for each of several evaluation sets
            return
        self._written_step = state.global_step
        limit = min(MAX_REPLY_TOKENS, cast(ORPOConfig, args).max_completion_length or MAX_REPLY_TOKENS)
        samples = self.sample(state.global_step, limit, args.device)
        if not state.is_world_process_zero:
            return
        _write(Path(str(args.output_dir)) / SAMPLES_NAME, samples)
        trackers = args.report_to or []
        if "wandb" in trackers:
            _to_wandb(samples)
        if "trackio" in trackers:
            _to_trackio(samples)
        if "comet_ml" in trackers:
            _to_comet(samples)
        if "tensorboard" in trackers:
            _to_tensorboard(self._callbacks, samples)

    def sample(self, step: int, limit: int, device: torch.device) -> list[Sample]:
        """A reply of at most `limit` tokens to each prompt. Every rank must call it."""
        tokenizer: Any = tokenizer_of(self._processing_class)
        # Training must not depend on whether replies are sampled, so its random state is saved and restored.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed + step)
            replies: list[list[int]] = []
            for inputs in _prompts(self._processing_class, self._rows, tokenizer.pad_token_id):
                options = {"do_sample": True, "max_new_tokens": limit, "pad_token_id": tokenizer.pad_token_id}
                replies += self._generate(inputs, **options).tolist()

        def text(ids: Any) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True).strip()

        return [
            Sample(step, text(row["prompt_ids"]), text(reply), text(row["chosen_ids"]))
            for row, reply in zip(self._rows, replies, strict=True)
        ]


def _prompts(processing_class: Any, rows: list[dict[str, Any]], pad: int) -> list[dict[str, torch.Tensor]]:
    """Batches for generate(): all prompts in one, padded on the left; one per prompt if any has images."""
    if any(row.get("images") for row in rows):
        batches = []
        for number, row in enumerate(rows):
            made = process_prompts(processing_class, [{**row, "index": number}])
            types = {name: of_rows[0][None] for name, of_rows in made.token_types.items()}
            ids = torch.tensor([row["prompt_ids"]])
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **types, **made.tensors})
        return batches
    longest = max(len(row["prompt_ids"]) for row in rows)
    blanks = [longest - len(row["prompt_ids"]) for row in rows]
    ids = torch.tensor([[pad] * blank + list(row["prompt_ids"]) for blank, row in zip(blanks, rows, strict=True)])
    mask = torch.tensor([[0] * blank + [1] * (longest - blank) for blank in blanks])
    return [{"input_ids": ids, "attention_mask": mask}]


def _write(path: Path, samples: list[Sample]) -> None:
    """Append, after dropping lines of the same or a later step: they come from a restarted run or another one."""
    lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
    keep_lines(path, lambda line: line["step"] < samples[0].step, added="".join(lines))


def _table(samples: list[Sample]) -> list[list[Any]]:
    return [[getattr(sample, column) for column in _COLUMNS] for sample in samples]


def _to_wandb(samples: list[Sample]) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log({"samples": wandb.Table(columns=list(_COLUMNS), data=_table(samples))})


def _to_trackio(samples: list[Sample]) -> None:
    import pandas
    import trackio

    trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(_table(samples), columns=list(_COLUMNS)))})


def _to_comet(samples: list[Sample]) -> None:
    import comet_ml

    experiment = comet_ml.get_running_experiment()
    if experiment is not None:
        experiment.log_table(f"samples-{samples[0].step}.csv", tabular_data=_table(samples), headers=list(_COLUMNS))


def _to_tensorboard(callbacks: CallbackHandler, samples: list[Sample]) -> None:
    for callback in callbacks.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for number, sample in enumerate(samples):
                text = f"**{sample.prompt}**\n\n{sample.reply}\n\n---\n\nPreferred: {sample.chosen}"
                callback.tb_writer.add_text(f"samples/{number}", text, sample.step)
            callback.tb_writer.flush()
