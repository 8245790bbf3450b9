"""What the command line shows people: progress bars and plain-text results."""

import textwrap

from moeq.artifacts import EvalResult
from moeq.layouts.selftest import Check
from moeq.notebook import Table
from moeq.report import trials
from moeq.report.tables import human_bytes, human_number, plain_table
from moeq.stages.allocate import AllocateReport
from moeq.stages.bench import BenchReport
from moeq.stages.chat import ChatReport
from moeq.stages.compare import CompareReport
from moeq.stages.doctor import Device, DoctorReport
from moeq.stages.export import ExportReport
from moeq.stages.generate import GenerateReport
from moeq.stages.imatrix import ImatrixReport
from moeq.stages.inspect import InspectReport
from moeq.stages.measure import MeasureReport
from moeq.stages.pareto import ParetoReport
from moeq.stages.plan import PlanReport, Workers
from moeq.stages.push import PushReport
from moeq.stages.quantize_report import QuantizeReport
from moeq.stages.repair import RepairReport
from moeq.stages.report import ReportReport
from moeq.stages.serve import ServeReport
from moeq.stages.verify import VerifyReport
from moeq.writing import weight_families

WIDTH = 100
"""Columns of wrapped lines."""


def _plain(table: Table) -> str:
    """What notebooks show, for a terminal."""
    return plain_table(table.header, table.rows)


def _families(rows: dict[str, weight_families.Family]) -> str:
    return _plain(weight_families.table("", rows))


def plan(report: PlanReport) -> str:
    """Text of `moeq plan`."""
    widths = ", ".join(f"{count} x {bits} bits" for bits, count in report.allocation.items()) or "still to be decided"
    lines = [
        f"{report.architecture}: {report.layers} MoE layers, {report.experts_per_layer} experts each",
        f"method {report.method}, quantizer {report.quantizer}, expert matrices: {widths}",
        *(f"{name}: {words}" for name, words in report.tiles.items()),
        "",
        _families(report.families),
        "",
        *(f"calibrated on {text.words}" for text in report.calibration),
        f"original   {human_bytes(report.source_bytes)}",
        f"packed     {human_bytes(report.stored_bytes)}, experts {report.expert_bits_per_weight:.4f} bits per weight",
        f"on disk    {human_bytes(report.disk_bytes)} with all other files",
        f"memory     about {human_bytes(report.ram_bytes)} while quantizing",
        f"time       very roughly {report.seconds / 60:.1f} min on two CPU cores",
        *(f"  --effort {name}: {seconds / 60:.1f} min" for name, seconds in report.efforts.items()),
        *(() if report.workers is None else (_workers(report.workers),)),
        f"quantized  {', '.join(report.quantized)}",
        f"untouched  {', '.join(report.untouched)}",
        f"plan       {report.plan_hash[:16]}",
        *(f"warning: {text}" for text in report.warnings),
    ]
    return "\n".join(lines)


def _workers(found: Workers) -> str:
    """What work that is spread takes."""
    more = f"; more than {found.useful} would wait" if found.count > found.useful else ""
    return (
        f"spread     over {found.count} workers: very roughly {found.seconds / 60:.1f} min, about "
        f"{human_bytes(found.ram_bytes)} each, {human_bytes(found.moved_bytes)} through shared files{more}"
    )


def inspect(report: InspectReport) -> str:
    """Text of `moeq inspect`."""
    state = "packed by moeq" if report.packed else "not quantized"
    lines = [
        f"{report.architecture}, {state}: {report.layers} MoE layers, {report.experts_per_layer} experts each",
        "",
        _families(report.families),
        "",
        f"weight files {human_bytes(report.stored_bytes)}, experts {report.expert_bits_per_weight:.4f} bits per weight",
    ]
    return "\n".join(lines)


def imatrix(report: ImatrixReport) -> str:
    """Text of `moeq imatrix`."""
    return (
        f"wrote {report.output}: {report.tensors} tensors of {report.architecture}\n"
        f"{report.tokens:,} tokens of {report.calibration}, at least {report.fewest} for each expert"
    )


def measure(report: MeasureReport) -> str:
    """Text of `moeq measure`."""
    rows = [(f"all at {bits} bits", f"{total:.6g}") for bits, total in report.totals.items()]
    lines = [f"wrote {report.output}: {report.cost} costs of {report.units:,} units (each {report.unit})", ""]
    lines.append(plain_table(("predicted cost", ""), rows))
    for name, (low, middle, high) in report.statistics.items():
        lines.append(f"{name}: {low:.4g} to {high:.4g}, median {middle:.4g}")
    return "\n".join(lines)


