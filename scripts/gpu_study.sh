#!/bin/sh
# The four-task sequence on one GPU, 8 processes side by side: 5 to 8 GiB each.
#   sh scripts/gpu_study.sh OUT DATA [JOBS] [more options of retain study]
# With NVIDIA's MPS started (nvidia-cuda-mps-control -d) small models' kernels run at once: a job a core.
# One JSON a run, written as it comes; what is not done when it is stopped goes on from there.
set -eu
out=$1 data=$2 jobs=${3:-8}
[ $# -gt 2 ] && shift 3 || shift 2
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec python3 -m retain study "${STUDY:-$(dirname "$0")/../benchmarks/studies/four-task-gpu.yaml}" \
    --out "$out" --data-dir "$data" --jobs "$jobs" --threads 1 "$@"
