"""Logits of a trained adapter, recorded with its model in memory, which a merge of the files has to reproduce.

Comparing base + adapter with the merged model, both loaded from the same files, cannot see that the files are not the
model that was trained.

Shape legend: V vocabulary, P recorded positions.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from orpo_dist.distributed.log import get_logger
from orpo_dist.model.loading.adapters import is_quantized

logger = get_logger(__name__)

TRAINED_NAME = "trained_logits.pt"
_PROBE_SHAPE = (2, 48)
_EVERY = 12  # of 48 positions: enough, as each depends on all before it, and megabytes instead of tens of them
# Relative to what was recorded: kernels and the order of additions differ between devices.
_TOLERANCE = 1e-3
# Likewise, the most that a base may differ from itself in float32 for the precision it ran in: beyond that it is
# another one. A measured difference counts up to this.
_FULL, _HALF, _QUANTISED = 1e-2, 0.1, 1.0


@dataclass(frozen=True)
class TrainedLogits:
    """What the model gave for `probe_of` its vocabulary at the end of training.

    adapters: the active ones. with_adapters: (2, P, V) float32. without: the same with the adapters switched off, None
    where the adapter's initialisation had changed the base. most_noise: what the precision of the training may explain,
    relative to the logits of the base.
    """

    adapters: list[str]
    vocabulary: int
    with_adapters: torch.Tensor
    without: torch.Tensor | None
    most_noise: float

    def save(self, folder: Path) -> None:
        torch.save(vars(self), folder / TRAINED_NAME)

    def why_not(self, reloaded: torch.Tensor, reloaded_base: torch.Tensor) -> str | None:
        """Why base + adapters, reloaded in float32, are not the trained model; None if they are.

        reloaded, reloaded_base: (2, 48, V), with the adapters and without. What the base alone differs by is the noise
        of the training's precision and quantisation.
        """
        difference = _size(self.recorded(reloaded) - self.with_adapters)
        noise = 0.0
        if self.without is not None:
            noise = 3 * min(_size(self.recorded(reloaded_base) - self.without), self.most_noise * _size(self.without))
        allowed = max(_TOLERANCE * _size(self.with_adapters), noise)
        effect = _size(self.with_adapters - self.recorded(reloaded_base))
        if self.most_noise > _FULL:
            allowed = max(allowed, 0.3 * effect)
        if difference <= allowed:  # false for NaN
            return None
        return (
            f"differ by {difference:.3g} (root mean square) from those of the model at the end of training, where "
            f"rounding explains {allowed:.3g} and training changed them by {effect:.3g}"
        )

    def recorded(self, logits: torch.Tensor) -> torch.Tensor:
        """The recorded positions of (2, 48, V)."""
        return _recorded(logits)


def read_trained(folder: Path) -> TrainedLogits | None:
    """What was recorded in `folder`; None if nothing was."""
    file = folder / TRAINED_NAME
    return TrainedLogits(**torch.load(file, weights_only=True)) if file.is_file() else None


def probe_of(vocabulary: int, *, encoder_decoder: bool) -> dict[str, torch.Tensor]:
    """A batch of 2 rows of 48 token ids, the same for every model of this vocabulary."""
    ids = torch.randint(vocabulary, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "decoder_input_ids": ids} if encoder_decoder else {"input_ids": ids}


def record_trained(model: object, device: torch.device, *, base_changed: bool, half: bool) -> TrainedLogits | None:
    """Run the probe through a model with adapters; None for other models. Every rank calls it if weights are sharded.

    base_changed: the initialisation of an adapter has changed the base. half: the run computes in 16 bits.
    """
    if not isinstance(model, PeftModel) or any(config.is_prompt_learning for config in model.peft_config.values()):
        return None
    vocabulary = model.config.get_text_config().vocab_size
    probe = probe_of(vocabulary, encoder_decoder=model.config.is_encoder_decoder)
    probe = {name: ids.to(device) for name, ids in probe.items()}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            after = _recorded(model(**probe, use_cache=False).logits)
            before = None
            if not base_changed:
                with model.disable_adapter():
                    before = _recorded(model(**probe, use_cache=False).logits)
    except (RuntimeError, ValueError, TypeError) as error:  # a model that takes no plain batch of token ids
        logger.warning("The logits of the trained model were not recorded, and a merge cannot compare them: %s", error)
        return None
    finally:
        model.train(was_training)
    most_noise = _HALF if half or model.dtype != torch.float32 else _FULL
    if is_quantized(model):
        most_noise = _QUANTISED
    return TrainedLogits(list(model.active_adapters), vocabulary, after, before, most_noise)


def _recorded(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, _EVERY - 1 :: _EVERY].float().cpu()


def _size(logits: torch.Tensor) -> float:
    return logits.double().square().mean().sqrt().item()
