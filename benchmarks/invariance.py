"""How much splitting a global batch of 8 pairs into micro-batches changes the trained weights, here and in TRL.

    python benchmarks/invariance.py            (CPU, under two minutes; prints a Markdown table)

A tiny Llama, 8 steps of SGD, the same 64 pairs of very different lengths in the same order for every run. The figure is
the largest difference in a weight from the run with one micro-batch of 8, relative to the largest change of a weight
during training.
"""

import random
import tempfile

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging
from trl.experimental.orpo import ORPOConfig as TRLConfig
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_dist import ORPOConfig, ORPOTrainer

STEPS, GLOBAL_BATCH, VOCABULARY = 8, 8, 256
CUTS = ((8, 1), (4, 2), (2, 4), (1, 8))


class SequentialTRLTrainer(TRLTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word `w0`, `w1`, ...: token counts are word counts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(VOCABULARY - 3)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def rows() -> datasets.Dataset:
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(VOCABULARY - 3)}" for _ in range(rng.randint(low, high)))

    pairs = [{"prompt": text(2, 150), "chosen": " " + text(1, 100), "rejected": " " + text(1, 100)} for _ in range(64)]
    return datasets.Dataset.from_list(pairs)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def trained(trainer_class, config_class, per_device: int, accumulation: int) -> dict[str, torch.Tensor]:
    words = tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            logging_strategy="no",
        )
        data = rows()
        if trainer_class is ORPOTrainer:
            # our sampler shuffles by seed: give TRL's sequential sampler the same order
            trainer = trainer_class(model(), args, train_dataset=data, processing_class=words)
        else:
            ours = ORPOTrainer(
                model(),
                ORPOConfig(folder, per_device_train_batch_size=GLOBAL_BATCH, use_cpu=True, report_to="none"),
                train_dataset=data,
                processing_class=words,
            )
            order = [i for batch in ours.get_train_dataloader().batch_sampler.global_batches() for i in batch]
            trainer = trainer_class(model(), args, train_dataset=data.select(order), processing_class=words)
        trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def main() -> None:
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    start = dict(model().named_parameters())
    print("| micro-batches | orpo_dist | TRL |\n|---|---|---|")
    reference = {}
    for per_device, accumulation in CUTS:
        cells = []
        for trainer_class, config_class in ((ORPOTrainer, ORPOConfig), (SequentialTRLTrainer, TRLConfig)):
            weights = trained(trainer_class, config_class, per_device, accumulation)
            whole = reference.setdefault(trainer_class, weights)
            change = max((whole[name] - start[name]).abs().max().item() for name in start)
            difference = max((weights[name] - whole[name]).abs().max().item() for name in start)
            cells.append(f"{difference / change:.1e}")
        print(f"| {accumulation} of {per_device} pairs | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
