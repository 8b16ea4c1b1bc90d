"""The whole recipe: one frozen spec per section, and what may not be combined across them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec
from qlora_kit.recipe.data import DataSpec
from qlora_kit.recipe.evaluate import EvaluateSpec, stride_fault
from qlora_kit.recipe.export import ExportSpec
from qlora_kit.recipe.lora import LoraSpec
from qlora_kit.recipe.model import ModelSpec
from qlora_kit.recipe.quantization import QuantizationSpec
from qlora_kit.recipe.quantization_aware import QuantizationAwareSpec
from qlora_kit.recipe.train import TrainSpec
from qlora_kit.recipe.vllm import vllm_faults


class Recipe(Spec):
    """A qlora_kit recipe. Only `model` and `data` have to be given."""

    model: ModelSpec
    """The base model and its tokenizer."""

    quantization: QuantizationSpec = QuantizationSpec()
    """Precision of the frozen base."""

    quantization_aware: QuantizationAwareSpec | None = None
    """Train on the quantized weights that will be shipped; unset: quantization comes after."""

    lora: LoraSpec = LoraSpec()
    """The adapter that is trained."""

    data: DataSpec
    """What is trained and evaluated on."""

    train: TrainSpec = TrainSpec()
    """Optimisation, precision, logging, saving."""

    evaluate: EvaluateSpec = EvaluateSpec()
    """What is measured."""

    export: ExportSpec = ExportSpec()
    """What a finished run is turned into."""

    run_dir: str = Field(default="runs/recipe", min_length=1)
    """Folder of the run; unset: `runs/` and the recipe's file name."""

    @property
    def trains_adapter(self) -> bool:
        """Whether what is trained is an adapter, and not the weights of the model themselves."""
        return self.quantization_aware is None or self.quantization_aware.train == "adapter"

    def with_optimizer(self, name: str) -> Recipe:
        """With this one in place of `train.optim: auto`; one that is named stays."""
        if self.train.optim != "auto":
            return self
        return self.model_copy(update={"train": self.train.model_copy(update={"optim": name})})

    def contradictions(self) -> Iterator[Fault]:
        """Faults between sections; those within one are its own to report."""
        if not self.data.has_eval_rows:
            yield from self._faults_without_eval_rows()
        if self.data.streaming:
            yield from self._streaming_faults()
        if "adapter:vllm" in self.export.to and self.trains_adapter:
            for fault in vllm_faults(self.lora):
                yield replace(fault, path=f"lora.{fault.path}")
        if self.export.merge_options.base == "dequantized" and not self.quantization.is_quantized:
            yield Fault(
                "export.merge_options.base",
                "dequantized names a quantized base, and this one is not quantized",
                "use original or auto",
            )
        stride, longest = self.evaluate.stride_tokens, self.data.max_length
        if stride and self.evaluate.window_tokens is None and stride > longest:
            yield stride_fault("evaluate.", stride, f"the window, data.max_length ({longest})")
        yield from self._precision_contradictions()
        if self.quantization_aware is not None:
            yield from self._aware_faults(self.quantization_aware)
            yield from self._lora_in_weight_faults() if self.trains_adapter else self._full_faults()

    def _streaming_faults(self) -> Iterator[Fault]:
        if self.train.max_steps is None:
            message = "data.streaming does not know how many rows there are"
            yield Fault("train.max_steps", message, "say how many steps to train")
        if self.train.train_sampling_strategy != "random":
            message = "data.streaming sees only the next rows"
            yield Fault("train.train_sampling_strategy", message, "remove one of the two")
        if self.data.mix != "concatenate" or any(one.num_rows for one in self.data.train):
            message = "sources are mixed by their numbers of rows, which data.streaming cannot know"
            yield Fault("data.streaming", message, "remove one of the two")
        if self.data.held_out is not None and self.data.held_out >= 1:
            message = "a number of rows cannot be held out of a stream"
            yield Fault("data.held_out", message, "give a share, such as 0.01")

    def _faults_without_eval_rows(self) -> Iterator[Fault]:
        hint = "name one, or set data.held_out: 0.05"
        if self.train.eval_strategy != "no":
            yield Fault("train.eval_strategy", "data.eval names no source", hint)
        if self.evaluate.generate is not None:
            yield Fault("evaluate.generate", "data.eval names no source", hint)
        if self.export.merge:
            message = "a merge is certified on held-out rows, and data.eval names no source"
            yield Fault("export.merge", message, hint)
        if self.export.to:
            message = "an export is measured on held-out rows, and data.eval names no source"
            yield Fault("export.to", message, hint)

    def _aware_faults(self, aware: QuantizationAwareSpec) -> Iterator[Fault]:
        bits = min(self.quantization.all_bits)
        if bits < 16:
            is_mixed = self.quantization.num_bits == 16
            hint = "remove quantization.overrides"
            why = (
                "where every weight stands on a code already and a small update moves none to "
                "another"
                if self.trains_adapter
                else "where no weight has a gradient, and so none can be trained"
            )
            yield Fault(
                "quantization_aware",
                f"the base is kept in {bits} bits, {why}",
                hint if is_mixed else f"set quantization.load_in_{bits}bit: false",
            )
        num_updates = self.train.max_steps
        if num_updates is not None and aware.first_update(num_updates) >= num_updates:
            yield Fault(
                "quantization_aware.start_after",
                f"{aware.start_after:g} is not below train.max_steps ({num_updates}), so nothing "
                "would be trained on quantized weights",
                "lower it",
            )

    def _lora_in_weight_faults(self) -> Iterator[Fault]:
        if self.lora.dropout:
            yield Fault(
                "lora.dropout",
                "with quantization_aware the update is inside the weight that is quantized, where "
                "no input of its own can be dropped",
                "set it to 0",
            )
        if self.lora.use_dora:
            yield Fault(
                "lora.use_dora",
                "with quantization_aware the gradient is computed for a plain low-rank update",
                "remove one of the two",
            )

    def _full_faults(self) -> Iterator[Fault]:
        """Where the weights are trained, there is no adapter."""
        full = "quantization_aware.train: full"
        if self.lora != LoraSpec():
            message = f"has no effect with {full}, which trains the weights and no adapter"
            yield Fault("lora", message, "remove the section")
        if self.train.loraplus_lr_ratio is not None:
            message = f"has no effect with {full}, which has no matrix B"
            yield Fault("train.loraplus_lr_ratio", message, "remove it")
        for number, target in enumerate(self.export.to):
            if target.partition(":")[0] == "lora-gguf" or target == "adapter:vllm":
                message = f"{target} holds low-rank updates, and {full} trains whole weights"
                yield Fault(f"export.to.{number}", message, "export the merged model")

    def _precision_contradictions(self) -> Iterator[Fault]:
        wanted = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        precision, compute = self.train.precision, self.quantization.compute_dtype
        if precision != "auto" and compute != "auto" and wanted[precision] != compute:
            yield Fault(
                "train.precision",
                f"{precision} contradicts quantization.compute_dtype: {compute}",
                "leave one of them on auto",
            )
        is_lora_whole = self.quantization.is_quantized or not self.trains_adapter
        if not is_lora_whole and self.lora.init == "loftq":
            yield Fault(
                "lora.init",
                "loftq corrects a quantization error, and this base is not quantized",
                "use init: default or gaussian",
            )
