"""Score a model on benchmarks.

    %(prog)s list                                                  the published benchmarks that are known
    %(prog)s run --hf H --published NAME --data FOLDER --output O      one of them, in its authors' files
    %(prog)s run --hf H --benchmark B.jsonl --output O                 questions of your own
    %(prog)s frames --hf H --published NAME --data FOLDER --output O   one run for each number of frames
    %(prog)s long-text --tokenizer H --output B.jsonl              questions about long texts, for run
    %(prog)s table O1 O2 ...                                       scores beside the published ones
    %(prog)s report O1 O2 ... --output P.html                          one page of them, with worst answers
    %(prog)s bridge --kit lmms-eval --endpoint URL --tasks T --output O    a script that runs another kit

--endpoint URL asks a server in place of --hf.  B holds one question a line, see
`megatron_eagle/evaluation/benchmarks.py`.  O holds the answers, the scores and what could not be asked; a run
that was stopped goes on.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_eagle.commands.server_options import add_timeout
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import Question, digest_of, read_benchmark
from megatron_eagle.evaluation.bridge import Bridge, write_bridge
from megatron_eagle.evaluation.finished import read_finished
from megatron_eagle.evaluation.judge import Judge
from megatron_eagle.evaluation.kit_names import KITS
from megatron_eagle.evaluation.long_text import long_text_records
from megatron_eagle.evaluation.provenance import note_asked
from megatron_eagle.evaluation.published.facts import FACTS, counts
from megatron_eagle.evaluation.published.held import LocalMedia
from megatron_eagle.evaluation.published.registry import BENCHMARKS
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.evaluation.report import write_report
from megatron_eagle.evaluation.runner import (
    count_readings,
    render_readings,
    render_scores,
    run_benchmark,
    tabulate,
    write_scores,
    write_unscored,
)
from megatron_eagle.evaluation.submission import letters, write_submission
from megatron_eagle.evaluation.summary import comparison, overall, plot_frames, read_result
from megatron_eagle.files import write_lines
from megatron_eagle.inference.generate import Answers, ExportedModel, Sampling
from megatron_eagle.inference.server_client import ServedModel
from megatron_eagle.positions import add_option, check_option


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    options = build_parser(prog).parse_args(argv)
    does = {"list": _list, "run": _run, "frames": _frames, "table": _table, "report": _report}
    {**does, "bridge": _bridge, "long-text": _long_text}[options.command](options)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the published benchmarks, and what Eagle 2.5 8B scored")
    for name, text in (("run", "ask and score"), ("frames", "as run, for several numbers of frames")):
        command = commands.add_parser(name, help=text)
        asked = command.add_mutually_exclusive_group(required=True)
        asked.add_argument("--hf", type=Path, metavar="H", help="exported folder")
        asked.add_argument("--endpoint", metavar="URL", help="a server that speaks OpenAI's chat completions")
        command.add_argument("--model", metavar="NAME", help="at the endpoint (default: its first)")
        what = command.add_mutually_exclusive_group(required=True)
        what.add_argument("--benchmark", type=Path, metavar="B.jsonl", help="questions")
        what.add_argument("--published", metavar="NAME", choices=sorted(BENCHMARKS), help="see list")
        command.add_argument("--data", type=Path, metavar="FOLDER", help="the published benchmark's files")
        command.add_argument("--output", type=Path, required=True, metavar="O", help="folder of the results")
        command.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
        command.add_argument("--fps", type=float, default=2.0, help="of video (default %(default)s)")
        command.add_argument("--max-tiles", type=int, metavar="N", help="per picture (default: the model's)")
        command.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
        command.add_argument(
            "--judge", metavar="URL", help="endpoint of the model that compares free answers"
        )
        command.add_argument("--judge-model", metavar="NAME", help="at that endpoint (default: its first)")
        command.add_argument(
            "--judge-prompt", type=Path, metavar="FILE", help="with {question}, {answer} and {prediction}"
        )
        command.add_argument(
            "--judge-runs",
            type=int,
            metavar="N",
            help="marks of an answer, whose mean counts (default: the authors', 5 for MM-Vet, else 1)",
        )
        add_timeout(command)
        add_option(command)
        if name == "run":
            command.add_argument(
                "--max-frames", type=int, help="per video (default: the benchmark's, or the model's)"
            )
        else:
            command.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    command = commands.add_parser("long-text", help="make questions about long texts, for run")
    command.add_argument(
        "--tokenizer", type=Path, required=True, metavar="H", help="exported folder, or one of a tokenizer"
    )
    command.add_argument("--output", type=Path, required=True, metavar="B.jsonl")
    command.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[4096, 16384, 32768, 65536, 131072],
        metavar="N",
        help="of prompt and answer (default 4096 to 131072)",
    )
    command.add_argument("--repeats", type=int, default=1, help="books of each length (default 1)")
    command = commands.add_parser("table", help="scores of finished runs beside the published ones")
    command.add_argument("folders", type=Path, nargs="+", metavar="O")
    command = commands.add_parser("report", help="finished runs as one HTML page")
    command.add_argument("folders", type=Path, nargs="+", metavar="O")
    command.add_argument(
        "--output", type=Path, metavar="P.html", help="default: report.html in the first folder"
    )
    command = commands.add_parser("bridge", help="run another kit on a served model")
    command.add_argument("--kit", choices=KITS, required=True)
    command.add_argument("--endpoint", metavar="URL", required=True)
    command.add_argument("--model", metavar="NAME", help="at the endpoint (default: its first)")
    command.add_argument(
        "--tasks", nargs="+", required=True, metavar="T", help="as the kit names them, or list"
    )
    command.add_argument("--output", type=Path, required=True, metavar="O")
    command.add_argument("--max-frames", type=int, default=256, help="per video (default %(default)s)")
    command.add_argument(
        "--videos",
        choices=("frames", "files"),
        default="frames",
        help="files: a server with the export's plugin reads them (default %(default)s)",
    )
    command.add_argument(
        "--data", type=Path, metavar="FOLDER", help="the kit's tasks (LMUData) on this machine; asks no hub"
    )
    return parser


def _list(_: argparse.Namespace) -> None:
    print(f"{'benchmark':<20}  {'Eagle 2.5 8B':>12}  {'of':>5}  {'frames':>6}  {'questions':>15}  files")
    for name, published in BENCHMARKS.items():
        reference = "-" if published.reference is None else f"{published.reference:g}"
        counts = " or ".join(f"{split.questions:,}" for split in FACTS[name].splits)
        files = " or ".join(published.files).replace("|", " and ")
        print(
            f"{name:<20}  {reference:>12}  {published.scale:>5g}  {published.max_frames:>6}  "
            f"{counts:>15}  {files}"
        )


def _run(options: argparse.Namespace) -> None:
    published = BENCHMARKS.get(options.published)
    default = published.max_frames if published else None  # the model's own
    _evaluate(options, options.output, default if options.max_frames is None else options.max_frames)


def _frames(options: argparse.Namespace) -> None:
    if options.published is None:
        raise UserError("frames: name a benchmark with --published")
    if BENCHMARKS[options.published].score == "elsewhere":
        raise UserError(f"{options.published}: scored by its authors' server, there is no curve: use run")
    folders = []
    for frames in sorted(set(options.frames)):
        folders.append(options.output / f"frames-{frames}")
        print(f"{frames} frames at most")
        _evaluate(options, folders[-1], frames)
    plot_frames([read_result(folder) for folder in folders], options.output / "frames.png")
    print(f"drawn in {options.output / 'frames.png'}")


def _evaluate(options: argparse.Namespace, output: Path, max_frames: int | None) -> None:
    values = {"fps": options.fps, "max-frames": max_frames, "max-new-tokens": options.max_new_tokens}
    values |= {"max-tiles": options.max_tiles, "limit": options.limit, "judge-runs": options.judge_runs}
    for name, value in values.items():
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be positive, not {value}")
    check_option(options)
    about = {"model": options.endpoint or str(options.hf.resolve())}
    published = BENCHMARKS.get(options.published)
    if published is not None:
        if options.data is None:
            raise UserError("--published needs --data, the folder of the benchmark's files")
        if published.frame_tiles and options.endpoint and not _cuts_frames(options):
            raise UserError(f"{options.published}: frames are tiled, by the export's plugin alone: use --hf")
        source = Source(options.data, options.output / "pictures", options.fps, max_frames)
        questions, problems = published.questions(source)
        about |= {"published": options.published, "data": str(options.data.resolve())}
        if not questions:
            first = f"{problems[0].file}, row {problems[0].line}: {problems[0].reason}" if problems else ""
            first = f"; the first problem: {first}" if first else ""
            raise UserError(f"{options.data}: no question of {options.published}{first}")
        about["questions"] = digest_of(questions)
        print(counts(FACTS[options.published], questions))
    else:
        questions, problems = read_benchmark(options.benchmark)
        digest = hashlib.sha256(options.benchmark.read_bytes()).hexdigest()
        about |= {"benchmark": str(options.benchmark), "sha256": digest}
    sampling = Sampling(options.fps, max_frames, options.max_tiles, options.max_new_tokens)
    judge, judged_by = _judge(options, questions)
    about |= judged_by
    found, questions = questions, questions[: options.limit]  # a run with a higher limit goes on
    progress = partial(tqdm, unit="question")
    asked = partial(_model, options, output)
    with LocalMedia(output / "media") as local:
        scored = run_benchmark(asked, questions, problems, output, sampling, about, progress, judge, local)
    dropped = [json.loads(line) for line in (output / "dropped.jsonl").open(encoding="utf-8")]
    head = {**about, "found": len(found), "limit": options.limit}
    head |= {"sampling": {"max_frames": max_frames, "fps": options.fps}}
    if published and published.score == "elsewhere":
        write_unscored(output, head, _submit(source.tables(*published.files), questions, output))
        _print_dropped(dropped, output)
        return
    if not scored:
        raise UserError(f"{output}: no question was answered; the first problem: {dropped[0]['reason']}")
    rows = tabulate(scored)
    score = overall(published, scored, found) if published else None
    readings = count_readings(output)
    head |= {"read": readings} if readings else {}
    write_scores(output, head, rows, score)
    print(render_scores(rows))
    if published:
        print(f"\n{comparison([read_result(output)])}")
    print(render_readings(readings), end="")
    _print_dropped(dropped, output)


def _print_dropped(dropped: Sequence[Mapping[str, str]], output: Path) -> None:
    if dropped:
        print(f"{len(dropped):,} questions in no score: {output / 'dropped.jsonl'}")
        for kind, count in sorted(Counter(entry["kind"] for entry in dropped).items()):
            first = next(entry for entry in dropped if entry["kind"] == kind)
            where = f"{first['file']}, row {first['line']}: " if first["line"] else ""
            print(f"  {kind}: {count:,}, the first: {where}{first['reason']}")


def _submit(tables: Sequence[Path], questions: Sequence[Question], output: Path) -> int:
    """Write the file for the authors; returns how many questions have an answer."""
    if len(tables) > 1:
        raise UserError(f"several files of questions, one is submitted: {', '.join(map(str, tables))}")
    path = output / "submission.json"
    chosen = letters(output, questions)
    labelled, of = write_submission(tables[0], chosen, path)
    print(f"{labelled:,} of {of:,} questions have a letter in {path}; the authors' server scores it")
    return len(chosen)


def _judge(
    options: argparse.Namespace, questions: Sequence[Question]
) -> tuple[Judge | None, dict[str, str | int]]:
    """The model that compares free answers, and what a run says of it."""
    if options.judge is None:
        for name in ("prompt", "runs"):
            if getattr(options, f"judge_{name}") is not None:
                raise UserError(f"--judge-{name} needs --judge, the endpoint of the model that compares")
        return None, {}
    model = ServedModel(options.judge, options.judge_model, options.timeout)
    prompt = None if options.judge_prompt is None else _read_prompt(options.judge_prompt)
    judge = Judge(model, prompt, options.judge_runs)
    about: dict[str, str | int] = {"judge": options.judge_model or options.judge}
    if prompt is not None:
        about["judge prompt"] = hashlib.sha256(prompt.encode()).hexdigest()
    if (runs := judge.runs_of({question.metric for question in questions})) > 1:
        about["judge runs"] = runs
    return judge, about


def _read_prompt(path: Path) -> str:
    try:
        prompt = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge-prompt: cannot be read: {str(error).splitlines()[0]}") from None
    if missing := [place for place in ("{question}", "{prediction}") if place not in prompt]:
        raise UserError(f"--judge-prompt {path}: has no place {' and '.join(missing)}")
    return prompt


def _model(options: argparse.Namespace, output: Path) -> Answers:
    model: Answers
    if options.hf is None:
        model = ServedModel(options.endpoint, options.model, options.timeout)
    else:
        model = ExportedModel(options.hf, allow_long_prompts=options.allow_long_prompts)
    note_asked(output, model)
    return model


def _cuts_frames(options: argparse.Namespace) -> bool:
    return ServedModel(options.endpoint, options.model).cutting is not None


def _long_text(options: argparse.Namespace) -> None:
    if options.repeats <= 0:
        raise UserError(f"--repeats must be positive, not {options.repeats}")
    count = load_tokenizer(options.tokenizer).count
    records = list(long_text_records(options.tokens, count, options.repeats))
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_lines(options.output, records)
    except OSError as error:
        raise UserError(f"--output {options.output}: {error.strerror}") from None
    print(f"{len(records):,} questions in {options.output}: `megatron-eagle evaluate run --benchmark`")


def _table(options: argparse.Namespace) -> None:
    print(comparison([read_result(folder) for folder in options.folders]))


def _report(options: argparse.Namespace) -> None:
    output = options.output or options.folders[0] / "report.html"
    write_report(output, [run for folder in options.folders for run in read_finished(folder)])
    print(f"written to {output}")


def _bridge(options: argparse.Namespace) -> None:
    if options.max_frames <= 0:
        raise UserError(f"--max-frames must be positive, not {options.max_frames}")
    model = options.model or ServedModel(options.endpoint).model
    about = {name: getattr(options, name) for name in ("endpoint", "tasks", "max_frames", "videos", "data")}
    print(write_bridge(options.kit, Bridge(model=model, **about), options.output), end="")
    print(f"# written to {options.output / 'evaluate.sh'}")
