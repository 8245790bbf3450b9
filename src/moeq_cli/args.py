"""The command line's verbs and options, as argparse knows them; frozen by a test."""

import argparse
from collections.abc import Callable

import shtab

from moeq_cli.parser import Parser, Version, usage


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a Recipe, by what they are about; defaults stay None so that a recipe file can fill them."""
    _budget_and_method(parser)
    _calibration_arguments(parser)
    _rounding_arguments(parser)
    _allocation_arguments(parser)
    add = parser.add_argument_group("advanced").add_argument
    add("--dense-bits", help="other linears: 16 (default), 8, 6, 4, attention=4,shared=8,dense=8,lm_head=16, or auto")
    add("--mtp", help="layers that predict further tokens: keep (default), pack or drop")
    add("--rank", help="tileq: components of the shared factors; auto: what the budget leaves (default: few or none)")
    add("--allocation", help="tileq: the method that chooses the residuals' widths, as gemq (default: all alike)")
    add("--tile-options", metavar="NAME=VALUE,...", help="tileq: choices of its tiles, as grid=8x16,rotation=expert")
    add("--progressive", metavar="BITS", help="falling budgets to go through before the last, as 3,2.5")
    add("--context", metavar="DIR", help="measure costs on this packed checkpoint's activations and gradients")
    add("--round-context", action=argparse.BooleanOptionalAction, help="costs of rounding the context once more")
    add("--trust-remote-code", action="store_true", default=None, help=TRUST)


def _budget_and_method(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("budget").add_argument
    add("--bits", type=float, help="mean stored bits per expert weight, scales and padding included")
    add("--size", help="bytes of the whole checkpoint instead: 8GB, 7.5GiB")
    add("--accounting", help="bytes (default) or codes: --bits counts code bits only, as papers do")
    add = parser.add_argument_group("method").add_argument
    add("--method", help="how bits are allocated (default auto; uniform without calibration text)")
    add("--effort", help="auto: fast, normal (default: checked against uniform), best, or a time to keep to, as 2h")
    add("--preset", help="paper: the method as its paper has it, instead of what was measured to be best")
    add("--recipe", metavar="FILE", help="YAML file with any of these options; the command line wins")
    add("--plan", metavar="FILE", help="follow this plan instead of allocating")
    add("--costs", metavar="FILE", help="allocate by these costs (moeq measure) instead of measuring")
    add("--device", help="auto (default), cpu or cuda[:n]")
    add("--serve", help="what will run it: moeq (default), vllm-native or gguf; see moeq export")
    add("--seed", type=int, help="seed of everything random (default 0)")


def _calibration_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("calibration").add_argument
    add("--calibration", metavar="TEXTS", help=TEXTS)
    add("--nsamples", type=int, help="calibration sequences (default 128)")
    add("--seqlen", type=int, help="tokens of a sequence (default 512)")
    add("--routing", help="whose statistics see a token: natural (default), all, or r for top-k x r")
    add("--quality", action=argparse.BooleanOptionalAction, help="measure small models on held-out text (default on)")
    add("--tune", help="train after packing: none (default), or model: scales, norms, biases and routers, by kl")
    add("--router", help="tune routers after packing: none, task (next-token loss) or kl (to the original)")
    _tuning_arguments(add)


def _rounding_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rounding").add_argument
    add(
        "--quantizer",
        help="minmax, rtn, hqq, gptq, gptq-mc, trellis, vector, ggml, ggml-rtn "
        "(default: trellis for auto and gemq, gptq for others, hqq without calibration text)",
    )
    add("--group-size", type=int, help="inputs per scale: 32, 64, 128 (default) or -1 for whole rows")
    add("--levels", help="auto (default), asym, asym16, sym or half")
    add("--compensate", action=argparse.BooleanOptionalAction, help="fit down to rounded gate and up (default: auto)")
    add("--act-order", action=argparse.BooleanOptionalAction, help="gptq: important columns first (default on)")
    add("--damp", type=float, help="gptq: damping in mean diagonals (default 0.1)")
    add("--gain", action=argparse.BooleanOptionalAction, help="match the gain of what was rounded (default on)")


def _allocation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("allocation").add_argument
    add("--cost", help="what ranks units: fisher, output-error, spectral-tail, weight-error (default: the method's)")
    add("--cost-options", metavar="NAME=VALUE,...", help="options of the cost, as gamma=12,noise=measured")
    add("--unit", help="expert or matrix: what gets its own width (default: the method's)")
    add("--candidates", help="code widths that a unit may get, as 1,2,3 (default: the method's)")
    add("--scope", help="global: one program over the model; layer: each layer gets its share of the budget")
    add("--shares", help="minimum shares in every layer: none, c2c3, 3:1,2:1 or 3+:10%%")
    add("--solver", help="auto (default), milp, dp or lagrangian")


def _tuning_arguments(add: Callable[..., argparse.Action]) -> None:
    add("--router-epochs", type=int, help="passes over the calibration text (default 1)")
    add("--router-lr", type=float, help="learning rate (default 0.0001, of the model 0.00015)")


START = """start with:
  moeq plan MODEL --bits 2.5             what would happen
  moeq quantize MODEL OUT --bits 2.5     make it
  moeq run OUT                           talk with it"""
EXAMPLES = {
    "plan": "moeq plan allenai/OLMoE-1B-7B-0924 --size 2.5GB",
    "inspect": "moeq inspect OLMoE-3bit",
    "quantize": "moeq quantize allenai/OLMoE-1B-7B-0924 OLMoE-2.5bit --bits 2.5 --calibration web.txt,code.jsonl",
    "measure": "moeq measure OLMoE costs.json --calibration web.txt",
    "allocate": "moeq allocate OLMoE plan.json --costs costs.json --bits 2.5 --svg widths.svg",
    "pareto": "moeq pareto OLMoE --costs costs.json --points 40",
    "export": "moeq export compressed-tensors OLMoE-4bit OLMoE-4bit-ct",
    "imatrix": "moeq imatrix OLMoE OLMoE-imatrix.gguf --calibration web.txt,code.jsonl",
    "repair": "moeq repair OLMoE-2.5bit OLMoE-tuned --tune model --reference OLMoE --calibration web.txt",
    "eval": "moeq eval OLMoE-2.5bit --text wiki.txt --reference OLMoE",
    "compare": "moeq compare OLMoE-2.5bit OLMoE-3bit --text wiki.txt web.txt --reference OLMoE",
    "generate": 'moeq generate OLMoE-2.5bit "The old man looked at the sea and"',
    "run": "moeq run OLMoE-2.5bit",
    "serve": "moeq serve OLMoE-2.5bit --port 8000",
    "push": "moeq push OLMoE-2.5bit me/OLMoE-1B-7B-2.5bit --yes",
    "report": "moeq report OLMoE-2.5bit OLMoE-3bit -o report.html",
    "bench": "moeq bench OLMoE-2.5bit",
    "verify": "moeq verify OLMoE-2.5bit",
    "doctor": "moeq doctor --json",
}
"""Verb -> a call of it."""
TEXTS = (
    "txt (a document per line), jsonl, parquet, directory, hub id; several: A:0.5,B:0.5; bundled[-web|-mixture], none"
)
"""Of --calibration."""
TRUST = "run the code in the model's directory, for models that transformers does not have"
"""Of --trust-remote-code."""
Verb = Callable[[str, str], argparse.ArgumentParser]
"""(name, what it does) -> its parser."""


def build_parser() -> Parser:
    """All verbs and options; frozen by a test."""
    parser = Parser(prog="moeq", description="Make Mixture-of-Experts language models small.", epilog=START)
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    shtab.add_argument_to(parser, "--print-completion", help="print a script: bash, zsh, tcsh or fish")
    parser._actions[-1].metavar = "SHELL"
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", prog="moeq")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        description = text[0].upper() + text[1:] + "."
        sub = verbs.add_parser(name, help=text, description=description, epilog=f"example:\n  {EXAMPLES[name]}")
        sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
        sub.add_argument("--quiet", action="store_true", help="no progress")
        parser.verbs[name] = sub
        return sub

    _making_verbs(verb)
    _measuring_verbs(verb)
    _using_verbs(verb)
    for each in (parser, *parser.verbs.values()):
        each.usage = usage(each)
    return parser


def _making_verbs(verb: Verb) -> None:
    """From an original to a packed checkpoint."""
    plan = verb("plan", "say what quantize would do, and its size, memory and time; reads no weights")
    plan.add_argument("model", help="local directory or hub id")
    plan.add_argument("--save-plan", metavar="FILE", help="write the plan for quantize --plan")
    plan.add_argument("--workers", type=int, help="say also what quantize --ray takes with so many workers")
    _recipe_arguments(plan)

    inspect = verb("inspect", "say what a checkpoint, packed or not, holds")
    inspect.add_argument("model", help="local directory or hub id")

    quantize = verb("quantize", "write a packed checkpoint that obeys the budget")
    quantize.add_argument("model", help="local directory or hub id")
    quantize.add_argument("output", help="directory to make")
    quantize.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    quantize.add_argument("--save-recipe", metavar="FILE", help="write all options, defaults included, as YAML")
    _recipe_arguments(quantize)
    _worker_arguments(quantize)

    measure = verb("measure", "measure what each width would cost each expert, for allocate and pareto")
    measure.add_argument("model", help="local directory or hub id")
    measure.add_argument("output", metavar="COSTS", help="file to write")
    _recipe_arguments(measure)
    _worker_arguments(measure)

    allocate = verb("allocate", "spend a budget by measured costs")
    allocate.add_argument("model", help="local directory or hub id")
    allocate.add_argument("output", metavar="PLAN", help="file to write, for quantize --plan")
    allocate.add_argument("--svg", metavar="FILE", help="write a heat map of the widths")
    _recipe_arguments(allocate)

    _other_making_verbs(verb)


def _other_making_verbs(verb: Verb) -> None:
    """From costs to curves, and from a packed checkpoint to others."""
    pareto = verb("pareto", "solve many budgets by one table of costs")
    pareto.add_argument("model", help="local directory or hub id")
    pareto.add_argument("--points", type=int, default=20, help="budgets (default 20)")
    pareto.add_argument("--svg", metavar="FILE", help="write the curve")
    _recipe_arguments(pareto)

    export = verb("export", "write a packed checkpoint in a format that other programs run without moeq")
    export.add_argument(
        "form", metavar="FORM", help="compressed-tensors (vLLM, SGLang, transformers) or gguf (llama.cpp)"
    )
    export.add_argument("directory", help="what quantize --serve vllm-native, or --serve gguf, wrote")
    export.add_argument("output", help="directory to make; the file for gguf")
    export.add_argument("--like", metavar="FILE", help="gguf: file by llama.cpp's converter to take the rest from")
    export.add_argument("--embeddings", type=int, default=8, help="gguf: bits of tables of tokens, or 16 (default 8)")

    imatrix = verb("imatrix", "write an importance matrix for llama-quantize --imatrix, block by block")
    imatrix.add_argument("model", help="local directory or hub id")
    imatrix.add_argument("output", help="file to write")
    _text_arguments(imatrix)
    imatrix.add_argument("--like", metavar="GGUF", help="file by llama.cpp's converter, for families without own names")
    imatrix.add_argument("--device", default="auto", help="auto (default), cpu or cuda[:n]")

    repair = verb("repair", "tune the routers of a packed checkpoint, or all that is small in it")
    repair.add_argument("directory", help="what quantize wrote")
    repair.add_argument("output", help="directory to make")
    _text_arguments(repair)
    repair.add_argument(
        "--tune", choices=("routers", "model"), default="routers", help="model: scales, norms, biases too"
    )
    repair.add_argument("--loss", choices=("task", "kl"), help="task (default for routers), or kl to --reference")
    repair.add_argument("--reference", metavar="MODEL", help="the original: for kl, and to report overlap")
    repair.add_argument("--device", default="auto", help="auto (default), cpu or cuda[:n]")
    _tuning_arguments(repair.add_argument)


def _text_arguments(parser: argparse.ArgumentParser) -> None:
    """The calibration text of verbs that cannot do without one."""
    add = parser.add_argument
    add("--calibration", required=True, metavar="TEXTS", help=TEXTS)
    add("--nsamples", type=int, default=128, help="sequences (default 128)")
    add("--seqlen", type=int, default=512, help="tokens of a sequence (default 512)")
    add("--seed", type=int, default=0, help="seed of the text's order (default 0)")


def _worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Who does the work: nothing that the result depends on."""
    add = parser.add_argument_group("several processes or machines (extra ray)").add_argument
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="spread work over Ray: local (default), auto, host:port",
    )
    add("--workers", type=int, help="pieces of work that go on at a time (default: one for each core)")


