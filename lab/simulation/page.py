"""The report as one HTML file that needs nothing else: pictures inside, no scripts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import msgspec
from matplotlib.figure import Figure

from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.lab.simulation.experiment import Experiment, Line, Run
from smartspec.lab.simulation.plots import STYLE, colour, focus
from smartspec.lab.simulation.workload import DRAWN_BY, Workload

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1f2328;
  background: #f6f8fa; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 2px; }
.sub, figcaption, footer { color: #59636e; }
.lead { font-size: 17px; margin: 18px 0 22px; }
.lead b { color: #b3324a; }
section { background: #fff; border: 1px solid #d8dee4; border-radius: 10px;
  padding: 20px 22px 14px; margin: 18px 0; }
figure { margin: 10px 0 4px; }
img { width: 100%; height: auto; display: block; }
figcaption { font-size: 13.5px; margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 14px; margin: 8px 0; }
th { text-align: right; font-weight: 600; color: #59636e; padding: 6px 10px;
  border-bottom: 1px solid #d8dee4; white-space: nowrap; }
td { text-align: right; padding: 6px 10px; border-bottom: 1px solid #eff2f5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; white-space: normal; }
td small { color: #59636e; }
tr.ours td { background: #fdf1f3; font-weight: 600; }
td.best { color: #14692f; }
i.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  margin-right: 8px; }
.tag { border-radius: 10px; padding: 1px 8px; font-size: 12.5px; background: #ddf4e4; }
.tag.scaled, .tag.extrapolated { background: #fff3cd; } .tag.datasheet { background: #ffe2dc; }
code { background: #eff2f5; border-radius: 4px; padding: 1px 5px; font-size: 13px; }
footer { font-size: 13px; margin-top: 24px; }
"""


def _inside(figure: Figure, alt: str) -> str:
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{encoded}">'


def _figure(title: str, figure: Figure, caption: str) -> str:
    return (
        f"<section><h2>{html.escape(title)}</h2><figure>{_inside(figure, title)}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure></section>"
    )


def percent(ratio: float) -> str:
    """A ratio of latencies in words.

    >>> percent(0.76), percent(1.2), percent(1.001)
    ('24% less', '20% more', 'the same, within 1%')
    """
    if abs(ratio - 1) < 0.005:
        return "the same, within 1%"
    return f"{abs(ratio - 1):.0%} {'less' if ratio < 1 else 'more'}"


def findings(wanted: Experiment, lines: Sequence[Line]) -> list[str]:
    """What the experiment says of the policy in focus, in sentences."""
    ours, first = focus(wanted.policies), wanted.policies[0]
    at = {(line.policy, line.load): line for line in lines}
    if ours == first:
        return []
    told = [f"{percent(at[ours, load].over_first)} at load {load:g}" for load in wanted.loads]
    sentences = [f"Mean latency under {ours}, against {first}: {', '.join(told)}."]
    fixed = [p for p in wanted.policies if p == "none" or p.startswith("static")]
    if len(fixed) > 1:
        best = {
            load: min(fixed, key=lambda p, load=load: at[p, load].latency_mean_s)  # type: ignore[misc]
            for load in wanted.loads
        }
        ratios = [at[ours, x].latency_mean_s / at[best[x], x].latency_mean_s for x in wanted.loads]
        parts = [
            f"{best[x]} at {x:g} ({r:.2f}x)" for x, r in zip(wanted.loads, ratios, strict=True)
        ]
        sentences.append(
            "Against the best fixed length of those tried, which is known only afterwards: "
            + ", ".join(parts)
            + "."
        )
    return sentences


def _results(wanted: Experiment, lines: Sequence[Line]) -> str:
    at = {(line.policy, line.load): line for line in lines}
    head = "".join(f"<th>load {x:g}<br>{wanted.rate(x):.3g}/s</th>" for x in wanted.loads)
    bounds = {p for p in wanted.policies if p.startswith("informed") or p == "clairvoyant"}
    rows = []
    for policy in wanted.policies:
        cells = []
        for load in wanted.loads:
            line = at[policy, load]
            rivals = [at[p, load].latency_mean_s for p in wanted.policies if p not in bounds]
            best = ' class="best"' if line.latency_mean_s == min(rivals) else ""
            spread = (
                ""
                if line.over_first_low != line.over_first_low
                else (f" ({line.over_first_low:.2f} to {line.over_first_high:.2f})")
            )
            cells.append(
                f"<td{best}>{line.latency_mean_s:.3f} s<br>"
                f"<small>{line.over_first:.2f}x{spread}</small></td>"
            )
        ours = ' class="ours"' if policy == "smartspec" else ""
        dot = f'<i class="dot" style="background:{colour(policy)}"></i>'
        rows.append(f"<tr{ours}><td>{dot}{html.escape(policy)}</td>{''.join(cells)}</tr>")
    return (
        "<section><h2>All results</h2><div class=scroll><table><tr><th>policy</th>"
        f"{head}</tr>{''.join(rows)}</table></div><figcaption>Mean request latency; "
        f"below it the ratio to {html.escape(wanted.policies[0])}'s over the same requests, "
        f"geometric mean and 95% interval of {wanted.num_seeds} seeds. Green: the lowest at this "
        "load but for informed and clairvoyant, which are told what nobody can "
        "know.</figcaption></section>"
    )


