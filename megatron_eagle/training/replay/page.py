"""A replayed step as one self-contained page: a table of its samples, then what each of them shows."""

from html import escape
from pathlib import Path

from megatron_eagle.data.inspection.preview_html import page, sample_section
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.files import write_whole
from megatron_eagle.training.monitoring.metrics import find_logs
from megatron_eagle.training.replay.replay import PastSample, Replay

_PRINTED = 10  # samples of the highest loss, on the screen
_STYLE = """<style>
table.samples td, table.samples th { border-bottom: 1px solid #d0d7de; padding-right: 1rem; }
table.samples .words { text-align: left; overflow-wrap: anywhere; }
</style>"""


def replay_page(replay: Replay, shown: int) -> str:
    """The page; text, pictures and frames of the first `shown` samples, the others in the table alone."""
    step, samples = replay.step, replay.samples
    tokenizer = load_tokenizer(replay.store.path / "tokenizer")
    sections = "".join(
        sample_section(
            replay.store,
            tokenizer,
            sample.row,
            title=f"Sample {sample.number}: row {sample.row:,}, {sample.dataset}",
            anchor=f"number-{sample.number}",
            note=_words(sample),
            weighting=step.data.loss_weighting,
            multi_turn=step.data.multi_turn,
        )
        for sample in samples[:shown]
    )
    more = len(samples) - shown
    note = f'<p class="note">{more:,} samples are in the table alone (--show).</p>' if more > 0 else ""
    verdict, wrong = replay.verdict
    facts = "".join(f"<p>{escape(sentence)}</p>" for sentence in _facts(replay))
    facts += f'<p class="problem">{escape(verdict)}</p>' if wrong else f"<p>{escape(verdict)}</p>"
    return page(
        f"Iteration {step.iteration:,}",
        replay.store,
        f"{_STYLE}{facts}{_table(replay, shown)}{note}{sections}",
    )


def _facts(replay: Replay) -> list[str]:
    """What is to be said of the step before its samples, in sentences."""
    step, samples = replay.step, replay.samples
    logged = "no finite number" if step.loss is None else f"{step.loss:.6f}"
    norm = "" if step.grad_norm is None else f", gradient norm {step.grad_norm:.4f} (of all samples)"
    found = [
        f"{step.packs} packs from number {step.first_pack:,} of the run on: {len(samples):,} samples, "
        f"{sum(sample.n_tokens for sample in samples):,} tokens. Logged loss {logged}{norm}.",
    ]
    if step.not_taken:
        found.append(f"The optimizer did not take this step: {step.not_taken}.")
    if step.left_out:
        found.append(f"Left out, as their media could not be read: {len(step.left_out)} of the samples.")
    return found


def _table(replay: Replay, shown: int) -> str:
    titles = ["sample", "data set", "file and line", "row", "pack", "tokens", "supervised", "weight, %"]
    if replay.weights is not None:
        titles += ["loss", "of the loss, %", "mean loss", "gradient norm"]
    rows, total = "", replay.total
    for place, sample in enumerate(replay.samples):
        cells = [
            f'<a href="#number-{sample.number}">{sample.number}</a>' if place < shown else str(sample.number),
            escape(sample.dataset),
            escape(f"{sample.file}:{sample.line}"),
            f"{sample.row:,}",
            f"{sample.pack:,}",
            f"{sample.n_tokens:,}",
            f"{sample.n_supervised:,}",
            "left out" if sample.left_out else f"{100 * sample.share:.2f}",
        ]
        if replay.weights is not None:
            part = None if sample.loss is None or not total else 100 * sample.loss / total
            shares = "-" if part is None else f"{part:.2f}"
            cells += [_number(sample.loss), shares, _number(sample.mean_loss), _number(sample.grad_norm)]
        rows += f"</tr><tr>{_cells(cells, 'td')}"
    return f'<table class="samples"><tr>{_cells(titles, "th")}{rows}</tr></table>'


def _cells(texts: list[str], tag: str) -> str:
    kinds = (' class="words"' if place in (1, 2) else "" for place in range(len(texts)))
    return "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True))


def _words(sample: PastSample) -> str:
    if sample.left_out:
        return f"Left out of the step: {sample.left_out}."
    weight = f"{100 * sample.share:.2f} % of the batch's weight"
    if sample.loss is None:
        return f"{weight}."
    return (
        f"{weight}; loss {_number(sample.loss)} (its share of the batch's), mean loss of its tokens "
        f"{_number(sample.mean_loss)}, gradient norm {_number(sample.grad_norm)}."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}"


def replay_summary(replay: Replay) -> str:
    """What to print of it."""
    lines = [*_facts(replay), replay.verdict[0]]
    if replay.weights is not None:
        lines.append(f"{'loss':>10}{'mean loss':>11}{'grad norm':>11}{'tokens':>9}  sample")
        for sample in replay.samples[:_PRINTED]:
            if sample.loss is not None:
                numbers = (sample.loss, sample.mean_loss, sample.grad_norm)
                lines.append(
                    f"{_number(numbers[0]):>10}{_number(numbers[1]):>11}{_number(numbers[2]):>11}"
                    f"{sample.n_tokens:>9,}  {sample.dataset}: {sample.file}:{sample.line} (row {sample.row})"
                )
    return "\n".join(lines)


def write_replay(replay: Replay, run: str | Path, output: str | Path | None, shown: int) -> Path:
    """Write the page, as `replay_N.html` in the run's logs unless `output` names another file; returns where
    it is.

    Raises:
        UserError: the file cannot be written.
    """
    name = f"replay_{replay.step.iteration:07d}.html"
    output = Path(output) if output is not None else (find_logs(run) or Path(run)) / name
    try:
        write_whole(output, replay_page(replay, shown))
    except OSError as error:
        raise UserError(f"{output}: cannot write the page: {error.strerror}") from error
    return output
