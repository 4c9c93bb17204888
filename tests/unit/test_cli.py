"""The command line: what it imports, how it fails, and how options reach the parts behind it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from smartspec.daemon import config
from smartspec.daemon.admission import curve_keys
from smartspec.daemon.cli import app
from smartspec.daemon.config import Settings
from smartspec.daemon.process import service
from smartspec.daemon.views import inspect

COMMANDS = ["run", "worker", "telemetry", "inspect", "pause", "release", "demo", "config"]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in config.keys().values():
        monkeypatch.delenv(key.env, raising=False)
    monkeypatch.delenv("SMARTSPEC_CONFIG", raising=False)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_is_listed_and_explains_itself() -> None:
    listed = invoke("--help").output
    for command in COMMANDS:
        assert f"  {command} " in listed
        assert "Usage:" in invoke(command, "--help").output


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert invoke("--version").output == f"smartspec {version('smartspec')}\n"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = """if True:
        import sys, time
        began = time.perf_counter()
        from smartspec.daemon.cli import app
        took_s = time.perf_counter() - began
        heavy = {"torch", "transformers", "matplotlib", "river", "redis", "zmq", "numpy"}
        print(took_s, *sorted(heavy & sys.modules.keys()))
    """
    attempts = [python(code).split() for _ in range(3)]  # the machine may be busy
    assert attempts[0][1:] == []
    assert min(float(attempt[0]) for attempt in attempts) < 0.5


def test_run_imports_neither_torch_nor_plots() -> None:
    loaded = python(
        "import sys\n"
        "import smartspec.daemon.process.service, smartspec.daemon.control_loop\n"
        "import smartspec.daemon.transport, smartspec.daemon.cli\n"
        "print(*sorted({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    assert loaded.split() == []


def test_default_file_is_printed_and_good(tmp_path: Path) -> None:
    path = tmp_path / "smartspec.toml"
    path.write_text(invoke("config", "defaults").output, "utf-8")
    result = invoke("config", "check", "-c", str(path))
    assert (result.exit_code, result.output) == (0, f"{path}: good\n")


def test_settings_in_force_are_shown_when_file_and_flags_are_given(tmp_path: Path) -> None:
    path = tmp_path / "smartspec.toml"
    path.write_text("mode = 'observe'\n[control]\nttl_s = 2.0\n", "utf-8")
    shown = invoke("config", "show", "-c", str(path), "--set", "control.ttl_s=3")
    values = tomllib.loads(shown.output)
    assert (values["mode"], values["control"]["ttl_s"]) == ("observe", 3.0)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["config", "check", "--set", "control.ttl=1"], "did you mean control.ttl_s?"),
        (["config", "check", "--set", "control.ttl_s"], "expected KEY=VALUE"),
        (["run", "--set", "control.ttl_s=never"], "control.ttl_s: got 'never'"),
        (["run", "--log-level", "loud"], "log.level: got 'loud'"),
        (["run", "-c", "/nowhere.toml"], "/nowhere.toml: cannot be read"),
        (["run", "--endpoint", "tcp://10.0.0.1:5"], "loopback"),
        (["inspect", "--redis-url", "db"], "redis.url"),
        (["worker", "--speculation", "static", "--length", "9"], "--length 9"),
        (["worker", "--proposer", "draft", "--draft-drop-layers", "a"], "--draft-drop-layers a"),
        (["worker", "--proposer", "draft-tree"], "--proposer draft-tree: give --draft-model"),
        (["worker", "--proposer", "eagle", "--model", "x"], "--proposer eagle: give --drafter"),
        (["distill", "p", "--train-only"], "--train-only: give --out"),
        (["distill", "p", "--layers", "a"], "--layers a: expected layer numbers"),
        (["demo", "--arms", ","], "--arms"),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(arguments: list[str], part: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_top_without_a_terminal_says_so_and_ends() -> None:
    result = invoke("top")
    assert result.exit_code == 2 and not result.stdout
    assert "smartspec inspect" in result.stderr and len(result.stderr.splitlines()) == 1


def test_daemon_that_cannot_start_now_is_one_line_and_an_exit_code_that_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(settings: Settings, **given: Any) -> None:
        raise service.ServiceError("another daemon (process 7) serves /x")

    monkeypatch.setattr(service, "run", refuse)
    result = invoke("run")
    assert (result.exit_code, result.stderr) == (
        1,
        "smartspec: another daemon (process 7) serves /x\n",
    )


def test_flags_of_run_become_settings_again_when_reloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "smartspec.toml"
    path.write_text("[control]\nttl_s = 2.0", "utf-8")
    seen: list[Settings] = []

    def capture(settings: Settings, reload: Any, **more: Any) -> None:
        path.write_text("[control]\nttl_s = 4.0", "utf-8")
        seen.extend([settings, reload()])

    monkeypatch.setattr(service, "run", capture)
    flags = ["--mode", "observe", "--runtime-dir", str(tmp_path), "--prometheus-port", "0"]
    assert invoke("run", "-c", str(path), *flags).exit_code == 0
    assert [s.control.ttl_s for s in seen] == [2.0, 4.0]
    for settings in seen:
        assert (settings.mode, settings.runtime_dir) == ("observe", str(tmp_path))
        assert settings.telemetry.prometheus_port == 0


def parameters_of(path: Path, function: str) -> set[str]:
    """Names of a function's parameters, without importing it (and torch with it)."""
    tree = ast.parse(path.read_text("utf-8"))
    [found] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    return {argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)}


