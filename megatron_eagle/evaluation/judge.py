"""Answers in free words, compared with accepted ones by a language model behind an OpenAI endpoint."""

import re
from collections.abc import Callable

from megatron_eagle.errors import UserError
from megatron_eagle.inference.generate import Answers, Request, Sampling

_PROMPT = """\
You compare an answer with reference answers to the same question.

Question: {question}
Reference answers: {accepted}
Answer: {answer}

Give 5 if the answer says the same as one of the references, 1 if it is wrong or says nothing, and 2 to 4
if it is partly right. Of a reference with <AND>, all parts are needed; with <OR>, one.
Reply with the number alone."""
_TRIES = 3


class UnusableJudge(UserError):
    """The judge cannot be reached, or does not say a number."""


def make_judge(model: Answers) -> Callable[[str, list[str], str], float]:
    """A `benchmarks.Judge`: its 1 to 5 become 0 to 1.

    The scores depend on the judge and on this prompt; benchmarks whose authors judge with a model of their
    own choice are comparable between runs of one judge, and only roughly with published numbers.

    Raises:
        UnusableJudge: by the judge, if its model fails, and after three replies without a number.
    """

    def judge(question: str, accepted: list[str], answer: str) -> float:
        if not answer.strip():
            return 0.0
        prompt = _PROMPT.format(question=question, accepted="; ".join(accepted), answer=answer)
        for _ in range(_TRIES):
            try:
                reply = model.answer(Request(prompt), Sampling(max_new_tokens=8))
            except UserError as error:  # would be the next question's failure too
                raise UnusableJudge(f"the judge fails: {error}") from None
            if found := re.search(r"[1-5]", reply):
                return (int(found[0]) - 1) / 4
        raise UnusableJudge(f"the judge does not answer with a number from 1 to 5, but {reply[:60]!r}")

    return judge
