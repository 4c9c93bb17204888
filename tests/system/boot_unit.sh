#!/bin/sh
# Boot this host's own root, copied on write, with systemd as PID 1, run a script in it, and show what
# it printed. Arguments: a folder for what is needed, the script, the interpreter to run smartspec with.
# Run it in a mount namespace of its own: nothing that it mounts or writes outlives it.
set -eu
base=$1 script=$2 python=$3
source=$(cd "$(dirname "$0")/../.." && pwd)
mount --make-rprivate /
mkdir -p "$base/layer" "$base/root"
mount -t tmpfs layer "$base/layer"
mkdir "$base/layer/upper" "$base/layer/work"
mount -t overlay -o "lowerdir=/,upperdir=$base/layer/upper,workdir=$base/layer/work" root "$base/root"
root=$base/root
rm -f "$root"/etc/systemd/system/*.wants/* "$root/etc/machine-id"
: > "$root/etc/machine-id"
mkdir -p "$root/opt/boot"
cp "$script" "$root/opt/boot/script"
DESTDIR=$root LAYOUT=debian BINDIR=/usr/bin sh "$source/systemd/install.sh"
# The interpreter may lie in a home, which services cannot see: it is shown elsewhere.
prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir "$root/opt/python" "$root/opt/packages"
mount --bind "$prefix" "$root/opt/python"
mount --bind "$packages" "$root/opt/packages"
# So may the sources, in a home or below /tmp, of which services see one of their own.
mkdir -p "$root/opt/source/smartspec"
mount --bind "$source" "$root/opt/source/smartspec"
name=python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
mkdir -p "$root/etc/systemd/system.conf.d"
printf '[Manager]\nDefaultEnvironment=LD_LIBRARY_PATH=/opt/python/lib\n' \
    > "$root/etc/systemd/system.conf.d/python.conf"
mkdir -p "$root/opt/venv/bin" "$root/opt/venv/lib/$name/site-packages"
ln -s "/opt/python/bin/$name" "$root/opt/venv/bin/python"
echo "home = /opt/python/bin" > "$root/opt/venv/pyvenv.cfg"
printf '/opt/source\nimport site; site.addsitedir("/opt/packages")\n' \
    > "$root/opt/venv/lib/$name/site-packages/smartspec.pth"
printf '#!/opt/venv/bin/python\nfrom smartspec.daemon.cli import main\nmain()\n' > "$root/usr/bin/smartspec"
chmod 0755 "$root/usr/bin/smartspec"
cat > "$root/etc/systemd/system/boot-script.service" <<'UNIT'
[Unit]
DefaultDependencies=no
After=basic.target systemd-sysusers.service
Requires=basic.target
[Service]
Type=oneshot
ExecStart=/bin/sh /opt/boot/script
StandardOutput=append:/opt/boot/out
StandardError=inherit
ExecStopPost=/bin/systemctl --force --force poweroff
UNIT
timeout 120 systemd-nspawn --directory="$root" --register=no --keep-unit --boot --console=pipe \
    --capability=all -- systemd.unit=boot-script.service > "$base/console" 2>&1 || true
cat "$root/opt/boot/out"
