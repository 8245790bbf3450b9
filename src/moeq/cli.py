"""The command line: what each verb does with its arguments.

stdout carries results (one JSON document with --json), stderr progress and errors. Exit status: 0 done,
1 failed with a message, 2 wrong arguments, 130 interrupted. Arguments are read in `moeq_cli`, before this is imported.
"""

import argparse
import contextlib
import importlib
import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from moeq import cli_text, codec
from moeq.allocation import decide as decisions
from moeq.checkpoint.locate import resolve_packed
from moeq.checkpoint.write import write_file_atomic
from moeq.cli_chat import converse
from moeq.cli_progress import shown
from moeq.defaults import filled
from moeq.errors import InternalError, MoeqError, OptionError, OutputError
from moeq.fleet import HERE, Fleet
from moeq.layouts import trust
from moeq.recipe import Recipe
from moeq.recipe_file import load_recipe
from moeq.report.curves import curve_svg
from moeq.stages import allocate as allocate_stage
from moeq.stages import bench as bench_stage
from moeq.stages import chat as chat_stage
from moeq.stages import compare as compare_stage
from moeq.stages import doctor as doctor_stage
from moeq.stages import evaluate as evaluate_stage
from moeq.stages import export as export_stage
from moeq.stages import generate as generate_stage
from moeq.stages import imatrix as imatrix_stage
from moeq.stages import inspect as inspect_stage
from moeq.stages import measure as measure_stage
from moeq.stages import pareto as pareto_stage
from moeq.stages import plan as plan_stage
from moeq.stages import push as push_stage
from moeq.stages import quantize as quantize_stage
from moeq.stages import repair as repair_stage
from moeq.stages import report as report_stage
from moeq.stages import serve as serve_stage
from moeq.stages import verify as verify_stage
from moeq.version import __version__
from moeq.writing import card_facts
from moeq_cli import main

BUDGETS = ("bits", "size", "plan")
"""Options of which one decides how large the result may be."""
JSON_VERSION = 1
"""Version of the JSON documents (docs/json.md)."""


def _recipe(args: argparse.Namespace) -> Recipe:
    options: dict[str, Any] = {} if args.recipe is None else load_recipe(Path(args.recipe))
    names = Recipe.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if given.keys() & set(BUDGETS):  # a budget on the command line replaces that of the file, whatever its unit
        options = {name: value for name, value in options.items() if name not in BUDGETS}
    return Recipe(**filled(args.model, {**options, **given, "preset": args.preset}))


def _check_file(option: str, file: str | None) -> None:
    """Find out before the work, not after it, that its result cannot be saved."""
    if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise OutputError("no file can be written there", file=file, option=option, fix="give a file name")


@contextlib.contextmanager
def _fleet(args: argparse.Namespace) -> Iterator[Fleet]:
    """Who does the work."""
    if args.ray is None:
        if args.workers is not None:
            raise OptionError("there are no workers without --ray", option="workers", fix="add --ray")
        yield HERE
        return
    try:
        found = importlib.import_module("moeq.integrations.ray_fleet")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise OptionError("Ray is not installed", option="ray", fix="pip install 'moeq[ray]'") from error
    gpus = float(str(args.device or "auto").startswith("cuda"))
    with found.RayFleet(args.ray, args.workers, gpus) as fleet:
        yield fleet


def _plan(args: argparse.Namespace) -> Any:
    recipe = _recipe(args)
    _check_file("save-plan", args.save_plan)
    if args.save_plan is not None:
        plan = decisions.draft(args.model, recipe).plan
        write_file_atomic(Path(args.save_plan), codec.canonical(plan.to_dict()) + b"\n")
    return plan_stage.run(args.model, recipe, args.workers)


def _measure(args: argparse.Namespace) -> Any:
    recipe = _recipe(args)
    _check_file("output", args.output)
    with _fleet(args) as fleet, shown(quiet=args.quiet) as progress:
        table = measure_stage.run(args.model, recipe, progress, output=Path(args.output), fleet=fleet)
    return measure_stage.report(table, args.output)


def _allocate(args: argparse.Namespace) -> Any:
    recipe = _recipe(args)
    for option, file in (("output", args.output), ("svg", args.svg)):
        _check_file(option, file)
    decision = allocate_stage.run(args.model, recipe)
    write_file_atomic(Path(args.output), codec.canonical(decision.plan.to_dict()) + b"\n")
    report = allocate_stage.report(decision, args.output)
    if args.svg is not None:
        picture = card_facts.heatmap(decision.inventory, decision.plan, Path(args.model).name)
        write_file_atomic(Path(args.svg), picture.encode())
    return report


