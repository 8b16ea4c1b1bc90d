"""What a run says about itself, phase by phase, in the words a practitioner uses."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint.drift import Drift, lines_of
from qlora_kit.data.pieces import runs, token_pieces
from qlora_kit.report import data_text
from qlora_kit.report.reporter import Reporter
from qlora_kit.report.visible import visible
from qlora_kit.startup import COLUMNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.checkpoint.entry import Entry
    from qlora_kit.checkpoint.run_directory import RunDirectory
    from qlora_kit.data.ledger import Ledger
    from qlora_kit.data.prepare import Part
    from qlora_kit.environment import Hardware
    from qlora_kit.model.adapter import Adapted
    from qlora_kit.model.base import Base
    from qlora_kit.recipe import QuantizationAwareSpec, QuantizationSpec, Recipe, TrainSpec
    from qlora_kit.startup import Startup
    from qlora_kit.train.arguments import AutoOptimizer
    from qlora_kit.train.batching import Batching
    from qlora_kit.train.loader import BatchShape
    from qlora_kit.train.recompute import Recompute
    from qlora_kit.train.shortcuts import Shortcuts

METRICS = {
    "accuracy": "{:.1%}",
    "macro_f1": "{:.3f}",
    "unlabelled": "{:.1%}",
    "rouge1": "{:.3f}",
    "rouge2": "{:.3f}",
    "rougeL": "{:.3f}",
    "bleu": "{:.1f}",
    "chrf": "{:.1f}",
}
"""Figures of answers besides exact match, and how they are written."""

_MIB = 1024**2
_GIB = 1024**3
_SMALL_SHARE = 0.3
# Of whole weights; adapters take about ten times as much.
_HIGHEST_FULL_RATE = 1e-4


def hardware(
    reporter: Reporter,
    machine: Hardware,
    compute_dtype: str,
    why: str,
    precision: str,
    has_wide_norms: bool = False,
) -> None:
    """The device, its memory, and the dtypes that follow from it, with why."""
    memory = machine.device_memory_bytes or machine.host_memory_bytes
    reporter.say(
        f"machine   {machine.device_name}, {machine.num_cpus} cores, {memory / _GIB:.0f} GiB"
    )
    norms = ", norms in float32" if has_wide_norms and compute_dtype != "float32" else ""
    reporter.say(f"compute   {compute_dtype}{norms}, trained in {precision}: {why}")


def left_out(reporter: Reporter, reasons: Iterable[str]) -> None:
    """What could have been faster, and why it is not."""
    for why in reasons:
        reporter.warn(f"{why}; training goes on without, exactly.")


def computing(
    reporter: Reporter,
    shortcuts: Shortcuts,
    recompute: Recompute,
    is_in_16_bits: bool = False,
) -> None:
    """Which shortcuts training takes, and which layers compute twice."""
    left_out(reporter, shortcuts.left)
    parts = []
    if shortcuts.supervised_loss:
        last = ", the last MLP too" * (shortcuts.last_mlp is not None)
        parts.append(f"logits at supervised places alone{last}")
    found = shortcuts.fusion
    if found is not None and found.groups:
        parts.append(f"{found.num_layers} LoRA layers in {len(found.groups)} operations")
    if found is not None and found.left:
        why = "; ".join(found.left)
        parts.append(f"{sum(found.left.values())} LoRA layers left to PEFT ({why})")
    lean = shortcuts.lean
    if lean.mlps:
        parts.append(f"{len(lean.mlps)} MLPs that keep less")
    if lean.num_norms:
        parts.append(f"{lean.num_norms} norms that keep less")
    if lean.rotary:
        parts.append("rotary embeddings as one operation")
    tried = f"; on a trial gradients differ by {shortcuts.difference:.1e}" * bool(parts)
    tried += ", as 16 bits round" * (bool(parts) and is_in_16_bits)
    reporter.say(f"shortcuts {'; '.join(parts) or 'none'}{tried}")
    if shortcuts.why_kernels:
        reporter.say(f"kernels   {shortcuts.why_kernels}")
    if recompute.reason:
        of_how_many = f"{recompute.count} of {recompute.num_layers} layers"
        reporter.say(
            f"recompute {of_how_many if recompute.num_layers else 'none'}: {recompute.reason}"
        )


def startup(reporter: Reporter, took: Startup) -> None:
    """Where the time went between the command and the first update."""
    reporter.table("from the command to the first update", COLUMNS, took.rows())


def entry(reporter: Reporter, found: Entry) -> None:
    """What was in the folder of the run."""
    for warning in found.warned:
        reporter.warn(warning)
    for line in found.said:
        reporter.say(line)


def optimizer(reporter: Reporter, auto: AutoOptimizer) -> None:
    """Which one `auto` is, and why."""
    reporter.say(f"optimizer {auto.name} (auto: {auto.why})")


def drift(reporter: Reporter, found: Drift) -> None:
    """What else than the recipe has changed since the checkpoint."""
    for line in lines_of(Drift(breaking=found.breaking)):
        reporter.warn(line)
    for line in lines_of(Drift(accepted=found.accepted)):
        reporter.say(line)


def base(reporter: Reporter, loaded: Base, quantization: QuantizationSpec) -> None:
    """What was loaded: its parameters, how many of them at which width, how it was come by."""
    # Not before there is a base: a run that is finished says so at once.
    from qlora_kit.model.bits import module_bits
    from qlora_kit.model.tokenizer import writes_the_date

    counted = loaded.quantized
    double = " with double quantization" if quantization.double_quant else ""
    names = {
        4: quantization.quant_type.upper() + double,
        8: "LLM.int8()",
        16: f"{str(loaded.compute_dtype).removeprefix('torch.')}, not quantized",
    }
    how = names[quantization.num_bits]
    if quantization.overrides:
        bits = module_bits(loaded.skeleton, quantization)
        counts = Counter(bits[name] for name in loaded.skeleton.linear_modules)
        how = ", ".join(f"{count} layers in {names[n]}" for n, count in sorted(counts.items()))
    share = f", {counted.share:.1%} of the parameters quantized" if counted.num_quantized else ""
    if 0 < counted.share < _SMALL_SHARE:
        reporter.warn(
            f"only {counted.share:.1%} of the parameters are quantized: most are in embeddings, "
            "which stay as they are, so little memory is saved."
        )
    reporter.say(
        f"base      {loaded.source.name}: {counted.num_parameters / 1e6:,.1f} M parameters in "
        f"{counted.weight_bytes / _MIB:,.0f} MiB, {how}{share}"
    )
    if loaded.origin:
        reporter.say(f"weights   {loaded.origin}")
    if writes_the_date(loaded.tokenizer):
        reporter.warn(
            "the chat template writes today's date, so another day gives other tokens; fix it with "
            "model.chat_template_kwargs: {date_string: 26 Jul 2024}."
        )
    reporter.say(f"padding   {loaded.pad.token} ({loaded.pad.reason})")


def data(
    reporter: Reporter, train: Part, held_out: Part, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Where rows and tokens of both parts went, and one example as it is trained on."""
    rows = [
        _ledger_row(name, part.ledger)
        for name, part in (("train", train), ("eval", held_out))
        if part.sequences and part.stream is None
    ]
    if train.stream is not None:
        reporter.say("stream    training rows are read, checked and counted while training")
    reporter.table(
        "where every row and token went",
        ("", "rows", "dropped", "truncated", "supervised", "context", "cut", "dropped tokens"),
        rows,
    )
    for part in (train, held_out):
        for finding in part.ledger.findings():
            reporter.warn(finding)
        data_text.files_left_out(reporter, part.ledger)
    for source, keys in train.ledger.ignored.items():
        reporter.say(f"not read  {', '.join(keys[:8])}{', …' if len(keys) > 8 else ''} of {source}")
    first = train.sequences[0]
    pieces = list(token_pieces(first.input_ids, first.labels, tokenizer))
    reporter.marked(
        [(visible(text), supervised) for text, supervised in runs(pieces)], "first     "
    )


