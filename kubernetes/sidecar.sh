#!/bin/sh
# Keep a daemon running as a sidecar: `sidecar.sh [options of smartspec run]`.
#
# A container that is down makes its whole pod unready, and takes the engine out of its service. So this
# one stays up whatever the daemon does: one that ends is started again here, at longer and longer
# intervals while it cannot start, and one that is stuck ends by itself (--exit-when-stuck).
set -u
directory=${SMARTSPEC_RUNTIME_DIR:?the directory of the sockets, in a volume shared with the engine}
first_s=${SMARTSPEC_RESTART_S:-1}  # whole seconds, doubled up to
longest_s=30
stable_s=60  # having lived this long, the next restart is a quick one again
umask 0077
child=
stop() {
    trap '' TERM INT
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; wait "$child"; fi
    exit 0
}
trap stop TERM INT
# Volumes may be written by everyone in the pod, which the daemon refuses: it gets a directory of its
# own there. The engine enters by its group (fsGroup, which the set-group-ID bit of volumes hands on).
daemon() {
    mkdir -p "$directory" && chmod u=rwx,g=rx,o= "$directory" || exit 1
    exec smartspec run --exit-when-stuck 60 "$@"
}
delay_s=$first_s
while :; do
    began_s=$(date +%s)
    daemon "$@" &
    child=$!
    wait "$child"
    code=$?
    [ $(($(date +%s) - began_s)) -ge "$stable_s" ] && delay_s=$first_s
    echo "smartspec run ended with code $code: started again in $delay_s s" >&2
    sleep "$delay_s" &
    child=$!
    wait "$child"
    delay_s=$((delay_s * 2 < longest_s ? delay_s * 2 : longest_s))
done
