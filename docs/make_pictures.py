"""Make the README's pictures: `.venv/bin/python docs/make_pictures.py` (a minute or two).

`docs/pictures/top.svg`: `smartspec top` beside a real daemon and three mock engines of known costs
(tests/scripted_engine.py, no model). `docs/pictures/simulate.svg`: what `smartspec simulate`
printed. `docs/pictures/report.png`: the report that it wrote, by headless Chromium (Debian: the
package `chromium`). One alone: give its name, `top`, `simulate` or `report`.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.text import Text
from textual.widgets import DataTable

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import live_daemon

from smartspec.daemon.config import Settings
from smartspec.daemon.views import top

OUT = Path(__file__).parent / "pictures"
MAX_BYTES = 150_000
REPORT_SIZE = "1000,1500"
NUM_STEPS = 600  #: of each engine, before the picture is taken
DEADLINE_S = 300.0
ENGINES = {"chat-0": 0.85, "code-0": 0.6, "code-1": 0.55}  #: acceptance of a draft
SIMULATE = (
    *("simulate", "--profile", "h100_8b", "--draft", "eagle", "--loads", "0.3,0.9"),
    *("--policies", "none,static3,static5,smartspec", "--duration-s", "15", "--num-seeds", "2"),
)


def picture_of_top() -> str:
    with live_daemon.folder() as folder, ExitStack() as stack:
        settings, _ = stack.enter_context(
            live_daemon.daemon(folder, state__enabled=False, log__level="error")
        )
        for name, acceptance in ENGINES.items():
            stack.enter_context(live_daemon.engine(settings, name, acceptance))
        deadline = time.monotonic() + DEADLINE_S
        while not all(count >= NUM_STEPS for count in num_steps(settings)):
            if time.monotonic() > deadline:
                raise SystemExit(f"fewer than {NUM_STEPS} steps: {num_steps(settings)}")
            time.sleep(1.0)
        return asyncio.run(shot(settings))


def num_steps(settings: Settings) -> list[int]:
    try:
        found = {view.state.engine: view.state.num_steps for view in top.look(settings)}
    except top.InspectError:
        found = {}
    return [found.get(name, 0) for name in ENGINES]


async def shot(settings: Settings) -> str:
    app = top.Top(lambda: top.look(settings), settings.endpoint, 0.5, lambda command: None)
    async with app.run_test(size=(150, 24)) as pilot:
        while not app.screen.query_one("#engines", DataTable).rows:
            await pilot.pause(0.1)
        await pilot.pause(1.0)
        return app.export_screenshot(title="smartspec top")


def picture_of_simulate() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "smartspec.daemon.cli", *SIMULATE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "118"},
    )
    console = Console(record=True, width=118, file=io.StringIO())
    console.print(Text("$ smartspec " + " ".join(SIMULATE)))
    console.print(Text.from_ansi(done.stdout))
    return console.export_svg(title="smartspec simulate")


def picture_of_report(out: Path) -> None:
    """What ``simulate --out`` writes, as a browser shows it."""
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("chromium is not installed (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        command = [sys.executable, "-m", "smartspec.daemon.cli", *SIMULATE, "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={folder}/browser", f"--window-size={REPORT_SIZE}"),
                *(f"--screenshot={out}", f"file://{folder}/report.html"),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )
    print(f"{out}: {out.stat().st_size} bytes")


def write(name: str, svg: str) -> None:
    """Without fonts from elsewhere: a reader's own serve."""
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    if len(svg.encode()) > MAX_BYTES:
        raise SystemExit(f"{name}: {len(svg.encode())} bytes, over {MAX_BYTES}")
    OUT.mkdir(exist_ok=True)
    (OUT / name).write_text(svg, "utf-8")
    print(f"{OUT / name}: {len(svg.encode())} bytes")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["top", "simulate", "report"]
    if "top" in wanted:
        write("top.svg", picture_of_top())
    if "simulate" in wanted:
        write("simulate.svg", picture_of_simulate())
    if "report" in wanted:
        picture_of_report(OUT / "report.png")
