"""The model card of a run: README.md with metadata for the hub, metrics, and how to load the model."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState

from orpo_dist.config import ORPOConfig
from orpo_dist.model.loading.load import base_identity
from orpo_dist.model.loading.vision import is_vision_language
from orpo_dist.run.machine import versions
from orpo_dist.run.summary import evaluation_at

TAGS = ("orpo", "orpo_dist", "generated_from_trainer")
# The main metrics; the others are in run_summary.json.
_METRICS = ("loss", "nll_loss", "rewards/accuracies", "rewards/margins", "log_odds_ratio")
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "beta",
    "nll_scope",
    "label_smoothing",
    "max_length",
    "max_prompt_length",
    "max_completion_length",
    "optim",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "seed",
)
_CITATION = """@article{hong2024orpo,
  title   = {{ORPO: Monolithic Preference Optimization without Reference Model}},
  author  = {Jiwoo Hong and Noah Lee and James Thorne},
  year    = 2024,
  eprint  = {arXiv:2403.07691}
}"""


@dataclass(frozen=True)
class CardFacts:
    """The content of a card.

    Attributes:
        base_model: hub id, or an existing folder; only a hub id becomes metadata. None for a model built in memory.
        dataset: hub id, or an existing path; only a hub id becomes metadata.
        kind: `adapter` or `finetune`, as the hub's `base_model_relation` calls it.
    """

    name: str
    base_model: str | None
    base_revision: str | None
    dataset: str | None
    kind: str
    is_encoder_decoder: bool
    repo_id: str | None
    tags: tuple[str, ...]
    is_vision_language: bool = False

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | PeftModel,
        args: ORPOConfig,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> "CardFacts":
        """model: as trained. The other arguments are those of `Trainer.create_model_card`."""
        base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        identity = base_identity(base)
        return cls(
            name=model_name or (args.hub_model_id or Path(str(args.output_dir)).resolve().name).split("/")[-1],
            base_model=identity.name or None,
            base_revision=identity.revision,
            dataset=dataset_name,
            kind="adapter" if isinstance(model, PeftModel) else "finetune",
            is_encoder_decoder=base.config.is_encoder_decoder,
            repo_id=args.hub_model_id,
            tags=tuple([tags] if isinstance(tags, str) else tags or []),
            is_vision_language=is_vision_language(base.config),
        )

    @property
    def pipeline_tag(self) -> str | None:
        if self.is_vision_language:
            return "image-text-to-text"
        return None if self.is_encoder_decoder else "text-generation"


def write_model_card(facts: CardFacts, args: ORPOConfig, state: TrainerState) -> None:
    """Write README.md into the output folder, replacing the draft that peft may have written."""
    ModelCard(card_text(facts, args, state)).save(Path(str(args.output_dir)) / "README.md")


def card_text(facts: CardFacts, args: ORPOConfig, state: TrainerState) -> str:
    """The card with its YAML header."""
    local_base = facts.base_model is None or Path(facts.base_model).exists()
    local_data = facts.dataset is not None and Path(facts.dataset).exists()
    data = ModelCardData(
        base_model=None if local_base else facts.base_model,
        base_model_relation=None if local_base else facts.kind,
        datasets=[facts.dataset.partition(":")[0]] if facts.dataset and not local_data else None,
        library_name="peft" if facts.kind == "adapter" else "transformers",
        model_name=facts.name,
        pipeline_tag=facts.pipeline_tag,
        tags=[*dict.fromkeys([*TAGS, *facts.tags])],
    )
    sections = [
        f"# {_escaped(facts.name)}",
        _introduction(facts, local_base, local_data),
        _metrics_section(state),
        "## Use\n\n```python\n" + _usage(facts) + "\n```",
        _settings_section(args),
        "## Versions\n\n" + "\n".join(f"- {name} {value}" for name, value in versions().items()),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _introduction(facts: CardFacts, local_base: bool, local_data: bool) -> str:
    if facts.base_model is None:
        base = "a model made in memory"
    elif local_base:
        base = _code(Path(facts.base_model).name)
    else:
        base = _link(facts.base_model)
    revision = f" at revision {_code(facts.base_revision)}" if facts.base_revision else ""
    what = "A LoRA adapter for" if facts.kind == "adapter" else "A fine-tuned version of"
    dataset = ""
    if facts.dataset and local_data:
        dataset = f" on the preference pairs of {_code(Path(facts.dataset).name)}"
    elif facts.dataset:
        dataset = f" on {_link(facts.dataset.partition(':')[0], 'datasets/')}"
    return (
        f"{what} {base}{revision}, trained{dataset} with [ORPO](https://huggingface.co/papers/2403.07691) "
        "(odds ratio preference optimisation) by orpo_dist."
    )


def _escaped(text: str) -> str:
    """Text that Markdown and HTML leave alone: the names of folders and data sets are anybody's."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A span of code, whatever backticks are in it (CommonMark, 6.1)."""
    text = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _link(name: str, kind: str = "") -> str:
    return f"[{_escaped(name)}](https://huggingface.co/{kind}{quote(name)})"


def _metrics_section(state: TrainerState) -> str:
    before, after = evaluation_at(state, 0), evaluation_at(state, state.global_step)
    if after is None:
        return ""
    lines = ["## Held-out pairs", "", "| metric | before | after |", "|---|---|---|"]
    for name in _METRICS:
        if name in after:
            earlier = f"{before[name]:.4f}" if before and name in before else ""
            lines.append(f"| {name} | {earlier} | {after[name]:.4f} |")
    return "\n".join(lines)


def _usage(facts: CardFacts) -> str:
    target = json.dumps(facts.repo_id or "path/to/this/folder")
    if facts.is_vision_language:
        return _vision_usage(facts, target)
    auto_class = "AutoModelForSeq2SeqLM" if facts.is_encoder_decoder else "AutoModelForCausalLM"
    if facts.kind == "adapter":
        auto_class = auto_class.replace("Auto", "AutoPeft", 1)
    package = "peft" if facts.kind == "adapter" else "transformers"
    imports = f"from {package} import {auto_class}\nfrom transformers import AutoTokenizer"
    if package == "transformers":
        imports = f"from transformers import {auto_class}, AutoTokenizer"
    return f"{imports}\n\nmodel = {auto_class}.from_pretrained({target})\n" + (
        f"tokenizer = AutoTokenizer.from_pretrained({target})"
    )


def _vision_usage(facts: CardFacts, target: str) -> str:
    adapter = facts.kind == "adapter"
    whole = json.dumps(facts.base_model) if adapter and facts.base_model else target
    lines = [
        *(["from peft import PeftModel"] if adapter else []),
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f"model = AutoModelForImageTextToText.from_pretrained({whole})",
        *([f"model = PeftModel.from_pretrained(model, {target})"] if adapter else []),
        f"processor = AutoProcessor.from_pretrained({target})",
    ]
    return "\n".join(lines)


def _settings_section(args: ORPOConfig) -> str:
    values = args.to_dict()
    lines = [f"- {name}: {values[name]}" for name in _SETTINGS if values[name] is not None]
    return "\n".join(["## Training", "", *lines, f"- world_size: {args.world_size}"])
