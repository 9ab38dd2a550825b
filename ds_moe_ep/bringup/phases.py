"""The four phases in order, within a job: each is shown when it is done, and a failed one ends all.

Every rank calls the same methods and comes to the same verdicts, from what all have told.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from ds_moe_ep.bringup.communication import (
    DecodeSize,
    check_latency,
    check_values,
    describe_bandwidth,
)
from ds_moe_ep.bringup.distribution import (
    WorkCost,
    balance_of_schedule,
    check_balance,
    check_dispatcher,
    choose_dispatcher,
    measure_cost,
)
from ds_moe_ep.bringup.experts import check_experts, check_hosts, check_room_for_output
from ds_moe_ep.bringup.host_pairs import check_pairs
from ds_moe_ep.bringup.memory import (
    MOST_AUTO,
    RankMemory,
    check_room_for_weights,
    choose_batch_size,
    judge_batch,
    judge_spread,
    judge_weights,
    measure_memory,
    used_bytes,
)
from ds_moe_ep.bringup.report import (
    BRINGUP_JSONL,
    FAIL,
    PASS,
    PHASES,
    Check,
    PhaseReport,
    write_jsonl,
)
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.loading import Engine
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.prepare import Work, replays_passes
from ds_moe_ep.engine.schedule import Batch, replicate, spread
from ds_moe_ep.errors import BringUpError, PlanError, ResourceError
from ds_moe_ep.memory_needs import BatchNeeds, weight_bytes
from ds_moe_ep.model_families import NO_PADDING
from ds_moe_ep.moe.dispatch import make_links
from ds_moe_ep.moe.probe import measure_links

__all__ = ["BringUp"]


class BringUp:
    """The bring-up of one job.

    Args:
        options: What the user asked for; a preflight measures thoroughly.
        job: The job.
        work: What was settled before loading.
        left: Prompts to serve, by index.

    Attributes:
        predicted_bytes: What a rank is to use at most, once the phases are done: what it used
            before loading, its weights, and its largest batch; None if the system does not say.
        available_bytes: What a rank may use; None if the system does not say.
        largest_batch: Prompts of the largest batch of any rank, once the phases are done.
        longest_tokens: Tokens of the longest prompt with its completion.
    """

    def __init__(self, options: JobOptions, job: Job, work: Work, left: Sequence[int]) -> None:
        self._options, self._job, self._work = options, job, work
        self._left = left
        self._lengths = [len(work.prompts[index].token_ids) for index in left]
        self._new_tokens = options.max_new_tokens if options.task == "generate" else 0
        self._reports: list[PhaseReport] = []
        self._host_checks: list[Check] = []
        self._hosts_s = 0.0
        self._before_bytes: int | None = None
        self._widest_dispatcher = options.dispatcher
        self.predicted_bytes: int | None = None
        self.available_bytes: int | None = None
        self.largest_batch = 0
        self.longest_tokens = max(self._lengths, default=0) + self._new_tokens

    def check_before_loading(self) -> None:
        """Does what of phases 1 and 4 can be done before weights are loaded.

        Raises:
            BringUpError: Some hosts differ; it names all of them.
            PlanError: The weights do not fit in memory.
        """
        start_s = time.perf_counter()
        checks = check_hosts(self._job, self._options.model)
        if not self._options.preflight:
            num_tokens = sum(self._lengths) + len(self._left) * self._new_tokens
            own = check_room_for_output(self._options.output.absolute().parent, num_tokens)
            checks.append(self._job.all_gather(own)[0])
        self._hosts_s = time.perf_counter() - start_s
        if any(check.verdict == FAIL for check in checks):
            self._close(1, checks, start_s)
        self._host_checks = checks
        start_s = time.perf_counter()
        room = check_room_for_weights(self._job, self._weight_bytes())
        if room.verdict == FAIL:
            self._close(4, [room], start_s)
        self._before_bytes = used_bytes(self._job.device)

    def run(self, engine: Engine) -> list[Batch]:
        """Goes through the phases with the loaded model.

        Returns:
            The batches of this rank.

        Raises:
            BringUpError: Experts or communication are not as they must be.
            PlanError: The batches do not fit in memory.
        """
        start_s = time.perf_counter() - self._hosts_s
        experts = check_experts(self._job, engine.report, self._work.placement)
        self._close(1, [*self._host_checks, experts], start_s)
        start_s = time.perf_counter()
        self._close(2, self._communication(engine), start_s)
        start_s = time.perf_counter()
        # What a batch takes is told by its prompts' pass, in which most rows travel.
        longest = max(self._lengths, default=1)
        widest, _ = choose_dispatcher(
            engine.layers[0], self._rows() * longest, self._work.spec.top_k
        )
        self._widest_dispatcher = self._job.all_gather(widest)[0]  # groups measure for themselves
        memory = measure_memory(
            self._job,
            engine.deepspeed_engine.module,
            self._weight_bytes(),
            self._before_bytes,
        )
        batch_size, of_rank, checks = self._distribution(engine, memory)
        self._close(3, checks, start_s)
        start_s = time.perf_counter()
        self._close(4, self._memory(memory, batch_size, of_rank), start_s)
        self._job.all_or_none(
            self._write, what="writing bringup.jsonl", timeout_s=self._options.timeout_s
        )
        return of_rank[self._job.info.rank]

    def _communication(self, engine: Engine) -> list[Check]:
        experts, spec = engine.layers[0].deepspeed_moe, self._work.spec
        if engine.layers[0].ep_size == 1:
            return [Check("groups", PASS, "each rank holds all experts: nothing travels")]
        links = make_links(experts.ep_group, experts.node_groups, shared=experts.shared)
        size = DecodeSize(self._rows(), engine.layers[0].hidden_size, spec.top_k, self._work.dtype)
        values = check_values(self._job, links)
        if values.verdict == FAIL:
            return [values]
        thorough = self._options.preflight
        checks = [values, *check_latency(self._job, links, size, thorough=thorough)]
        # A dispatcher that chooses has measured them already.
        prices = experts.prices or measure_links(links, self._job.device)
        checks.append(describe_bandwidth(prices))
        num_bytes = size.num_rows * size.hidden_size * size.dtype.itemsize
        pairs = check_pairs(self._job, num_bytes, thorough=thorough)
        return checks if pairs is None else [*checks, pairs]

    def _distribution(
        self, engine: Engine, memory: Sequence[RankMemory]
    ) -> tuple[int, list[list[Batch]], list[Check]]:
        """Returns the batch size, the batches of each rank, and what there is to say of both."""
        asked = self._options.batch_size
        cost = self._cost(engine)
        whole = self._spread(max(1, len(self._left)), cost)
        most = max(len(batch.indices) for of_rank in whole for batch in of_rank or [Batch(())])
        batch_size, why = choose_batch_size(memory, self._needs(), max(1, most), asked)
        of_rank = self._spread(batch_size, cost)
        token_cost = cost.new_token_cost if cost else 1.0
        share = balance_of_schedule(
            of_rank, lambda i: self._lengths[i] + token_cost * self._new_tokens
        )
        num_ranks = 1 if self._options.batch_mode == "replicated" else self._job.info.world_size
        checks = [
            check_balance(share, len(self._left), num_ranks, cost),
            check_dispatcher(
                engine.layers[0],
                self._rows(),
                self._work.spec.top_k,
                self._options.dispatcher,
                has_static_shapes=replays_passes(self._options),
            ),
            Check("batch size", PASS, why),
        ]
        left = self._left
        by_prompt = [
            [Batch(tuple(left[position] for position in batch.indices)) for batch in batches]
            for batches in of_rank
        ]
        return batch_size, by_prompt, checks

    def _cost(self, engine: Engine) -> WorkCost | None:
        """Measures what work costs, where how it is spread can make a difference."""
        options = self._options
        is_worth_it = options.preflight or self._per_rank() > self._rows()
        if options.batch_mode == "replicated" or not self._new_tokens or not is_worth_it:
            return None
        return measure_cost(
            self._job,
            engine.deepspeed_engine,
            engine.layers,
            self._work.context_length,
            self._work.spec.vocab_size,
        )

    def _spread(self, batch_size: int, cost: WorkCost | None) -> list[list[Batch]]:
        world_size = self._job.info.world_size
        takes_padding = self._work.spec.model_type not in NO_PADDING
        if self._options.batch_mode == "replicated":
            return replicate(self._lengths, world_size, batch_size, takes_padding=takes_padding)
        return spread(
            self._lengths,
            world_size,
            batch_size,
            max_new_tokens=self._new_tokens,
            new_token_cost=cost.new_token_cost if cost else 1.0,
            takes_padding=takes_padding,
        )

    def _memory(
        self, memory: Sequence[RankMemory], batch_size: int, of_rank: Sequence[Sequence[Batch]]
    ) -> list[Check]:
        largest = max((len(b.indices) for batches in of_rank for b in batches), default=0)
        self.largest_batch = largest
        self._predict(memory[self._job.info.rank], largest)
        return [
            judge_weights(memory, is_exact=self._work.spec.params_are_exact),
            judge_spread(memory),
            judge_batch(memory, self._needs(), batch_size, largest),
        ]

    def _predict(self, own: RankMemory, largest_batch: int) -> None:
        if self._before_bytes is not None:
            batch_bytes = largest_batch * self._needs().num_bytes
            self.predicted_bytes = self._before_bytes + self._weight_bytes() + batch_bytes
        if own.free_bytes is not None:
            self.available_bytes = (used_bytes(self._job.device) or 0) + own.free_bytes

    def _weight_bytes(self) -> int:
        work, placement = self._work, self._work.placement
        num_bytes = weight_bytes(work.spec, work.plan, work.dtype.itemsize)
        if placement is not None:  # its slots may be more than the experts that are counted
            more = placement.slots_per_rank - work.spec.num_experts // work.plan.ep_size
            of_layers = more * len(placement.moe_layers)
            num_bytes += of_layers * work.spec.num_params_per_expert * work.dtype.itemsize
        return num_bytes

    def _needs(self) -> BatchNeeds:
        return BatchNeeds.of(
            self._work.spec,
            ep_size=self._work.plan.ep_size,
            prompt_tokens=max(self._lengths, default=0),
            new_tokens=self._new_tokens,
            element_bytes=self._work.dtype.itemsize,
            on_gpu=self._job.device.type == "cuda",
            dispatcher=self._widest_dispatcher,
        )

    def _per_rank(self) -> int:
        num_ranks = 1 if self._options.batch_mode == "replicated" else self._job.info.world_size
        return max(1, -(-len(self._left) // num_ranks))

    def _rows(self) -> int:
        """Returns the tokens of a rank in a decode step, before a batch size is chosen."""
        return min(self._options.batch_size or MOST_AUTO, self._per_rank())

    def _close(self, number: int, checks: Sequence[Check], start_s: float) -> None:
        """Shows a phase, and ends the job if it has failed."""
        report = PhaseReport(number, tuple(checks), time.perf_counter() - start_s)
        self._reports.append(report)
        if self._job.info.rank == 0:
            print(report.to_text(), flush=True)
        if not report.failed:
            return
        with contextlib.suppress(ResourceError):  # what failed is what the user is to hear
            self._write()
        if number == len(PHASES):
            raise PlanError(" | ".join(check.reason for check in report.failed))
        told = " | ".join(f"{check.name}: {check.reason}" for check in report.failed)
        raise BringUpError(f"stopped at phase {number} of {len(PHASES)}, {report.name}: {told}")

    def _write(self) -> None:
        if self._job.info.rank == 0 and self._options.metrics is not None:
            write_jsonl(self._options.metrics / BRINGUP_JSONL, self._reports)
