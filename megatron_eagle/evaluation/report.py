"""Evaluations as one HTML page that needs nothing else, for colleagues and for an appendix.

The table beside the published scores, bars of the categories, the curve over numbers of frames, the worst
answers with what they were asked about, and what was run on what.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import Question
from megatron_eagle.evaluation.finished import Finished, worst
from megatron_eagle.evaluation.metrics import LETTERS
from megatron_eagle.evaluation.published.held import LocalMedia
from megatron_eagle.evaluation.shown_media import media_figures
from megatron_eagle.evaluation.summary import comparison_rows, plot_frames, remarks
from megatron_eagle.files import write_whole
from megatron_eagle.inference.generate import Sampling

_WORST = 10  # of each benchmark
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem;
  color: #1f2328 }
h1 { font-size: 1.5rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 2px solid #d0d7de; padding-top: 1rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
table { border-collapse: collapse }
td, th { padding: .2rem 1.2rem .2rem 0; text-align: left; border-bottom: 1px solid #eee }
th { color: #57606a; font-weight: normal } .number { text-align: right; font-variant-numeric: tabular-nums }
.note, figcaption { color: #57606a } .problem { color: #cf222e } .right { color: #1a7f37 }
.bar { width: 340px } .bar div { background: #54a3ea; height: .8em; min-width: 1px }
.question { border: 1px solid #d0d7de; border-radius: 6px; padding: .6rem 1rem; margin: 0 0 1rem }
.question p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
.media { display: flex; flex-wrap: wrap; gap: .6rem; margin: .5rem 0 }
figure { margin: 0 } figcaption { font-size: 12px }
.media img, .curve { max-width: 100% }
"""


def write_report(path: Path, runs: Sequence[Finished]) -> None:
    """Write the page.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_whole(path, render_evaluations(runs))
    except OSError as error:
        raise UserError(f"{path}: cannot write the report: {error.strerror}") from None


def render_evaluations(runs: Sequence[Finished]) -> str:
    """The page. Whatever comes from models, data or users is escaped."""
    models = dict.fromkeys(run.scores["model"] for run in runs)
    title = f"Evaluation of {escape(', '.join(m if '://' in m else Path(m).name for m in models))}"
    # Of a curve's runs those with most frames; `read_finished` has them last.
    longest = {(run.name, run.scores["model"]): run for run in runs}.values()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    body = [_overview(runs), _curve(runs)]
    body += [_section(run, with_answers=run in longest) for run in runs]
    body.append(_provenance(runs))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n{''.join(body)}</body></html>\n"
    )


def _overview(runs: Sequence[Finished]) -> str:
    """Published benchmarks beside their published scores; of others, the questions and their mean."""
    results = [run.result for run in runs if run.result is not None]
    own = [run for run in runs if run.result is None]
    parts = []
    if results:
        head, *rows = comparison_rows(results)
        frames = [_frames(run) for run in runs if run.result is not None]
        cells = [[name, shown, *numbers] for (name, *numbers), shown in zip(rows, frames, strict=True)]
        parts.append("<h2>Beside Eagle 2.5 8B as published</h2>")
        parts.append(_table([head[0], "frames at most", *head[1:]], cells))
        parts += [f"<p>{escape(note)}</p>" for note in remarks(results)]
    if own:
        rows = [[run.name, _frames(run), *_summed(run)] for run in own]
        parts.append("<h2>Other questions</h2>")
        parts.append(_table(["benchmark", "frames at most", "metric", "asked", "score"], rows, texts=3))
    return "".join(parts)


def _frames(run: Finished) -> str:
    most = run.sampling.max_frames
    return "the model's" if most is None else f"{most:,}"


def _summed(run: Finished) -> list[str]:
    """Metrics, questions and scores: of each metric its last row, which is that over all categories."""
    last = {row["metric"]: row for row in run.scores["rows"]}.values()
    columns = zip(
        *((row["metric"], f"{row['n']:,}", f"{100 * row['score']:.2f}") for row in last), strict=True
    )
    return [", ".join(column) for column in columns]


def _curve(runs: Sequence[Finished]) -> str:
    """Of benchmarks that were run with several numbers of frames."""
    limited = [run for run in runs if run.sampling.max_frames is not None]
    results = [run.result for run in limited if run.result is not None]
    several = [r for r in results if len({o.frames for o in results if o.benchmark == r.benchmark}) > 1]
    if not several:
        return ""
    png = io.BytesIO()
    plot_frames(several, png)
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return f'<h2>Frames</h2><img class="curve" src="{url}" alt="score over the number of frames">'


def _section(run: Finished, *, with_answers: bool) -> str:
    limited = run.sampling.max_frames is not None
    title = escape(run.name) + (f", {_frames(run)} frames at most" if limited else "")
    parts = [f"<h2>{title}</h2>", _bars(run) if run.scores["rows"] else _unscored(run), _dropped(run)]
    return "".join([*parts, _worst_answers(run) if with_answers and run.scores["rows"] else ""])


def _unscored(run: Finished) -> str:
    said = f"{len(run.answers):,} answers are not scored here"
    return f"<p>{said}: submission.json in its folder is for the authors' server.</p>"


def _bars(run: Finished) -> str:
    """A bar for each category; in parts of 100, whatever the benchmark's own scale is."""
    rows = [
        f"<tr><td>{escape(row['category'])}</td><td>{escape(row['metric'])}</td>"
        f'<td class="number">{row["n"]:,}</td><td class="number">{100 * row["score"]:.1f}</td>'
        f'<td class="bar"><div style="width:{100 * row["score"]:.1f}%"></div></td></tr>'
        for row in run.scores["rows"]
    ]
    numbers = '<th class="number">n</th><th class="number">score</th>'
    head = f"<tr><th>category</th><th>metric</th>{numbers}<th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _dropped(run: Finished) -> str:
    lines = [
        f'<p class="problem">{n:,} in no score: {escape(kind)}; the first: {escape(reason)}</p>'
        for kind, n, reason in run.dropped_kinds
    ]
    return "".join(lines)