def _pareto(args: argparse.Namespace) -> Any:
    _check_file("svg", args.svg)
    report = pareto_stage.run(args.model, _recipe(args), args.points)
    if args.svg is not None:
        curve = {report.cost: [(point.expert_bytes, point.objective) for point in report.points]}
        write_file_atomic(Path(args.svg), curve_svg(curve, f"{Path(args.model).name}: {report.cost}").encode())
    return report


def _text(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("calibration", "nsamples", "seqlen", "seed")}


def _repair(args: argparse.Namespace) -> Any:
    with shown(quiet=args.quiet) as progress:
        return repair_stage.run(
            args.directory,
            args.output,
            **_text(args),
            tune=args.tune,
            loss=args.loss,
            reference=args.reference,
            lr=args.router_lr,
            epochs=args.router_epochs or 1,
            device=args.device,
            progress=progress,
        )


def _imatrix(args: argparse.Namespace) -> Any:
    with shown(quiet=args.quiet) as progress:
        return imatrix_stage.run(
            args.model,
            args.output,
            **_text(args),
            like=args.like,
            device=args.device,
            progress=progress,
        )


def _export(args: argparse.Namespace) -> Any:
    directory = resolve_packed(args.directory)
    with shown(quiet=args.quiet) as progress:
        return export_stage.run(
            directory, args.output, form=args.form, like=args.like, embeddings=args.embeddings, progress=progress
        )


def _inspect(args: argparse.Namespace) -> Any:
    return inspect_stage.run(args.model)


def _quantize(args: argparse.Namespace) -> Any:
    recipe = _recipe(args)
    _check_file("save-recipe", args.save_recipe)
    words = [word for word in args.words if word not in ("--json", "--quiet", "--resume")]
    command = shlex.join(["moeq", *words])
    with _fleet(args) as fleet, shown(quiet=args.quiet) as progress:
        report = quantize_stage.run(
            args.model, args.output, recipe, resume=args.resume, command=command, progress=progress, fleet=fleet
        )
    if args.save_recipe is not None:
        saved = recipe.replace(quantizer=report.quantizer)
        write_file_atomic(Path(args.save_recipe), saved.to_yaml().encode())
    return report


def _eval(args: argparse.Namespace) -> Any:
    with _fleet(args) as fleet, shown(quiet=args.quiet) as progress:
        return evaluate_stage.run(
            args.model,
            args.text,
            reference=args.reference,
            pairs=args.pairs,
            preset=args.preset,
            tasks=args.tasks,
            shots=args.num_fewshot,
            limit=args.limit,
            task_path=args.task_path,
            chat=args.chat_template,
            seqlen=args.seqlen,
            max_tokens=args.max_tokens,
            batch_size=args.batch_size,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            fleet=fleet,
            progress=lambda done, total: progress("windows", done, total),
            questions=lambda done, total: progress("sequences", done, total),
            compiled=lambda done, total: progress("kernels", done, total),
        )


def _compare(args: argparse.Namespace) -> Any:
    with shown(quiet=args.quiet) as progress:
        return compare_stage.run(
            args.models,
            args.text,
            reference=args.reference,
            pairs=args.pairs,
            seqlen=args.seqlen or 2048,
            max_tokens=args.max_tokens,
            batch_size=args.batch_size,
            speed=args.speed,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )


def _generate(args: argparse.Namespace) -> Any:
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        print(text if begun else args.prompt + text, end="", flush=True)
        begun = True

    with shown(quiet=args.quiet) as progress:
        return generate_stage.run(
            args.model,
            args.prompt,
            show=None if args.json else show,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            compiled=lambda done, total: progress("kernels", done, total),
        )


def _run(args: argparse.Namespace) -> Any:
    with shown(quiet=args.quiet) as progress:
        directory, chat = chat_stage.open_chat(
            args.model,
            sampling=chat_stage.Sampling(
                max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed
            ),
            system=args.system,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            compiled=lambda done, total: progress("kernels", done, total),
        )
    turns = converse(chat, silent=args.json)
    return chat_stage.ChatReport(model=directory, template=chat.template, turns=turns)


