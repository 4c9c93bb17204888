#!/bin/sh
# Keep a daemon running as a sidecar: `sidecar.sh [options of smartspec run]`.
#
# A container that is down makes its whole pod unready, and takes the engine out of its service. So a
# daemon that dies is started again here, and not by the kubelet.
set -u
directory=${SMARTSPEC_RUNTIME_DIR:?the directory of the sockets, in a volume shared with the engine}
# Volumes may be written by everyone in the pod, which the daemon refuses: it gets a directory of its
# own there. The engine enters by its group (fsGroup, which the set-group-ID bit of volumes hands on).
mkdir -p "$directory" && chmod u=rwx,g=rx,o= "$directory" || exit 2
umask 0077
daemon=
stop() {
    trap '' TERM INT
    if [ -n "$daemon" ]; then kill -TERM "$daemon" 2>/dev/null; wait "$daemon"; fi
    exit 0
}
trap stop TERM INT
while :; do
    smartspec run "$@" &
    daemon=$!
    wait "$daemon"
    code=$?
    daemon=
    [ "$code" = 0 ] && exit 0
    echo "smartspec run ended with code $code: started again in ${SMARTSPEC_RESTART_S:=1} s" >&2
    sleep "$SMARTSPEC_RESTART_S" &
    wait $!
done
