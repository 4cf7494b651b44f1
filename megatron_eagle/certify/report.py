"""A certificate for a terminal: a line for each sample, what differs by design, the first difference."""

from megatron_eagle.certify.certifying import PATHS, Certificate, SampleResult


def report(certificate: Certificate) -> str:
    """The text."""
    content, results = certificate.content, certificate.results
    width = max([len("sample"), *(len(result.name) for result in results)])
    lines = [f"{'sample':{width}}  {'tokens':>7}  {'':30}first difference"]
    lines += [
        f"{result.name:{width}}  {result.tokens:>7,}  {_numbers(result):30}{result.first or 'none'}"
        for result in results
    ]
    lines += [f"{path}: {what}" for path, what in content["paths"].items()]
    lines += [f"differs by design: {what}" for what in content["by_design"]]
    reasons = dict.fromkeys(reason for result in results for reason in result.not_compared)
    for reason in reasons:
        count = sum(reason in result.not_compared for result in results)
        lines.append(f"not compared, {count} of {len(results)} samples: {reason}")
    for result in results:
        lines += [
            f"{result.name}: the messages of {kit} differ at {found}"
            for kit, found in result.differences.items()
            if kit not in PATHS
        ]
    for path in PATHS:
        lines += _in_all(path, results)
    if certificate.green:
        lines.append("GREEN: no difference")
    else:
        lines.append(f"RED: {content['first_difference'] or 'nothing could be compared'}")
    return "\n".join(lines)


def _numbers(result: SampleResult) -> str:
    return "  ".join(f"{name.split(': ')[1].split('_')[-1]} {far:.1e}" for name, far in result.apart.items())


def _in_all(path: str, results: list[SampleResult]) -> list[str]:
    found = [result.differences[path].stage for result in results if path in result.differences]
    counts = {stage: found.count(stage) for stage in dict.fromkeys(found)}
    return [
        f"{path} differs at {stage} in {count} of {len(results)} samples" for stage, count in counts.items()
    ]
