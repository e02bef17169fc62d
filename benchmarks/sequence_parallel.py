"""One long pair over several processes: peak memory, and a limit under which one process dies.

    python benchmarks/sequence_parallel.py   (a row of 16,384 tokens)
    python benchmarks/sequence_parallel.py --tokens 65536

A tiny Llama (2 layers of width 128, 4 heads) in float32 on the CPU with gradient checkpointing, one forward and one
backward of one pair: half of the tokens are the prompt's, a quarter each completion's. Memory is the peak of a process
above what it holds before the step. Then both run again under a limit half way between (RLIMIT_DATA).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))


def status(name: str) -> float:
    """MiB of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


def step(tokens: int, limit: float | None) -> None:
    """One rank's step; rank 0 prints the largest peak and the loss."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from orpo_dist.loss import Objective
    from orpo_dist.model.head.install import install_head
    from orpo_dist.model.packed.switch import use_packed_layout
    from orpo_dist.packing.collate import PackedCollator
    from orpo_dist.packing.exchange import sequence_group
    from orpo_dist.packing.split import SequencePlace

    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, max_position_embeddings=tokens, **shape))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    install_head(model, Objective())
    use_packed_layout(model, max_length=None)
    ids = torch.randint(3, 1000, (tokens,)).split((tokens // 2, tokens // 4, tokens // 4))
    prompt, chosen, rejected = (part.tolist() for part in ids)
    row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "weight": 1.0, "index": 0}
    place = SequencePlace(ranks, dist.get_rank()) if ranks > 1 else None
    batch = PackedCollator(True, "sequence", place)([row])
    layout = batch["orpo_layout"]
    layout.tokens, layout.pairs = layout.counts().float().unbind()
    if layout.split is not None:
        layout.split.group = sequence_group(ranks)
    before = status("VmRSS")
    if limit is not None:
        bound = int((status("VmData") + limit) * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    loss = model(**batch, use_cache=False)
    loss.backward()
    figures = torch.tensor([status("VmHWM") - before])
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    total = loss.detach().clone()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(json.dumps({"peak": figures.item(), "loss": total.item()}), flush=True)
    dist.destroy_process_group()


def run(tokens: int, ranks: int, limit: float | None = None) -> dict[str, float] | None:
    """Peak in MiB and loss; None if a process died."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launch, __file__, "--step", str(tokens), str(limit or 0)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print("\n".join(line for line in done.stderr.splitlines() if "Error" in line)[-400:], file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step(int(options.step[0]), float(options.step[1]) or None)
        return
    print("| processes | limit, MiB | peak, MiB | loss |\n|---|---|---|---|", flush=True)
    peaks = []
    for ranks in (1, options.ranks):
        found = run(options.tokens, ranks)
        assert found is not None, "without a limit it must not die"
        peaks.append(found["peak"])
        print(f"| {ranks} | none | {found['peak']:.0f} | {found['loss']:.6f} |", flush=True)
    limit = sum(peaks) / 2
    for ranks in (1, options.ranks):
        found = run(options.tokens, ranks, limit)
        told = "died | |" if found is None else f"{found['peak']:.0f} | {found['loss']:.6f} |"
        print(f"| {ranks} | {limit:.0f} | {told}", flush=True)


if __name__ == "__main__":
    main()