def allocate(report: AllocateReport) -> str:
    """Text of `moeq allocate`."""
    widths = ", ".join(f"{count} x {bits} bits" for bits, count in report.allocation.items())
    lines = [f"wrote {report.output}: {report.expert_bits_per_weight:.4f} bits per expert weight, {widths}"]
    if report.linears:
        packed = ", ".join(f"{count} x {bits} bits" for bits, count in report.linears.items())
        lines.append(f"other linears: {packed}, the rest as they are")
    if report.objective is not None:
        lines.append(
            f"predicted {report.cost} cost {report.objective:.6g}, at most {report.gap:.1e} of it could be saved"
        )
    return "\n".join([*lines, "", *report.map])


def pareto(report: ParetoReport) -> str:
    """Text of `moeq pareto`."""
    rows = [
        (
            f"{point.expert_bits_per_weight:.4f}",
            human_bytes(point.expert_bytes),
            f"{point.objective:.6g}",
            f"{point.gap:.1e}",
            ", ".join(f"{count} x {bits}" for bits, count in point.allocation.items()),
        )
        for point in report.points
    ]
    return plain_table(("bits/weight", "experts", f"{report.cost} cost", "gap", "matrices x bits"), rows)


def quantize(report: QuantizeReport) -> str:
    """Text of `moeq quantize`."""
    lines = [
        f"wrote {report.output}: {human_bytes(report.directory_bytes)}, was {human_bytes(report.source_bytes)}",
        "",
        _families(report.families),
        "",
        f"experts: {report.expert_bits_per_weight:.4f} bits per weight, everything included",
        f"verified: {report.verified.files} files hashed, {report.verified.decoded} matrices decoded, reloaded",
    ]
    lines += [f"calibrated on {text.words}" for text in report.calibration]
    if report.tokens_per_expert is not None:
        tokens = report.tokens_per_expert
        lines.append(
            f"calibration tokens per expert: min {tokens['min']}, median {tokens['median']}, "
            f"{tokens['without_tokens']} experts had none"
        )
    if report.quality is not None:
        facts = (f"{key} {human_number(value)}" for key, value in report.quality.items())
        lines.append(f"held-out quality: {', '.join(facts)}")
        for text, found in report.quality_by_text.items():
            lines.append(f"  {text}: kl {found['kl']:.4f}, perplexity {found['perplexity']:.2f}")
    elif report.quality_note:
        lines.append(f"quality {report.quality_note}")
    if any(trial.kl for trial in report.trials):
        header, *rows = trials.rows_of(report.trials)
        lines += ["", plain_table(header, rows)]
    elif report.trials_note:
        lines.append(report.trials_note)
    return "\n".join(lines)


def export(report: ExportReport) -> str:
    """Text of `moeq export`."""
    widths = ", ".join(f"{report.widths.count(bits)} of {bits} bits" for bits in sorted(set(report.widths)))
    return (
        f"wrote {report.output}: {human_bytes(report.stored_bytes)} as {report.form}, was "
        f"{human_bytes(report.packed_bytes)}\nlayers: {widths}; {report.checked} matrices read back\n"
        + (f"llama-cli -m {report.output}" if report.form == "gguf" else f"vllm serve {report.output}")
    )


def push(report: PushReport) -> str:
    """Text of `moeq push`."""
    what = f"{len(report.files)} files, {human_bytes(report.total_bytes)}"
    lines = [f"{name}  {human_bytes(size)}" for name, size in report.files.items()]
    lines += [f"warning: {warning}" for warning in report.warnings]
    if report.uploaded:
        return "\n".join([*lines, f"put {what} into {report.repo}: {report.url}"])
    who = "private" if report.private else "public"
    return "\n".join([*lines, f"would put {what} into {report.repo} ({who} if it is new); --yes does it"])


def repair(report: RepairReport) -> str:
    """Text of `moeq repair`."""
    what = "routers, norms and scales" if report.tune == "model" else "routers"
    lines = [
        f"wrote {report.output}: {report.parameters:,} weights of {what} tuned in {report.steps:,} steps, "
        f"{len(report.changed)} tensors changed",
        f"{report.loss} loss on the calibration text: {report.loss_before:.5g} -> {report.loss_after:.5g}",
    ]
    if report.before is not None and report.after is not None:
        rows = [(name, f"{value:.5g}", f"{report.after[name]:.5g}") for name, value in report.before.items()]
        lines += ["", plain_table(("held-out windows", "before", "after"), rows)]
    if report.quality_note:
        lines.append(report.quality_note)
    return "\n".join(lines)


def evaluate(result: EvalResult) -> str:
    """Text of `moeq eval`."""
    rows = [(name, f"{value:.5g}") for name, value in result.metrics.items()]
    return plain_table(("metric", "value"), [*rows, ("tokens", f"{result.tokens:,}")])


def compare(report: CompareReport) -> str:
    """Text of `moeq compare`."""
    return "\n".join(map(_plain, report.tables()))


def generate(report: GenerateReport) -> str:
    """Text of `moeq generate`: it was shown while it came."""
    return "" if report.continuation else report.prompt


def chat(_: ChatReport) -> str:
    """Text of `moeq run`: it was shown while it came."""
    return ""