def _ledger_row(name: str, ledger: Ledger) -> tuple[str, ...]:
    return (
        name,
        f"{ledger.num_rows:,}",
        f"{sum(ledger.dropped.values()):,}",
        f"{ledger.truncated:,}",
        f"{ledger.supervised_tokens:,}",
        f"{ledger.context_tokens:,}",
        f"{ledger.cut_tokens:,}",
        f"{ledger.dropped_tokens:,}",
    )


def adapter(reporter: Reporter, adapted: Adapted, recipe: Recipe) -> None:
    """Parameters that are trained, of how many in all, and where they are."""
    share = adapted.num_trainable / adapted.num_parameters
    trained = (
        f"{adapted.num_trainable:,} of {adapted.num_parameters:,} parameters trained ({share:.2%})"
    )
    if recipe.trains_adapter:
        reporter.say(f"adapter   r={recipe.lora.r}, {trained}, on {_kinds(adapted.targets)}")
    else:
        reporter.say(f"weights   {trained}, all of {_kinds(adapted.in_full)}")
        if recipe.train.learning_rate > _HIGHEST_FULL_RATE:
            reporter.warn(
                f"train.learning_rate: {recipe.train.learning_rate:g} is one for adapters; whole "
                f"weights take about a tenth of it ({recipe.train.learning_rate / 10:g})."
            )
    aware = recipe.quantization_aware
    if aware is not None:
        share = aware.start_after
        start = f"{share:.0%} of the" if share < 1 else f"{share:g}"
        which = "merged" if recipe.trains_adapter else "trained"
        reporter.say(
            f"aware     {which} weights are quantized to {aware.method} in every forward pass"
            f"{f' after {start} updates' if share else ''}; what is measured is measured so"
        )