def stand_in_for(
    monkeypatch: pytest.MonkeyPatch, name: str, function: str, seen: dict[str, Any]
) -> None:
    def capture(**options: Any) -> int:
        seen.update(options)
        return 0

    module = types.ModuleType(name)
    setattr(module, function, capture)
    monkeypatch.setitem(sys.modules, name, module)


def test_options_of_worker_reach_the_engine(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    seen: dict[str, Any] = {}
    stand_in_for(monkeypatch, "smartspec.engine_adapter.reference.service", "run_worker", seen)
    options = ["--proposer", "draft", "--draft-drop-layers", "10,13", "--engine", "gpu-1"]
    result = invoke("worker", *options, "--endpoint", "ipc:///run/x.sock", "--fetch-only")
    assert result.exit_code == 0
    assert seen["proposer"] == "draft"
    assert seen["draft_drop_layers"] == (10, 13)
    assert (seen["engine"], seen["endpoint"]) == ("gpu-1", "ipc:///run/x.sock")
    assert seen["fetch_only"] is True
    assert seen["speculation"] == "smartspec"
    engine = repository / "engine_adapter" / "reference" / "service.py"
    assert set(seen) <= parameters_of(engine, "run_worker")


def test_options_of_distill_reach_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from smartspec.lab.distill import command

    seen: dict[str, Any] = {}

    def capture(prompts: Path, out: Path | None, work: Path, recipe: Any, **how: Any) -> int:
        seen.update(prompts=prompts, out=out, work=work, recipe=recipe, **how)
        return 0

    monkeypatch.setattr(command, "run", capture)
    result = invoke("distill", "p.jsonl", "--out", "x", "--layers", "1,2", "--loss", "tv", "--json")
    assert result.exit_code == 0
    assert (seen["prompts"], seen["out"]) == (Path("p.jsonl"), Path("x"))
    assert (seen["recipe"].layers, seen["recipe"].loss) == ((1, 2), "tv")
    assert seen["as_json"] is True


def test_worker_connects_to_a_daemon_elsewhere_when_it_has_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}
    stand_in_for(monkeypatch, "smartspec.engine_adapter.reference.service", "run_worker", seen)
    curve_keys.make(tmp_path / "keys")
    keys = str(curve_keys.add(tmp_path / "keys", "gpu0"))
    assert invoke("worker", "--endpoint", "tcp://host:5560", "--keys", keys).exit_code == 0
    assert seen["endpoint"] == "tcp://host:5560" and seen["keys"] is not None
    assert invoke("worker", "--endpoint", "tcp://host:5560").exit_code == 2  # readable on the way


