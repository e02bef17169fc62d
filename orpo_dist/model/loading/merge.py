"""Merges a trained adapter into its base, verifies that the logits do not change, and writes a plain model."""

import gc
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedModel

from orpo_dist.errors import UserError
from orpo_dist.model.loading.adapter_files import adapter_folder, adapters_in, saved_embeddings
from orpo_dist.model.loading.adapters import is_quantized, quiet_peft
from orpo_dist.model.loading.hub import hub_errors
from orpo_dist.model.loading.initial import refuse_second_draw
from orpo_dist.model.loading.load import auto_class_of, base_identity, load_config, load_model, loading_whole_models
from orpo_dist.model.loading.trained import TRAINED_NAME, TrainedLogits, probe_of, read_trained
from orpo_dist.model.loading.vision import is_vision_language
from orpo_dist.model.patches import DEQUANTISED_WEIGHTS, replace_attribute
from orpo_dist.model.upstream import is_out_of_memory
from orpo_dist.options.model import parse_dtype

REPORT_NAME = "merge_report.json"
# Of float32 logits, relative to the largest: the order of additions differs, nothing else may.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how far the logits of the written model are from those of base and adapter.

    Differences are the largest over the logits of a probe batch (2 rows of 48 tokens), computed in float32; None when
    they were not compared. from_training: to the logits recorded at the end of training, in its precision; None where
    there are none. adapters: those that were merged.
    """

    path: str
    base: str
    base_revision: str | None
    dtype: str
    verified: bool
    max_logit_difference: float | None
    adapter_effect: float | None
    from_training: float | None
    adapters: list[str]

    def lines(self) -> list[str]:
        """The report for a terminal."""
        revision = f" (revision {self.base_revision})" if self.base_revision else ""
        named = "" if self.adapters == ["default"] else f" {' and '.join(self.adapters)}"
        text = [f"Merged{named} into {self.base}{revision}, {self.dtype}: {self.path}"]
        if not self.verified:
            return [*text, "Not verified."]
        assert self.max_logit_difference is not None and self.adapter_effect is not None
        text.append(
            f"Verified: logits differ from base + adapter by at most {self.max_logit_difference:.2g}; "
            f"the adapter itself moves them by up to {self.adapter_effect:.2g}."
        )
        if self.from_training is None:
            text[-1] += f" The folder has no {TRAINED_NAME}: not compared with the model at the end of training."
        else:
            text[-1] += f" From those at the end of training they differ by at most {self.from_training:.2g}."
        if self.max_logit_difference > 0.5 * self.adapter_effect:
            text.append(
                f"Warning: rounding to {self.dtype} hides much of what the adapter learned. Merge with --dtype "
                "float32, or use the adapter unmerged."
            )
        return text


def merge_run(
    run_folder: str | Path,
    output: str | Path | None = None,
    dtype: str | None = None,
    verify: bool = True,
    *,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge the adapter of a run into its base and write a model that plain transformers loads.

    The base is loaded in full precision, even if it was quantised for training, at the revision recorded in the
    adapter. Verification compares, in float32, (base + adapter) with the logits recorded at the end of training, the
    merged weights with it, and the written model with the merged weights. It needs 4 bytes of memory per parameter;
    without it 16-bit models need 2.

    Args:
        run_folder: folder of a run, or of an adapter. Of several adapters those are merged that were active in
            training, else `default`.
        output: where to write, by default `RUN/merged`. Only an earlier merge is overwritten.
        dtype: `bfloat16`, `float16` or `float32`; by default the one the base is stored in.
        verify: compare logits before the result is moved to `output`.
        trust_remote_code: run Python code that the base's repository ships.

    Raises:
        UserError: no adapter in the folder, the base cannot be loaded, the output exists, or the logits differ.
    """
    run_folder = Path(run_folder)
    output = run_folder / "merged" if output is None else Path(output)
    source = _source(run_folder)
    _check_output(run_folder, output)
    partial = output.with_name(f"{output.name}.partial-{socket.gethostname()}-{os.getpid()}")
    _sweep(output)
    try:
        with loading_whole_models():
            report = _merge(source, output, partial, dtype, verify, trust_remote_code)
        (partial / REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _sweep(output: Path) -> None:
    """Removes what killed merges of this machine have left: as much as a whole model each."""
    mine = f"{output.name}.partial-{socket.gethostname()}-"
    for path in output.parent.glob(f"{glob.escape(output.name)}.partial-*"):
        process = path.name.removeprefix(mine)
        if path.name.startswith(mine) and process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class _Source:
    """What is merged: folder of the run, settings of the first adapter, the adapters, and what was recorded of them."""

    run: Path
    settings: PeftConfig
    adapters: list[str]
    trained: TrainedLogits | None


def _merge(
    source: _Source, output: Path, partial: Path, dtype: str | None, verify: bool, trust_remote_code: bool
) -> MergeReport:
    settings, trained = source.settings, source.trained
    wanted = None if dtype is None else parse_dtype(dtype)
    base = _load_base(str(settings.base_model_name_or_path), settings.revision, trust_remote_code)
    identity = base_identity(base)
    final = base.dtype if wanted is None else wanted
    _resize(base, source)
    # Not every tensor has the dtype of the model: rotary frequencies and router biases stay as they are.
    dtypes = {name: final if t.dtype == base.dtype else t.dtype for name, t in _tensors(base) if t.is_floating_point()}
    final_name = str(final).removeprefix("torch.")
    if verify:
        base.float()
    adapted = _with_adapters(base, source)
    vocabulary = base.config.get_text_config().vocab_size
    probe = probe_of(vocabulary, encoder_decoder=base.config.is_encoder_decoder)
    if verify:
        with adapted.disable_adapter():
            of_base = _logits(adapted, probe)
        of_adapter = _logits(adapted, probe)
        _require_trained(trained, of_adapter, of_base, vocabulary)
    merged = adapted.merge_and_unload(safe_merge=True, adapter_names=source.adapters)
    if verify:
        _require_equal(of_adapter, _logits(merged, probe), f"merged weights and {identity.name} + {source.run}")
    _cast(merged, dtypes)
    _write(merged, source.run, settings, partial, trust_remote_code)
    if not verify:
        return MergeReport(
            str(output), identity.name, identity.revision, final_name, False, None, None, None, source.adapters
        )
    of_rounded = _logits(merged.float(), probe)
    del base, adapted, merged
    gc.collect()  # modules and their hooks form cycles; two models must not be in memory at once
    of_written = _read_back(partial, probe, trust_remote_code)
    _require_equal(of_rounded, of_written, "the written model and the merged weights")
    return MergeReport(
        path=str(output),
        base=identity.name,
        base_revision=identity.revision,
        dtype=final_name,
        verified=True,
        max_logit_difference=(of_written - of_adapter).abs().max().item(),
        adapter_effect=(of_adapter - of_base).abs().max().item(),
        from_training=None if trained is None else _largest(trained.recorded(of_written), trained.with_adapters),
        adapters=source.adapters,
    )


def _source(run_folder: Path) -> _Source:
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} does not exist.")
    found, trained = adapters_in(run_folder), read_trained(run_folder)
    if found:
        if trained is None and len(found) > 1 and found[0] != "default":
            raise UserError(
                f"{run_folder} holds several adapters ({', '.join(found)}), and no {TRAINED_NAME} that says which one "
                f"was trained: name the folder of one, e.g. {run_folder / found[0]}."
            )
        adapters = trained.adapters if trained is not None else found[:1]
        absent = [name for name in adapters if name not in found]
        if absent:
            raise UserError(f"{run_folder} does not hold the trained adapter {absent[0]}: it has {', '.join(found)}.")
        settings = PeftConfig.from_pretrained(str(adapter_folder(run_folder, adapters[0])))
        refuse_second_draw(settings, str(run_folder))
        return _Source(run_folder, settings, adapters, trained)
    if (run_folder / "config.json").is_file():
        raise UserError(f"{run_folder} holds a whole model, not an adapter: there is nothing to merge.")
    checkpoints = sorted(run_folder.glob("checkpoint-*/adapter_config.json"), key=lambda path: path.stat().st_mtime)
    hint = f" The run did not end; its newest checkpoint is {checkpoints[-1].parent}." if checkpoints else ""
    raise UserError(f"{run_folder} holds no adapter (adapter_config.json).{hint}")


