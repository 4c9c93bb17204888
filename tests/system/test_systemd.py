"""The units: what systemd says of them, how they are installed, and their life under PID 1."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNITS = ("smartspec.service", "smartspec@.service", "smartspec-telemetry.service")
WORKER = "smartspec-worker.service"  #: runs torch, and reaches the network for models
MAX_EXPOSURE = 1.5

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (systemd)"
)


def installed(folder: Path, layout: str = "debian") -> Path:
    """Install into ``folder`` as a package would; returns where the units are."""
    subprocess.run(
        ["sh", str(SYSTEMD / "install.sh")],
        env={**os.environ, "DESTDIR": str(folder), "LAYOUT": layout, "BINDIR": "/usr/bin"},
        check=True,
        capture_output=True,
    )
    return folder / "usr/lib/systemd/system"


def lines_of(unit: str) -> set[str]:
    return set((SYSTEMD / unit).read_text("utf-8").split("# Sandbox.")[1].splitlines())


@needs_analyze
def test_units_are_verified_without_a_complaint(tmp_path: Path) -> None:
    units = installed(tmp_path)
    for unit in (*UNITS, WORKER):
        text = (units / unit).read_text("utf-8").replace("/usr/bin/smartspec", "/bin/true")
        (tmp_path / unit).write_text(text, "utf-8")
    names = [unit.replace("@", "@gpus") for unit in (*UNITS, WORKER)]
    paths = [str(tmp_path / name) for name in names]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if "smartspec" in line]
    assert (done.returncode, ours) == (0, [])


@needs_analyze
@pytest.mark.parametrize("unit", UNITS)
def test_exposure_is_small(unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(SYSTEMD / unit)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) <= MAX_EXPOSURE


def test_all_units_have_one_sandbox() -> None:
    daemon, template, telemetry = (
        {line for line in lines_of(unit) if not line.startswith("WantedBy=")} for unit in UNITS
    )
    assert daemon == template == telemetry


@pytest.mark.parametrize(("layout", "secrets"), [("debian", "default"), ("rhel", "sysconfig")])
def test_install_keeps_to_the_layout_and_to_what_is_there(
    tmp_path: Path, layout: str, secrets: str
) -> None:
    units = installed(tmp_path, layout)
    assert sorted(p.name for p in units.iterdir()) == sorted((*UNITS, WORKER))
    text = (units / "smartspec.service").read_text("utf-8")
    assert f"EnvironmentFile=-/etc/{secrets}/smartspec" in text
    file = tmp_path / "etc" / secrets / "smartspec"
    assert file.stat().st_mode & 0o777 == 0o600
    settings = tmp_path / "etc/smartspec/smartspec.toml"
    settings.write_text("mode = 'observe'\n", "utf-8")
    installed(tmp_path, layout)
    assert settings.read_text("utf-8") == "mode = 'observe'\n"


def test_daemon_dies_before_an_engine_when_memory_is_short() -> None:
    scores = []
    for unit in UNITS:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read(SYSTEMD / unit, "utf-8")
        scores.append(int(parser["Service"]["OOMScoreAdjust"]))
    assert all(score > 0 for score in scores)
    assert scores[2] > scores[0]


# -- as PID 1 runs them -------------------------------------------------------------------------

LIFE = """
say() { echo "== $*"; }
mkdir -p /etc/systemd/system/smartspec.service.d
printf '[Service]\\nWatchdogSec=1\\n' > /etc/systemd/system/smartspec.service.d/test.conf
systemctl daemon-reload
systemctl start smartspec; say start $?
systemctl show -p StatusText -p Group smartspec
stat -c '%n %a %U %G' /run/smartspec /run/smartspec/engines.sock /var/lib/smartspec/
pid=$(systemctl show -P MainPID smartspec)
say oom $(cat /proc/$pid/oom_score_adj)
for i in $(seq 100); do [ -S /run/smartspec/valkey.sock ] && break; sleep 0.1; done
say valkey $?
# An engine's container, which was there before and sees the directory as a mount.
mkdir /mnt/engine
unshare --mount sh -c 'mount --bind /run/smartspec /mnt/engine; touch /run/bound
  until [ -e /run/look ]; do sleep 0.1; done; ss=/mnt/engine/engines.sock
  connect="import socket; socket.socket(socket.AF_UNIX).connect(\\"$ss\\")"
  /opt/venv/bin/python -c "$connect" && touch /run/seen; touch /run/looked' &
