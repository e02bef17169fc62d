"""LoRA initialisations that change the base: the initial adapter is kept, so that the saved one needs no second draw.

PiSSA, CorDA, OLoRA and LoRA-GA take s B0 A0 out of the base's weights and put it into the new adapter. Whoever loads
that adapter would have to take the same product out of the base again, and peft's draw at loading is another one
(svd_lowrank), fails (CorDA without its statistics) or is left out (LoRA-GA). What a run saves is therefore plain LoRA
on the base as it came:

    W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]

Source: "Convert PiSSA to LoRA", https://github.com/huggingface/peft/blob/main/examples/pissa_finetuning/README.md, and
`LoraModel.subtract_mutated_init`, which needs a second adapter in the model, and that does not work sharded.

Shape legend: r rank, A (r, in), B (out, r), s scaling of the adapter.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError

logger = get_logger(__name__)

INITIAL_NAME = "initial_adapter.safetensors"
_CHANGES_BASE = ("pissa", "corda", "olora", "lora_ga")
_RANK_FIRST, _RANK_SECOND = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")

Initial = dict[str, dict[str, torch.Tensor]]
"""Adapter -> name as peft saves it -> the weight that the adapter began with, on the CPU."""


def changes_base(config: PeftConfig) -> bool:
    """Whether the initialisation of this adapter changes the weights of its base."""
    return isinstance(config, LoraConfig) and str(config.init_lora_weights).lower().startswith(_CHANGES_BASE)


def refuse_unsaveable(config: PeftConfig, *, quantised: bool) -> None:
    """Before a new adapter is made.

    Raises:
        UserError: what would be saved could not reproduce the trained model.
    """
    if not isinstance(config, LoraConfig):
        return
    init = config.init_lora_weights
    if init == "loftq":
        raise UserError(
            "init_lora_weights=loftq replaces the base's weights by quantised ones that no adapter file holds. Load "
            "the base with load_in_4bit instead, and call peft's replace_lora_weights_loftq on the PeftModel."
        )
    if changes_base(config) and quantised:
        raise UserError(
            f"init_lora_weights={init} would quantise the base a second time, and the saved adapter would not fit the "
            "base as it is stored. Load the base without quantisation, or use another initialisation."
        )
    if init == "eva":
        logger.warning(
            "init_lora_weights=eva: the adapter begins as plain LoRA until peft's initialize_lora_eva_weights is "
            "called on the trainer's model."
        )


def refuse_second_draw(config: PeftConfig, adapter: str) -> None:
    """Before a saved adapter is loaded.

    Raises:
        UserError: loading would change the base in another way than the training of the adapter did.
    """
    if changes_base(config) or (isinstance(config, LoraConfig) and config.init_lora_weights == "loftq"):
        raise UserError(
            f"The adapter {adapter} was initialised with init_lora_weights={vars(config)['init_lora_weights']}, and "
            "saved without being converted to plain LoRA: loading it draws the base's part again. Save it with peft's "
            "path_initial_model_for_weight_conversion, or let the run that trains it end, which converts it."
        )


def initial_weights(model: object, *, given: bool) -> Initial:
    """The weights of the adapters whose initialisation has changed the base; empty for other models.

    given: the caller made the adapters. What they hold now is taken as their beginning, and the log says so.
    """
    if not isinstance(model, PeftModel):
        return {}
    found: Initial = {}
    for name, config in model.peft_config.items():
        if changes_base(config):
            state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            found[name] = {
                key: tensor.detach().cpu().clone() for key, tensor in state.items() if _rank_dimension(key) is not None
            }
            if given:
                logger.warning(
                    "The adapter %s was initialised with %s before it was given to the trainer: its weights at this "
                    "moment are taken as its initial ones.",
                    name,
                    vars(config)["init_lora_weights"],
                )
    return found


def save_initial(initial: Initial, folder: Path) -> None:
    """Beside the checkpoint of a run, which resumes with it; no file for other adapters."""
    if initial:
        flat = {f"{name}/{key}": tensor for name, state in initial.items() for key, tensor in state.items()}
        save_file({key: tensor.contiguous() for key, tensor in flat.items()}, folder / INITIAL_NAME)


def resume_initial(model: object, drawn: Initial, folder: Path, *, sharded: bool) -> Initial:
    """The initial weights of the run that `folder` is a checkpoint of, with the base of `model` changed to fit them.

    drawn: those of this process, to which its base fits. Where both are equal, nothing changes.

    Raises:
        UserError: they differ, and the base is sharded or the checkpoint has none.
    """
    if not drawn:
        return drawn
    if not (folder / INITIAL_NAME).is_file():
        raise UserError(f"{folder} has no {INITIAL_NAME}: it cannot be resumed with an adapter initialised like this.")
    saved: Initial = {name: {} for name in drawn}
    for key, tensor in load_file(folder / INITIAL_NAME).items():
        name, _, rest = key.partition("/")
        saved[name][rest] = tensor
    assert isinstance(model, PeftModel)
    for name, state in saved.items():
        if all(torch.equal(state[key], drawn[name][key]) for key in state):
            continue
        if sharded:
            raise UserError(
                f"The initial weights of the adapter {name} were drawn differently than in {folder}, and the base is "
                "sharded: resume on the machine and with the seed of the run, or use an initialisation that leaves the "
                "base alone (init_lora_weights=True, gaussian, eva, orthogonal)."
            )
        logger.warning("The adapter %s was drawn differently than in %s: the base is changed to fit.", name, folder)
        _move_base(model, name, drawn[name], state)
    return saved


@torch.no_grad()
def _move_base(model: PeftModel, adapter: str, drawn: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    for name, layer in model.named_modules():
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if isinstance(layer, LoraLayer) and down in saved:
            weight: Any = layer.get_base_layer().weight
            change = drawn[up].float() @ drawn[down].float() - saved[up].float() @ saved[down].float()
            change = layer.scaling[adapter] * change.to(weight.device)
            # transformers' Conv1D (GPT-2) holds (in, out).
            weight.copy_(weight.float() + (change.T if vars(layer).get("fan_in_fan_out") else change))


def to_plain_lora(folder: Path, initial: dict[str, torch.Tensor]) -> None:
    """Rewrite the adapter that peft has just saved in `folder` as LoRA of twice the rank on the base as it came."""
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for key, begun in initial.items():
        dimension = _rank_dimension(key)
        assert dimension is not None
        begun = begun.to(state[key].dtype)
        state[key] = torch.cat([state[key], begun if dimension == 0 else -begun], dim=dimension).contiguous()
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    logger.info("%s: %s was converted to plain LoRA of rank %d.", folder, config.init_lora_weights, 2 * config.r)
    # alpha / r stays what it was; alpha / sqrt(r) with rsLoRA.
    factor = math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights = True
    config.corda_config = None
    config.r *= 2
    config.lora_alpha = config.lora_alpha * factor  # type: ignore[assignment]  # peft divides it, a float will do
    config.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: alpha * factor for key, alpha in (config.alpha_pattern or {}).items()}  # type: ignore[misc]
    config.inference_mode = True
    temporary = folder / ".adapter_model.safetensors"
    save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, file)
    config.save_pretrained(str(folder))


def _rank_dimension(key: str) -> int | None:
    """Which dimension of a saved weight is the rank; None for what has no rank (DoRA's magnitudes, modules_to_save)."""
    parts = key.split(".")
    if any(part in _RANK_FIRST for part in parts):
        return 0
    return 1 if any(part in _RANK_SECOND for part in parts) else None