def _measuring_verbs(verb: Verb) -> None:
    """What one learns of a checkpoint."""
    evaluate = verb("eval", "measure perplexity, and divergence from a reference model")
    evaluate.add_argument("model", help="packed checkpoint or any model transformers loads")
    evaluate.add_argument("--text", metavar="FILE", help="text or jsonl file")
    evaluate.add_argument("--preset", help="measure as gptq-paper, alphaq, gemq, bitsmoe or tileq do")
    _measuring_arguments(evaluate)
    add = evaluate.add_argument_group("lm-evaluation-harness").add_argument
    add("--tasks", metavar="TASK,...", help="tasks to ask, as arc_easy,hellaswag")
    add("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    add("--limit", type=int, help="questions of each task at most, to try out")
    add("--task-path", metavar="DIR", help="further task files, whose data may be here")
    add("--chat-template", action="store_true", help="questions go through the chat template")
    _worker_arguments(evaluate)

    compare = verb("compare", "measure checkpoints side by side, also those of other tools")
    compare.add_argument("models", metavar="MODEL", nargs="+", help="packed checkpoints or any that transformers loads")
    compare.add_argument("--text", required=True, nargs="+", metavar="FILE", help="text or jsonl files")
    _measuring_arguments(compare)
    compare.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True, help="tokens/s (default on)")