def _kinds(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ×{count}" for name, count in sorted(counts.items()))


def schedule(reporter: Reporter, spec: TrainSpec, batches: Batching, shape: BatchShape) -> None:
    """How many updates there will be, and what each is made of."""
    from qlora_kit.train.updates import num_update_steps

    whole, rows = shape.items_per_update, batches.num_items
    shared = f" × {shape.num_processes} processes" if shape.num_processes > 1 else ""
    product = f"{shape.per_device} × {shape.accumulation} accumulated{shared}"
    if 0 < rows < whole:
        product = f"all there are; room for {whole}: {product}"
    reporter.say(f"batches   {batches.description}")
    reporter.say(
        f"schedule  {num_update_steps(rows, spec, whole)} steps of "
        f"{min(rows, whole) or whole} sequences ({product}), {spec.optim}, learning rate "
        f"{spec.learning_rate:g} "
        f"{spec.lr_scheduler_type}"
    )


def summary(reporter: Reporter, run: RunDirectory, recipe: Recipe) -> None:
    """One screen: what came out, what it is worth, what to do next."""
    values = json.loads(run.summary.read_text(encoding="utf-8"))
    training, memory = values["training"], values["memory"]
    reporter.say("")
    reporter.say(
        f"trained   {training['num_steps']} steps in {training['seconds']:.0f} s, "
        f"{training['tokens_per_second']:,.0f} tokens/s; loss {training['first_loss']:.3f} → "
        f"{training['last_loss']:.3f}; peak memory {memory['peak_bytes'] / _MIB:,.0f} MiB "
        f"({memory['peak_phase']})"
    )
    foretold = memory.get("training")
    if foretold is not None:
        predicted, measured = foretold["predicted_bytes"], foretold["measured_bytes"]
        reporter.say(
            f"plan      predicted {predicted / _MIB:,.0f} MiB for training, measured "
            f"{measured / _MIB:,.0f} MiB ({predicted / measured:.0%})"
        )
    evaluation(reporter, values["evaluation"], recipe.quantization, recipe.quantization_aware)
    if values["certificate"] is not None:
        certificate(reporter, values["certificate"])
    reporter.say("")
    reporter.say(f"Everything is in {run.folder}. What next:")
    folder = shlex.quote(str(run.folder))
    reporter.say(f"  qlora-kit chat {folder}")
    if recipe.data.has_eval_rows:
        reporter.say(f"  qlora-kit evaluate {folder}")
    if values["certificate"] is None:
        reporter.say(f"  qlora-kit merge {folder}")
    elif not values["certificate"]["passed"]:
        told = run.shipped / "certificate.json"
        reporter.say(
            f"  {told} tells how far from what was trained the model beside it is, and why"
        )
    else:
        reporter.say(
            f'  python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{run.shipped}')\""
        )


