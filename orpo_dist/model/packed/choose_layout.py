"""Chooses the layout of micro-batches: packed if the model supports it, else padded.

    choose    with the loaded model: whether it supports the packed layout, and the collator
    verify    with the wrapped model: compares both layouts, and the loss head with the model's own logits, on a tiny
              batch, and falls back to padded, or to full logits, if they differ

The packed layout computes the prompt once, has no padding and forms the logits of one chunk at a time. The padded one
is TRL's concatenated forward: the reference, and the fallback for models that do not support the packed layout.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.distributed.agree import first_objection
from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError
from orpo_dist.model.loading.vision import (
    features_for_both,
    image_rules,
    refuse_images,
    shares_features,
    trains_vision,
    type_text_tokens,
    vision_cost,
    widen_pixels,
)
from orpo_dist.model.packed.asked_layout import Collator, LayoutOptions, PairCollator
from orpo_dist.model.packed.choose_head import HeadChoice
from orpo_dist.model.packed.rotary import fix_rotary_frequencies
from orpo_dist.model.packed.switch import PackingVerdict, use_packed_layout
from orpo_dist.model.packed.verify import LayoutCheck, verify_layout
from orpo_dist.model.packed.verify_images import drawn_row, image_rows, tiny_image_batch, verify_images
from orpo_dist.model.packed.verify_slices import text_rows, verify_slices
from orpo_dist.model.patches import Patched, undo_all
from orpo_dist.model.upstream import config_value, text_model_of
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.images import ImageCollator, process_prompts
from orpo_dist.packing.padded import EncoderDecoderCollator, PaddedCollator, PaddedLayout
from orpo_dist.packing.sampler import FILLER
from orpo_dist.packing.token_ids import inside
from orpo_dist.packing.trl_collator import TRLCollator

logger = get_logger(__name__)


class LayoutChoice:
    """The layout of a run's micro-batches, decided when the model is known and confirmed when it is ready to run.

    Attributes:
        collator: for the data loaders.
        autocast: the accelerator's, for forwards of packed rows: the loss head lies around the model's forward, and
            so around the wrapper for mixed precision that accelerate has put on it.
        router_aux_loss_coef: weight of the load-balancing loss of the model that was chosen for.
        vision_cost_per_token: of an image token, beside a token's cost in the language model; 0 without images.
    """

    def __init__(self, options: LayoutOptions):
        self.options = options
        self.collator = PairCollator()
        self.autocast: Callable[[], AbstractContextManager] = nullcontext
        self._depth = 0
        self._takes_packed = False
        self.router_aux_loss_coef = 0.0
        self.vision_cost_per_token = 0.0
        self._verdict: PackingVerdict | None = None
        self._head: HeadChoice | None = None
        self._base: PreTrainedModel | None = None
        self._half_pixels = False
        self._verified = False

    @property
    def is_packed(self) -> bool:
        return isinstance(self._layout_collator, PackedCollator)

    @property
    def prefix_sharing(self) -> bool:
        return isinstance(self._layout_collator, PackedCollator) and self._layout_collator.prefix_sharing

    @property
    def model_config(self) -> Any:
        """Of the model that was chosen for."""
        assert self._base is not None, "choose() comes first"
        return self._base.config

    @property
    def model_class(self) -> str:
        """Of the model that was chosen for."""
        return type(self._base).__name__

    @property
    def _layout_collator(self) -> Collator | None:
        chosen = self.collator.chosen
        return chosen.inner if isinstance(chosen, ImageCollator) else chosen

    def follow(self, options: LayoutOptions) -> None:
        """Take over other options; `choose` comes next. The model of the earlier choice has its own attention again."""
        if self._verdict is not None:
            self._verdict.restore()
            self._verdict = None
        self.options = options

    def choose(self, model: nn.Module, *, router_aux_loss_coef: float) -> None:
        """Choose the layout for `model` and switch to it. Logs one line if the requested one is not possible."""
        options = self.options
        self._verified = not options.verify_layout
        self._base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        if options.images is not None:
            refuse_images(self._base)
        self.router_aux_loss_coef, self._half_pixels = router_aux_loss_coef, False
        self.collator.chosen, self._verdict, self._takes_packed = self._padded_collator(), None, False
        self._head = HeadChoice(
            model, options.objective, chunk_rows=options.loss_chunk_size, router_aux_loss_coef=router_aux_loss_coef
        )
        if options.trl_collator is not None:
            logger.warning("A data_collator was given: padded layout.")
        elif not options.padding_free and options.prefix_sharing:
            logger.warning("prefix_sharing has no effect with padding_free=false: prompts are padded twice.")
        elif options.padding_free:
            self._choose_packed(model, self._head)
        if self._head.head is None:
            logger.warning("Padded layout with full logits: %s.", self._head.reason)
        self._refuse_padded_slices()

    def _choose_packed(self, model: nn.Module, choice: HeadChoice) -> None:
        options, head = self.options, choice.head
        if head is None:
            return
        if isinstance(model, PeftModel) and isinstance(model.active_peft_config, PrefixTuningConfig):
            logger.warning("Padded layout: prefix tuning gives every sequence keys and values of its own.")
            return
        verdict = use_packed_layout(model, max_length=options.max_length)
        reason = first_objection(verdict.reason)  # ranks may differ in what is installed
        if reason:
            verdict.undo()
            logger.warning("Padded layout: %s.", reason)
            return
        if verdict.unshared:
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in verdict.unshared}))
            logger.info("%d modules (%s) run on unshared rows.", len(verdict.unshared), kinds)
        verdict.makers.append(lambda: [head.put_on()])
        verdict.undo()  # until fix_rotary() and in_force()
        self._verdict, self._takes_packed = verdict, True
        if options.images is not None and not options.prefix_sharing:
            logger.warning("prefix_sharing=false has no effect on pairs with images: their pixels are encoded once.")
        sharing = options.prefix_sharing or options.images is not None
        self.collator.chosen = self._with_images(PackedCollator(sharing, options.nll_scope, options.sequence))

    def verify(self, model: nn.Module, *, may_fall_back: bool = True) -> None:
        """Compare both layouts on a tiny batch; every rank calls it, once, with the model as it will run.

        Raises:
            UserError: they differ and the micro-batches in flight are packed already (`may_fall_back=False`).
        """
        if self._verdict is None or not self._verified:  # the padded layout's head is checked without verify_layout too
            self._verify_head(model, may_fall_back)
        if not self._verified:
            self._verified = True
            self._verify_layout(model, may_fall_back)

    def _verify_layout(self, model: nn.Module, may_fall_back: bool) -> None:
        if self._verdict is not None:
            with self.in_force(), self.autocast():
                reason = first_objection(self._verify_packed(model, self._verdict).reason)
            if not reason:
                return self._verify_slices(model)
            self._fall_back(reason, may_fall_back)
            logger.warning("Padded layout: %s.", reason)
        reason = first_objection(self._verify_images(model).reason)
        if reason and isinstance(self.collator.chosen, ImageCollator):
            logger.warning("The vision tower runs twice per pair: %s.", reason)
            self.collator.chosen = replace(self.collator.chosen, pixels_twice=True)

    def _verify_head(self, model: nn.Module, may_fall_back: bool) -> None:
        assert self._head is not None and self._base is not None, "choose() comes first"
        collator, images, batch = self.collator.chosen, self.options.images, None
        if images is not None and isinstance(collator, ImageCollator) and not self._head.checked:
            batch = tiny_image_batch(self._base, collator, images.example)
        reason = self._head.check(
            model,
            self._base,
            batch,
            self.autocast,
            max_length=self.options.max_length,
            compute_dtype=self.options.compute_dtype,
        )
        if not reason:
            return
        if self._verdict is None:
            logger.warning("Full logits: %s.", reason)
            return
        self._fall_back(reason, may_fall_back)
        logger.warning("Padded layout with full logits: %s.", reason)

    def _fall_back(self, reason: str, may_fall_back: bool) -> None:
        if not may_fall_back:
            raise UserError(f"The packed layout is wrong for this model: {reason}. Set padding_free=false.")
        self._verdict = None
        self.collator.chosen = self._padded_collator()
        self._refuse_padded_slices(reason)

    def _refuse_padded_slices(self, reason: str = "") -> None:
        if self.options.sequence is not None and self._verdict is None:
            raise UserError(
                "sequence_parallel_size needs the packed layout, and this run has the padded one"
                + (f": {reason}." if reason else " (see the line above).")
                + " Set sequence_parallel_size=1."
            )

    def _verify_packed(self, model: nn.Module, verdict: PackingVerdict) -> LayoutCheck:
        if self.options.images is not None:  # one of the pairs it compares has no image
            return self._verify_images(model)
        return verify_layout(
            model, verdict, prefix_sharing=self.prefix_sharing, compute_dtype=self.options.compute_dtype
        )

    def _verify_slices(self, model: nn.Module) -> None:
        """Compare slices of a row with the whole one, where ranks share rows.

        Raises:
            UserError: they differ.
        """
        collator, base, images = self.collator.chosen, self._base, self.options.images
        if self.options.sequence is None or collator is None or base is None:
            return
        if isinstance(collator, ImageCollator) and images is not None:
            batch = replace(collator, filler=None)(image_rows(base, collator.processor, images.example))
        else:
            batch = collator(text_rows(base))
        with self.in_force(), self.autocast():
            check = verify_slices(
                model, batch, max_length=self.options.max_length, compute_dtype=self.options.compute_dtype
            )
        reason = first_objection(check.reason)
        if reason:
            raise UserError(f"sequence_parallel_size is wrong for this model: {reason}. Set sequence_parallel_size=1.")

    def _verify_images(self, model: nn.Module) -> LayoutCheck:
        collator, images = self.collator.chosen, self.options.images
        if images is None or not isinstance(collator, ImageCollator):
            return LayoutCheck(0.0, 0.0)
        return verify_images(model, collator, images.example, self._verdict, compute_dtype=self.options.compute_dtype)

    def widen_pixels(self) -> list[Patched]:
        """Give the vision towers half-precision pixels in their own precision, if the processor makes such. Returns the
        handles."""
        return widen_pixels(self._base) if self._half_pixels and self._base is not None else []

    def type_text_tokens(self) -> list[Patched]:
        """Give a model that cannot train without token types those of text. Returns the handles."""
        return type_text_tokens(self._base) if self._base is not None else []

    def fix_rotary(self) -> list[Patched]:
        """Fix rotary frequencies that follow the length (model/packed/rotary.py), if the model took the packed layout
        at first. Returns the handles."""
        if not self._takes_packed or self._base is None:
            return []
        fixed = fix_rotary_frequencies(text_model_of(self._base), self.options.max_length)
        return [handle for handles in fixed.values() for handle in handles]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within it the model takes the batches of the chosen layout: around the forward and the backward pass of a
        micro-batch, which recomputes layers under gradient checkpointing. Outside of it the model is as it came, so
        that callbacks may generate with it, copy it and train it otherwise."""
        verdict, head = self._verdict, self._head.head if self._head is not None else None
        if self._depth or (verdict is None and head is None):
            yield
            return
        self._depth += 1
        handles = [head.put_on()] if verdict is None and head is not None else []
        if verdict is not None:
            verdict.put_on()
        try:
            yield
        finally:
            undo_all(handles)
            if verdict is not None:
                verdict.restore()
            self._depth -= 1

    def scores_by_head(self, layout: PaddedLayout) -> bool:
        """Whether the loss of this padded batch comes from the loss head, and not from full logits."""
        return self._head is not None and self._head.takes(layout)

    def image_features_once(self) -> AbstractContextManager:
        """Around a padded forward: both rows of a pair get the features of one pass through the vision tower."""
        collator = self.collator.chosen
        if not isinstance(collator, ImageCollator) or collator.pixels_twice:
            return nullcontext()
        assert self._base is not None
        return features_for_both(self._base)

    def _with_images(self, collator: PackedCollator | PaddedCollator) -> Collator:
        """The collator of the layout, or one around it where rows have images."""
        images, base = self.options.images, self._base
        if images is None or base is None:
            return collator
        prompt = drawn_row(images.example, images.processor)
        made = process_prompts(images.processor, [{**prompt, "index": FILLER}])
        # An estimate for balancing batches: families name their tensors and tokens in their own way.
        floats = [tensor for tensor in made.tensors.values() if tensor.is_floating_point()]
        self._half_pixels = any(tensor.dtype != torch.float32 for tensor in floats)
        pixels = max((tensor.numel() for tensor in floats), default=0)
        image_tokens = sum(map(prompt["prompt_ids"].count, images.processor.image_token_ids))
        self.vision_cost_per_token = vision_cost(base, pixels, image_tokens)
        filler = None
        if images.world_size > 1 and (images.partitioned or trains_vision(base)):
            token = [inside(self.options.pad_token_id, base.config.get_text_config().vocab_size) or 0]
            filler = {**prompt, "chosen_ids": token, "rejected_ids": token, "weight": 0.0, "index": FILLER}
        twice = isinstance(collator, PaddedCollator) and not shares_features(base)
        if twice:
            logger.warning("The vision tower runs twice per pair: %s has no get_image_features.", type(base).__name__)
        return ImageCollator(collator, images.processor, image_rules(base), filler, twice)

    def _padded_collator(self) -> Collator:
        options, config = self.options, self.model_config  # not of the wrapped model: DDP's wrapper has no config
        # Masked, so which token it is has no effect, but the embedding looks it up.
        padding = inside(options.pad_token_id, config.get_text_config().vocab_size) or 0
        if config.is_encoder_decoder:
            if options.trl_collator is not None:
                raise UserError("data_collator cannot be replaced for encoder-decoder models: leave it unset.")
            start = config_value(config, "decoder_start_token_id")  # T5Gemma 2 has none
            if start is None:
                raise UserError(
                    "The model's config has no decoder_start_token_id; set it (for T5 it is the pad token)."
                )
            return EncoderDecoderCollator(padding, start)
        if options.trl_collator is not None:
            return TRLCollator(options.trl_collator, padding, options.nll_scope)
        return self._with_images(PaddedCollator(padding, options.nll_scope))
