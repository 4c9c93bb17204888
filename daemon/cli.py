"""The command `smartspec`: the one place where everything meets, each part imported when asked for.

Exit codes: 0 done; 2 a setting, option or file that cannot be used, which trying again would not
change; others as the command says.
A mistake of the user is one line that names it; a traceback is a fault of ours.
"""

from __future__ import annotations

import enum
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from smartspec.daemon import cli_keys, cli_lab, config
from smartspec.daemon.cli_options import (
    EXIT_FAILED,
    Assignments,
    ConfigFile,
    RuntimeDir,
    assigned,
    fail,
    load_settings,
    optional,
    settings_beside,
)
from smartspec.daemon.config import ConfigError, Settings

app = typer.Typer(
    help="Steer the speculation lengths of LLM engines for the most tokens per second.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
doctor_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(doctor_app, name="doctor")


class Mode(enum.StrEnum):
    observe = "observe"
    canary = "canary"
    control = "control"


class Proposer(enum.StrEnum):
    lookup = "lookup"
    draft = "draft"
    eagle = "eagle"
    eagle_chain = "eagle-chain"
    lookup_tree = "lookup-tree"
    draft_tree = "draft-tree"
    none = "none"


class Speculation(enum.StrEnum):
    own = "own"
    static = "static"
    smartspec = "smartspec"


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"smartspec {version('smartspec')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config_file: ConfigFile = None,
    mode: Annotated[Mode | None, typer.Option(help="Steer, or only learn and predict.")] = None,
    runtime_dir: RuntimeDir = None,
    endpoint: Annotated[str | None, typer.Option(help="Where engines connect.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis; default: embedded.")] = None,
    prometheus_port: Annotated[int | None, typer.Option(help="To be scraped at; 0: none.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error.")] = None,
    exit_when_stuck: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="End when the loop has not turned for so long, to be started again; 0: never.",
        ),
    ] = 0.0,
    set_: Assignments = None,
) -> None:
    """Run the daemon: learn from engines and steer them, until SIGTERM or Ctrl-C.

    Exit codes: 1 it cannot start as things are (an address in use, say), 2 a setting is wrong.
    """
    from smartspec.daemon.process import logs, service

    def load() -> Settings:
        flags = {
            "mode": mode.value if mode else None,
            "runtime_dir": runtime_dir,
            "endpoint": endpoint,
            "redis.url": redis_url,
            "telemetry.prometheus_port": prometheus_port,
            "log.level": log_level,
        }
        given = {name: value for name, value in flags.items() if value is not None}
        return config.load(config_file, overrides={**assigned(set_), **given})

    try:
        settings = load()
        logs.configure(settings.log)
        service.run(settings, reload=load, exit_when_stuck_s=exit_when_stuck)
    except ConfigError as error:
        fail(error)
    except service.ServiceError as error:
        fail(error, EXIT_FAILED)


