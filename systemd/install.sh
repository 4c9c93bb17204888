#!/bin/sh
# Install the units, the user, the group and a file of settings; an existing file of settings stays.
#
# DESTDIR (default: none) is put before every path. LAYOUT is debian or rhel (default: what this host
# looks like): where the file of secret variables lies, /etc/default or /etc/sysconfig. BINDIR
# (default /usr/bin) holds the command smartspec.
set -eu
cd "$(dirname "$0")"
DESTDIR=${DESTDIR:-}
BINDIR=${BINDIR:-/usr/bin}
if [ -z "${LAYOUT:-}" ]; then
    if [ -e /etc/debian_version ]; then LAYOUT=debian; else LAYOUT=rhel; fi
fi
case $LAYOUT in
    debian) variables=/etc/default ;;
    rhel) variables=/etc/sysconfig ;;
    *) echo "install.sh: LAYOUT: got '$LAYOUT', expected debian or rhel" >&2; exit 2 ;;
esac
units=$DESTDIR/usr/lib/systemd/system
install -d "$units" "$DESTDIR/usr/lib/sysusers.d" "$DESTDIR/usr/lib/tmpfiles.d" "$DESTDIR/etc/smartspec" "$DESTDIR$variables"
for unit in smartspec.service smartspec@.service smartspec-telemetry.service \
    smartspec-worker.service; do
    sed -e "s|/usr/bin/smartspec|$BINDIR/smartspec|" -e "s|/etc/default|$variables|" "$unit" \
        > "$units/$unit"
    chmod 0644 "$units/$unit"
done
install -m 0644 sysusers.conf "$DESTDIR/usr/lib/sysusers.d/smartspec.conf"
install -m 0644 tmpfiles.conf "$DESTDIR/usr/lib/tmpfiles.d/smartspec.conf"
settings=$DESTDIR/etc/smartspec/smartspec.toml
if [ ! -e "$settings" ]; then
    echo "# All keys: smartspec config defaults" > "$settings"
    chmod 0644 "$settings"
fi
secrets=$DESTDIR$variables/smartspec
if [ ! -e "$secrets" ]; then
    (umask 077; echo "# SMARTSPEC_REDIS_URL=rediss://user:password@host:6379/0" > "$secrets")
fi
if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
    systemd-sysusers smartspec.conf
    systemd-tmpfiles --create smartspec.conf
    systemctl daemon-reload
fi
echo "installed; next: systemctl enable --now smartspec"
