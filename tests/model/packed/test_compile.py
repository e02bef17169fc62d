"""Compiled blocks: the same numbers, no compilation per length of a row, checkpointing around them."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from orpo_dist import ORPOTrainer
from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Sharding
from orpo_dist.errors import UserError
from orpo_dist.loss import Objective, orpo_loss
from orpo_dist.model.packed.compile import compile_blocks
from orpo_dist.model.packed.switch import use_packed_layout
from orpo_dist.packing.collate import PackedCollator
from tests.model.packing_reference import rows, score_packed
from tests.model.tiny_models import tiny_model
from tests.trainer_runs import config, pairs

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
LENGTHS = (
    ((11, 7, 9), (5, 6, 3)),
    ((3, 4, 5),),
    ((20, 30, 12), (1, 1, 1), (9, 9, 9)),
    ((2, 1, 1),),
    ((40, 2, 2), (7, 7, 7)),
)


def numbers(model, lengths):
    batch = PackedCollator(True, "sequence")(rows(lengths=lengths))
    layout = batch["orpo_layout"]
    tokens, count = layout.counts().float().unbind()
    logits = model(**batch, use_cache=False).logits
    loss = orpo_loss(score_packed(logits, layout), Objective(beta=1.0), tokens, count)
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "family, blocks",
    [
        ("llama", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("gemma2", 2), ("gpt_oss", 2), ("qwen3_5", 1), ("stablelm", 2))
        ),
    ],
)
def test_numbers_and_recompilations(counter, family, blocks, checkpointing):
    model = tiny_model(family)
    use_packed_layout(model, max_length=128)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = [numbers(model, lengths) for lengths in LENGTHS]
    assert len(compile_blocks(model, backend=counter)) == blocks
    names = list(model.state_dict())
    counts = []
    for lengths, theirs in zip(LENGTHS, expected, strict=True):
        for ours, other in zip(numbers(model, lengths), theirs, strict=True):
            assert (ours - other).abs().max() <= 2e-5 * other.abs().max() + 1e-7
        counts.append(counter.frame_count)
    most = 7 if family == "stablelm" else 6  # rotary angles on a part of each head
    assert 2 <= counts[0] <= most and counts[-1] == counts[0], counts
    assert list(model.state_dict()) == names


def test_more_blocks_compile_no_more(counter):
    counts = []
    for layers in (2, 6):
        torch._dynamo.reset()
        counter.frame_count = 0
        model = tiny_model("llama")
        model.model.layers.extend(tiny_model("llama").model.layers[0] for _ in range(layers - 2))
        use_packed_layout(model, max_length=128)
        compile_blocks(model, backend=counter)
        numbers(model, LENGTHS[0])
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_checkpointing_stays_around_the_compiled_code(counter):
    """Recomputation runs the attention a second time."""
    model = tiny_model("llama")
    use_packed_layout(model, max_length=128)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compile_blocks(model, backend=counter)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(torch.compiler.disable(lambda *args: calls.append(1)))
    numbers(model, LENGTHS[0])
    assert len(calls) == 4


def test_a_model_without_blocks_is_refused():
    class Text(nn.Module):
        pass

    model = tiny_model("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="no decoder block to compile"):
        compile_blocks(model)


def train(folder, tokenizer, model, **options):
    trainer = ORPOTrainer(
        model,
        config(folder, max_steps=4, eval_strategy="steps", eval_steps=2, logging_steps=1, **options),
        train_dataset=pairs(24, len(tokenizer)),
        eval_dataset=pairs(5, len(tokenizer)),
        processing_class=tokenizer,
    )
    trainer.train()
    return [{k: v for k, v in line.items() if "loss" in k or "rewards" in k} for line in trainer.state.log_history]


@pytest.mark.slow
@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
def test_torch_compile_of_the_trainer(tmp_path, chat_tokenizer, tiny_llama, padding_free):
    """Training, evaluation and training again, the option as a user sets it; the whole model is not compiled."""
    torch._dynamo.reset()
    options = {"padding_free": padding_free}
    plain = train(tmp_path / "a", chat_tokenizer, tiny_llama(len(chat_tokenizer)), **options)
    torch._dynamo.utils.counters.clear()
    model = tiny_llama(len(chat_tokenizer))
    compiled = train(tmp_path / "b", chat_tokenizer, model, torch_compile_backend="aot_eager", **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["recompile_limit"]
    assert type(model).__name__ == "LlamaForCausalLM" and len(plain) == len(compiled) > 5
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in theirs.items()}


def test_zero3_with_compiled_blocks_is_refused(tmp_path):
    from orpo_dist.training import refusals

    args = ORPOConfig(str(tmp_path), use_cpu=True, torch_compile=True)
    refusals.refuse_missing_kernels(args, Sharding.REPLICATED)
    with pytest.raises(UserError, match="torch_compile does not work with ZeRO-3"):
        refusals.refuse_missing_kernels(args, Sharding.ZERO3)


def test_liger_keeps_away_from_the_loss(tmp_path):
    args = ORPOConfig(str(tmp_path), use_cpu=True, use_liger_kernel=True, liger_kernel_config={"rope": False})
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert args.liger_kernel_config == {"rope": False, **off}
    with pytest.raises(UserError, match="fused_linear_cross_entropy cannot be used"):
        ORPOConfig(
            str(tmp_path), use_cpu=True, use_liger_kernel=True,
            liger_kernel_config={"fused_linear_cross_entropy": True},
        )  # fmt: skip


def test_liger_that_cannot_run_is_refused(tmp_path, monkeypatch):
    from orpo_dist.training import refusals

    args = ORPOConfig(str(tmp_path), use_cpu=True, use_liger_kernel=True)
    monkeypatch.setattr(refusals, "is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match=r"needs liger-kernel, .* pip install 'orpo-dist\[liger\]'"):
        refusals.refuse_missing_kernels(args, Sharding.REPLICATED)
    monkeypatch.setattr(refusals, "is_liger_kernel_available", lambda: True)
    with pytest.raises(UserError, match="needs a GPU"):
        refusals.refuse_missing_kernels(args, Sharding.REPLICATED)


def test_liger_leaves_the_head_in_place(tmp_path):
    """With the package itself: the patched model keeps the forward that takes a layout."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from transformers.integrations.liger import apply_liger_kernel

    from orpo_dist.model.head.install import install_head
    from orpo_dist.training import refusals

    model = tiny_model("qwen3")
    install_head(model, Objective(beta=0.1))
    forward = model.forward
    args = ORPOConfig(str(tmp_path), use_cpu=True, use_liger_kernel=True, liger_kernel_config={"rope": False})
    apply_liger_kernel(model, args.liger_kernel_config)
    assert model.forward == forward and "Liger" in type(model.model.norm).__name__ + repr(model.model.norm)
    assert refusals.liger_knows(model) and not refusals.liger_knows(tiny_model("gpt2"))
