"""The loss of padded rows (padding_free=false) through the loss head, against full logits: peak memory and time.

    python benchmarks/padded_head.py              (CPU, about 2 minutes; writes results/padded_head.json)

Forward and backward of one micro-batch of 2 pairs of 60 + 200 and 150 tokens, each measurement in a process of its own,
the two alternating; medians of three rounds. Time is that of the processor, which other load hardly changes.
SmolLM2-135M's widths and vocabulary with few layers, random weights: what differs is the head alone.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench import HERE, SMOLLM2, commit, processor
from transformers import LlamaConfig, LlamaForCausalLM
from worker import rows_of

from orpo_dist.loss import Objective
from orpo_dist.model.forward import PairForward
from orpo_dist.model.packed.asked_layout import LayoutOptions
from orpo_dist.model.packed.choose_layout import LayoutChoice

WAYS = ("full logits", "loss head")
LENGTHS = [[60, 200, 150]] * 2


def resident_gib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def measure(way: str, layers: int, frozen_head: bool) -> dict[str, float]:
    torch.manual_seed(0)
    shape = {**SMOLLM2, "num_hidden_layers": layers, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_output_embeddings().requires_grad_(not frozen_head)
    layout = LayoutChoice(
        LayoutOptions(
            objective=Objective(),
            padding_free=False,
            prefix_sharing=False,
            verify_layout=False,
            loss_chunk_size=None,
            nll_scope="sequence",
            pad_token_id=0,
            max_length=None,
            compute_dtype=torch.float32,
        )
    )
    layout.choose(model, router_aux_loss_coef=0.0)
    layout.verify(model)
    if way == "full logits":
        layout.scores_by_head = lambda padded: False  # type: ignore[method-assign]
    rows = [{**row, "weight": 1.0, "index": i} for i, row in enumerate(rows_of(LENGTHS, SMOLLM2["vocab_size"]))]
    forward, seconds = PairForward(layout, Objective()), []
    before = resident_gib()
    for _ in range(2):
        batch = layout.collator(rows)
        batch["orpo_layout"].tokens, batch["orpo_layout"].pairs = batch["orpo_layout"].counts().float().unbind()
        model.zero_grad(set_to_none=True)
        began = time.process_time()
        loss = forward(model, batch, torch.device("cpu")).loss
        assert loss is not None
        loss.backward()
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"gib": peak - before, "seconds": min(seconds), "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--frozen_head", action="store_true", help="as with LoRA")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "padded_head.json")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.layers, args.frozen_head)))
        return
    found = {}
    for frozen in (False, True):
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--measure", way, "--layers", str(args.layers)]
                command += ["--frozen_head"] if frozen else []
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds[way].append(json.loads(done.stdout.strip().splitlines()[-1]))
        losses = [each["loss"] for way in WAYS for each in rounds[way]]
        assert max(losses) - min(losses) < 1e-4, losses
        found["frozen head" if frozen else "trained head"] = {
            way: {key: statistics.median(each[key] for each in rounds[way]) for key in ("gib", "seconds")}
            for way in WAYS
        }
    facts = {"commit": commit(), "processor": processor(), "threads": torch.get_num_threads(), "layers": args.layers}
    args.out.write_text(json.dumps({**facts, "lengths": LENGTHS, "medians": found}, indent=1) + "\n")
    for head, ways in found.items():
        for way, medians in ways.items():
            print(f"{head}, {way}: {medians['gib']:.2f} GiB beyond the model, {medians['seconds']:.2f} s of processor")


if __name__ == "__main__":
    main()
