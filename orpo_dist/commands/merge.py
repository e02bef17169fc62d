"""`orpo-dist merge RUN`: merge the adapter of a run into its base model."""

import argparse

from orpo_dist.merge import merge_run


def main(argv: list[str]) -> int:
    """`orpo-dist merge RUN [--output DIR] [--dtype DTYPE] [--no-verify]`."""
    parser = argparse.ArgumentParser(
        prog="orpo-dist merge",
        allow_abbrev=False,
        description="Merge the adapter of a run into its base model and verify the result.",
    )
    parser.add_argument("run", help="folder of a run (or any folder with adapter_config.json)")
    parser.add_argument("--output", help="where to write the model (default: RUN/merged)")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: as the base is stored)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the base's repository ships")
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits; half the memory")
    options = parser.parse_args(argv)
    report = merge_run(
        options.run,
        options.output,
        options.dtype,
        verify=not options.no_verify,
        trust_remote_code=options.trust_remote_code,
    )
    print("\n".join(report.lines()))
    return 0
