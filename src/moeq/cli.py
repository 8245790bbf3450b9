"""The command line: plan, inspect, quantize, eval, generate, verify.

stdout carries results (one JSON document with --json), stderr progress and errors. Exit status: 0 done,
1 failed with a message, 2 wrong arguments, 130 interrupted.
"""

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moeq import cli_text, codec
from moeq.checkpoint.write import write_file_atomic
from moeq.errors import MoeqError, OutputError
from moeq.recipe import Recipe, load_recipe
from moeq.stages import generate as generate_stage
from moeq.stages import inspect as inspect_stage
from moeq.stages import preflight, quality
from moeq.stages import quantize as quantize_stage
from moeq.stages import verify as verify_stage
from moeq.version import __version__

BUDGETS = ("bits", "size", "plan")
"""Options of which one decides how large the result may be."""
JSON_VERSION = 1
"""Version of the JSON documents (docs/json.md)."""


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a Recipe; defaults stay None so that a recipe file can fill them."""
    add = parser.add_argument
    add("--recipe", metavar="FILE", help="YAML file with any of the options below; the command line wins")
    add("--method", help="how bits are allocated (default uniform)")
    add("--bits", type=float, help="mean stored bits per expert weight, scales and padding included")
    add("--size", help="bytes of the whole checkpoint instead: 8GB, 7.5GiB")
    add("--accounting", help="bytes (default) or codes: --bits counts code bits only, as papers do")
    add("--quantizer", help="minmax, rtn, hqq, gptq, gptq-mc (default: gptq with calibration text, else hqq)")
    add("--group-size", type=int, help="inputs per scale: 32, 64, 128 (default) or -1 for whole rows")
    add("--levels", help="auto (default), asym, asym16, sym or half")
    add("--dense-bits", help="other linears: 16 (default), 8, 6, 4, or attention=4,shared=8,dense=8,lm_head=16")
    add("--calibration", metavar="FILE", help="text file (a document per line), jsonl, or dataset id")
    add("--nsamples", type=int, help="calibration sequences (default 128)")
    add("--seqlen", type=int, help="tokens of a sequence (default 512)")
    add("--seed", type=int, help="seed of everything random (default 0)")
    add("--routing", help="whose statistics see a token: natural (default), all, or r for top-k x r")
    add("--act-order", action=argparse.BooleanOptionalAction, help="gptq: important columns first (default on)")
    add("--damp", type=float, help="gptq: damping in mean diagonals (default 0.1)")
    add("--gain", action=argparse.BooleanOptionalAction, help="match the gain of what was rounded (default on)")
    add("--device", help="auto (default), cpu or cuda[:n]")
    add("--plan", metavar="FILE", help="follow this plan instead of allocating")


def build_parser() -> argparse.ArgumentParser:
    """All verbs and options; frozen by a test."""
    parser = argparse.ArgumentParser(
        prog="moeq", allow_abbrev=False, description="Make Mixture-of-Experts language models small."
    )
    parser.add_argument("--version", action="version", version=f"moeq {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        description = text[0].upper() + text[1:] + "."
        sub = verbs.add_parser(name, help=text, allow_abbrev=False, description=description)
        sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
        return sub

    plan = verb("plan", "say what quantize would do, and its size, memory and time; reads no weights")
    plan.add_argument("model", help="local directory or hub id")
    plan.add_argument("--save-plan", metavar="FILE", help="write the plan for quantize --plan")
    _recipe_arguments(plan)

    inspect = verb("inspect", "say what a checkpoint, packed or not, holds")
    inspect.add_argument("model", help="local directory or hub id")

    quantize = verb("quantize", "write a packed checkpoint that obeys the budget")
    quantize.add_argument("model", help="local directory or hub id")
    quantize.add_argument("output", help="directory to make")
    quantize.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    quantize.add_argument("--save-recipe", metavar="FILE", help="write all options, defaults included, as YAML")
    _recipe_arguments(quantize)

    evaluate = verb("eval", "measure perplexity, and divergence from a reference model")
    evaluate.add_argument("model", help="packed checkpoint or any model transformers loads")
    evaluate.add_argument("--text", required=True, metavar="FILE", help="text or jsonl file")
    evaluate.add_argument("--reference", metavar="MODEL", help="the original: adds KL, top-1, router overlap")
    evaluate.add_argument("--pairs", metavar="FILE", help="minimal pairs (jsonl): adds blimp accuracy")
    evaluate.add_argument("--seqlen", type=int, default=2048, help="tokens per window (default 2048)")
    evaluate.add_argument("--max-tokens", type=int, help="use only the start of the text")
    evaluate.add_argument("--batch-size", type=int, default=1, help="windows per forward pass (default 1)")
    evaluate.add_argument("--device", default="auto", help="auto (default), cpu or cuda[:n]")

    generate = verb("generate", "continue a text")
    generate.add_argument("model", help="packed checkpoint or any model transformers loads")
    generate.add_argument("prompt", help="the text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="tokens to add (default 64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument("--seed", type=int, default=0, help="seed of sampling (default 0)")
    generate.add_argument("--device", default="auto", help="auto (default), cpu or cuda[:n]")

    verify = verb("verify", "prove a packed checkpoint: structure, hashes, every matrix, a forward pass")
    verify.add_argument("directory", help="what quantize wrote")
    return parser


def _recipe(args: argparse.Namespace) -> Recipe:
    options: dict[str, Any] = {} if args.recipe is None else load_recipe(Path(args.recipe))
    names = Recipe.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if given.keys() & set(BUDGETS):  # a budget on the command line replaces that of the file, whatever its unit
        options = {name: value for name, value in options.items() if name not in BUDGETS}
    return Recipe(**{**options, **given})


def _check_file(option: str, file: str | None) -> None:
    """Find out before the work, not after it, that its result cannot be saved."""
    if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise OutputError("no file can be written there", file=file, option=option, fix="give a file name")


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        yield cli_text.Bars(stack)


def _plan(args: argparse.Namespace) -> Any:
    recipe = _recipe(args)
    _check_file("save-plan", args.save_plan)
    if args.save_plan is not None:
        plan = quantize_stage.setup(args.model, recipe).plan
        write_file_atomic(Path(args.save_plan), codec.canonical(plan.to_dict()) + b"\n")
    return preflight.run(args.model, recipe)


def _inspect(args: argparse.Namespace) -> Any:
    return inspect_stage.report(args.model)


def _quantize(args: argparse.Namespace) -> Any:
    recipe = _recipe(args)
    _check_file("save-recipe", args.save_recipe)
    words = [word for word in args.words if word not in ("--json", "--resume")]
    command = shlex.join(["moeq", *words])
    with _progress() as progress:
        report = quantize_stage.run(
            args.model, args.output, recipe, resume=args.resume, command=command, progress=progress
        )
    if args.save_recipe is not None:
        saved = recipe.replace(quantizer=report.quantizer)
        write_file_atomic(Path(args.save_recipe), saved.to_yaml().encode())
    return report


def _eval(args: argparse.Namespace) -> Any:
    with _progress() as progress:
        return quality.run(
            args.model,
            args.text,
            reference=args.reference,
            pairs=args.pairs,
            seqlen=args.seqlen,
            max_tokens=args.max_tokens,
            batch_size=args.batch_size,
            device=args.device,
            progress=lambda done, total: progress("windows", done, total),
        )


def _generate(args: argparse.Namespace) -> Any:
    return generate_stage.run(
        args.model,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        device=args.device,
    )


def _verify(args: argparse.Namespace) -> Any:
    return verify_stage.run(Path(args.directory), every=True)


VERBS: dict[str, tuple[Callable[[argparse.Namespace], Any], Callable[[Any], str]]] = {
    "plan": (_plan, cli_text.plan),
    "inspect": (_inspect, cli_text.inspect),
    "quantize": (_quantize, cli_text.quantize),
    "eval": (_eval, cli_text.evaluate),
    "generate": (_generate, cli_text.generate),
    "verify": (_verify, cli_text.verify),
}


def document(verb: str, result: Any) -> dict[str, Any]:
    """The JSON document of a verb's result. EvalResult metrics stand at the top level."""
    body = codec.encode(result)
    if verb == "eval":
        body = {**body.pop("metrics"), **body}
    return {"verb": verb, "json_version": JSON_VERSION, "moeq_version": __version__, **body}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    args.words = words
    run, text = VERBS[args.verb]
    try:
        result = run(args)
    except MoeqError as error:
        return _fail(args, type(error).__name__, str(error))
    except KeyboardInterrupt:
        print("interrupted" + ("; go on with --resume" if args.verb == "quantize" else ""), file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(document(args.verb, result), indent=1))
    else:
        print(text(result))
    return 0


def _fail(args: argparse.Namespace, kind: str, message: str) -> int:
    print(f"moeq {args.verb}: {message}", file=sys.stderr)
    if args.json:
        print(json.dumps({"verb": args.verb, "json_version": JSON_VERSION, "error": kind, "message": message}))
    return 1


if __name__ == "__main__":
    sys.exit(main())
