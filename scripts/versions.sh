#!/usr/bin/env bash
# Builds environments of other versions and runs the core tests in each; see docs/versions.md.
#
#   scripts/versions.sh                      all of them, in build/versions
#   scripts/versions.sh oldest trainers      some of them
#   PYTHON=python3.11 WHERE=/tmp/v TORCH=torch==2.13.0 scripts/versions.sh
#
# It prints one line an environment: its versions, what the tests said, and what installing the
# wheel would change there. Each environment takes 1.5 GB and some minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}
WHERE=$(realpath -m "${WHERE:-build/versions}")
TORCH=${TORCH:-torch==2.13.0}  # the index may give a build for GPUs: name one for CPUs if so
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The core tests: the two lines with both trainers, the plain loop, fitting, saving and loading,
# filter, force, budget, every door to the same adapter, and that the core needs the core alone.
CORE=(
  tests/training/test_callback.py
  tests/training/test_trl.py
  tests/training/test_filter.py
  tests/training/test_parity.py
  tests/retention/test_retention.py
  tests/retention/test_budget.py
  tests/curvature/test_artifact.py
  tests/test_extras.py::test_the_core_needs_the_core_alone
)

TESTS="pytest hypothesis"
declare -A PACKAGES=(
  [oldest]="transformers==4.57.1 peft==0.17.0 trl==0.24.0 datasets==4.0.0 accelerate==1.8.0
    numpy==1.26.4 safetensors==0.4.5 tqdm==4.66.3 pyarrow==15.0.0 pydantic==2.7.0 rich==13.0.0
    typer==0.15.4 scipy==1.12.0 scikit-learn==1.4.0 pyyaml==6.0.1"
  # The upper ends of LLaMA-Factory 0.9.5, which lie inside the ranges of ms-swift 4.6.0.
  [trainers]="transformers==5.6.0 peft==0.18.1 trl==0.24.0 datasets==4.0.0 accelerate==1.11.0
    pydantic rich typer scipy scikit-learn pyyaml"
  # The pins of axolotl 0.19.0, which nothing else satisfies.
  [axolotl]="transformers==5.16.1 peft==0.20.0 trl==1.9.0 datasets==4.8.4 accelerate==1.13.0
    huggingface_hub==1.17.0 tokenizers==0.23.1 pydantic==2.12.5 pyyaml==6.0.3 typer==0.25.1
    numpy>=2.1,<3 rich scipy scikit-learn"
  [newest]="transformers peft trl datasets accelerate pydantic rich typer scipy scikit-learn pyyaml"
)
# Trainers that are put beside, so that the dry run sees what they ask for.
declare -A BESIDE=([trainers]="llamafactory==0.9.5 ms-swift==4.6.0" [axolotl]="axolotl==0.19.0")

mkdir -p "$WHERE"
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$WHERE" . || exit 1
wheel=$(ls -t "$WHERE"/retain_lora-*.whl | head -1)
failed=0
for name in "${@:-oldest trainers axolotl newest}"; do
  for env in $name; do
    [ -n "${PACKAGES[$env]:-}" ] || { echo "no such environment: $env" >&2; exit 2; }
    bin=$WHERE/$env/bin
    if [ ! -e "$WHERE/$env/.ready" ]; then
      "$PYTHON" -m venv "$WHERE/$env" &&
        # shellcheck disable=SC2086
        "$bin/python" -m pip install --quiet "$TORCH" $TESTS ${PACKAGES[$env]} &&
        { [ -z "${BESIDE[$env]:-}" ] ||
          "$bin/python" -m pip install --quiet --no-deps ${BESIDE[$env]}; } &&
        touch "$WHERE/$env/.ready" || { echo "$env: cannot be installed"; failed=1; continue; }
    fi
    # Of the two lines alone, and with TRL: nothing that is there may change.
    changes=$("$bin/python" -m pip install --dry-run "$wheel[trl]" 2>&1 | grep -E "^Would|^ERROR")
    said=$(PYTHONPATH=src "$bin/python" -m pytest -q -p no:cacheprovider -W ignore \
      "${CORE[@]}" 2>&1 | tee "$WHERE/$env.log" | tail -1)
    case $said in *failed* | *error* | "") failed=1 ;; esac
    versions=$("$bin/python" -m pip list --format freeze 2>/dev/null |
      grep -E "^(torch|transformers|peft|trl|datasets|accelerate|numpy)==" | tr '\n' ' ')
    echo "$env | $versions| $said | $changes"
  done
done
exit $failed