def _workload(wanted: Experiment) -> str:
    plain = msgspec.to_builtins(wanted)
    default = msgspec.to_builtins(Experiment())
    rows = "".join(
        f"<tr><td><code>{name}</code></td><td class=text>{html.escape(_value(plain[name]))}"
        f"{'' if plain[name] == default[name] else ' (set)'}</td></tr>"
        for name in (*Workload.__struct_fields__, "policies", "loads", "num_seeds")
        if not (wanted.drafts and name in DRAWN_BY)
    )
    return f"<section><h2>What was asked</h2><table>{rows}</table></section>"


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _profile(gpu: Profile) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(one.term)}</td><td class=text><span class='tag {one.label}'>"
        f"{one.label}</span></td><td class=text>{html.escape(one.note)}</td></tr>"
        for one in gpu.sources
    )
    return (
        f"<section><h2>The profile: {html.escape(gpu.name)}</h2><p class=sub>"
        f"{html.escape(gpu.target)} on {html.escape(gpu.accelerator)}; whole steps are off by "
        f"{gpu.fit_error_mean:.1%} on average (p95 {gpu.fit_error_p95:.1%}) from what was "
        "fitted.</p><div class=scroll><table><tr><th>term</th><th class=text>how</th>"
        f"<th class=text>from</th></tr>{rows}</table></div></section>"
    )


CAPTIONS = {
    "latency": (
        "Latency against rate",
        (
            "Every policy serves the same requests with the same luck. Bars are 95% intervals over "
            "seeds: left of the mean, which differs with the requests drawn, right of the paired "
            "ratio. Points are set apart sideways a little so that bars do not hide each other."
        ),
    ),
    "lengths": (
        "Lengths over time, with load",
        (
            "Above, requests running and waiting; below, the share of requests drafted for at each "
            "length, and the mean. Seed 0."
        ),
    ),
    "goodput": (
        "Goodput, predicted and measured",
        (
            "Tokens per second of decoding steps: what the daemon said it would be with its "
            "policy of "
            "the step before, and what came. By how much they differ on average over bins is in "
            "the "
            "titles. Seed 0."
        ),
    ),
    "gain": (
        "Cumulative gain",
        (
            "Seconds of waiting saved so far, over all requests that have come, against the first "
            "policy; below 0 is lost. Seed 0."
        ),
    ),
}


def render(
    wanted: Experiment,
    lines: Sequence[Line],
    figures: Mapping[str, Figure],
    runs: Sequence[Run],
) -> str:
    """The page. The same experiment gives the same text."""
    gpu = wanted.load_profile()
    source = f"trace {wanted.trace}" if wanted.trace else f"{wanted.arrivals.capitalize()} arrivals"
    requests = sum(run.num_requests for run in runs)
    lead = " ".join(html.escape(one) for one in findings(wanted, lines))
    parts = [_figure(CAPTIONS[n][0], figures[n], CAPTIONS[n][1]) for n in CAPTIONS if n in figures]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>SmartSpec: {html.escape(gpu.name)}, {html.escape(wanted.draft)}</title>"
        f"<style>{CSS}</style><main><h1>What would speculation do?</h1><p class=sub>"
        f"{html.escape(gpu.target)} on {html.escape(gpu.accelerator)}, draft "
        f"{html.escape(wanted.draft)}, {html.escape(wanted.source_of_drafts)}; "
        f"{html.escape(source)}, {wanted.duration_s:g} s, {requests} requests served in "
        f"{len(runs)} simulated runs.</p><p class=lead>{lead}</p>"
        f"{parts[0]}{_results(wanted, lines)}{''.join(parts[1:])}{_workload(wanted)}{_profile(gpu)}"
        "<footer>Simulated: an engine in virtual time under the daemon's own code. Take "
        "differences between policies from it rather than seconds (docs/simulator.md). A load of 1 "
        "is what is served without speculation.</footer></main></html>\n"
    )
