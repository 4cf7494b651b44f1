"""Train: `torchrun --nproc-per-node N -m megatron_eagle train run --config FILE [a.b=c ...]`; watch it."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_eagle.commands.rehearse import add_rehearse, run_rehearse
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.slurm_step import step_processes


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int | None:
    """Run the command; returns its exit status."""
    parser = build_parser(prog)
    arguments, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in arguments or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes overrides in one place; here options may stand between them
        arguments.overrides = arguments.overrides + rest
    if arguments.command in ("run", "replay") and not _join_step():
        return 2
    if arguments.command == "report":
        return _report(arguments.run, arguments.output)
    if arguments.command == "status":
        return _status(arguments.run)
    if arguments.command == "check":
        return _check(arguments)
    if arguments.command == "replay":
        return _replay(arguments)
    if arguments.command == "preflight":
        return _preflight(arguments)
    if arguments.command == "rehearse":
        return run_rehearse(arguments)
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return _run(arguments)
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(_run)(arguments)  # what this process ends by, for the torchrun that has started it


def _join_step() -> bool:
    """Take this process' place among those of `srun`; whether it has one, which the first says for all."""
    try:
        os.environ |= step_processes(os.environ)
    except UserError:
        if os.environ.get("SLURM_PROCID", "0") == "0":
            raise
        return False
    return True


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, or resume where the checkpoint folder stands")
    check = commands.add_parser("check", help="look at settings, data and folders, without training")
    preflight = commands.add_parser(
        "preflight",
        help="look at the nodes of a job before it trains: folders, clocks, packages, GPUs, messages",
        description="Started as the run will be (torchrun, srun, or alone). Status 0: nothing stands in the "
        "way; 2: a mistake, which other nodes would not mend; 3: a node is bad; 4: of a process that rank 0 "
        "says nothing to.",
    )
    for command in (run, check, preflight):
        command.add_argument(
            "--config", required=True, metavar="FILE", help="the run's file, or one of stages"
        )
        command.add_argument("--stage", metavar="NAME", help="only this stage of a file (default: all)")
        command.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings in place of the file's")
    run.add_argument(
        "--stopped-status",
        type=int,
        metavar="N",
        help="of a run that a signal stopped, when it has saved (default 75); 0 for a torchrun that would "
        "start it again",
    )
    run.add_argument(
        "--outcome",
        metavar="FILE",
        help="lines are added here for whoever may start it again: `started N FOLDER`, `saved N`, "
        "`stopped N` (told to, and saved), `failed` (a mistake: again would not help). A stop or a mistake "
        "ends with status 0 then, so that torchrun starts nothing again",
    )
    check.add_argument("--processes", type=int, required=True, metavar="N", help="of the job, on all nodes")
    _add_preflight(preflight)
    report = commands.add_parser("report", help="draw a run's logs into one HTML file")
    report.add_argument("run", metavar="RUN", help="a run's folder of checkpoints, or of logs")
    report.add_argument("--output", metavar="FILE", help="default: report.html in the run's logs")
    status = commands.add_parser(
        "status", help="whose run it is, where each of its ranks stands, who is behind"
    )
    status.add_argument("run", metavar="RUN", help="a run's folder of checkpoints, or of logs")
    _add_replay(commands)
    add_rehearse(commands)
    return parser


def _check(arguments: argparse.Namespace) -> int:
    from megatron_eagle.training.preflight import check_runs
    from megatron_eagle.training.stages import load_stages

    configs = load_stages(
        arguments.config, arguments.overrides, stage=arguments.stage, world_size=arguments.processes
    )
    print(*check_runs(configs, arguments.processes), sep="\n")
    return 0


def _add_preflight(preflight: argparse.ArgumentParser) -> None:
    add = preflight.add_argument
    add(
        "--seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="how long each part may take: until all processes have come, their look at the nodes, their "
        "messages (default: %(default)g)",
    )
    add(
        "--meet-seconds",
        type=float,
        metavar="S",
        help="until all processes have come, where that may take longer (default: as --seconds)",
    )
    add(
        "--writes",
        action="append",
        default=[],
        metavar="FOLDER",
        help="another folder that all nodes write; may be given several times",
    )
    add("--exclude-slow", action="store_true", help="a slow node counts as bad (default: it is named)")
    add("--bad-nodes", metavar="FILE", help="add the names of bad nodes to this file, a line each")


def _preflight(arguments: argparse.Namespace) -> int:
    _quiet()
    from megatron_eagle.preflight.meeting import UNMET, Meeting
    from megatron_eagle.preflight.nodes import Participant, leave, own_process, patience, wait_for_verdict

    meet_seconds = arguments.seconds if arguments.meet_seconds is None else arguments.meet_seconds
    for name, seconds in (("--seconds", arguments.seconds), ("--meet-seconds", meet_seconds)):
        if not 0 < seconds < 86_400:
            raise UserError(f"{name} {seconds:g}: expected more than 0, and less than a day")
    process, environment = own_process(os.environ)
    silence = patience(arguments.seconds, meet_seconds)
    try:
        meeting = Meeting(process, environment, meet_seconds)
        part = Participant(meeting.again(), silence)
        if process.rank > 0:
            return leave(wait_for_verdict(meeting, silence), part)
    except UserError as error:
        if process.rank == 0:
            raise
        print(f"error: {error}", file=sys.stderr)
        return UNMET
    from megatron_eagle.preflight.lead import PreflightRequest, lead

    request = PreflightRequest(
        config=arguments.config,
        overrides=arguments.overrides,
        stage=arguments.stage,
        seconds=arguments.seconds,
        meet_seconds=meet_seconds,
        written=arguments.writes,
        exclude_slow=arguments.exclude_slow,
        bad_nodes=arguments.bad_nodes,
    )
    return leave(lead(meeting, request, environment), part)


