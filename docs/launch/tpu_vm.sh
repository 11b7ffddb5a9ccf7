#!/bin/bash
# Trains on a Cloud TPU slice, from a machine with gcloud:
#     REPOSITORY=https://GIT_HOST/ldm_jax SHARE=10.0.0.2:/runs docs/launch/tpu_vm.sh
# SHARE is an NFS folder, such as a Filestore instance, that all hosts see. A preempted slice is made again, and the
# training goes on from its last checkpoint.
set -euo pipefail
NAME=${NAME:-ldm} ZONE=${ZONE:-us-central2-b} TYPE=${TYPE:-v4-32} REPOSITORY=${REPOSITORY:?the git address of ldm_jax}
SHARE=${SHARE:?the NFS folder of the runs}
TPU=(gcloud compute tpus tpu-vm)
SETUP="sudo apt-get -qq update && sudo apt-get -qq install nfs-common python3.11-venv git &&
    sudo mkdir -p /mnt/runs && (mountpoint -q /mnt/runs || sudo mount -t nfs $SHARE /mnt/runs) &&
    (test -d ldm_jax || git clone -q $REPOSITORY ldm_jax) && cd ldm_jax &&
    python3.11 -m venv .venv && .venv/bin/pip install -q -r requirements.txt 'jax[tpu]'"
TRAIN="cd ldm_jax && .venv/bin/python -m ldm_jax.train --config=configs/fashion_mnist_best.py \
    --workdir=/mnt/runs/best --distributed"

on_all_hosts() {
    "${TPU[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

ready() {
    [ "$("${TPU[@]}" describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null)" = READY ]
}

for attempt in {1..100}; do
    if ! ready; then
        "${TPU[@]}" delete "$NAME" --zone="$ZONE" --quiet 2>/dev/null || true
        "${TPU[@]}" create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version=tpu-ubuntu2204-base --spot || {
            sleep 60 # there is no capacity
            continue
        }
    fi
    on_all_hosts "$SETUP" || { # a new machine may still be installing its own updates
        sleep 60
        continue
    }
    on_all_hosts "$TRAIN" && exit 0
    status=$?
    if [ "$status" -ne 143 ] && ready; then # 143: stopped and saved
        echo "The training failed, and the slice is still there: see above." >&2 # wrong input, a loss that is not finite
        exit 1
    fi
    echo "Preempted; start ${attempt} is over."
done
exit 1
