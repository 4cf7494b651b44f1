"""examples/slurm/requeue.sh without Slurm: whom it blames, whom it leaves out, and when it gives up."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.paths import REPO

# As Slurm says it: NumNodes of a job that runs, or is requeued and not yet gone, are those that it has;
# of one that waits its range.
SCONTROL = """#!/bin/bash
[[ ! -e $STANDIN/away || $2 == hostnames ]] || exit 1
state=RUNNING nodes=$SLURM_JOB_NUM_NODES
[[ ! -e $STANDIN/requeued ]] || state=COMPLETING
[[ ${4:-} == "$SLURM_JOB_ID" ]] || state=PENDING nodes=${RANGE:-$nodes}
case "$1 $2" in
    "show hostnames") tr , '\\n' <<<"$3" ;;
    "show job")
        echo "JobId=$4 JobState=$state Restarts=${STARTS:-$SLURM_RESTART_COUNT} Partition=main" \
            "NumNodes=$nodes ExcNodeList=$(cat "$STANDIN/exc-$4")" ;;
    "requeue $SLURM_JOB_ID") touch "$STANDIN/requeued" ;;
    "update JobId="*) echo "${3#ExcNodeList=}" >"$STANDIN/exc-${2#JobId=}" ;;
    *) exit 1 ;;
esac
"""
# Of a list by --nodes, or all.
SINFO = """#!/bin/bash
names=$(printf '%s\\n' "$@" | sed -n 's/^--nodes=//p' | tr , '|')
grep -E "^(${names:-.*}) " "$STANDIN/nodes"
"""
SQUEUE = """#!/bin/bash
cat "$STANDIN/queue"
"""
SCRIPT = """set -euo pipefail
logs=${RANK_LOGS:=$STANDIN} LAUNCH=${LAUNCH:-torchrun}
source examples/launch.sh; source examples/slurm/requeue.sh
begin_history
"""


class Job:
    """A job on n1 and n2 of four nodes; files of its logs are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.restarts = folder, 0
        (folder / "bin").mkdir()
        for name, text in (("scontrol", SCONTROL), ("sinfo", SINFO), ("squeue", SQUEUE)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        for number in (7, 8, 17):
            (folder / f"exc-{number}").write_text("(null)")
        self.states("n1 allocated", "n2 allocated", "n3 idle", "n4 mixed")

    def states(self, *lines: str) -> None:
        (self.folder / "nodes").write_text("\n".join([*lines, ""]))

    def start(self, commands: str, nodes: str = "n1,n2", **environment: str) -> str:
        """A start that ends with these commands; what it prints."""
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "STANDIN": str(self.folder),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_JOB_NUM_NODES": str(nodes.count(",") + 1),
            "SLURM_RESTART_COUNT": str(self.restarts),
            **environment,
        }
        self.restarts += 1
        (self.folder / "requeued").unlink(missing_ok=True)
        command = ["bash", "-c", SCRIPT + commands]
        result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
        return result.stdout + result.stderr

    def history(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "history-7.jsonl").read_text().splitlines()]

    @property
    def excluded(self) -> str:
        return self.excluded_of(7)

    def excluded_of(self, number: int) -> str:
        return (self.folder / f"exc-{number}").read_text().strip()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


BLAME = 'blame; echo "${bad[*]}: $why"'


def ended(*lines: str) -> str:
    """Commands by which nodes say how the run has ended on them."""
    return "".join(
        f'mkdir -p "$logs/{line.split()[1]}"; echo "{line}" >"$logs/{line.split()[1]}/ended-7"\n'
        for line in lines
    )


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["lost n1 rank 0", "killed n2 rank 1 by SIGKILL"], "n2: n2: rank 1 by SIGKILL"),
        (["error n1 rank 0 by its own", "lost n2 rank 1"], "n1: n1: rank 0 by its own"),
        (["lost n1 it did not meet the others"], "n2: n2: said nothing, and the others have lost it"),
        (["error n1 rank 0", "error n2 rank 1"], ": n1: rank 0;n2: rank 1"),
        (["lost n1 rank 0", "lost n2 rank 1"], ": lost n1 rank 0;lost n2 rank 1"),
        ([], ": no process has said why"),
    ],
)
def test_blame(job: Job, lines: list[str], named: str) -> None:
    assert job.start(ended(*lines) + BLAME) == f"{named}\n"