def _with_adapters(base: PreTrainedModel, source: _Source) -> PeftModel:
    """The adapters on the base, all of them active."""
    first, *others = source.adapters
    try:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(base, str(adapter_folder(source.run, first)), adapter_name=first)
            for name in others:
                adapted.load_adapter(str(adapter_folder(source.run, name)), name)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        base_name = source.settings.base_model_name_or_path
        raise UserError(f"The adapter in {source.run} does not fit {base_name}: {error}") from error
    if others:
        tuner: Any = adapted.base_model
        tuner.set_adapter(source.adapters)
    return adapted.eval()


def _resize(base: PreTrainedModel, source: _Source) -> None:
    """Give the base the vocabulary that the adapter was trained with. peft saves resized embeddings with the adapter,
    and loads them into a base of that size alone."""
    folders = [adapter_folder(source.run, name) for name in source.adapters]
    rows = {shape[0] for folder in folders for shape in saved_embeddings(base, folder)}
    embedding: Any = base.get_input_embeddings()
    for size in rows - {embedding.weight.shape[0]}:
        base.resize_token_embeddings(size, mean_resizing=False)  # the rows come from the adapter's file


def _check_output(run_folder: Path, output: Path) -> None:
    if output.resolve() == run_folder.resolve():
        raise UserError(
            f"--output {output} is the folder of the adapter: transformers would load the adapter on top of the merged "
            "model again. Choose another folder."
        )
    if output.exists() and not (output / REPORT_NAME).is_file() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an earlier merge: remove it, or choose another --output.")