def test_options_of_worker_reach_the_http_server_and_its_decode_process(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    seen: dict[str, Any] = {}
    name = "smartspec.engine_adapter.reference.http.service"
    stand_in_for(monkeypatch, name, "run_server", seen)
    given = ["--model", "m", "--proposer", "draft", "--draft-drop-layers", "10,13", "--step-events"]
    given += ["--set", "control.ttl_s=2", "--set", "mode=observe"]
    ours = ["--http", "127.0.0.1:0", "--max-num-waiting", "3", "--api-key-file", "keys"]
    assert invoke("worker", *given, *ours).exit_code == 0
    assert (seen["address"], seen["api_key_file"]) == ("127.0.0.1:0", Path("keys"))
    assert seen["limits"].max_num_waiting == 3
    command = seen["worker_command"]
    assert command[-2] == "--parent"
    child = command[command.index("worker") + 1 : -2]
    assert "--http" not in child and "--api-key-file" not in child
    # What the child is told is what would have been told to the engine without --http.
    engines: list[dict[str, Any]] = [{}, {}]
    for words, engine in zip((given, child), engines, strict=True):
        stand_in_for(
            monkeypatch, "smartspec.engine_adapter.reference.service", "run_worker", engine
        )
        assert invoke("worker", *words).exit_code == 0
    assert engines[0] == engines[1]
    server = repository / "engine_adapter" / "reference" / "http" / "service.py"
    assert set(seen) <= parameters_of(server, "run_server")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--draft-model", "x"], "--draft-model: goes with --proposer draft or draft-tree"),
        (["--draft-drop-layers", "1"], "--draft-drop-layers: goes with --proposer draft"),
        (["--drafter", "x"], "--drafter: goes with --proposer eagle"),
        (["--api-key-file", "keys"], "--api-key-file: goes with --http"),
        (["--served-model-name", "m"], "--served-model-name: goes with --http"),
    ],
)
def test_option_that_would_be_ignored_is_refused(options: list[str], words: str) -> None:
    result = invoke("worker", *options)
    assert result.exit_code == 2 and words in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["simulate", "--policies", "none,static9"], "static9: the longest length is 5"),
        (["simulate", "--policies", ""], "no policy ''"),
        (["simulate", "--loads", "0.1,foo"], "--loads 0.1,foo: expected numbers"),
        (["simulate", "--profile", "FILE.json"], "FILE.json: not a profile"),
        (["simulate", "--trace", "FILE.json"], "FILE.json: not a trace"),
        (["tune", "--state", "x", "--draft", "eagle"], "--state: stands in place of --profile"),
    ],
)
def test_input_of_the_laboratory_is_refused_by_name(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE.json").write_bytes(b'{"\xc4')
    result = invoke(*options)
    assert result.exit_code == 2 and words in result.stderr


@pytest.mark.parametrize("address", ["8000", "127.0.0.1:x"])
def test_http_address_is_refused_in_one_line_when_it_is_none(address: str) -> None:
    result = invoke("worker", "--http", address)
    assert result.exit_code == 2
    assert "expected HOST:PORT" in result.stderr.splitlines()[-1]


def test_options_of_demo_reach_it(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    seen: dict[str, Any] = {}
    stand_in_for(monkeypatch, "smartspec.lab.demo.run", "main", seen)
    assert invoke("demo", "--arms", "none, smartspec", "--seed", "4", "--quick").exit_code == 0
    assert seen == {
        "out": Path("build/demo"),
        "arms": ["none", "smartspec"],
        "seed": 4,
        "quick": True,
    }
    assert set(seen) <= parameters_of(repository / "lab" / "demo" / "run.py", "main")


def test_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("importlib.import_module", missing)
    result = invoke("worker")
    assert result.exit_code == 2
    assert "pip install 'smartspec[worker]'" in result.stderr


def test_inspect_exits_with_2_and_advice_when_no_redis_answers(tmp_path: Path) -> None:
    began = time.monotonic()
    result = invoke("inspect", "--json", "--runtime-dir", str(tmp_path))
    assert result.exit_code == inspect.EXIT_NO_REDIS
    assert "smartspec run" in result.stderr
    assert result.stdout == ""
    assert time.monotonic() - began < 5


def test_inspect_json_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    from smartspec.daemon.telemetry.engine_state import EngineState

    view = inspect.View(state=EngineState(engine="a"), age_s=0.5, daemon_age_s=0.1, events=[])
    monkeypatch.setattr(inspect, "read", lambda settings, engine, now: [view])
    shown = json.loads(invoke("inspect", "--json").stdout)
    assert shown["engines"][0]["engine"] == "a"


@pytest.mark.parametrize(
    ("num_targets", "num_out", "line"),
    [
        (0, 0, "no request asks for a time per token"),
        (3, 0, "3 requests ask for a time per token"),
        (1, 0, "1 request asks for a time per token"),
        (3, 2, "3 requests ask for a time per token, 2 of them out of reach even if all others"),
    ],
)
def test_inspect_tells_how_many_targets_are_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, num_targets: int, num_out: int, line: str
) -> None:
    from smartspec.daemon.telemetry.engine_state import EngineState

    state = EngineState(engine="a", num_targets=num_targets, num_targets_out_of_reach=num_out)
    view = inspect.View(state=state, age_s=0.5, daemon_age_s=0.1, events=[])
    monkeypatch.setattr(inspect, "read", lambda settings, engine, now: [view])
    text = " ".join(invoke("inspect").stdout.replace("│", "").split())
    assert f"targets {line}" in text
    assert ("out of reach" in text) == bool(num_out)


def test_inspect_shows_names_as_text_when_they_hold_markup_or_escapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from smartspec.daemon.telemetry.engine_state import EngineState

    state = EngineState(engine="[red]x\x1b]0;y\x07", reason="[bold]2 running")
    view = inspect.View(state=state, age_s=0.5, daemon_age_s=0.1, events=[])
    for views in ([view], [view, view]):
        monkeypatch.setattr(inspect, "read", lambda *_, views=views: views)
        assert invoke("inspect").exit_code == 0
        text = invoke("inspect").stdout
        assert "[red]x" in text
        assert "[bold]" in text
        assert "\x1b]" not in text