@pytest.mark.parametrize("state", ["down", "allocated*", "draining"])
def test_what_slurm_says_of_a_node_comes_first(job: Job, state: str) -> None:
    job.states("n1 allocated", f"n2 {state}", "n3 down")
    said = job.start(ended("killed n1 rank 0") + BLAME)
    assert said == f"n2: n2: {state}\n"


@pytest.mark.parametrize(
    ("report", "named"),
    [
        ("host n3 is cut off from the others: rank 2 on n3 (pid 5) in iteration 2", "n3"),
        ("silent (process gone or stopped): rank 1 on n2 (pid 5) for 3 s; the furthest is rank 0 in", "n2"),
        ("behind the others: rank 1 on n2 (pid 5) for 3 s, rank 2 on n3 (pid 5) for 3 s, rank 3 on n4 (", ""),
        ("all in the same phase, in a collective: rank 1 on n2 (pid 5)", ""),
        ("hosts n1 and n2 do not reach each other: rank 1 on n2 (pid 5)", ""),
    ],
)
def test_a_hang_names_whom_its_report_names(job: Job, report: str, named: str) -> None:
    log = 'mkdir -p "$logs/n1/7_x"; sleep 0.02; echo "hang: $R" >"$logs/n1/7_x/stderr.log"\n'
    commands = ended("hang n1 rank 0 by status 70") + log + BLAME
    said = job.start(commands, nodes="n1,n2,n3,n4", R=report)
    assert said.startswith(f"{named}: ") and (not named or report in said)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("srun: error: n2: task 1: Killed", "n2"),
        ("srun: error: n2: task 1: Exited with exit code 137", "n2"),
        ("srun: error: n2: task 1: Exited with exit code 1", "n2"),
        ("srun: error: n1,n2: tasks 0-1: Exited with exit code 2", ""),
        ("srun: error: n2: task 1: Terminated", ""),
    ],
)
def test_tasks_of_srun(job: Job, line: str, named: str) -> None:
    """The first line counts: the others were killed by srun itself."""
    said = f'echo "{line}" >"$srun_said"; echo "srun: error: n1: task 0: Killed" >>"$srun_said"\n'
    assert job.start(said + BLAME, LAUNCH="srun").startswith(f"{named}: ")


def test_other_nodes_until_they_run_out(job: Job) -> None:
    """The oldest comes back; what the user has excluded stays."""
    (job.folder / "exc-7").write_text("n9")
    job.states(*(f"n{i} idle" for i in (1, 2, 3, 4, 9)))
    assert "without n9,n1" in job.start("requeue failed 'failed (a)' n1")
    assert job.excluded == "n9,n1"
    assert "without n9,n1,n2" in job.start("requeue failed 'failed (b)' n2", nodes="n2,n3")
    said = job.start("requeue failed 'failed (c)' n3", nodes="n3,n4")
    assert "only 1 other nodes, and the job takes 2: n1 is not left out" in said
    assert job.excluded == "n9,n2,n3"
    assert [line["excluded"] for line in job.history()] == ["n1", "n1,n2", "n2,n3"]
    assert [line["how"] for line in job.history()] == ["failed"] * 3


def test_a_range_of_nodes_that_shrank_gets_them_back(job: Job) -> None:
    """The most that it had counts, and not what it runs on: else it would stay on one node for good."""
    job.states("n1 idle", "n2 idle", "n3 idle")
    assert job.start("requeue failed 'failed (a)' n1").endswith("without n1\n")
    said = job.start("requeue failed 'failed (b)' n2", nodes="n2")
    assert "only 1 other nodes, and the job takes 2: n1 is not left out" in said
    assert job.excluded == "n2"
    assert [line["excluded"] for line in job.history()] == ["n1", "n2"]
    job.restarts = 0  # another job of this number
    (job.folder / "exc-7").write_text("(null)")
    assert job.start("requeue failed 'failed (a)' n1", nodes="n1").endswith("without n1\n")
    assert job.start("requeue failed 'failed (b)' n2", nodes="n2").endswith("without n1,n2\n")


