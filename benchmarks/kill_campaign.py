"""Kill training runs at random moments, resume them, and compare the result with an uninterrupted run.

    python benchmarks/kill_campaign.py [--kills 42] [--seed 0] [--topologies plain,lora,zero2,zero3,fsdp2]
                                       [--out benchmarks/results/kill_campaign.json]
    make test-kill-all                 (64 kills over six topologies)

For each topology one run is left uninterrupted. A second one is killed with SIGKILL again and again, half of the time
while a checkpoint is being written: either one rank, or everything at once as in a power failure. Between kills every
checkpoint under its final name must be complete, and the next start must resume from the newest of them. At the end the
weights must be bitwise equal and the logged losses equal. Exit code 1 if they are not.

--topologies zero2:8 asks for 8 kills of that one. A word after a slash says how it is killed:

    zero2/async:8      with async_save, always while a checkpoint is written; the uninterrupted run saves as usual
    plain/workers:2    one of the two workers of its data loader
    lora/last:10       after the last checkpoint: in the final save, the merge, the model card, before the summary. The
                       finished run is then started three times more, and must not change
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from orpo_dist.run.checkpoint import STAGING, checkpoint_folders, step_of, verify  # noqa: E402
from tests.pair_files import write_pairs  # noqa: E402
from tests.tiny_tokenizers import CHATML_WITH_TOOLS, train_bpe  # noqa: E402

STEPS, START_SECONDS, END_SECONDS = 40, 600, 300
LAST_ACTS = ("save", "merge", "card", "summary")
MERGED = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.3, "merge_adapter": True, "max_steps": 2}
# How a run is killed -> what its recipe changes in the killed run, and in the uninterrupted one.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "": ({}, {}),
    "async": ({"async_save": True}, {}),
    "workers": ({"dataloader_num_workers": 2}, {}),
    "last": (MERGED, MERGED),
}
PROCESSES = {"plain": 1, "lora": 2, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "fsdp2": 2, "fsdp2_sharded": 2}
OF_THE_MACHINE = ("time", "runtime", "per_second", "memory", "preparation_time", "padded_tokens_ratio", "total_flos")


@dataclass
class Kill:
    """One SIGKILL. resumed_from: step of the checkpoint that the next start resumed from, 0 for a fresh start."""

    victim: str
    after_step: int
    inside_saving: bool
    resumed_from: int
    seconds_to_end: float


@dataclass
class Result:
    topology: str
    processes: int
    way: str = ""
    kills: list[Kill] = field(default_factory=list)
    whole_checkpoints_seen: int = 0
    equal_weights: bool = False
    equal_losses: bool = False
    finished_run_unchanged: bool | None = None  # not tried
    seconds: float = 0.0


def make_inputs(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML_WITH_TOOLS
    torch.manual_seed(0)
    model = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_pairs(folder / "train.jsonl", 22, seed=1)
    write_pairs(folder / "test.jsonl", 4, seed=2)


def recipe(folder: Path, output: Path, topology: str) -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder),
        "dataset_test_split": "test",
        "output_dir": str(output),
        "resume_from_checkpoint": "auto",
        "per_device_train_batch_size": 4 // PROCESSES[topology],
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 3,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **({"use_peft": True, "lora_r": 4, "lora_dropout": 0.3} if topology == "lora" else {}),
    }


def command(folder: Path, topology: str, path: Path, launcher: str = "") -> list[str]:
    if launcher == "orpo-dist":
        launch = [sys.executable, "-m", "orpo_dist.cli", "launch", "--cpu", "--processes-per-node"]
        return [*launch, str(PROCESSES[topology]), "--accelerate-config", topology, str(path)]
    script = [str(REPOSITORY / "benchmarks" / "kill_campaign_rank.py"), "train", str(path)]
    if topology == "plain":
        return [sys.executable, *script]
    if topology in ("lora", "ddp"):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    name, _, form = topology.partition("_")
    config = yaml.safe_load((REPOSITORY / "accelerate_configs" / f"{name}.yaml").read_text())
    if form == "sharded":  # torch.distributed.checkpoint instead of one file
        config["fsdp_config"]["fsdp_state_dict_type"] = "SHARDED_STATE_DICT"
    on_cpu = folder / f"{topology}.accelerate.yaml"
    on_cpu.write_text(yaml.safe_dump({**config, "use_cpu": True, "num_processes": PROCESSES[topology]}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={on_cpu}", "--main_process_port=0"]
    return [*launch, *script]


class Run:
    """A running run and its processes.

    Args:
        launcher: `orpo-dist` for `orpo-dist launch`; unset, python, torchrun or accelerate launch, by the topology.
        changes: fields of the recipe.
        own_group: whether its processes are a process group (and session) of their own.
    """

    def __init__(
        self,
        folder: Path,
        output: Path,
        topology: str,
        launcher: str = "",
        changes: dict[str, Any] | None = None,
        own_group: bool = False,
    ):
        path = folder / f"{output.name}.yaml"
        path.write_text(yaml.safe_dump({**recipe(folder, output, topology), **(changes or {})}))
        self.said = folder / f"{output.name}.txt"
        environment = {
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
            "ORPO_DIST_CACHE": str(folder / "cache"),
        }
        self._file = self.said.open("w")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command(folder, topology, path, launcher),
            env=environment,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=own_group,
        )

    def workers(self) -> list[psutil.Process]:
        """The ranks: processes that run kill_campaign_rank.py."""
        return [process for process, is_loader in self._of_the_program() if not is_loader]

    def loaders(self) -> list[psutil.Process]:
        """The workers of data loaders, which the ranks have forked."""
        return [process for process, is_loader in self._of_the_program() if is_loader]

    def _of_the_program(self) -> list[tuple[psutil.Process, bool]]:
        try:
            every = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            named = [
                process
                for process in every
                if "kill_campaign_rank.py" in " ".join(process.cmdline()[:3])
                and "launch" not in " ".join(process.cmdline())
            ]
            ids = {process.pid for process in named}
            return [(process, process.ppid() in ids) for process in named]
        except psutil.Error:  # one of them has just ended
            return []

    def everything(self) -> list[psutil.Process]:
        return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]

    def wait(self, seconds: float) -> int:
        code = self.process.wait(timeout=seconds)
        self._file.close()
        return code

    def text(self) -> str:
        return self.said.read_text(errors="replace")


def newest(output: Path) -> int:
    folders = checkpoint_folders(output)
    return step_of(folders[-1]) if folders else 0


def kill_once(run: Run, output: Path, way: str, chance: random.Random, already: int) -> tuple[str, int] | None:
    """Wait for a random moment and kill. Returns the victim and the newest step then; None if the run ended first."""
    moment = last_act(run, chance) if way == "last" else during_training(run, output, way, chance, already)
    if moment is None:
        return None
    time.sleep(moment)
    victims = run.loaders() if way == "workers" else run.workers()
    if run.process.poll() is not None or not victims:
        return None
    if way == "workers" or (len(victims) > 1 and chance.random() < 0.5):
        rank = chance.randrange(len(victims))
        victims[rank].kill()
        return ("a worker of a data loader" if way == "workers" else f"rank {rank}"), newest(output)
    for process in run.everything():
        process.kill()
    return "all processes", newest(output)


def during_training(run: Run, output: Path, way: str, chance: random.Random, already: int) -> float | None:
    """Wait for a random step, and half of the time for a checkpoint that is being written. Returns the seconds to wait
    on; None if the run has ended, or nearly: what the last kill left in _saving would be taken for this one's."""
    latest = STEPS - 1
    if already >= latest:
        return None
    step = chance.randint(already + 1, min(already + 3, latest))
    in_saving, pause = way == "async" or chance.random() < 0.5, chance.random()
    while newest(output) < step or (in_saving and not any((output / STAGING).glob("*"))):
        if not still_runs(run):
            return None
        time.sleep(0.001)
    return pause * (0.1 if in_saving else 0.3)


