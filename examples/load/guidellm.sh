#!/usr/bin/env bash
# Load from guidellm (https://github.com/vllm-project/guidellm), in an environment of its own.
#
#   examples/load/guidellm.sh URL MODEL_DIR [NUM_REQUESTS] [REPORT.json]
#
# MODEL_DIR holds the tokenizer that the prompts are made with: the served model's. On a machine
# without a GPU, point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU wheels first.
set -euo pipefail

url=$1
model_dir=$2
num_requests=${3:-200}
report=${4:-build/load/guidellm.json}
environment=${GUIDELLM_ENV:-build/load/guidellm}

if [ ! -x "$environment/bin/guidellm" ]; then
    python3 -m venv "$environment"
    # First, and in this version: what guidellm would choose for itself is built for CUDA.
    "$environment/bin/pip" install torch==2.13.0
    "$environment/bin/pip" install guidellm==0.8.1
fi

mkdir -p "$(dirname "$report")"
HF_HUB_OFFLINE=1 "$environment/bin/guidellm" run \
    --backend "kind=openai_http,target=$url,request_format=/v1/completions" \
    --profile kind=concurrent,streams=16 \
    --constraint "kind=max_requests,count=$num_requests" \
    --data kind=synthetic_text,prompt_tokens=64,output_tokens=16 \
    --tokenizer "kind=huggingface_auto,model=$model_dir" \
    --output kind=console --output "kind=json,path=$report" \
    --disable-console-interactive