def _load_base(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedModel:
    base = load_model(name, revision=revision, dtype="auto", trust_remote_code=trust_remote_code)
    if is_quantized(base):
        # The base is stored quantised, and the adapter was trained on its dequantised values.
        base = base.dequantize()
        replace_attribute(base, "_weight_conversions", None, DEQUANTISED_WEIGHTS)
    return base.eval()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _cast(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> None:
    for name, tensor in _tensors(model):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])


def _write(
    model: PreTrainedModel, run_folder: Path, settings: PeftConfig, folder: Path, trust_remote_code: bool
) -> None:
    if (run_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(run_folder))
    model.save_pretrained(folder)
    in_run = (run_folder / "tokenizer_config.json").is_file()
    source, revision = (str(run_folder), None) if in_run else (str(settings.base_model_name_or_path), settings.revision)
    # A tokenizer of a text model; of a vision-language model the processor, which holds one.
    auto_class = AutoProcessor if is_vision_language(model.config) else AutoTokenizer
    with hub_errors(source, revision):
        processing_class = auto_class.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    processing_class.save_pretrained(folder)  # with the chat template


@torch.no_grad()
def _logits(model: torch.nn.Module, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**probe, use_cache=False).logits.float()


def _read_back(folder: Path, probe: dict[str, torch.Tensor], trust_remote_code: bool) -> torch.Tensor:
    """Logits of the written model in float32, loaded as a user would: plain transformers, no code of this package."""
    auto_class = auto_class_of(load_config(str(folder), trust_remote_code=trust_remote_code))
    with hub_errors(str(folder)):
        model = auto_class.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return _logits(model.eval(), probe)


def _require_equal(expected: torch.Tensor, actual: torch.Tensor, what: str) -> None:
    difference = (expected - actual).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):  # also true of NaN
        raise UserError(
            f"Merge refused: the logits of {what} differ by {difference:.3g}, so the merged model would not be the "
            "trained one. Nothing was written. Use the adapter unmerged, and please report this."
        )


def _require_trained(
    trained: TrainedLogits | None, of_adapter: torch.Tensor, of_base: torch.Tensor, vocabulary: int
) -> None:
    if trained is None:
        return
    reason = (
        trained.why_not(of_adapter, of_base)
        if vocabulary == trained.vocabulary
        else (f"are over {vocabulary} tokens and not over {trained.vocabulary}, as in training")
    )
    if reason is not None:
        raise UserError(
            f"Merge refused: the logits of base + adapter, loaded from their files, {reason}. What lies there is not "
            "the model that was trained. Nothing was written."
        )


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs).abs().max().item()