def _worst_answers(run: Finished) -> str:
    wrong = [answer for answer in run.answers if answer["score"] < 1]
    if not wrong:
        return '<p class="right">Every answer has the full score.</p>'
    head = "<h3>The worst answers</h3>"
    try:
        chosen = worst(wrong, run.questions(), _WORST)
    except UserError as error:
        return f'{head}<p class="problem">the questions cannot be read again: {escape(str(error))}</p>'
    with LocalMedia(run.folder / "media") as local:
        return head + "".join(_answer(question, answer, run.sampling, local) for question, answer in chosen)


def _answer(question: Question, answer: dict[str, Any], sampling: Sampling, local: LocalMedia) -> str:
    options = "".join(
        f"<br>{letter}. {escape(option)}" for letter, option in zip(LETTERS, question.options, strict=False)
    )
    right = question.answer if isinstance(question.answer, str) else ", ".join(map(str, question.answer))
    right = right or "none: its table has no right answer"
    return (
        f'<div class="question"><p class="note">{escape(question.id)}, {escape(question.category)}, '
        f"{100 * answer['score']:.0f} of 100 by {escape(question.metric)}</p>"
        f"{media_figures(question.request, sampling, local)}<p>{escape(question.question)}{options}</p>"
        f'<p class="problem">answered: {escape(answer["answer"]) or "(nothing)"}</p>'
        f'<p class="right">expected: {escape(right)}</p></div>'
    )


def _provenance(runs: Sequence[Finished]) -> str:
    """Who answered, and how it was asked; a line for each start of a run."""
    rows = []
    for run in runs:
        settings = {name.replace("_", " "): value for name, value in asdict(run.sampling).items()}
        settings |= {"judge": run.scores.get("judge"), "limit": run.scores.get("limit")}
        how = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
        for start in run.asked or [{}]:
            versions = ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())
            certificate = start.get("certificate") or "none"
            rows.append([run.name, start.get("date", ""), run.scores["model"], certificate, versions, how])
    head = ["benchmark", "started", "model", "certificate", "versions", "asked with"]
    return f"<h2>What was run</h2>{_table(head, rows, texts=len(head))}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """`texts` columns of text, then numbers."""
    kinds = [""] * texts + [' class="number"'] * (len(head) - texts)
    lines = [[f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, head, strict=True)]]
    lines += [
        [f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)] for row in rows
    ]
    return "<table>" + "".join(f"<tr>{''.join(line)}</tr>" for line in lines) + "</table>"
