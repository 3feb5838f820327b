"""The engine: load a policy and guides, generate guided completions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from fastguide import assets
from fastguide.config import MAX_CANDIDATES, Rule
from fastguide.engine.caches import Caches, check_memory, reserve
from fastguide.engine.calls import check_errors, decode, gather
from fastguide.engine.loop import Loop
from fastguide.engine.ranks import LeadingLoop, Ranks, check_launch, follow
from fastguide.engine.requests import Limits, build_request, per_prompt
from fastguide.engine.runner import ModelRunner
from fastguide.engine.samples import Request
from fastguide.engine.stats import EngineStats
from fastguide.engine.text import Prompt, TextStream, as_prompts, encode, end_tokens
from fastguide.guides import Guide, LoadContext, ValueGuide
from fastguide.guides.base import check_guides
from fastguide.models.fingerprint import fingerprint
from fastguide.models.loading import (
    load_policy,
    load_tokenizer,
    one_line,
    resolve_device,
)
from fastguide.models.locate import locate
from fastguide.models.quantization import check_scheme, shrink
from fastguide.request import (
    Completion,
    GenerationError,
    Piece,
    SamplingParams,
)

T = TypeVar("T")


class Engine:
    """A language model that guides steer while it decodes.

    ``policy`` is its name with a fingerprint of its weights, for records; ``name_or_path`` is where
    it was loaded from, absolute if that is a folder.

    >>> engine = Engine("path-or-hub-id", guides={"cheerful": ValueGuide("path-or-hub-id")})
    >>> outputs = engine.generate(["Once upon a time"], rule=VAS(beta=4.0, k=20))
    """

    def __init__(
        self,
        model: str | Path | None = None,
        guides: Mapping[str, Guide] | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        max_rows: int = 64,
        kv_memory: int | float | None = None,
        prefill_tokens: int | None = None,
        prefix_cache: bool = True,
        way: str = "auto",
        tensor_parallel: bool = False,
        quantize: str | None = None,
        graphs: bool = False,
        compile: bool = False,
    ) -> None:
        """Load the policy and its guides.

        Args:
            model: hub id, local path or packaged name of a causal decoder. None: the packaged
                model, and its guides unless ``guides`` says otherwise.
            guides: by name; requests weigh them by these names.
            dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the policy's checkpoint's,
                and guides compute in the policy's: trainers save them in float32.
            device: None picks CUDA where there is one.
            trust_remote_code: run code shipped with checkpoints.
            allow_pickle: also load weights that are not safetensors.
            max_rows: most samples that decode together; the others wait.
            kv_memory: for the caches of all models together: bytes (a whole number), or a fraction
                of the memory that is free once the models are loaded. None takes 0.9 of it on a
                GPU, and half of it but at most 8 GiB on a CPU, if so much is of any use.
            prefill_tokens: most prompt tokens that a step computes in each model, so that long
                prompts do not hold up what runs; None is 512 on a CPU and 2,048 on a GPU.
            prefix_cache: keep the beginnings of earlier requests, until their memory is needed.
            way: how guides on the policy's own weights run: ``one-pass`` with the policy,
                ``two-phase`` after it, or ``auto``, whichever costs less by passes measured here.
            tensor_parallel: share the policy's weights out among the processes that ``torchrun``
                started, by the model's own plan in transformers. Guides on its weights are shared
                out with it; those with others are whole in every process. Only rank 0 comes back
                from here: the others follow it until it ends, and end with it.
            quantize: the policy's linear layers, through torchao: ``int8``, ``fp8`` or ``int4``
                weights (the last needs bf16 on a GPU); guides say so themselves. Records then name
                it with the policy. None leaves the weights as they are.
            graphs: make steps of fixed shapes where all guides are decoders on the policy's device,
                and replay them as CUDA graphs on a GPU; on a CPU they run as they come.
            compile: have ``torch.compile`` fuse the small operations of all models' layers, but for
                those that run as a native stack on a CPU; the first passes take longer then.

        Raises:
            ValueError: for weights that are missing, corrupt, incomplete, unsupported or do not
                fit together, for guides that are none, and where memory does not suffice.
        """
        _check_count("max_rows", max_rows)
        if prefill_tokens is not None:
            _check_count("prefill_tokens", prefill_tokens)
        check_memory(kv_memory)
        if guides is None:
            guides = {n: ValueGuide(n) for n in assets.guides()} if model is None else {}
        check_guides(guides)
        path = assets.MODEL if model is None else model
        locate(path)
        check_scheme(quantize)
        if graphs and (tensor_parallel or way == "overlap"):
            raise ValueError(
                f"graphs is True with way {way!r} and tensor_parallel {tensor_parallel}; allowed "
                "with it are auto, one-pass and two-phase, and False"
            )
        if tensor_parallel:
            check_launch(device)
            if quantize is not None:
                raise ValueError(
                    f"quantize is {quantize!r} and tensor_parallel is True; allowed is one of them"
                )
        where = None if tensor_parallel else resolve_device(device)
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        trust = dict(trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        try:
            policy = load_policy(path, dtype=dtype, device=where, parallel=tensor_parallel, **trust)
            where = policy.device
            self.policy = f"{Path(path).name}@{fingerprint(policy.model)}"
            if quantize is not None:
                shrink(policy.model, quantize)
                self.policy += f"+{quantize}"
            policy.pack()
            vocabulary = policy.model.config.get_text_config().vocab_size
            context = LoadContext(
                self.tokenizer,
                where,
                policy.model.dtype,
                vocabulary=vocabulary,
                policy=policy,
                policy_path=assets.absolute(Path(assets.resolve(path))),
                **trust,
            )
            scorers = {name: guide.load(context) for name, guide in guides.items()}
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the weights of the model and {len(guides)} guides do not fit on "
                f"{where or 'each rank'}: {one_line(error)}"
            ) from error
        ranks = Ranks() if tensor_parallel else None
        self.name_or_path = assets.absolute(path)
        self.runner = ModelRunner(policy, scorers, way, fixed=graphs)
        self.limits = Limits(
            vocabulary=vocabulary,
            context=policy.context,
            guide_contexts={name: scorer.context for name, scorer in scorers.items()},
            guide_kinds={name: getattr(scorer, "kind", None) for name, scorer in scorers.items()},
        )
        caches = Caches(policy, scorers, self.runner.ways)
        if compile:
            for decoder in caches.decoders.values():
                decoder.fuse()
        uses = int(caches.uses(dict.fromkeys(scorers, 1.0)).max())  # sequences of a sample
        longest = policy.context and uses * max_rows * (policy.context + MAX_CANDIDATES)
        least = int if ranks is None else ranks.least
        reserve(caches, kv_memory, longest, prefix_cache, least)
        self.runner.ways.measure(float if ranks is None else ranks.same)
        if prefill_tokens is None:
            prefill_tokens = 512 if where.type == "cpu" else 2048
        kind: Callable[..., Loop] = Loop
        if ranks is not None and ranks.leads:
            kind = functools.partial(LeadingLoop, ranks=ranks)
        self.loop = kind(
            self.runner,
            caches,
            self.tokenizer,
            end_tokens(policy.model, self.tokenizer),
            max_rows=max_rows,
            prefill_tokens=prefill_tokens,
        )
        if ranks is not None and not ranks.leads:
            follow(self.loop, ranks)

    @property
    def max_rows(self) -> int:
        """Most samples that decode together; may be changed at any time."""
        return self.loop.scheduler.max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        _check_count("max_rows", rows)
        self.loop.scheduler.max_rows = rows

    @property
    def stats(self) -> EngineStats:
        """What runs and waits, and what the caches hold."""
        return self.loop.stats

    def clear_prefixes(self) -> None:
        """Forget the beginnings of earlier requests: only what runs keeps slots."""
        self.loop.forget()

    @property
    def guides(self) -> list[str]:
        """Names of the loaded guides."""
        return list(self.runner.scorers)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        rule: Rule | Sequence[Rule | None] | None = None,
        weights: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        errors: str = "raise",
        progress: bool | None = None,
    ) -> list[Completion]:
        """Complete all prompts; completions come in the order of the prompts, n for each.

        Args:
            prompts: texts, token ids (a list, or a one-dimensional array or tensor) or chats; a
                single one is allowed.
            rule: how guides steer, per call or one per prompt; None is plain decoding.
            weights: of guides by name, per call or one per prompt; None weighs each guide 1. A
                guide that is left out of the mapping is not used.
            sampling: per call or one per prompt; None is ``SamplingParams()``.
            errors: ``raise``: finish every other request, then raise with all outputs attached;
                ``return``: give failed requests as completions with ``finish_reason="error"``.
            progress: a bar on standard error, where that is a terminal; None shows one for batches.

        Raises:
            GenerationError: a ``ValueError`` whose ``outputs`` holds what was finished.
            GenerationInterrupt: a ``KeyboardInterrupt`` (Ctrl-C) with what was done as ``outputs``.
        """
        check_errors(errors)
        listed = as_prompts(prompts)
        total = sum(getattr(s, "n", 1) for s in per_prompt("sampling", sampling, len(listed)))
        return gather(self.completions(listed, rule, weights, sampling), total, errors, progress)

    def completions(
        self,
        prompts: Prompt | Sequence[Prompt],
        rule: Rule | Sequence[Rule | None] | None = None,
        weights: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[Completion, None, None]:
        """Completions as they finish, in no fixed order; arguments as in ``generate``.

        An interrupt (Ctrl-C, or one thrown into the generator) gives what was done so far, as
        completions with ``finish_reason="aborted"``, and is raised again after them.
        """

        def finished(completion: Completion, _: TextStream | None) -> Completion | None:
            return completion if completion.finish_reason is not None else None

        return self._decode(as_prompts(prompts), rule, weights, sampling, finished)

    def stream(
        self,
        prompt: Prompt,
        rule: Rule | None = None,
        weights: Mapping[str, float] | None = None,
        sampling: SamplingParams | None = None,
    ) -> Generator[Piece, None, None]:
        """Pieces of one prompt's completions as they are decoded; arguments as in ``generate``.

        Joined, the pieces of a sample are exactly the text that ``generate`` gives. Interrupts
        are as in ``completions``.

        Raises:
            GenerationError: if samples failed, after the others have ended.
        """
        failed: list[Completion] = []

        def piece(completion: Completion, text: TextStream | None) -> Piece | None:
            if completion.finish_reason == "error":
                failed.append(completion)
            done = completion.finish_reason is not None
            new = text.take(final=done) if text is not None else ""
            if not new and not done:
                return None
            return Piece(new, completion.sample, completion if done else None)

        yield from self._decode([prompt], rule, weights, sampling, piece)
        if failed:
            raise GenerationError(failed)

    def _decode(
        self,
        prompts: list[Prompt],
        rule: Rule | Sequence[Rule | None] | None,
        weights: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None,
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        emit: Callable[[Completion, TextStream | None], T | None],
    ) -> Generator[T, None, None]:
        """What ``emit`` makes of the news of these prompts."""
        rules = per_prompt("rule", rule, len(prompts))
        weighings = per_prompt("weights", weights, len(prompts))
        samplings = per_prompt("sampling", sampling, len(prompts))

        def requests() -> Iterator[Request | Completion]:
            for i, prompt in enumerate(prompts):
                try:
                    yield self.request(prompt, rules[i], weighings[i], samplings[i], i)
                except ValueError as error:
                    where = f"prompt {i}: " if len(prompts) > 1 else ""
                    yield Completion(i, 0, finish_reason="error", error=f"{where}{error}")

        return decode(self.loop, requests(), emit)

    def request(
        self,
        prompt: Prompt,
        rule: Rule | None = None,
        weights: Mapping[str, float] | None = None,
        sampling: SamplingParams | None = None,
        index: int = 0,
    ) -> Request:
        """A prompt as the loop takes it.

        Raises:
            ValueError: one sentence with the received and the allowed value.
        """
        tokens = encode(self.tokenizer, prompt)
        return build_request(index, tokens, rule, weights, sampling, self.limits)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; allowed are whole numbers from 1")
