"""Run by test_once.py under torchrun: `prepare_pairs` on two ranks. Each rank writes what it saw to OUT/RANK.json.

torchrun --nproc_per_node 2 -m tests.distributed.prepare_worker TOKENIZER OUT
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch import distributed
from transformers import AutoTokenizer

from orpo_dist.data import prepare
from orpo_dist.data.prepare import prepare_pairs
from orpo_dist.distributed import once
from orpo_dist.options.data import PrepareOptions

PAIRS = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
COLLECTIVE_TIMEOUT = 2  # seconds; building takes longer, so waiting in a collective would fail


def outcome(run: Callable[[], object]) -> str:
    try:
        return f"ok: {run()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(tokenizer_folder: str, out: str) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT))
    rank = distributed.get_rank()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    options = PrepareOptions()
    seen: dict[str, object] = {}

    built: list[str] = []
    real_build = prepare._build

    def slow_build(folder: Path, *arguments: object) -> None:
        time.sleep(COLLECTIVE_TIMEOUT + 1)
        built.append(folder.parent.name)
        real_build(folder, *arguments)

    prepare._build = slow_build
    dropped = Path(out, "dropped_rows.jsonl")
    rows = [*PAIRS, {"prompt": "p", "chosen": "", "rejected": "b"}]
    train = prepare_pairs(rows, tokenizer, PrepareOptions(max_bad_rows=1), dropped_rows_path=dropped)
    seen["rows"] = [train.dataset[i] for i in range(len(train.dataset))]
    seen["dropped"] = [row.describe() for row in train.dropped]
    seen["built"] = len(built)
    seen["again"] = len(prepare_pairs(rows, tokenizer, PrepareOptions(max_bad_rows=1)).dataset)
    seen["built_again"] = len(built)
    distributed.barrier()  # the group still works

    seen["too many bad"] = outcome(lambda: prepare_pairs(rows, tokenizer, PrepareOptions(max_bad_rows=0)))
    prepare._build = real_build
    seen["missing column"] = outcome(lambda: prepare_pairs([{"text": "x"}], tokenizer, options, name="eval"))
    broken = [*PAIRS, {"prompt": None, "chosen": "a", "rejected": "b"}]
    seen["bad row"] = outcome(lambda: prepare_pairs(broken, tokenizer, PrepareOptions(on_bad_row="error")))

    def crash(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    prepare._build = crash
    start = time.monotonic()
    seen["crash"] = outcome(lambda: prepare_pairs(PAIRS[:3], tokenizer, options))
    seen["crash seconds"] = time.monotonic() - start

    # Two nodes with a cache each: the first rank of the second node has to build too.
    os.environ |= {"ORPO_DIST_CACHE": str(Path(out, f"node{rank}")), "GROUP_RANK": str(rank), "LOCAL_RANK": "0"}
    once.VISIBLE_SECONDS = 0.5
    real_exists = Path.exists
    if rank == 1:  # the other node's disk
        Path.exists = lambda path: "node0" not in path.parts and real_exists(path)
    prepare._build = real_build
    seen["own cache"] = outcome(lambda: len(prepare_pairs(PAIRS, tokenizer, options).dataset))
    seen["own folders"] = sorted(path.name.split("-")[0] for path in Path(out, f"node{rank}").iterdir())

    Path(out, f"{rank}.json").write_text(json.dumps(seen))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