until [ -e /run/bound ]; do sleep 0.1; done
printf '[log]\\nmode = "observe"\\n' > /etc/smartspec/smartspec.toml
systemctl reload smartspec; say bad reload $? $(systemctl is-active smartspec)
printf '[control]\\nttl_s = 3\\n' > /etc/smartspec/smartspec.toml
systemctl reload smartspec; say reload $?
sleep 1
kill -STOP $pid
for i in $(seq 100); do
  new=$(systemctl show -P MainPID smartspec)
  [ "$new" != "$pid" ] && [ "$new" != 0 ] && break; sleep 0.1
done
say restarts $(systemctl show -P NRestarts smartspec)
for i in $(seq 50); do [ "$(systemctl is-active smartspec)" = active ] && break; sleep 0.1; done
say active $(systemctl is-active smartspec)
systemctl stop smartspec; say stop $?
systemctl show -P Result smartspec
ls -d /run/smartspec
systemctl start smartspec; touch /run/look
until [ -e /run/looked ]; do sleep 0.1; done; ls /run/seen
systemctl stop smartspec
sed -i '1i [telemetry]\\nenabled = false' /etc/smartspec/smartspec.toml
systemctl start smartspec smartspec-telemetry; say both $?
systemctl is-active smartspec-telemetry
systemctl stop smartspec-telemetry; ls /run/smartspec/engines.sock
cp /etc/smartspec/smartspec.toml /etc/smartspec/gpus.toml
systemctl start smartspec@gpus; say template $?
stat -c '%n %a %U %G' /run/smartspec-gpus/engines.sock
systemctl stop smartspec smartspec@gpus
printf 'endpoint = "tcp://127.0.0.1:PORT"\\ninsecure = true\\n' > /etc/smartspec/gpus.toml
/opt/venv/bin/python -c 'import pathlib, socket, time
taken = socket.socket(); taken.bind(("127.0.0.1", PORT)); taken.listen()
pathlib.Path("/run/taken").touch()
while not pathlib.Path("/run/free").exists(): time.sleep(0.1)' &
until [ -e /run/taken ]; do sleep 0.1; done
systemctl start smartspec@gpus; say taken $?; touch /run/free
for i in $(seq 50); do systemctl -q is-active smartspec@gpus && break; sleep 0.3; done
say tcp $(systemctl is-active smartspec@gpus)
systemctl stop smartspec@gpus
life=smartspec.daemon.process.service
say fields $(journalctl -u smartspec LOGGER=$life -o cat | grep -c SIGHUP)
journalctl -u smartspec -u smartspec-telemetry -u smartspec@gpus --no-pager -o cat
"""


@pytest.mark.timeout(160)
def test_unit_lives_under_a_real_systemd(tmp_path: Path) -> None:
    """Readiness, sockets, watchdog, reload and stop, with systemd as PID 1 of a container."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to boot a container")
    for tool in ("systemd-nspawn", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (systemd-container)")
    script = tmp_path / "script"
    with socket.socket() as probe:  # the container has this host's network
        probe.bind(("127.0.0.1", 0))
        script.write_text(LIFE.replace("PORT", str(probe.getsockname()[1])), "utf-8")
    boot = Path(__file__).with_name("boot_unit.sh")
    base = tmp_path / "boot"
    done = subprocess.run(
        ["unshare", "--mount", "sh", str(boot), str(base), str(script), sys.executable],
        capture_output=True,
        text=True,
    )
    out = done.stdout
    if "== start" not in out:
        console = base / "console"
        shown = console.read_text("utf-8", "replace")[-300:] if console.exists() else done.stderr
        pytest.skip(f"no container boots here: {shown.strip()}")
    assert "== start 0" in out, out
    assert "StatusText=control mode" in out
    assert "/run/smartspec 750 smartspec smartspec-engines" in out
    assert "/run/smartspec/engines.sock 660 smartspec smartspec-engines" in out
    assert "/var/lib/smartspec/ 700 smartspec smartspec-engines" in out
    assert "== oom 500" in out
    assert "== valkey 0" in out, out
    assert "== reload 0" in out
    assert "SIGHUP: control.ttl_s: 1.0 -> 3.0" in out
    assert "== fields 1" in out, out  # by the journal's own protocol
    assert "== restarts 1" in out, out
    assert "== active active" in out
    assert "== bad reload 1 active" in out and "did you mean mode" in out, out
    assert "== stop 0\nsuccess\n/run/smartspec\n" in out, out
    assert "/run/seen" in out, out  # a mount of the directory outlives a restart
    assert "== both 0\nactive\n/run/smartspec/engines.sock" in out, out
    assert "== template 0" in out
    assert "== taken 1" in out, out
    assert "== tcp active" in out, out  # it was tried again; ZeroMQ asks for interfaces, too
    assert "/run/smartspec-gpus/engines.sock 660 smartspec smartspec-engines" in out