def _report(run: str, output: str | None) -> int:
    from megatron_eagle.training.monitoring.report import write_run_report

    print(write_run_report(run, output))
    return 0


def _status(run: str) -> int:
    from megatron_eagle.training.monitoring.heartbeat import HEARTBEATS, status
    from megatron_eagle.training.resilience.owner import describe_owner

    folder, logs = Path(run), Path(run, "logs")
    if (folder / HEARTBEATS).is_dir():
        folder, logs = folder.parent, folder
    if owner := describe_owner(folder):  # before its ranks have begun, too
        print(f"owner: {owner}", flush=True)
    ranks = status(logs)
    print(ranks if owner else f"owner: none, no run writes here now\n{ranks}")
    return 0


def _add_replay(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    replay = commands.add_parser(
        "replay",
        help="the samples of a past step as a page, each with its loss and gradient norm",
        usage="%(prog)s RUN (--iteration N | --around-spike) [--checkpoint C] [options] [a.b=c ...]",
    )
    replay.set_defaults(overrides=[])  # argparse takes none after RUN and options: see main
    add = replay.add_argument
    add("run", metavar="RUN", help="a run's folder of checkpoints, or of logs")
    which = replay.add_mutually_exclusive_group(required=True)
    which.add_argument("--iteration", type=int, metavar="N")
    which.add_argument(
        "--around-spike", action="store_true", help="the last step refused, or the largest jump of the loss"
    )
    add(
        "--checkpoint",
        metavar="C",
        help="whose weights to ask, RUN itself or another (default: none, data alone)",
    )
    add("--output", metavar="FILE", help="default: replay_N.html in the run's logs")
    add("--show", type=int, default=100, metavar="K", help="samples shown in full (default: %(default)s)")


def _replay(arguments: argparse.Namespace) -> int:
    _quiet()
    from megatron_eagle.training.replay.history import History
    from megatron_eagle.training.replay.page import replay_summary, write_replay
    from megatron_eagle.training.replay.replay import measure_losses, prepare

    if arguments.show < 0:
        raise UserError(f"--show {arguments.show}: expected 0 or more samples")
    first, prepared = os.environ.get("RANK", "0") == "0", None
    try:
        iteration = arguments.iteration
        if arguments.around_spike:
            iteration, reason = History(arguments.run).spike()
            if first:
                print(f"iteration {iteration}: {reason}")
        overrides = arguments.overrides
        prepared = prepare(arguments.run, iteration, checkpoint=arguments.checkpoint, overrides=overrides)
        replay = measure_losses(prepared) if prepared.weights is not None else prepared
    except UserError as error:
        if _said_by_first(error, alike=prepared is None):
            return 2
        raise
    if first:
        print(replay_summary(replay))  # a page that cannot be written does not take it along
        print(f"written to {write_replay(replay, arguments.run, arguments.output, arguments.show)}")
    return 0


def _said_by_first(error: UserError, *, alike: bool) -> bool:
    """Whether rank 0 prints the same, and this is another."""
    return os.environ.get("RANK", "0") != "0" and _found_by_all(error, alike=alike)


def _found_by_all(error: UserError, *, alike: bool) -> bool:
    """An agreed error, or one of what all ranks do alike (read settings)."""
    from megatron_eagle.runtime.agreement import AgreedError

    return alike or isinstance(error, AgreedError)


def _quiet() -> None:
    """Libraries announce per rank what is not installed (Apex, Transformer Engine) or will be renamed."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _run(arguments: argparse.Namespace) -> int:
    _quiet()
    from megatron_eagle.training.resilience.outcome import note_outcome
    from megatron_eagle.training.resilience.policy import EXIT_REQUEUE, Preempted
    from megatron_eagle.training.stages import load_stages, train_stages
    from megatron_eagle.training.train import standard_observers, train

    outcome = None if arguments.outcome is None else Path(arguments.outcome)
    stopped_status: int | None = arguments.stopped_status
    if stopped_status is None:
        stopped_status = EXIT_REQUEUE if outcome is None else 0
    started, first = False, os.environ.get("RANK", "0") == "0"
    try:
        configs = load_stages(arguments.config, arguments.overrides, stage=arguments.stage)
        started = True
        train_stages(configs, partial(train, observe=partial(standard_observers, outcome=outcome)))
    except Preempted as stopped:
        if first:
            saved = stopped.iteration
            if outcome and saved is not None and not note_outcome(outcome, "stopped", saved):
                stopped_status = EXIT_REQUEUE  # the script must not take it for finished
            print(f"{stopped}; start again to go on (status {stopped_status})", file=sys.stderr)
        return stopped_status
    except UserError as error:
        if outcome is None or not _found_by_all(error, alike=not started):
            if _said_by_first(error, alike=not started):
                return 2
            raise
        if first:
            print(f"error: {error}", file=sys.stderr)
            if not note_outcome(outcome, "failed"):
                return 2
    return 0