def evaluation(
    reporter: Reporter,
    values: dict[str, Any] | None,
    quantization: QuantizationSpec | None,
    aware: QuantizationAwareSpec | None = None,
) -> None:
    """Base and tuned model side by side, or one model alone; nothing where nothing was measured.

    `quantization` is the base's, None where it is not known.
    """
    if not any(_is_measured(one) for one in (values or {}).values()):
        return
    assert values is not None
    rows = []
    kind = "" if quantization is None else _kind_of(quantization)
    if aware is not None:
        kind = f"quantized to {aware.method}"
    shown = [
        name for name in METRICS if any(name in one["metrics"] for one in values.values() if one)
    ]
    for measured in values.values():
        if measured is None:
            continue
        name = measured["name"]
        if name == "base" and kind:
            name = f"base ({kind})"
        if measured["name"] == "tuned" and aware is not None:
            name = f"tuned ({kind})"
        perplexity, exact = measured["perplexity"], measured["exact_match"]
        rows.append(
            (
                name,
                f"{perplexity['perplexity']:.3f}" if perplexity else "–",
                f"{exact:.1%}" if exact is not None else "–",
                f"{measured['num_exact']} of {measured['num_rows']}" if exact is not None else "–",
                f"{measured['num_unstopped']}" if exact is not None else "–",
                *(METRICS[name].format(measured["metrics"].get(name, 0.0)) for name in shown),
            )
        )
    columns = ("held-out rows", "perplexity", "exact match", "rows", "never stopped")
    reporter.table("", (*columns, *(name.replace("_", " ") for name in shown)), rows)


def _is_measured(values: dict[str, Any] | None) -> bool:
    return values is not None and bool(
        values["perplexity"] or values["exact_match"] is not None or values["metrics"]
    )


def _kind_of(quantization: QuantizationSpec) -> str:
    names = {4: quantization.quant_type.upper(), 8: "LLM.int8()", 16: "not quantized"}
    if len(quantization.all_bits) > 1:
        return "mixed: " + " + ".join(names[bits] for bits in sorted(quantization.all_bits))
    return names[quantization.num_bits]


def samples(reporter: Reporter, measured: dict[str, Any], count: int = 3) -> None:
    """A few answers, as they came."""
    for sample in measured["samples"][:count]:
        mark = "✓" if sample["is_exact"] else f"✗ wanted {sample['reference']}"
        reporter.say(f"  {sample['question']}")
        reporter.say(f"  → {sample['answer']}  {mark}")


def certificate(reporter: Reporter, values: dict[str, Any]) -> None:
    """One line: what the merge is worth, or the quantized model that training was for, and whether
    that is within its budget.
    """
    measured = values["divergence"]
    verdict = "certified" if values["passed"] else "OVER BUDGET"
    aware = values["trained_on"].get("quantization_aware")
    if aware is not None and values["dtype"] == aware["method"]:
        what, made = "quantized", f"{values['dtype']}, as in training"
    else:
        what, made = "merged   ", f"{values['base']} base in {values['dtype']}"
    reporter.say(
        f"{what} {verdict} on {measured['num_tokens']:,} held-out tokens: {made}, "
        f"KL {measured['kl_mean']:.2g} nats/token "
        f"(budget {values['max_kl']:g}), same top token {measured['top1_agreement']:.2%}, "
        f"max |Δ log p| {measured['max_abs_delta_logp']:.2g}, perplexity "
        f"{measured['reference_perplexity']:.4f} → {measured['candidate_perplexity']:.4f}"
    )
    for fault in values["reload_faults"]:
        reporter.warn(f"the merged folder does not reload as it was: {fault}")
