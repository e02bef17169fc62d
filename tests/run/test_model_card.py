"""Model cards: what the hub reads, and what a reader needs."""

import ast
from dataclasses import replace

import pytest
import yaml
from transformers import TrainerState

from orpo_dist import ORPOConfig
from orpo_dist.run.model_card import CardFacts, card_text

FACTS = CardFacts(
    name="tuned",
    base_model="owner/base",
    base_revision="abc",
    dataset="owner/pairs:config",
    kind="adapter",
    is_encoder_decoder=False,
    repo_id="me/tuned",
    tags=("extra", "orpo"),
)


@pytest.fixture
def args(tmp_path):
    return ORPOConfig(output_dir=str(tmp_path), use_cpu=True, lr_scheduler_type="cosine")


@pytest.fixture
def state():
    state = TrainerState(global_step=5)
    state.log_history = [
        {"step": 0, "eval_loss": 3.0, "eval_rewards/margins": 0.125},
        {"step": 5, "eval_loss": 1.0, "eval_rewards/margins": 0.75},
    ]
    return state


def header_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_metadata(args, state):
    header = header_of(card_text(FACTS, args, state))
    assert header["base_model"] == "owner/base"
    assert header["base_model_relation"] == "adapter"
    assert header["datasets"] == ["owner/pairs"]
    assert header["library_name"] == "peft"
    assert header["tags"] == ["orpo", "orpo_dist", "generated_from_trainer", "extra"]
    assert header["pipeline_tag"] == "text-generation"


def test_folders_are_no_metadata(args, state, tmp_path):
    card = card_text(replace(FACTS, base_model=str(tmp_path), dataset=str(tmp_path)), args, state)
    assert not {"base_model", "base_model_relation", "datasets"} & set(header_of(card))
    assert str(tmp_path) not in card  # paths of the machine do not travel


def test_metrics_and_settings(args, state):
    card = card_text(FACTS, args, state)
    assert "| rewards/margins | 0.1250 | 0.7500 |" in card
    assert "- lr_scheduler_type: cosine" in card
    assert "Held-out" not in card_text(FACTS, args, TrainerState(global_step=5))


@pytest.mark.parametrize(
    ("kind", "is_encoder_decoder", "name"),
    [
        ("adapter", False, "AutoPeftModelForCausalLM"),
        ("adapter", True, "AutoPeftModelForSeq2SeqLM"),
        ("finetune", False, "AutoModelForCausalLM"),
        ("finetune", True, "AutoModelForSeq2SeqLM"),
    ],
)
def test_the_code_imports_what_it_uses(args, state, kind, is_encoder_decoder, name):
    facts = replace(FACTS, kind=kind, is_encoder_decoder=is_encoder_decoder)
    code = code_of(card_text(facts, args, state))
    assert f'{name}.from_pretrained("me/tuned")' in code
    imports = [line for line in code.splitlines() if "import" in line]
    scope: dict = {}
    ast.parse(code)
    exec("\n".join(imports), scope)
    assert name in scope and "AutoTokenizer" in scope
    assert ("pipeline_tag" in header_of(card_text(facts, args, state))) is not is_encoder_decoder


@pytest.mark.parametrize("kind", ["adapter", "finetune"])
def test_a_vision_language_model_is_used_with_its_processor(args, state, kind):
    card = card_text(replace(FACTS, kind=kind, is_vision_language=True), args, state)
    assert header_of(card)["pipeline_tag"] == "image-text-to-text"
    code = code_of(card)
    ast.parse(code)
    base = "owner/base" if kind == "adapter" else "me/tuned"
    assert f'AutoModelForImageTextToText.from_pretrained("{base}")' in code
    assert ('PeftModel.from_pretrained(model, "me/tuned")' in code) == (kind == "adapter")
    assert 'AutoProcessor.from_pretrained("me/tuned")' in code


def test_names_are_text_and_never_markup(args, state, tmp_path):
    """Folders and data sets are called what their owners like."""
    rows = tmp_path / "a`b``c <img src=x>"
    rows.mkdir()
    facts = replace(FACTS, name="x](http://y) <script>\n# second", base_model='own"er/<b>', dataset=str(rows))
    card = card_text(facts, args, state).split("---\n", 2)[2]
    assert card.lstrip().startswith("# x\\](http://y) \\<script\\> # second\n")
    assert '[own"er/\\<b\\>](https://huggingface.co/own%22er/%3Cb%3E)' in card
    assert "of ``` a`b``c <img src=x> ```" in card
    ast.parse(code_of(card_text(replace(facts, kind="finetune", repo_id='a"b'), args, state)))