def last_act(run: Run, chance: random.Random) -> float | None:
    """Wait for a random act after the last checkpoint. Returns the seconds to wait on."""
    act, pause = chance.choice(LAST_ACTS), chance.random()
    while f"last act: {act}" not in run.text():
        if not still_runs(run):
            return None
        time.sleep(0.001)
    return pause * {"save": 0.2, "merge": 1.0, "card": 0.01, "summary": 0.001}[act]


def still_runs(run: Run) -> bool:
    return run.process.poll() is None and time.monotonic() < run.began + START_SECONDS


def uninterrupted(topology: str, way: str, folder: Path) -> Path:
    """The folder of the run that nobody kills; made once."""
    changes = WAYS[way][1]
    whole = folder / f"{topology}-whole{'-last' if changes else ''}"
    if not whole.exists():
        peaceful = Run(folder, whole, topology, changes=changes)
        assert peaceful.wait(START_SECONDS) == 0, peaceful.text()[-5000:]
    return whole


def campaign(topology: str, way: str, kills: int, folder: Path, chance: random.Random) -> Result:
    began, result = time.monotonic(), Result(topology, PROCESSES[topology], way)
    whole, broken = uninterrupted(topology, way, folder), folder / f"{topology}-killed"
    ends: list[bool] = []
    losses_equal: list[bool] = []
    while True:
        run = Run(folder, broken, topology, changes=WAYS[way][0])
        before = newest(broken)
        hit = kill_once(run, broken, way, chance, before) if len(result.kills) < kills else None
        inside = hit is not None and any((broken / STAGING).glob("*"))
        killed_at = time.monotonic()
        run.wait(START_SECONDS)
        took = time.monotonic() - killed_at
        finished = "This run has finished" in run.text()  # killed after its summary
        resumed = finished or f"Resuming from {broken / f'checkpoint-{before}'}" in run.text()
        assert resumed or not before or "Resuming" not in run.text(), run.text()[-5000:]
        if result.kills and before:  # 0: the first start of another run
            result.kills[-1].resumed_from = before
        for checkpoint in checkpoint_folders(broken):
            verify(checkpoint)
            result.whole_checkpoints_seen += 1
        if hit is None:
            assert run.process.returncode == 0, run.text()[-5000:]
            assert resumed or not before, run.text()[-5000:]
            ends.append(same_weights(whole, broken) and same_merged(whole, broken))
            losses_equal.append(same_losses(whole, broken))
            if len(result.kills) >= kills:
                break
            shutil.rmtree(broken)
            continue  # it finished between two kills: start another one
        result.kills.append(Kill(*hit, inside, 0, round(took, 1)))
        print(f"{topology} {way}: {result.kills[-1]}", flush=True)
        assert took < END_SECONDS, f"the other ranks outlived the dead one by {took:.0f} s"
    result.equal_weights, result.equal_losses = all(ends), all(losses_equal)
    if way == "last":
        result.finished_run_unchanged = is_left_alone(folder, broken, topology, way)
    shutil.rmtree(broken)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def is_left_alone(folder: Path, output: Path, topology: str, way: str) -> bool:
    """Whether a finished run that is started three times more stays as it is, in names, contents and times."""

    def state() -> dict[str, tuple[bytes, int]]:
        files = [path for path in output.rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = state()
    for _ in range(3):
        run = Run(folder, output, topology, changes=WAYS[way][0])
        if run.wait(START_SECONDS) != 0 or "This run has finished" not in run.text():
            print(run.text()[-5000:], flush=True)
            return False
    after = state()
    differ = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    if differ:
        print(f"Changed by a start of a finished run: {differ}", flush=True)
    return not differ


def same_merged(one: Path, other: Path) -> bool:
    """Whether both have merged their adapters to the same weights, or neither has; nothing half merged is left."""
    if any(other.glob("merged.partial*")):
        return False
    return not (one / "merged").exists() or same_weights(one / "merged", other / "merged")


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = ({}, {})
    for folder, found in ((one, ours), (other, theirs)):
        for file in folder.glob("*.safetensors"):
            found |= load_file(file)
    return bool(ours) and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_losses(one: Path, other: Path) -> bool:
    ours, theirs = losses(one), losses(other)
    for event, twin in zip(ours, theirs, strict=False):
        if event != twin:
            print(f"{one.name}: {event}\n{other.name}: {twin}", flush=True)
    return bool(ours) and ours == theirs


def losses(output: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in event.items() if not any(word in name for word in OF_THE_MACHINE)}
        for event in events
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=42, help="of all topologies together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--topologies", default="plain,lora,zero2,zero3,fsdp2", help="zero2:8, zero2/async:4; see above"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chance, topologies = random.Random(options.seed), options.topologies.split(",")
    results = []
    with tempfile.TemporaryDirectory(prefix="kill_campaign") as temporary:
        folder = Path(temporary)
        make_inputs(folder)
        for number, entry in enumerate(topologies):
            name, _, asked = entry.partition(":")
            topology, _, way = name.partition("/")
            share = options.kills // len(topologies) + (number < options.kills % len(topologies))
            results.append(campaign(topology, way, int(asked or share), folder, chance))
            write(options.out, options.seed, results)
    summary = write(options.out, options.seed, results)
    print(json.dumps({name: value for name, value in summary.items() if name != "topologies"}))
    return 0 if all(summary[name] for name in ("equal_weights", "equal_losses", "finished_runs_unchanged")) else 1


def write(path: Path | None, seed: int, results: list[Result]) -> dict[str, Any]:
    """The figures so far, also into the file `path`."""
    kills = [kill for result in results for kill in result.kills]
    summary = {
        "seed": seed,
        "kills": len(kills),
        "inside_saving": sum(kill.inside_saving for kill in kills),
        **{f"kills_{way or 'anytime'}": sum(len(r.kills) for r in results if r.way == way) for way in WAYS},
        "of_one_rank": sum(kill.victim != "all processes" for kill in kills),
        "slowest_end_after_a_dead_rank": max((kill.seconds_to_end for kill in kills), default=0.0),
        "equal_weights": all(result.equal_weights for result in results),
        "equal_losses": all(result.equal_losses for result in results),
        "finished_runs_unchanged": all(result.finished_run_unchanged is not False for result in results),
        "seconds": round(sum(result.seconds for result in results), 1),
        "topologies": [asdict(result) for result in results],
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


if __name__ == "__main__":
    sys.exit(main())
