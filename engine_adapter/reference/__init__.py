"""The reference decode worker: continuous batching with speculative decoding, small enough to read.

Reading order: `worker` (a step on one screen), `sequence`, `scheduler`, `model_runner` with
`attention` and `kv_cache` (the ragged pass), `sampling` (why output never depends on drafts),
`proposer` with `prompt_lookup` and `draft_model`; then `line_server`, `service` and `model`, which
make it a process.
"""