def test_slow_nodes_are_left_out_for_others_only(job: Job) -> None:
    """Others that are left out themselves would come back, and are slow again."""
    said = "usable_nodes; echo; spare_nodes"
    assert job.start(said).split("\n\n")[1].split() == ["n3", "n4"]
    job.start("requeue failed 'failed (a)' n3")
    assert job.start(said).split("\n\n")[1].split() == ["n4"]


def test_none_is_left_out_where_all_are_needed(job: Job) -> None:
    job.states("n1 idle", "n2 idle", "n3 down")
    said = job.start("requeue failed 'failed (a)' n1")
    assert "only 1 other nodes, and the job takes 2: n1 is not left out" in said
    assert said.splitlines()[-1] == "failed (a); job 7 goes back to the queue"


def test_failures_in_a_row_end_it_with_a_report(job: Job) -> None:
    limit = {"MAX_REQUEUES_WITHOUT_PROGRESS": "1"}
    assert "goes back to the queue" in job.start("requeue failed 'failed (first)'", **limit)
    said = job.start("requeue failed 'failed (second)' n1", **limit)
    first, *report = said.splitlines()
    assert first.endswith("was requeued 1 times in a row without a new checkpoint: not again")
    assert [line.rpartition(": ")[2] for line in report] == ["failed (first)", "failed (second)"]
    assert " on n1,n2, saved null" in report[0]
    assert not (job.folder / "requeued").exists()


def test_progress_counts_anew_but_not_for_ever(job: Job) -> None:
    """Failures with progress are counted by MAX_REQUEUES, stops by a signal are not."""
    limits = {"MAX_REQUEUES_WITHOUT_PROGRESS": "1", "MAX_REQUEUES": "2"}
    progress = 'printf "started 0\nsaved 5\n" >"$outcome"\n'
    for _ in range(3):
        assert "goes back" in job.start(progress + "requeue stopped 'stopped by a signal'", **limits)
    for _ in range(2):
        assert "goes back" in job.start(progress + "requeue failed 'failed'", **limits)
    said = job.start(progress + "requeue failed 'failed'", **limits)
    assert "has failed 3 times, and MAX_REQUEUES is 2: not again" in said
    assert job.history()[-1]["saved"] == 5


@pytest.mark.parametrize(
    ("outcome", "progress"),
    [
        ("started 0 /run\nstarted 0 /run\nstarted 0 /run\n", False),  # a crash loop of torchrun's restarts
        ("started 8 /run\nstarted 4 /run\nsaved 8\n", False),  # it fell back, and has what it had
        ("started 8 /run\nstarted 4 /run\nsaved 8\nsaved 12\n", True),
        ("started 8 /run\nstarted 12 /run\n", True),  # killed before it could note its save
        ("started 8 /run\nstopped 8\n", False),
        ("started 8 /run\nstopped 9\n", True),
        ("started 90 /run/one\nstarted 0 /run/two\nstarted 0 /run/two\n", True),  # a stage is finished
        ("started 0\nstarted 0\n", False),
        ("", False),
    ],
)
def test_progress_is_a_newer_checkpoint_or_a_finished_stage(job: Job, outcome: str, progress: bool) -> None:
    job.start(f"printf '{outcome}' >\"$outcome\"; end_history failed 'failed'")
    assert job.history()[0]["progress"] is progress


def test_a_start_that_ended_with_its_node(job: Job) -> None:
    """The next one says so, and the node is left out from the next requeue on."""
    job.start("true")
    job.states("n1 allocated", "n2 down*", "n3 idle", "n4 idle")
    assert "without n2,n1" in job.start("""requeue failed 'it "has" failed' n1""", nodes="n1,n3")
    gone, failed = job.history()
    assert (gone["how"], gone["nodes"]) == ("gone", "n1,n2") and gone["why"].endswith("Slurm says n2 down*")
    assert failed["why"] == "it 'has' failed"


