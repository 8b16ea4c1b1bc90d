"""Tasks of EleutherAI's lm-eval, asked of any runtime through the library itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qlora_kit.data.read.hub import upstream_faults
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.errors import DataError, ModelError
from qlora_kit.model.reason import reason_of
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.protocol import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is known of a context that nothing tells the length of.
_CONTEXT_TOKENS = 2048
_NEW_TOKENS = 256
_GENERATION_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


@dataclass(frozen=True)
class TaskPlan:
    """Which tasks, and how they are asked; None leaves what the task itself says."""

    names: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat: bool = False
    batch_size: int = 16


def evaluate_tasks(
    runtime: Runtime, plan: TaskPlan, manager: TaskManager, reporter: Reporter = SILENT
) -> dict[str, dict[str, Any]]:
    """The figures of each task, as lm-eval names them (`acc,none`, `acc_stderr,none` …).

    `manager` is that of `require_tasks`.

    Raises:
        ModelError: a task asks for what a runtime cannot do.
    """
    if plan.chat and not runtime.tokenizer.chat_template:
        raise ModelError(f"{runtime.name} has no chat template; leave --chat out.")
    found = simple_evaluate(
        RuntimeLM(runtime, plan.batch_size, reporter),
        tasks=list(plan.names),
        num_fewshot=plan.num_fewshot,
        limit=plan.limit,
        apply_chat_template=plan.chat,
        fewshot_as_multiturn=plan.chat,
        task_manager=manager,
        bootstrap_iters=1000,
        log_samples=False,
    )
    assert found is not None
    return {name: _figures(found, name, values) for name, values in found["results"].items()}


def require_tasks(plan: TaskPlan) -> TaskManager:
    """What lm-eval knows, before a model is loaded; its own tasks, of which there are thousands,
    are looked through only where those of `include_path` do not suffice.

    Raises:
        DataError: there is no such task, or its rows are not to be had.
    """
    manager = _manager_of(plan)
    for name in plan.names:
        try:
            manager.load([name])
        except upstream_faults() as error:
            raise DataError(
                f"the rows of {name} are not to be had: {reason_of(error)}. Ask where there is a "
                "network first, or name tasks with rows of your own (--include-path)."
            ) from error
    return manager


def _manager_of(plan: TaskPlan) -> TaskManager:
    if plan.include_path is not None:
        own = TaskManager(include_path=plan.include_path, include_defaults=False)
        if not _unknown(own, plan):
            return own
    manager = TaskManager(include_path=plan.include_path)
    unknown = _unknown(manager, plan)
    if unknown:
        raise DataError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, and "
            "--include-path names a folder with YAML files of your own."
        )
    return manager


def _unknown(manager: TaskManager, plan: TaskPlan) -> list[str]:
    return [name for name in plan.names if not manager.match_tasks([name])]


def _figures(found: Any, name: str, values: dict[str, Any]) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in values.items()
        if key not in ("alias", "name", "sample_len") and isinstance(value, (int, float))
    }
    return {
        **kept,
        "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name),
        "num_rows": found["n-samples"].get(name, {}).get("effective"),
    }


class RuntimeLM(TemplateLM):  # type: ignore[misc]
    """What lm-eval wants of a model, made of what a runtime offers."""

    def __init__(self, runtime: Runtime, batch_size: int, reporter: Reporter = SILENT):
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase = runtime.tokenizer
        self._runtime = runtime
        self._batch_size = batch_size
        self._reporter = reporter

    @property
    def eot_token_id(self) -> int:
        own = self.tokenizer.eos_token_id
        return int(own) if isinstance(own, int) else min(self._runtime.stop_ids)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return int(first) if isinstance(first, int) else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self._runtime.context_tokens or _CONTEXT_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return self._runtime.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """With the tokenizer's own beginning, unless the text has it already (of a template)."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (isinstance(first, str) and string.startswith(first))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return list(ids)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        windows = []
        for number, (_, context, continuation) in enumerate(requests):
            ids = (context + continuation)[-self.max_length :]
            length = min(len(continuation), len(ids) - 1)
            labels = (IGNORE_INDEX,) * (len(ids) - length) + tuple(ids[len(ids) - length :])
            windows.append(TokenSequence(tuple(ids), labels, f"request {number + 1}"))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
        with self._reporter.progress("scoring", len(windows)) as progress:
            for scored in self._runtime.score(windows, self._batch_size):
                logprobs = torch.log_softmax(scored.logits.float(), dim=-1)
                own = logprobs.gather(1, scored.targets[:, None]).sum()
                is_greedy = bool((logprobs.argmax(dim=-1) == scored.targets).all())
                answers[scored.index] = (float(own), is_greedy)
                progress.update()
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Each text in windows that do not overlap, as lm-eval's own models read it."""
        pieces: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                pieces.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy; what a request asks for beyond that is refused."""
        answers: list[str] = []
        with self._reporter.progress("answering", len(requests)) as progress:
            for at in range(0, len(requests), self._batch_size):
                batch = requests[at : at + self._batch_size]
                answers += self._answered(batch)
                progress.update(len(batch))
        return answers

    def _answered(self, batch: Sequence[Any]) -> list[str]:
        options = [_require_greedy(request.args[1]) for request in batch]
        limits = [int(one.get("max_gen_toks", _NEW_TOKENS)) for one in options]
        most = min(max(limits), self.max_length // 2)
        prompts = [self.tok_encode(one.args[0])[-(self.max_length - most) :] for one in batch]
        rows = self._runtime.generate(prompts, most, self._batch_size)
        texts = []
        for ids, limit, option in zip(rows, limits, options, strict=True):
            text = self.tokenizer.decode(ids[:limit], skip_special_tokens=True)
            assert isinstance(text, str)
            texts.append(_up_to(text, option.get("until", ())))
        return texts


def _require_greedy(options: dict[str, Any]) -> dict[str, Any]:
    samples = options.get("do_sample") and options.get("temperature", 1.0) > 0
    unknown = sorted(options.keys() - set(_GENERATION_OPTIONS))
    if samples or unknown:
        asked = ", ".join(unknown) or "do_sample"
        raise ModelError(
            f"a task asks for answers with {asked}, and a runtime writes greedy ones; "
            "change generation_kwargs in the task's YAML, or take another task."
        )
    return options


def _up_to(text: str, until: str | Iterable[str]) -> str:
    """Cut before the first of the texts that end an answer."""
    for end in [until] if isinstance(until, str) else until:
        if end:
            text = text.split(end)[0]
    return text