def _using_verbs(verb: Verb) -> None:
    """What one does with a checkpoint."""
    generate = verb("generate", "continue a text")
    generate.add_argument("model", help="packed checkpoint or any model transformers loads")
    generate.add_argument("prompt", help="the text to continue")
    _speaking_arguments(generate, 64, 0.0)

    run = verb("run", "talk with a model in the terminal")
    run.add_argument("model", help="packed checkpoint or any model transformers loads")
    run.add_argument("--system", metavar="TEXT", help="what the model is told before everything else")
    _speaking_arguments(run, 512, 0.7)

    push = verb("push", "put a packed checkpoint on the hub; without --yes say what would be put there")
    push.add_argument("directory", help="what quantize wrote")
    push.add_argument("repo", help="owner/name on the hub")
    push.add_argument("--yes", action="store_true", help="upload; else nothing leaves this machine")
    push.add_argument("--public", action="store_true", help="everybody may see a repository that is made for it")

    serve = verb("serve", "serve a model through OpenAI's interface (/v1/chat/completions, /v1/completions)")
    serve.add_argument("model", help="packed checkpoint or any model transformers loads")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default 8000)")
    serve.add_argument("--api-key", metavar="KEY", help="what clients must send (default: MOEQ_API_KEY, or none)")
    serve.add_argument("--served-name", metavar="NAME", help="what clients call the model (default: the directory)")
    serve.add_argument("--max-new-tokens", type=int, default=4096, help="tokens of an answer at most (default 4096)")
    serve.add_argument("--running", type=int, default=8, help="answers made at the same time (default 8)")
    serve.add_argument("--waiting", type=int, default=64, help="answers made or waiting at most (default 64)")
    serve.add_argument("--log-requests", action="store_true", help="a line on stderr for each request")
    serve.add_argument("--device", default="auto", help="auto (default), cpu or cuda[:n]")
    serve.add_argument("--trust-remote-code", action="store_true", help=TRUST)

    report = verb("report", "write one page about packed checkpoints: what was spent where, quality, other budgets")
    report.add_argument("directories", metavar="DIR", nargs="+", help="directories that quantize wrote")
    report.add_argument("-o", "--output", metavar="FILE", default="report.html", help="file (default report.html)")
    report.add_argument("--compared", metavar="FILE", help="what moeq compare --json printed: its quality is shown")

    bench = verb("bench", "measure tokens per second on the CPU, against what its memory allows")
    bench.add_argument("directory", help="what quantize wrote")
    bench.add_argument("--prompt-tokens", type=int, default=512, help="tokens of the prompt (default 512)")
    bench.add_argument("--new-tokens", type=int, default=64, help="tokens to decode after it (default 64)")
    bench.add_argument("--threads", type=int, help="threads (default: torch's)")
    bench.add_argument(
        "--exact-activations", action="store_true", help="do not round activations to 8 bits when decoding; slower"
    )
    bench.add_argument("--breakdown", action="store_true", help="say what each kind of module takes of a token")

    verify = verb("verify", "prove a packed checkpoint: structure, hashes, every matrix, a forward pass")
    verify.add_argument("directory", help="what quantize wrote")
    verify.add_argument("--trust-remote-code", action="store_true", help=TRUST)

    verb("doctor", "test the compiled kernels of this machine and say what runs on them, for reports of bugs")


def _measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """What quality is measured against, and how."""
    add = parser.add_argument
    add("--reference", metavar="MODEL", help="the original: adds KL, top-1, router overlap")
    add("--pairs", metavar="FILE", help="minimal pairs (jsonl): adds blimp accuracy")
    add("--seqlen", type=int, help="tokens per window (default 2048)")
    add("--max-tokens", type=int, help="use only the start of a text")
    add("--batch-size", type=int, default=1, help="windows per forward pass (default 1)")
    add("--device", default="auto", help="auto (default), cpu or cuda[:n]")
    add("--trust-remote-code", action="store_true", help=TRUST)


def _speaking_arguments(parser: argparse.ArgumentParser, tokens: int, temperature: float) -> None:
    """How a model speaks, with the usual values of a verb."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=tokens, help=f"tokens to add at most (default {tokens})")
    add("--temperature", type=float, default=temperature, help=f"0 is greedy (default {temperature:g})")
    add("--seed", type=int, default=0, help="seed of sampling (default 0)")
    add("--device", default="auto", help="auto (default), cpu or cuda[:n]")
    add("--trust-remote-code", action="store_true", help=TRUST)