def serve(report: ServeReport) -> str:
    """Text of `moeq serve`, when it has ended."""
    return f"served {report.answers:,} answers of {report.tokens:,} tokens in {report.seconds:,.0f} s"


def report(done: ReportReport) -> str:
    """Text of `moeq report`."""
    return f"wrote {done.output}: {human_bytes(done.bytes)}, needs no network; open it in a browser"


def bench(report: BenchReport) -> str:
    """Text of `moeq bench`."""
    lines = [
        f"{report.threads} threads, kernels {report.kernels}, {report.dtype}; loaded in {report.load_seconds:.2f} s, "
        f"at most {human_bytes(report.peak_rss)} of memory",
        f"prefill    {report.prefill_tokens_per_second:.1f} tokens/s, {report.prefill_tokens} at once",
        f"decode     {report.decode_tokens_per_second:.2f} tokens/s, {report.decode_tokens} one by one",
        f"per token  {human_bytes(report.bytes_per_token)} of weights, {human_bytes(report.expert_bytes_per_token)} "
        "of experts",
        "time       " + ", ".join(f"{name} {share:.0%}" for name, share in report.shares.items()),
    ]
    if report.read_bandwidth is not None and report.roofline_share is not None:
        lines.append(
            f"memory     read at {human_bytes(round(report.read_bandwidth))}/s: at most "
            f"{report.roofline_tokens_per_second:.2f} tokens/s, of which decode reaches {report.roofline_share:.0%}"
        )
    if report.breakdown:
        lines += ["", "   ms  share  calls  module, without what it calls"]
        for part in report.breakdown:
            lines.append(f"{part.milliseconds:5.2f}  {part.share:5.1%}  {part.calls:5.0f}  {part.module} ({part.kind})")
    return "\n".join(lines)


def verify(report: VerifyReport) -> str:
    """Text of `moeq verify`."""
    return (
        f"ok: {report.files} files match their sha256, {report.decoded} matrices in {report.layers} layers decode, "
        "the model reloads and gives finite logits"
    )


def doctor(report: DoctorReport) -> str:
    """Text of `moeq doctor`."""
    versions = [f"{name} {version or '-'}" for name, version in report.versions.items()]
    extension = "built" if report.native else "not built"
    facts = [*versions, f"CUDA {report.cuda or '-'}", f"compiled kernels {extension}", report.system]
    lines = [_wrapped(", ".join(facts)), ""]
    lines += [_processor(device) for device in report.devices]
    routes = [(route.device, route.layers, route.path, route.reason) for route in report.routes]
    lines += ["", plain_table(("device", "layers", "computed by", "why"), routes)]
    if report.checks:
        header = ("device", "self-test", "result", "error", "allowed", "time")
        lines += ["", plain_table(header, [_self_test(check) for check in report.checks])]
    free = "" if report.cache_free_bytes is None else f", {human_bytes(report.cache_free_bytes)} free on its disk"
    kept = "verdicts are kept for the next process" if report.cache_works else "verdicts cannot be kept"
    lines += ["", f"cache: {kept}{free}"]
    lines += [_wrapped(f"FAILED {failure}") for failure in report.failures]
    if report.ok:
        end = "ok: all compiled paths answer rightly" if report.checks else "ok: torch computes everything, slower"
    else:
        end = "what failed is left to torch: answers stay right, slower; please report moeq doctor --json"
    return "\n".join([*lines, _wrapped(f"{end} ({report.seconds:.1f} s)")])


def _processor(device: Device) -> str:
    facts = [f"{device.cores} cores" if device.device == "cpu" else f"{device.cores} processors"]
    if device.threads is not None:
        facts.append("1 thread in use" if device.threads == 1 else f"{device.threads} threads in use")
    if device.instruction_sets:
        facts.append(f"kernels for {', '.join(device.instruction_sets)}")
    if device.capability is not None:
        facts += [f"capability {device.capability}", f"driver {device.driver}"]
    if device.memory_bytes:
        facts.append(f"{human_bytes(device.free_bytes)} of {human_bytes(device.memory_bytes)} free")
    for what, speed in (("reads", device.read_bandwidth), ("copies", device.copy_bandwidth)):
        if speed is not None:
            facts.append(f"{what} {human_bytes(round(speed))}/s")
    return _wrapped(f"{device.device}: {device.name}, {', '.join(facts)}")


def _self_test(check: Check) -> tuple[str, ...]:
    error = "-" if check.error is None else f"{check.error:.1g}"
    result = "ok" if check.ok else "WRONG"
    return (
        check.device,
        f"{check.path} {check.subject}",
        result,
        error,
        f"{check.tolerance:g}",
        f"{check.seconds:.3f} s",
    )


def fitted(text: str, width: int) -> str:
    """Sentences wrapped at words for a terminal; tables, which have gaps in their lines, stay as they are."""
    lines = text.splitlines()
    return "\n".join(
        line if len(line) <= width or "  " in line.strip() else textwrap.fill(line, width, subsequent_indent="  ")
        for line in lines
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")
