"""Answers in free words, marked or read off by a language model behind an OpenAI endpoint.

Each benchmark has its authors' scale. The prompts say the same as theirs in our words; `--judge-prompt` takes
a file with the authors' own. A score depends on prompt and model: with those of the authors' judges (GPT-4 of
2023 and 2024) it is comparable only roughly.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.inference.generate import Answers, Request, Sampling

_GENERAL = """\
You compare an answer with reference answers to the same question.

Question: {question}
Reference answers: {answer}
Answer: {prediction}

Give 5 if the answer says the same as one of the references, 1 if it is wrong or says nothing, and 2 to 4
if it is partly right. Of a reference with <AND>, all parts are needed; with <OR>, one.
Reply with the number alone."""
_OPENEQA = """\
You mark how well a response answers a question, as one integer from 1 to 5. The right answer is given, and
sometimes others that are right too. 5: the response agrees wholly with one of them. 1: it agrees with none.

Question: Is the door open?
Answer: yes
Response: no
Your mark: 1

Question: What stands beside the lamp?
Answer: a plant in a pot
Response: a vase
Your mark: 3

Question: How many cushions are on the sofa?
Answer: two
Response: There are 2.
Your mark: 5

Question: {question}
Answer: {answer}
Other right answers: {extra_answers}
Response: {prediction}
Your mark:"""
_MM_VET = """\
Say how correct a prediction is, given the ground truth: a number from 0.0 (all wrong) to 1.0 (all right) in
steps of 0.1. Where the ground truth has <AND>, all of its parts are needed, and each is worth its share;
where it has <OR>, one part is enough. Fill in the last column.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which colours has the flag? | red <AND> white | blue | 0.0
Which colours has the flag? | red <AND> white | white and blue | 0.5
Which colours has the flag? | red <AND> white | It is white and red. | 1.0
Who is it? | the mayor <OR> Anna Berg | This seems to be Anna Berg. | 1.0
Why is this funny? | The dog wears glasses and reads like its owner. | A dog has glasses on. | 0.4
{question} | {answer} | {prediction} |"""
_MMB_VIDEO = """\
Rate how close in meaning a candidate's answer is to the true answer of a question, whatever its grammar:
0: not at all, it is wrong. 1: little, it is mostly wrong. 2: much, it is mostly right. 3: wholly.
Reply with the number alone.

Question: {question}
True answer: {answer}
Candidate's answer: {prediction}
Rating:"""
_CG_BENCH = """\
Say whether a prediction answers a question rightly, going by what it and the true answer mean. Reply with one
digit. 0: they differ and cannot be about the same thing. 1: they agree, or the prediction holds the truth.
2: they differ in words, but may describe the same sight: who judges would have to see it.

Question: {question}
True answer: {answer}
Prediction: {prediction}
Digit:"""
_CG_BENCH_SEEN = """\
The pictures are of the parts of a video that a question is about. Say whether a prediction answers it rightly
by what they show. Reply with one digit: 1 if it does, 0 if not.

Question: {question}
Prediction: {prediction}
Digit:"""
_MATHVISTA = """\
Copy the final answer out of a reply to a question: an option's letter, a number or a list, as the question
asks for it, and nothing else.

Question: How many birds are in the tree? Answer with an integer alone, such as 1.
Reply: I count four on the left and three on the right, so there are seven birds.
Answer: 7

Question: What does one cup cost? (Unit: $) Answer with a number of 2 decimal places alone.
Reply: Three cups cost $3.60, hence one cup costs $1.20.
Answer: 1.20

Question: In which years did sales fall? Answer with a list alone, such as [1, 2, 3].
Reply: They fell in 2011 and once more in 2015.
Answer: [2011, 2015]

Question: Which angle is the largest?
A. 40°
B. 75°
C. 65°
Reply: The largest angle is 75°, which is option (B).
Answer: B

