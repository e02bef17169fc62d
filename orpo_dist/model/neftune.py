"""NEFTune: uniform noise on the embeddings in training, at most alpha / sqrt(L d), L the length of the own sequence.

Jain et al. 2023 (https://arxiv.org/abs/2310.05914). transformers' hook takes the length of the batch's rows for L: a
packed row, or the longest row of a padded batch. Here the noise of a sequence is a function of (seed, step, pair, side)
and of its length alone, so it is the same however the global batch is cut, and in both layouts.

    noise = EmbeddingNoise(alpha, seed)
    with noise.attach(model):
        with noise.of(batch, step):
            model(...)

Shape legend: T tokens of a packed row, B pairs, L length of the longest row, d width of the embeddings.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.model.patches import EMBEDDING_NOISE, Patched, add_forward_hook
from orpo_dist.packing.layout import PackedLayout


@dataclass(frozen=True)
class _Sequence:
    """key: what its noise is drawn from. row, start: where its tokens are in the batch. length: L. first: tokens before
    it have the noise of another sequence (a shared prompt)."""

    key: str
    row: int
    start: int
    length: int
    first: int = 0


class EmbeddingNoise:
    """Adds the noise to what the input embeddings return, in training mode and within `of`."""

    def __init__(self, alpha: float, seed: int):
        self._alpha, self._seed = alpha, seed
        self._calls: list[list[_Sequence]] = []
        self._call = self._micro_batches = 0

    def attach(self, model: nn.Module) -> Patched:
        base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        return add_forward_hook(base.get_input_embeddings(), self._hook, EMBEDDING_NOISE)

    @contextmanager
    def of(self, batch: dict[str, Any], step: int) -> Iterator[None]:
        """batch: a micro-batch of the layout's collator. step: of the optimizer; its noise differs from every other."""
        self._micro_batches += 1
        self._call = 0
        self._calls = self._sequences(batch, step) if self._alpha else []
        try:
            yield
        finally:
            self._calls = []

    def _sequences(self, batch: dict[str, Any], step: int) -> list[list[_Sequence]]:
        """For each call of the embeddings in a forward: one, or two in an encoder-decoder model."""
        layout = batch["orpo_layout"]

        def key(pair: int, side: str) -> str:
            index = layout.index[pair]
            # A row of the user's loader has no number: its noise is that of its place.
            name = str(index) if index >= 0 else f"{index} {self._micro_batches} {pair}"
            return f"{self._seed} {step} {name} {side}"

        if isinstance(layout, PackedLayout):
            calls = []
            for pair, s in enumerate(layout.segments):
                calls.append(_Sequence(key(pair, "chosen"), 0, s.start, s.prompt + s.chosen))
                shared = s.prompt if s.prompt_copies == 1 else 0
                start = s.rejected_start - s.prompt
                calls.append(_Sequence(key(pair, "rejected"), 0, start, s.prompt + s.rejected, first=shared))
            return [calls]
        masks = [batch["attention_mask"]]
        if "decoder_input_ids" in batch:
            masks.append(layout.completion)
        pairs = len(layout.index)
        return [
            [
                _Sequence(key(row % pairs, "chosen" if row < pairs else "rejected"), row, start, length)
                for row, (start, length) in enumerate(
                    zip(mask.int().argmax(1).tolist(), mask.sum(1).tolist(), strict=True)
                )
            ]
            for mask in masks
        ]

    def _hook(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training or not self._calls:
            return output
        number = self._call % len(self._calls)
        self._call += 1
        noise = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
        for sequence in self._calls[number]:
            drawn = self._drawn(f"{sequence.key} {number}", sequence.length, output.shape[-1], output.device)
            place = noise[sequence.row, sequence.start + sequence.first : sequence.start + sequence.length]
            place.copy_(drawn[sequence.first :])
        return output + noise.to(output.dtype)

    def _drawn(self, key: str, length: int, width: int, device: torch.device) -> torch.Tensor:
        """(length, d) float32."""
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
        generator = torch.Generator(device).manual_seed(seed)
        bound = self._alpha / (length * width) ** 0.5
        return torch.empty(length, width, device=device).uniform_(-bound, bound, generator=generator)