@pytest.mark.parametrize(
    "commands", ["requeue failed 'failed' n1", "leave_to_later_start; end_history gone x"]
)
def test_a_start_that_was_cut_off_leaves_the_job_to_the_next(job: Job, commands: str) -> None:
    """Its node is reached again, and the job runs on others: nothing of theirs is touched. Slurm ends it."""
    said = job.start(f"sleep() {{ echo until it is ended; }}; {commands}", STARTS="1")
    assert said.splitlines() == [
        "Slurm itself has requeued job 7: this start ends, and leaves it alone",
        "until it is ended",
    ]
    assert not (job.folder / "requeued").exists() and job.excluded == "(null)" and not job.history()
    assert "without n1" in job.start("requeue failed 'failed' n1")


def test_a_requeue_by_slurm_itself_is_not_held_up(job: Job) -> None:
    commands = 'touch "$STANDIN/requeued"; sleep() { echo held up; }; requeue failed "failed"'
    said = job.start(commands, STARTS="1")
    assert "this start ends" in said and "held up" not in said


def test_a_slurm_that_does_not_answer_is_waited_for(job: Job) -> None:
    """It is restarted, or the node is cut off: without an answer the run would end here."""
    commands = 'touch "$STANDIN/away"; sleep() { rm "$STANDIN/away"; }; requeue failed "failed"'
    assert job.start(commands).startswith("Slurm does not answer; waiting for it\nfailed; job 7 goes back")


def test_a_start_that_cannot_be_noted_is_the_last(job: Job) -> None:
    """On a full disk nothing would count, and the job would be requeued for ever."""
    said = job.start("trap '' XFSZ; ulimit -f 0; requeue failed 'failed'")
    assert said.endswith("history-7.jsonl cannot be written (is its disk full?): not again\n")
    assert not (job.folder / "requeued").exists()


def test_a_start_is_one_line_whatever_is_said(job: Job) -> None:
    """Or what counts starts without progress counts its words."""
    lines = ended("hang n1 rank 0 by status 70", "hang n2 rank 1 by status 70")
    said = job.start(lines + 'blame; requeue failed "failed ($why)"')
    assert said.startswith("failed (hang n1 rank 0 by status 70;hang n2 rank 1 by status 70); job 7 goes")
    job.start("end_history failed $'a \"word\"\\nin\\ttwo\\\\lines'")
    assert [line["why"] for line in job.history()] == [said.rpartition("; job 7")[0], "a 'word' in two/lines"]


def test_another_job_of_the_same_number_begins_anew(job: Job) -> None:
    job.start("requeue failed 'failed' n1")
    job.restarts = 0
    job.start("end_history finished finished")
    assert [line["how"] for line in job.history()] == ["finished"]


QUEUE = """8 afterok:7(unfulfilled) /x/train.sbatch run.yaml --stage two
9 afterok:7(unfulfilled) /x/evaluate.sh
17 afterok:8(unfulfilled) /x/train.sbatch run.yaml --stage three
"""


def test_the_next_stage_goes_without_what_a_stage_has_left_out(job: Job) -> None:
    """It alone, and not other jobs that wait; it takes them for its own, which come back where they must."""
    (job.folder / "queue").write_text(QUEUE)
    job.start("requeue failed 'failed' n1")
    (job.folder / "exc-8").write_text("n9")
    assert job.start("pass_on", nodes="n2,n3") == "job 8, which waits for this one, goes without n1, too\n"
    assert [job.excluded_of(number) for number in (8, 17)] == ["n9,n1", "(null)"]

    (job.folder / "exc-7").write_text("n9,n1")
    job.restarts, changed = 0, {"SLURM_JOB_ID": "8", "AFTER_JOB": "7"}
    said = job.start("requeue failed 'failed (b)' n2", nodes="n2,n3", **changed)
    assert said.endswith("without n9,n1,n2\n")


def test_too_few_nodes_for_the_next_stage(job: Job) -> None:
    (job.folder / "queue").write_text(QUEUE)
    job.start("requeue failed 'failed' n1")
    job.states("n1 idle", "n2 idle", "n3 down", "n4 idle")
    said = job.start("pass_on", nodes="n2", RANGE="1-3")
    assert said == "only 2 other nodes, and the job takes 3: n1 is not left out\n"
    assert job.excluded_of(8) == "(null)"


def test_nothing_to_pass_on(job: Job) -> None:
    (job.folder / "queue").write_text(QUEUE)
    assert job.start("pass_on") == ""
    assert job.excluded_of(8) == "(null)"
