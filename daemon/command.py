"""Entry point of `smartspec`: one line on what to install where a package is missing, no traceback.

The base install, which an engine's process has, lacks all that the command stands on.
"""

from __future__ import annotations

import sys

#: Packages that are in another extra than `daemon`.
EXTRAS = {
    **dict.fromkeys(("fastapi", "gguf", "torch", "transformers", "uvicorn"), "worker"),
    **dict.fromkeys(("matplotlib", "psutil"), "demo"),
    "textual": "top",
}


def main() -> None:
    """Run the command; exit with 2 when it cannot be."""
    try:
        from smartspec.daemon.cli import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "smartspec"):
            raise
        extra = EXTRAS.get(package, "daemon")
        print(
            f"smartspec: the package {package} is not installed: pip install 'smartspec[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(2)