Question: {question}
Reply: {prediction}
Answer:"""
_NUMBER = re.compile(r"(?<![\d.])\d+(?:\.\d+)?(?![\d])")
_TRIES = 3
_EVIDENCE_FRAMES = 8  # of each part of a video


class UnusableJudge(UserError):
    """The judge cannot be reached, or does not say a number."""


@dataclass(frozen=True)
class Scale:
    """How a benchmark's answers are marked.

    Attributes:
        prompt: with `{question}`, `{answer}`, `{extra_answers}` and `{prediction}`.
        low, high: the marks that become 0 and 1.
        whole: marks are integers.
        to_last_period: what follows an answer's last period is not judged.
        seen: if given, 2 is no mark: the judge is asked again with this prompt and the evidence.
        runs: times that an answer is marked; the mean counts.
    """

    prompt: str
    low: float
    high: float
    whole: bool = True
    to_last_period: bool = False
    seen: str = ""
    runs: int = 1


SCALES = {
    "judge": Scale(_GENERAL, 1, 5),
    # facebookresearch/open-eqa: evaluate-predictions.py, prompts/mmbench*.txt (LLM-Match in the paper)
    "judge-openeqa": Scale(_OPENEQA, 1, 5, to_last_period=True),
    # yuweihao/MM-Vet: mm-vet_evaluator.py (num_run is 5 in the paper)
    "judge-mm-vet": Scale(_MM_VET, 0, 1, whole=False, runs=5),
    # open-compass/VLMEvalKit: vlmeval/dataset/utils/mmbench_video.py
    "judge-mmb-video": Scale(_MMB_VIDEO, 0, 3),
    # CG-Bench/CG-Bench: run/utils.py, eval_open_step_1 and eval_open_step_2
    "judge-cg-bench": Scale(_CG_BENCH, 0, 1, seen=_CG_BENCH_SEEN),
}


@dataclass(frozen=True)
class Judge:
    """A language model that marks and reads answers.

    Attributes:
        prompt: in place of those of `SCALES` and of MathVista's extraction.
        runs: times that an answer is marked, in place of those of `SCALES`.
    """

    model: Answers
    prompt: str | None = None
    runs: int | None = None

    def runs_of(self, metrics: Iterable[str]) -> int:
        """How often it marks answers of these metrics, at most."""
        scales = [SCALES[metric].runs for metric in metrics if metric in SCALES]
        return self.runs or max(scales, default=1)

    def mark(
        self,
        metric: str,
        question: str,
        accepted: Sequence[str],
        answer: str,
        evidence: Sequence[str | dict[str, Any]] = (),
    ) -> float:
        """The mean mark of an answer on the metric's scale, as 0 to 1; an empty answer is not asked about.

        Args:
            evidence: videos that show the answer, for a judge that has to see it.

        Raises:
            UnusableJudge: the model fails, or three of its replies hold no mark of the scale.
        """
        scale = SCALES[metric]
        if scale.to_last_period and (end := answer.rfind(".")) >= 0:
            answer = answer[: end + 1]
        if not answer.strip():
            return 0.0
        # Without a place for other right answers all of them stand where the first would.
        prompt = self.prompt or scale.prompt
        first = accepted[:1] if "{extra_answers}" in prompt else accepted
        words = {
            "question": question,
            "answer": re.sub(r"\s*<(AND|OR)>\s*", r" <\1> ", "; ".join(first)),
            "extra_answers": "; ".join(accepted[1:]),
            "prediction": answer,
        }
        asked, shown = (
            Request(_filled(prompt, words)),
            Request(_filled(scale.seen, words), videos=tuple(evidence)),
        )
        marks = [self._mark(asked, shown, scale) for _ in range(self.runs_of([metric]))]
        return (sum(marks) / len(marks) - scale.low) / (scale.high - scale.low)

    def _mark(self, asked: Request, shown: Request, scale: Scale) -> float:
        high = 2 if scale.seen else scale.high
        mark = self._marked(asked, scale, high)
        return self._marked(shown, scale, scale.high) if scale.seen and mark == high else mark

    def _marked(self, request: Request, scale: Scale, high: float) -> float:
        kind = "whole number" if scale.whole else "number"
        wanted = f"a {kind} from {scale.low:g} to {high:g}"
        reply = ""
        for attempt in range(_TRIES):
            # A model that answers the same question the same way is told what is missing.
            more = f"\n\nReply with {wanted} alone." if attempt else ""
            reply = self._reply(replace(request, prompt=request.prompt + more), max_new_tokens=8)
            mark = _NUMBER.search(reply)
            if mark and scale.low <= float(mark[0]) <= high and not (scale.whole and "." in mark[0]):
                return float(mark[0])
        raise UnusableJudge(f"the judge does not answer with {wanted}, but {reply[:60]!r}")

    def extract(self, asked: str, answer: str) -> str:
        """The final answer that a reply gives to what was asked (MathVista).

        Raises:
            UnusableJudge: the model fails.
        """
        words = {"question": asked, "prediction": answer}
        request = Request(_filled(self.prompt or _MATHVISTA, words))
        return self._reply(request, max_new_tokens=64).strip()

    def _reply(self, request: Request, max_new_tokens: int) -> str:
        sampling = Sampling(max_frames=_EVIDENCE_FRAMES, max_new_tokens=max_new_tokens)
        try:
            return self.model.answer(request, sampling)
        except UserError as error:  # would be the next question's failure too
            raise UnusableJudge(f"the judge fails: {error}") from None


def _filled(prompt: str, words: dict[str, str]) -> str:
    """The prompt with its places filled; a brace in a question or an answer is no place."""
    return re.sub(r"\{(\w+)\}", lambda place: words.get(place[1], place[0]), prompt)