def _serve(args: argparse.Namespace) -> Any:
    with contextlib.ExitStack() as display:  # it ends when the server listens
        progress = display.enter_context(shown(quiet=args.quiet))

        def listening(address: str, name: str) -> None:
            display.close()
            if not args.quiet:
                print(f"{name} answers at {address}/v1, Ctrl-C stops it", file=sys.stderr, flush=True)

        return serve_stage.run(
            args.model,
            host=args.host,
            port=args.port,
            name=args.served_name,
            key=args.api_key if args.api_key is not None else os.environ.get("MOEQ_API_KEY"),
            max_new_tokens=args.max_new_tokens,
            running=args.running,
            waiting=args.waiting,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            compiled=lambda done, total: progress("kernels", done, total),
            listening=listening,
            requests=args.log_requests,
        )


def _report(args: argparse.Namespace) -> Any:
    _check_file("output", args.output)
    return report_stage.run(args.directories, args.output, compared=args.compared)


def _bench(args: argparse.Namespace) -> Any:
    with shown(quiet=args.quiet) as progress:
        return bench_stage.run(
            args.directory,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            threads=args.threads,
            exact_activations=args.exact_activations,
            breakdown=args.breakdown,
            progress=progress,
        )


def _verify(args: argparse.Namespace) -> Any:
    return verify_stage.run(resolve_packed(args.directory), every=True, trust_remote_code=args.trust_remote_code)


def _doctor(_: argparse.Namespace) -> Any:
    return doctor_stage.run()


def _push(args: argparse.Namespace) -> Any:
    directory = resolve_packed(args.directory)
    return push_stage.run(directory, args.repo, upload=args.yes, private=not args.public)


VERBS: dict[str, tuple[Callable[[argparse.Namespace], Any], Callable[[Any], str]]] = {
    "plan": (_plan, cli_text.plan),
    "inspect": (_inspect, cli_text.inspect),
    "measure": (_measure, cli_text.measure),
    "allocate": (_allocate, cli_text.allocate),
    "pareto": (_pareto, cli_text.pareto),
    "quantize": (_quantize, cli_text.quantize),
    "export": (_export, cli_text.export),
    "imatrix": (_imatrix, cli_text.imatrix),
    "repair": (_repair, cli_text.repair),
    "eval": (_eval, cli_text.evaluate),
    "compare": (_compare, cli_text.compare),
    "generate": (_generate, cli_text.generate),
    "run": (_run, cli_text.chat),
    "serve": (_serve, cli_text.serve),
    "report": (_report, cli_text.report),
    "bench": (_bench, cli_text.bench),
    "verify": (_verify, cli_text.verify),
    "push": (_push, cli_text.push),
    "doctor": (_doctor, cli_text.doctor),
}


def document(verb: str, result: Any) -> dict[str, Any]:
    """The JSON document of a verb's result. EvalResult metrics stand at the top level."""
    body = codec.encode(result)
    if verb == "eval":
        body = {**body.pop("metrics"), **body}
    return {"verb": verb, "json_version": JSON_VERSION, "moeq_version": __version__, **body}


def run(args: argparse.Namespace) -> int:
    """Do what parsed arguments ask for; returns the exit status."""
    verb, text = VERBS[args.verb]
    caches = os.environ.get("XDG_CACHE_HOME")
    if caches and Path(caches).is_absolute():  # others are to be ignored, says the XDG specification
        trust.keep_verdicts_in(Path(caches) / "moeq")
    logging.disable_progress_bar()  # there is one display, and it is ours
    try:
        result = verb(args)
    except MoeqError as error:
        return _fail(args, type(error).__name__, str(error))
    except Exception as error:  # nothing but a typed error leaves the command line; the trace is for the report
        traceback.print_exc()
        return _fail(args, InternalError.__name__, str(InternalError.of(error)))
    if args.json:
        print(json.dumps(document(args.verb, result), indent=1))
    else:
        shown_text = text(result)
        if sys.stdout.isatty() and args.verb not in ("run", "generate"):
            shown_text = cli_text.fitted(shown_text, shutil.get_terminal_size().columns)
        print(shown_text, end="" if args.verb == "run" else "\n")
    if isinstance(result, doctor_stage.DoctorReport) and not result.ok:
        for failure in result.failures:
            print(f"moeq doctor: {failure}", file=sys.stderr)
        return 1
    return 0


def _fail(args: argparse.Namespace, kind: str, message: str) -> int:
    print(f"moeq {args.verb}: {message}", file=sys.stderr)
    if args.json:
        print(json.dumps({"verb": args.verb, "json_version": JSON_VERSION, "error": kind, "message": message}))
    return 1


if __name__ == "__main__":
    sys.exit(main())