@app.command()
def telemetry(
    config_file: ConfigFile = None,
    runtime_dir: RuntimeDir = None,
    set_: Assignments = None,
    settings_from_stdin: Annotated[
        bool, typer.Option("--settings-from-stdin", hidden=True)
    ] = False,
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Write Redis and serve Prometheus beside a daemon (`run` starts this by itself)."""
    import msgspec

    from smartspec.daemon.process import logs, service
    from smartspec.daemon.process.parent_death import follow_parent
    from smartspec.daemon.process.stopping import Stop

    stop = Stop()
    stop.install()
    if parent:
        follow_parent(parent)
    if settings_from_stdin:
        settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    else:
        settings = load_settings(config_file, set_, runtime_dir=runtime_dir)
    logs.configure(settings.log)
    from smartspec.daemon.telemetry import process

    try:
        service.prepare_runtime_dir(Path(settings.runtime_dir))
    except service.ServiceError as error:
        fail(error, EXIT_FAILED)
    process.run(settings, stop)


@app.command()
def inspect(
    engine: Annotated[str | None, typer.Argument(help="Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines; stable keys.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Until Ctrl-C.")] = False,
    config_file: ConfigFile = None,
    runtime_dir: RuntimeDir = None,
    redis_url: Annotated[str | None, typer.Option(help="Default: the embedded one.")] = None,
    set_: Assignments = None,
) -> None:
    """Show what engines are doing, why, and what it brings.

    Exit codes: 2 Redis cannot be read, 3 no such engine.
    """
    settings = settings_beside(config_file, set_, runtime_dir=runtime_dir, redis__url=redis_url)
    from smartspec.daemon.views import inspect as inspection

    raise typer.Exit(inspection.run(settings, engine, as_json, watch))


AnyEngine = Annotated[str, typer.Argument(help="Default: all, and those to come.")]


@app.command()
def pause(
    engine: AnyEngine = "",
    config_file: ConfigFile = None,
    runtime_dir: RuntimeDir = None,
    set_: Assignments = None,
) -> None:
    """Leave an engine to its own configuration, until `release`; learning goes on.

    Exit codes: 2 no daemon answers, 3 it refuses.
    """
    _command("pause", engine, settings_beside(config_file, set_, runtime_dir=runtime_dir))


@app.command()
def release(
    engine: AnyEngine = "",
    config_file: ConfigFile = None,
    runtime_dir: RuntimeDir = None,
    set_: Assignments = None,
) -> None:
    """Steer an engine again that was paused.

    Exit codes: 2 no daemon answers, 3 it refuses.
    """
    _command("release", engine, settings_beside(config_file, set_, runtime_dir=runtime_dir))


def _command(action: Literal["pause", "release"], engine: str, settings: Settings) -> NoReturn:
    from smartspec.daemon import commands

    raise typer.Exit(commands.run(settings, commands.Command(action=action, engine=engine)))


@app.command()
def top(
    interval_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    config_file: ConfigFile = None,
    runtime_dir: RuntimeDir = None,
    redis_url: Annotated[str | None, typer.Option(help="Default: the embedded one.")] = None,
    set_: Assignments = None,
) -> None:
    """Watch all engines: load, lengths, gain, acceptance, events. Keys are shown below it.

    Exit code: 2 there is no terminal.
    """
    settings = settings_beside(config_file, set_, runtime_dir=runtime_dir, redis__url=redis_url)
    raise typer.Exit(optional("smartspec.daemon.views.top", "top").run(settings, interval_s))


@app.command()
def record(
    file: Annotated[Path, typer.Argument(help="To write; must not exist.")],
    seconds: Annotated[float, typer.Option(min=0.1, help="How long.")] = 60.0,
    max_mb: Annotated[int, typer.Option(min=1, help="Before compression.")] = 512,
    config_file: ConfigFile = None,
    runtime_dir: RuntimeDir = None,
    set_: Assignments = None,
) -> None:
    """Record what engines and daemon say to each other, for `smartspec replay`.

    Exit code: 2 no daemon is heard, or the file cannot be written.
    """
    settings = settings_beside(config_file, set_, runtime_dir=runtime_dir)
    from smartspec.daemon import record as command
    from smartspec.daemon.process.stopping import Stop

    stop = Stop()
    stop.install()
    raise typer.Exit(command.run(settings, file, seconds, max_mb << 20, stop))


@doctor_app.callback()
def doctor(
    context: typer.Context,
    engine: Annotated[str | None, typer.Option(help="Look at this one; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines; stable keys.")] = False,
    config_file: ConfigFile = None,
    runtime_dir: RuntimeDir = None,
    set_: Assignments = None,
) -> None:
    """Examine this host and its engines end to end, and say what to do.

    Exit code: 1 something has failed.
    """
    if context.invoked_subcommand is not None:
        return
    settings = settings_beside(config_file, set_, runtime_dir=runtime_dir)
    from smartspec.daemon.views import doctor as examination

    raise typer.Exit(examination.run(settings, engine, as_json))


@doctor_app.command("vllm")
def doctor_vllm(
    python: Annotated[
        str, typer.Option(help="The Python that runs vLLM; default: the one that runs this.")
    ] = sys.executable,
    as_json: Annotated[bool, typer.Option("--json", help="For machines; stable keys.")] = False,
) -> None:
    """Say whether an installed vLLM can be steered, and which scheduler to name. Starts no engine.

    Exit code: 1 it cannot.
    """
    from smartspec.daemon.views import doctor as examination

    raise typer.Exit(examination.show(examination.examine_vllm(python), as_json))


@app.command()
def state(
    as_json: Annotated[bool, typer.Option("--json", help="For machines; stable keys.")] = False,
    config_file: ConfigFile = None,
    set_: Assignments = None,
) -> None:
    """List what was learned and is kept, and what was refused and why.

    Exit code: 2 the directory cannot be read.
    """
    settings = settings_beside(config_file, set_)
    from smartspec.daemon.views import stored_state

    raise typer.Exit(stored_state.run(settings, as_json))


@app.command()
def worker(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Hugging Face id or local path.")] = None,
    proposer: Annotated[Proposer, typer.Option(help="What guesses tokens.")] = Proposer.lookup,
    draft_model: Annotated[str | None, typer.Option(help="Of draft and draft-tree.")] = None,
    draft_drop_layers: Annotated[
        str | None,
        typer.Option(metavar="I,J,...", help="Draft with the model itself less these layers."),
    ] = None,
    drafter: Annotated[
        Path | None,
        typer.Option(
            help="Of eagle, eagle-chain: a file of `smartspec distill`; default: that of the model."
        ),
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=0, max=64, help="Longest speculation; of trees the most nodes.")
    ] = 8,
    speculation: Annotated[
        Speculation,
        typer.Option(help="smartspec: steered by the daemon; static or own: always --length."),
    ] = Speculation.smartspec,
    length: Annotated[
        int, typer.Option(min=0, max=64, help="Static length; also where no daemon steers.")
    ] = 3,
    engine: Annotated[str, typer.Option(help="Name, unique on the daemon.")] = "worker-0",
    endpoint: Annotated[str | None, typer.Option(help="Where the daemon listens.")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="NAME.engine of `smartspec keys add`, for tcp://.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto: cuda if any.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto: float32 on the CPU, else bfloat16.")] = "auto",
    max_num_running: Annotated[int, typer.Option(min=1, help="Requests decoded together.")] = 16,
    max_model_len: Annotated[int, typer.Option(min=2, help="Tokens per request.")] = 1024,
    max_prefill_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens a step.")] = 256,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on the CPU.")] = None,
    step_events: Annotated[
        bool, typer.Option("--step-events", help="Print a line for every step too.")
    ] = False,
    fetch_only: Annotated[
        bool, typer.Option("--fetch-only", help="Download the model and exit.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of requests that bring none.")] = 0,
    http: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve OpenAI's API there instead of JSON lines."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys for --http, one a line; else $SMARTSPEC_API_KEY."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name over --http.")
    ] = None,
    max_num_waiting: Annotated[
        int, typer.Option(min=0, help="Requests over --http that may wait; then 429.")
    ] = 256,
    max_num_connections: Annotated[
        int, typer.Option(min=1, help="Open at a time to --http; beyond them 503.")
    ] = 768,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request over --http.")] = 2 << 20,
    request_timeout_s: Annotated[
        float, typer.Option(min=0.001, help="For an answer over --http.")
    ] = 600.0,
    drain_timeout_s: Annotated[
        float, typer.Option(min=0, help="After SIGTERM, for answers over --http to finish.")
    ] = 30.0,
    config_file: ConfigFile = None,
    runtime_dir: RuntimeDir = None,
    set_: Assignments = None,
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Run the reference engine: requests as JSON lines on stdin, tokens as JSON lines on stdout.

    With --http it serves OpenAI's API, and runs the engine as a child process.
    """
    if parent:
        from smartspec.daemon.process.parent_death import follow_parent

        follow_parent(parent)
    # With keys it is the address of a daemon elsewhere, which is not ours to listen at.
    listening = None if keys else endpoint
    settings = settings_beside(config_file, set_, runtime_dir=runtime_dir, endpoint=listening)
    drafting = proposer in (Proposer.draft, Proposer.draft_tree)
    if drafting and not (draft_model or draft_drop_layers):
        fail(f"--proposer {proposer.value}: give --draft-model or --draft-drop-layers")
    if not drafting and (draft_model or draft_drop_layers):
        option = "--draft-model" if draft_model else "--draft-drop-layers"
        fail(f"{option}: goes with --proposer draft or draft-tree, got {proposer.value}")
    headed = proposer in (Proposer.eagle, Proposer.eagle_chain)
    if headed and model is not None and drafter is None:
        fail(
            f"--proposer {proposer.value}: give --drafter; "
            "`smartspec distill` makes one for a model"
        )
    if drafter is not None and not headed:
        fail(f"--drafter: goes with --proposer eagle or eagle-chain, got {proposer.value}")
    if http is None and (api_key_file or served_model_name):
        fail(f"{'--api-key-file' if api_key_file else '--served-model-name'}: goes with --http")
    if speculation is Speculation.static and length > max_length:
        fail(f"--length {length}: expected at most --max-length ({max_length})")
    try:
        dropped = tuple(int(part) for part in (draft_drop_layers or "").split(",") if part.strip())
    except ValueError:
        fail(f"--draft-drop-layers {draft_drop_layers}: expected layer numbers, e.g. 10,13,16")
    # OpenMP's threads spin while they wait for each other; where another process wants the core (on
    # a small machine the daemon does), the one waited for gets no turn. 20,000 turns are as fast as
    # the default on an idle machine, and let go before harm is done. Read once, by torch's import.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if http is not None and not fetch_only:
        served = optional("smartspec.engine_adapter.reference.http.service", "worker")
        limits = optional("smartspec.engine_adapter.reference.http.limits", "worker").Limits(
            max_num_waiting=max_num_waiting,
            max_num_connections=max_num_connections,
            max_body_bytes=max_body_bytes,
            request_timeout_s=request_timeout_s,
            drain_timeout_s=drain_timeout_s,
        )
        command = [sys.executable, "-P", "-m", "smartspec.daemon.cli", "worker"]
        try:
            status = served.run_server(
                address=http,
                worker_command=[*command, *_repeated(context), "--parent", str(os.getpid())],
                limits=limits,
                api_key_file=api_key_file,
                served_model_name=served_model_name,
            )
        except ValueError as error:
            fail(error)
        raise typer.Exit(status)
    service = optional("smartspec.engine_adapter.reference.service", "worker")
    raise typer.Exit(
        service.run_worker(
            model=model,
            proposer=proposer.value,
            draft_model=draft_model,
            draft_drop_layers=dropped,
            drafter=drafter,
            max_length=max_length,
            speculation=speculation.value,
            length=length,
            engine=engine,
            endpoint=endpoint or settings.endpoint,
            keys=_engine_keys(keys),
            device=device,
            dtype=dtype,
            max_num_running=max_num_running,
            max_model_len=max_model_len,
            max_prefill_tokens=max_prefill_tokens,
            threads=threads,
            step_events=step_events,
            fetch_only=fetch_only,
            seed=seed,
        )
    )


def _engine_keys(path: Path | None) -> Any:
    from smartspec.engine_adapter.curve import read_keys

    try:
        return None if path is None else read_keys(path)
    except ValueError as error:
        fail(f"--keys: {error}")


#: Options of `worker` that are for the process that serves HTTP, not for its decode process.
_OF_HTTP = {
    "http",
    "api_key_file",
    "served_model_name",
    "max_num_waiting",
    "max_num_connections",
    "max_body_bytes",
    "request_timeout_s",
    "drain_timeout_s",
    "parent",
}


def _repeated(context: typer.Context) -> list[str]:
    """The command's own options once more, for its decode process."""
    words: list[str] = []
    for option in context.command.params:
        name = option.name or ""
        value = context.params.get(name)
        if name in _OF_HTTP or value is None or value is False:
            continue
        for one in value if isinstance(value, list | tuple) else (value,):
            words.append(option.opts[0])
            if one is not True:
                words.append(str(one.value if isinstance(one, enum.Enum) else one))
    return words


app.add_typer(cli_lab.app)
app.add_typer(cli_keys.config_app, name="config")
app.add_typer(cli_keys.keys_app, name="keys")


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
