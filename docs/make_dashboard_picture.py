"""Draw the Grafana dashboard from a real run: `.venv/bin/python docs/make_dashboard_picture.py`.

Needs `prometheus` (Debian: the package of that name) and the default model; takes four minutes.
The reference worker decodes the demo's prompts, few at a time, then many, then few, under a daemon;
a real Prometheus scrapes it every second. Each panel of dashboards/smartspec.json is then asked for
in its own words and drawn where the dashboard has it, by matplotlib: what a reader sees are the
dashboard's queries and their answers, not Grafana's looks. Stops when a query is refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import live_daemon
from fakes import free_port

from smartspec.lab.demo.processes import WorkerProcess
from smartspec.lab.demo.schedule import load_prompts, mixed

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "pictures" / "dashboard.png"
PHASES = ((2, 60.0), (12, 90.0), (2, 60.0))  #: requests at a time, seconds
SECTIONS = ("What it brings", "What it does", "Whether to trust it", "Load")
RATE = "15s"  #: for $__rate_interval
START_S = 60.0


@contextmanager
def prometheus(target_port: int, folder: Path) -> Iterator[str]:
    """A server that scrapes the daemon every second; its address."""
    binary = shutil.which("prometheus")
    if binary is None:
        raise SystemExit("prometheus is not installed (Debian: apt-get install prometheus)")
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n"
        "  - job_name: smartspec\n"
        "    static_configs:\n"
        f"      - {{targets: ['127.0.0.1:{target_port}'], labels: {{instance: node-0}}}}\n",
        "utf-8",
    )
    port = free_port()
    process = subprocess.Popen(
        [
            *(binary, f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"),
            *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"),
        ]
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"{url}/-/ready", timeout=1):
                    break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit("prometheus has not started") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def serve(worker: WorkerProcess, until_idle_s: float = 60.0) -> None:
    """Keep as many requests under way as the phase wants."""
    prompts = mixed(load_prompts(), np.random.default_rng(0))
    count, running = 0, set[str]()
    for at_once, seconds in PHASES:
        print(f"{at_once} requests at a time, {seconds:.0f} s", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while len(running) < at_once:
                request = f"r{count}"
                worker.submit(request, prompts[count % len(prompts)], max_tokens=96)
                running.add(request)
                count += 1
            drop_finished(worker, running)
    end = time.monotonic() + until_idle_s
    while running and time.monotonic() < end:
        drop_finished(worker, running)


def drop_finished(worker: WorkerProcess, running: set[str]) -> None:
    got = worker.poll(0.2)
    if got is not None and got[1].get("event") == "finished":
        running.discard(got[1]["id"])


def ask(url: str, query: str, begin_s: float, end_s: float) -> list[dict[str, Any]]:
    """Series of a query over time, as Grafana would ask for them."""
    words = query.replace("$instance", ".*").replace("$engine", ".*")
    words = words.replace("$__rate_interval", RATE)
    arguments = {"query": words, "start": begin_s, "end": end_s, "step": 1}
    try:
        with urllib.request.urlopen(
            f"{url}/api/v1/query_range?{urllib.parse.urlencode(arguments)}", timeout=30
        ) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{query}: {error.read().decode()}") from error


def legend(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def draw(panels: list[dict[str, Any]], url: str, begin_s: float, end_s: float) -> list[str]:
    """Write the picture; returns the titles of panels without any data."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for panel in panels:
        if panel["type"] == "row":
            sections[panel["title"]] = current = []
        else:
            current.append(panel)
    shown = [(name, sections[name]) for name in SECTIONS]
    heights = [-(-len(members) // 3) for _, members in shown]
    figure = plt.figure(figsize=(15, 2.6 * sum(heights) + 0.5 * len(shown)), dpi=72)
    outer = figure.add_gridspec(len(shown), 1, height_ratios=heights, hspace=0.3)
    empty = []
    for (name, members), height, cell in zip(shown, heights, outer, strict=True):
        frame = figure.add_subplot(cell)
        frame.axis("off")
        frame.set_title(name, loc="left", fontsize=12, fontweight="bold", pad=22)
        inner = cell.subgridspec(height, 3, hspace=0.75, wspace=0.14)
        for index, panel in enumerate(members):
            axes = figure.add_subplot(inner[index // 3, index % 3])
            axes.set_title(panel["title"], loc="left", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
            num_lines = 0
            for target in panel["targets"]:
                for series in ask(url, target["expr"], begin_s, end_s):
                    points = np.array([[float(t), float(v)] for t, v in series["values"]])
                    points = points[np.isfinite(points[:, 1])]
                    if len(points):
                        label = legend(target["legendFormat"], series["metric"])
                        axes.plot(points[:, 0] - begin_s, points[:, 1], lw=1.2, label=label)
                        num_lines += 1
            axes.set_xlim(0, end_s - begin_s)
            axes.margins(y=0.15)
            if 0 < num_lines:
                # Below, where it hides nothing.
                axes.legend(
                    fontsize=6,
                    ncols=3,
                    frameon=False,
                    loc="upper center",
                    bbox_to_anchor=(0.5, -0.1),
                )
            elif not num_lines:
                empty.append(panel["title"])
                axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes, color="gray")
    figure.savefig(OUT, bbox_inches="tight")
    return empty


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    panels = json.loads((ROOT / "dashboards" / "smartspec.json").read_text("utf-8"))["panels"]
    with ExitStack() as stack:
        folder = stack.enter_context(live_daemon.folder())
        tsdb = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ss-tsdb-")))
        port = free_port()
        settings, _ = stack.enter_context(
            live_daemon.daemon(
                folder,
                telemetry__prometheus_port=port,
                state__directory=f"{folder}/state",
                adoption__check_loss=0.02,
            )
        )
        url = stack.enter_context(prometheus(port, tsdb))
        worker = WorkerProcess(
            [
                *("--proposer", "lookup", "--engine", "chat-0", "--threads", "1"),
                *("--speculation", "smartspec", "--endpoint", settings.endpoint),
            ],
            tsdb / "worker.log",
        )
        stack.callback(worker.stop)
        worker.wait_ready(lambda waited_s, words: None)
        begin_s = time.time()
        serve(worker)
        end_s = time.time()
        empty = draw(panels, url, begin_s, end_s)
    print(f"{OUT}: {OUT.stat().st_size} bytes; panels without data: {', '.join(empty) or 'none'}")


if __name__ == "__main__":
    main()
