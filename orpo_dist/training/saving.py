"""What a trainer writes and reads back: the final model, checkpoints, the card, and uploads."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers.trainer_utils import HubStrategy

from orpo_dist.distributed.environment import Sharding
from orpo_dist.errors import RunStopped, SaveError
from orpo_dist.model.loading.adapter_files import adapter_folder, load_adapters
from orpo_dist.model.loading.initial import save_initial, to_plain_lora
from orpo_dist.model.loading.trained import record_trained
from orpo_dist.run.stop import ignore_signals
from orpo_dist.run.upload import STAGED, unstage, upload_run
from orpo_dist.run.verified import why_unusable
from orpo_dist.training.building import BuildingTrainer
from orpo_dist.training.final_model import resized_embeddings, save_checked, whole_weights
from orpo_dist.training.optimizer_modes import use_averaged_weights
from orpo_dist.training.progress import progress_of


class SavingTrainer(BuildingTrainer):
    """Models that plain transformers or peft can load, and checkpoints that are complete or not there."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, or its adapter, with tokenizer and config, whatever form the checkpoints have.

        Raises:
            SaveError: on the rank that writes: transformers or peft could not load what lies there.
        """
        if self._checkpoints.staging is not None:  # part of a checkpoint, which keeps the form that was asked for
            with resized_embeddings(self.model, self.environment.sharding):
                super().save_model(output_dir, _internal_call=True)
            return
        use_averaged_weights(self.optimizer)
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        with self.hang_watch.phase("save", "the save of the model"):
            save_checked(
                partial(self._save_whole, folder),
                self.accelerator.unwrap_model(self.model),
                folder,
                checks=self.args.should_save,
                trust_remote_code=self.args.trust_remote_code,
            )
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_whole(self, folder: Path) -> None:
        half = self.args.bf16 or self.args.fp16
        changed = bool(self._initial_adapters)
        trained = record_trained(self.model, self.args.device, base_changed=changed, half=half)
        sharding = self.environment.sharding
        with whole_weights(self.accelerator, sharding, self.deepspeed), resized_embeddings(self.model, sharding):
            super().save_model(str(folder), _internal_call=True)  # which only means: without a push
        if self.args.should_save:
            for name, initial in self._initial_adapters.items():
                to_plain_lora(adapter_folder(folder, name), initial)
            if trained is not None:
                trained.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began, write = time.monotonic(), super()._save_checkpoint
        use_averaged_weights(self.optimizer)
        progress = progress_of(self, self._train_sums, self._step_guard)

        def write_all() -> None:
            write(model, trial)
            if self.args.should_save:
                save_initial(
                    self._initial_adapters, Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
                )

        watch = self.hang_watch.phase("save", f"the save of step {self.state.global_step}")
        with self._throughput.paused(), watch:
            run = Path(super()._get_output_dir(trial))
            published = self._checkpoints.save(run, self.state, write_all, progress)
            if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
                self._checkpoints.background.wait()
                super()._push_from_checkpoint(str(published))
        if self.args.async_save:
            self._stop_requests.not_a_step()
        else:
            self._stop_requests.saved(time.monotonic() - began)

    def _wants_to_stop(self) -> bool:
        """This rank's vote. A checkpoint that could not be written in the background is one: every rank knows of it
        sooner or later, they stop after the same step, and the failure is raised where they save or end."""
        seconds = self._checkpoints.background.took()
        if seconds is not None:
            self._stop_requests.saved(seconds)
        return self._checkpoints.background.failed or self._stop_requests.reason() is not None

    def _finish_saving(self) -> None:
        """Wait for a checkpoint that is being written in the background. Raises SaveError if it cannot be."""
        with self.hang_watch.phase("save", "a save in the background"):
            self._checkpoints.background.wait()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_saving()  # the last checkpoint may be the best one
        return super()._finalize_training(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        staging = self._checkpoints.staging
        return str(staging) if staging is not None else super()._get_output_dir(trial)

    def _load_best_model(self) -> None:
        use_averaged_weights(self.optimizer)  # else a later switch would average the last step's into the best ones
        reason = why_unusable(Path(str(self.state.best_model_checkpoint)))
        if reason is not None:
            raise SaveError(
                f"Training is done, but the best checkpoint, {self.state.best_model_checkpoint}, cannot be loaded: "
                f"{reason}. The last checkpoint is not touched: without load_best_model_at_end it becomes the model."
            )
        if self._loads_adapters():
            load_adapters(self.model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_adapters():
            load_adapters(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _loads_adapters(self) -> bool:
        """Whether a checkpoint holds adapters as peft saves them, and not the form of ZeRO or FSDP."""
        sharding = self.environment.sharding
        return isinstance(self.model, PeftModel) and not sharding.is_zero and sharding is not Sharding.FSDP

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._checkpoints.staging is not None:  # it does not have its final name yet
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        # The Trainer copies the model's files into output_dir and uploads all of it: a folder with nothing else in it.
        run = self.args.output_dir
        self.args.output_dir = str(Path(str(run)) / f"{STAGED}-{self.state.global_step}")
        try:
            Path(self.args.output_dir).mkdir(exist_ok=True)
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.args.output_dir = run

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self.is_world_process_zero():
            unstage(self._run_folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the Trainer's, for the files that run/upload.py lists. Every rank must call it."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, **({"private": private} if private is not None else {}))
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(self.model.model_tags or [])]
        self.create_model_card(tags=tags, **kwargs)
        self._finish_current_push()
        return upload_run(
            Path(str(self.args.output_dir)),
            str(self.hub_model_id),
            blocking=blocking,
            commit_message=commit_message,
            token=token,
            revision=revision if revision is not None else self.args.hub_revision,
        )

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output folder. The arguments are those of TRL, passed by `push_to_hub`."""
        if self.is_world_process_zero():
            from orpo_dist.run.model_card import CardFacts, write_model_card

            write_model_card(CardFacts.of(self.model, self.args, model_name, dataset_name, tags), self.args, self.state)

    def _checkpoint_saved(self) -> None:
        """Raises RunStopped if the ranks have agreed to stop."""
        step = self.state.global_step
        if self._step_guard.stops and step < self.state.max_steps:
            self._finish_saving()
            raise self._stopped(step, str(self._run_folder / f"checkpoint-{step}"))

    def _stopped(self, step: int, checkpoint: str | None) -> RunStopped:
        """A collective: the reason is that of any rank."""
        ignore_signals()
        reasons = [reason for reason in gather_object([self._stop_requests.reason()]) if reason is not None]
        return RunStopped(reasons[0] if reasons else "asked to", step, checkpoint)
