#!/bin/sh
# vLLM under SmartSpec. In another terminal, where the daemon is installed: smartspec run
# Usage: serve.sh MODEL [more of vllm serve's options]
#
# The table names every length from 5 to 0, which is what vLLM's newer model runner captures full CUDA
# graphs for; lengths that it does not name run in pieces. SmartSpec puts its own lengths in the table's
# place. Without a daemon the table itself is in force: so it drafts 5 up to a batch of 251, and the
# other lengths stand at sizes that hardly ever occur (of --max-num-seqs 256).
set -eu
model=$1
shift
exec vllm serve "$model" \
    --max-num-seqs 256 \
    --speculative-config '{
        "method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 5,
        "num_speculative_tokens_per_batch_size":
            [[1, 251, 5], [252, 252, 4], [253, 253, 3], [254, 254, 2], [255, 255, 1], [256, 256, 0]]
    }' \
    --scheduler-cls smartspec.engine_adapter.vllm.SmartSpecScheduler "$@"
