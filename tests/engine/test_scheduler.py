"""Situations by name, each shown to have happened by plans or counters."""

import pytest

from engine.arena import ChunkUse
from engine.plan import StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.types import EngineError, ErrorCode, FinishReason
from tests.engine.simulated import Driver, small_config


def finish(driver: Driver) -> None:
    driver.run()
    driver.check_outputs()
    driver.check_empty()


def adapters_in(driver: Driver, plan: StepPlan) -> set[int | None]:
    return {plan.slots[s.slot] if s.slot >= 0 else None for s in plan.sequences}


# The way of a request


@pytest.mark.parametrize("overlap", [True, False])
def test_one_request(overlap: bool) -> None:
    driver = Driver(small_config(), overlap=overlap)
    request = driver.submit([1, 2, 3], max_tokens=6, ignore_eos=True)
    finish(driver)
    assert driver.requests[request].finish == {0: FinishReason.LENGTH}
    assert len(driver.plans) == 6


def test_one_step_ahead_the_token_is_not_known_yet() -> None:
    driver = Driver(small_config())
    driver.submit([1, 2, 3], max_tokens=4, ignore_eos=True)
    finish(driver)
    rows = [plan.sequences[0] for plan in driver.plans]
    assert [row.tokens for row in rows] == [(1, 2, 3), (), (), ()]
    assert [row.output_index for row in rows] == [0, 1, 2, 3]


def test_without_overlap_every_token_is_known() -> None:
    driver = Driver(small_config(), overlap=False)
    driver.submit([1, 2, 3], max_tokens=4, ignore_eos=True)
    finish(driver)
    assert all(plan.sequences[0].tokens for plan in driver.plans)


def test_the_end_by_length_is_foreseen() -> None:
    driver = Driver(small_config())
    driver.submit([1] * 30, max_tokens=10, ignore_eos=True)
    finish(driver)
    assert driver.counter("discarded_rows") == 0
    assert sum(plan.sequences[0].sample for plan in driver.plans) == 10


def test_a_stop_seen_late_discards_one_row() -> None:
    driver = Driver(small_config(eos_token_ids=frozenset(range(50))))
    request = driver.submit([1, 2, 3], max_tokens=9)
    finish(driver)
    assert driver.counter("discarded_rows") == 1
    assert driver.requests[request].finish == {0: FinishReason.STOP}
    assert len(driver.requests[request].tokens[0]) == 1


def test_min_tokens_bans_stops() -> None:
    driver = Driver(small_config(eos_token_ids=frozenset(range(40))))
    request = driver.submit([1, 2, 3], max_tokens=9, min_tokens=3)
    finish(driver)
    assert [plan.sequences[0].ban_stops for plan in driver.plans][:4] == [True, True, True, False]
    assert len(driver.requests[request].tokens[0]) >= 4


def test_a_prompt_alone_gives_no_token() -> None:
    driver = Driver(small_config())
    request = driver.submit([1] * 20, max_tokens=0, prompt_logprobs=0)
    finish(driver)
    assert driver.requests[request].tokens == {0: []}
    assert driver.requests[request].finish == {0: FinishReason.LENGTH}
    assert len(driver.requests[request].prompt_logprobs[0]) == 20
    assert not any(row.sample for plan in driver.plans for row in plan.sequences)


def test_a_long_prompt_is_computed_in_pieces_beside_decodes() -> None:
    driver = Driver(small_config())
    driver.submit([1, 2, 3], max_tokens=20, ignore_eos=True)
    driver.step()
    driver.submit([5] * 36, max_tokens=2)
    finish(driver)
    assert driver.counter("mixed_steps") == 4
    assert max(plan.tokens for plan in driver.plans) == 12


def test_without_chunking_a_prompt_is_one_row() -> None:
    driver = Driver(small_config(prefill_tokens=None))
    driver.submit([1, 2, 3], max_tokens=20, ignore_eos=True)
    driver.step()
    driver.submit([5] * 36, max_tokens=2)
    finish(driver)
    assert 36 in [row.length for plan in driver.plans for row in plan.sequences]


def test_decodes_never_starve_prompts() -> None:
    driver = Driver(small_config(prefill_tokens=4, max_running=6, num_chunks=60))
    for _ in range(5):
        driver.submit([1, 2], max_tokens=38, ignore_eos=True)
    for _ in range(12):
        driver.step()
    late = driver.submit([3, 4], max_tokens=1)
    for _ in range(6):
        driver.step()
    assert driver.requests[late].finish
    finish(driver)


def prompts_by_step(driver: Driver) -> list[int]:
    return [len(plan.admissions) for plan in driver.plans]


@pytest.mark.parametrize(("spared", "taken"), [(0, [1, 1, 1, 1, 0]), (1, [1, 0, 2, 0, 1]), (3, [1, 0, 0, 0, 3])])
def test_prompts_that_come_one_by_one_are_put_together(spared: int, taken: list[int]) -> None:
    driver = Driver(small_config(decode_steps=spared))
    for step in range(5):
        if step < 4:
            driver.submit([1, 2, 3], max_tokens=9, ignore_eos=True)
        driver.step()
    assert prompts_by_step(driver)[:5] == taken
    finish(driver)


def test_no_step_is_spared_while_somebody_waits() -> None:
    """Six prompts that come at once take three steps in a row."""
    driver = Driver(small_config(decode_steps=1))
    for _ in range(6):
        driver.submit([1] * 5, max_tokens=5, ignore_eos=True)
    finish(driver)
    assert prompts_by_step(driver)[:3] == [3, 2, 1]


def test_no_step_is_spared_where_nobody_decodes() -> None:
    driver = Driver(small_config(decode_steps=2))
    for _ in range(3):
        driver.submit([1, 2], max_tokens=1)
        driver.step()
    finish(driver)
    assert prompts_by_step(driver) == [1, 1, 1]


def test_a_prompt_in_pieces_takes_others_along() -> None:
    """Its steps are longer anyway."""
    driver = Driver(small_config(decode_steps=1))
    driver.submit([1, 2], max_tokens=12, ignore_eos=True)
    driver.step()
    driver.step()
    driver.submit([3] * 30, max_tokens=2, ignore_eos=True)
    driver.step()
    driver.submit([4, 5], max_tokens=2, ignore_eos=True)
    finish(driver)
    assert prompts_by_step(driver)[:5] == [1, 0, 1, 0, 1]


# Refusals


def test_too_long_a_request_names_both_figures() -> None:
    driver = Driver(small_config())
    with pytest.raises(EngineError, match=r"holds 40 tokens, but 41.*: 31 in the prompt and 10") as error:
        driver.submit([1] * 31, max_tokens=10)
    assert error.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    driver.submit([1] * 30, max_tokens=10)


def test_a_full_queue_refuses() -> None:
    driver = Driver(small_config(max_queued=2, max_running=1))
    driver.submit([1])
    driver.step()
    driver.submit([1], n=3)
    driver.submit([1])
    with pytest.raises(EngineError, check=lambda error: error.code is ErrorCode.QUEUE_FULL):
        driver.submit([1])
    finish(driver)
    driver.submit([1])


@pytest.mark.parametrize("bad", [{"prompt": []}, {"n": 0}, {"max_tokens": -1}])
def test_malformed_requests_are_refused(bad: dict[str, object]) -> None:
    driver = Driver(small_config())
    with pytest.raises(EngineError, check=lambda error: error.code is ErrorCode.INVALID_REQUEST):
        driver.submit(**{"prompt": [1], **bad})  # type: ignore[arg-type]


def test_an_arena_without_room_for_one_context_is_refused_with_the_longest_that_fits() -> None:
    with pytest.raises(ValueError, match="longest --context-length that fits is 36"):
        Scheduler(small_config(num_chunks=13, max_adapter_chunks=4))


def test_a_priority_is_refused_where_it_would_change_nothing() -> None:
    for policy in ("fcfs", "fair"):
        driver = Driver(small_config(policy=policy))
        driver.submit([1], priority=0)
        with pytest.raises(EngineError, match="only where --schedule-policy is priority"):
            driver.submit([1], priority=-1)


def test_a_lower_priority_goes_first() -> None:
    driver = Driver(small_config(policy="priority", max_running=1))
    requests = [driver.submit([1], priority=priority, max_tokens=2) for priority in (3, 1, -2)]
    finish(driver)
    admitted = [admission.sequence_id for plan in driver.plans for admission in plan.admissions]
    assert admitted == list(reversed(requests))


# Adapters


def test_a_request_whose_adapter_is_away_is_passed_over() -> None:
    driver = Driver(small_config(), late_loads=True)
    driver.add("a")
    waiting = driver.submit([1, 2], "a")
    base = driver.submit([1, 2], max_tokens=5, ignore_eos=True)
    driver.run_until(lambda: bool(driver.requests[base].finish))
    assert driver.counter("skips_not_resident") > 0
    assert not driver.requests[waiting].tokens[0]
    driver.late_loads = False
    finish(driver)


def test_a_plan_may_hold_loads_alone() -> None:
    driver = Driver(small_config(), late_loads=True)
    driver.add("a")
    driver.submit([1, 2], "a")
    assert driver.plan()
    assert driver.plans[0].loads
    assert not driver.plans[0].sequences
    driver.commit()
    driver.late_loads = False
    finish(driver)


def test_adapters_share_a_decode_step() -> None:
    driver = Driver(small_config(max_slots=3))
    for name in ("a", "b", "c"):
        driver.add(name)
    for served in ("a", None, "b", "c"):
        driver.submit([1, 2], served, max_tokens=6, ignore_eos=True)
    finish(driver)
    assert driver.counter("mixed_adapter_steps") > 0
    assert max(len(adapters_in(driver, plan)) for plan in driver.plans) == 4


def test_more_adapters_than_slots_take_turns() -> None:
    driver = Driver(small_config(max_slots=2))
    for name in "abcde":
        driver.add(name)
        driver.submit([1, 2, 3], name, max_tokens=6, ignore_eos=True)
    finish(driver)
    assert driver.counter("skips_no_slot") > 0
    assert all(len(adapters_in(driver, plan)) <= 2 for plan in driver.plans)


def test_waiting_for_a_slot_is_bounded() -> None:
    driver = Driver(small_config(max_slots=1, patience=3, max_running=2))
    driver.add("hot")
    driver.add("cold")
    driver.submit([1], "hot", max_tokens=8, ignore_eos=True)
    driver.step()
    waiting = driver.submit([1], "cold", max_tokens=2)
    overtakers = 0
    while not driver.requests[waiting].finish:
        if driver.scheduler.stats().waiting < 2:
            driver.submit([1], "hot", max_tokens=8, ignore_eos=True)
            overtakers += 1
        driver.step()
        assert overtakers < 12
    assert driver.counter("slot_reservations") == 1
    finish(driver)


def test_a_slot_is_not_reserved_for_who_waits_for_its_source() -> None:
    driver = Driver(small_config(max_slots=1, patience=0, max_running=2), late_loads=True)
    driver.add("hot")
    driver.add("slow", cold=True)
    driver.submit([1], "slow")
    for _ in range(5):
        driver.submit([1], "hot", max_tokens=2)
    while sum(bool(r.finish) for r in driver.requests.values()) < 5:
        assert driver.step() or driver.finish_copies()
    assert len(driver.fetching) == 1
    driver.late_loads = False
    finish(driver)


def test_an_idle_adapter_makes_room_for_kv_and_comes_back() -> None:
    driver = Driver(small_config(num_chunks=14, prefix_cache=False))
    driver.add("a", 4)
    driver.submit([1], "a", max_tokens=2)
    driver.run()
    driver.submit([1] * 38, max_tokens=2, ignore_eos=True)
    driver.submit([2] * 4, max_tokens=8, ignore_eos=True)
    driver.run()
    assert driver.scheduler.stats().evictions["arena/memory"] == 1
    driver.submit([1], "a", max_tokens=2)
    finish(driver)
    assert driver.scheduler.stats().loads == {"device/ok": 2}


def test_a_pinned_adapter_is_loaded_without_being_asked_for_and_stays() -> None:
    driver = Driver(small_config(num_chunks=18, max_adapter_chunks=4))
    driver.add("p", 4)
    driver.scheduler.adapters.pin("p")
    driver.run()
    assert driver.scheduler.adapters.info("p").state == "resident"
    for _ in range(4):
        driver.submit([3] * 20, max_tokens=20, ignore_eos=True)
    finish(driver)
    assert driver.counter("preemptions") > 0
    assert driver.scheduler.adapters.info("p").state == "resident"
    assert driver.scheduler.stats().evictions.get("arena/memory", 0) == 0


def test_a_load_that_finds_no_memory_is_bounded_too() -> None:
    driver = Driver(small_config(num_chunks=14, patience=2, max_running=3))
    driver.add("a", 4)
    driver.submit([1] * 12, max_tokens=20, ignore_eos=True)
    driver.submit([2] * 12, max_tokens=20, ignore_eos=True)
    driver.step()
    waiting = driver.submit([1], "a", max_tokens=2)
    overtakers = 0
    while not driver.requests[waiting].finish:
        if driver.scheduler.stats().waiting < 2:
            driver.submit([overtakers % 50] * 4, max_tokens=4, ignore_eos=True)
            overtakers += 1
        driver.step()
        assert overtakers < 20
    finish(driver)


def test_growing_sequences_do_not_push_out_an_adapter_for_ever() -> None:
    driver = Driver(small_config(num_chunks=15, max_running=3, prefix_cache=False), late_loads=True)
    driver.add("a", 4)
    waiting = None
    for turn in range(300):
        if driver.scheduler.stats().waiting < 4:
            driver.submit([turn % 50], max_tokens=20, ignore_eos=True)
        if turn == 30:
            waiting = driver.submit([1] * 8, "a", max_tokens=2)
        driver.step()
        if turn % 3 == 0:
            driver.finish_copies()
    assert waiting is not None
    assert driver.requests[waiting].finish, "its adapter came and went, and it never ran"
    driver.late_loads = False
    finish(driver)


# Memory


@pytest.mark.parametrize("overlap", [True, False])
def test_preempted_sequences_resume_without_saying_anything_twice(overlap: bool) -> None:
    driver = Driver(small_config(num_chunks=14), overlap=overlap)
    for start in (1, 2, 3):
        driver.submit([start] * 10, max_tokens=30, ignore_eos=True, logprobs=None)
    finish(driver)
    assert driver.counter("preemptions") > 0
    assert driver.counter("resumptions") == driver.counter("preemptions")


def test_a_preempted_sequence_waits_for_its_last_step() -> None:
    driver = Driver(small_config(num_chunks=14), late_loads=True)
    driver.add("a", 4)
    driver.submit([1] * 34, max_tokens=6, ignore_eos=True)
    preempted = driver.submit([2], max_tokens=20, ignore_eos=True)
    driver.run_until(lambda: driver.scheduler.stats().running == 2)
    driver.submit([3], "a")
    while driver.counter("preemptions") == 0:
        if len(driver.flights) == 2:
            driver.commit()
        driver.plan()
    assert len(driver.flights) == 1
    assert not driver.plan(), "nothing can be done before the step commits"
    driver.fail(driver.scheduler.adapters.load_failed(driver.copying.pop(), "no luck", driver.now))
    assert driver.plan(), "its chunks are free at once"
    assert [row.sequence_id for row in driver.plans[-1].sequences] == [1]
    driver.commit()
    driver.plan()
    assert [admission.sequence_id for admission in driver.plans[-1].admissions] == [2]
    assert len(driver.plans[-1].admissions[0].tokens) == 1 + len(driver.requests[preempted].tokens[0])
    finish(driver)


def test_the_oldest_is_never_preempted() -> None:
    driver = Driver(small_config(num_chunks=14))
    first = driver.submit([1] * 10, max_tokens=30, ignore_eos=True)
    for start in (2, 3, 4):
        driver.submit([start] * 10, max_tokens=30, ignore_eos=True)
    driver.run_until(lambda: bool(driver.requests[first].finish))
    admitted = [a.sequence_id for plan in driver.plans for a in plan.admissions]
    assert admitted.count(1) == 1
    finish(driver)


def test_prefix_blocks_are_shared_and_evicted() -> None:
    driver = Driver(small_config(num_chunks=20))
    prompt = list(range(20))
    driver.submit(prompt, max_tokens=2)
    driver.run()
    second = driver.submit(prompt, max_tokens=2)
    driver.run()
    assert driver.requests[second].cached_tokens[0] == 16
    assert driver.counter("prefix_hit_tokens") == 16
    for start in range(4):
        driver.submit([start + 30] * 36, max_tokens=4, ignore_eos=True)
    finish(driver)
    assert driver.scheduler.stats().evictions["prefix/memory"] > 0


def test_a_reloaded_adapter_never_meets_its_old_kv() -> None:
    driver = Driver(small_config())
    prompt = list(range(20))
    driver.add("a")
    driver.submit(prompt, "a")
    driver.run()
    driver.unload("a")
    driver.change_source("a")
    content = driver.sources["a"][0]
    driver.add("a")
    driver.sources["a"] = (content, 2)
    again = driver.submit(prompt, "a")
    driver.run()
    assert driver.requests[again].cached_tokens[0] == 0


def test_demotion_to_the_host_keeps_the_kv() -> None:
    driver = Driver(small_config())
    prompt = list(range(20))
    driver.add("a")
    driver.submit(prompt, "a")
    driver.run()
    residency = driver.scheduler._residency
    residency.evict(driver.scheduler.adapters.catalog.named("a"), "memory")
    again = driver.submit(prompt, "a")
    finish(driver)
    assert driver.requests[again].cached_tokens[0] == 16


def test_prompt_logprobs_pass_the_cache_by() -> None:
    driver = Driver(small_config())
    prompt = list(range(20))
    driver.submit(prompt)
    driver.run()
    request = driver.submit(prompt, prompt_logprobs=0)
    finish(driver)
    assert driver.requests[request].cached_tokens[0] == 0
    assert len(driver.requests[request].prompt_logprobs[0]) == 20


def test_a_stop_seen_late_meets_a_load_into_the_same_chunk() -> None:
    driver = Driver(small_config(num_chunks=14, eos_token_ids=frozenset(range(50)), prefix_cache=False))
    driver.add("a", 4)
    driver.submit([2] * 5, max_tokens=30, ignore_eos=True)
    stopping = driver.submit([1] * 36, max_tokens=4)  # 9 blocks, a tenth for the row behind its end
    driver.run_until(lambda: bool(driver.requests[stopping].finish))
    (row,) = [s for s in driver.flights[0].sequences if s.sequence_id == 2]
    assert (row.start, len(row.new_blocks)) == (36, 1), "no row was planned behind the end"
    assert driver.scheduler._arena.coming == 10
    driver.submit([2], "a", max_tokens=2)
    driver.plan()
    assert not driver.plans[-1].loads, "the load did not wait for the step that still writes there"
    driver.commit()
    driver.plan()
    (load,) = driver.plans[-1].loads
    held = {c for plan in driver.plans for s in plan.sequences if s.sequence_id == 2 for c in s.new_blocks}
    assert held & set(load.chunks), "the load went elsewhere"
    finish(driver)
    assert driver.counter("discarded_rows") == 2


# Choices


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_choices_share_the_prompts_blocks(prefix_cache: bool) -> None:
    driver = Driver(small_config(prefix_cache=prefix_cache))
    driver.submit(list(range(1, 19)), n=4, max_tokens=3, ignore_eos=True)
    driver.run_until(lambda: driver.scheduler.stats().running == 4)
    assert driver.scheduler.stats().chunks["kv"] == 4 + 4  # shared by all, and one of each choice's own
    finish(driver)
    prompts = [row.length for plan in driver.plans for row in plan.sequences if row.length > 1]
    assert sorted(prompts) == [2, 2, 2, 6, 12]


def test_choices_wait_for_the_first_prompt() -> None:
    driver = Driver(small_config())
    driver.submit([1] * 20, n=3)
    driver.step()
    assert driver.scheduler.stats().running == 1
    assert driver.scheduler.stats().waiting == 2
    finish(driver)


def test_when_the_first_choice_is_aborted_the_next_leads() -> None:
    driver = Driver(small_config())
    request = driver.submit([1] * 20, n=3, prompt_logprobs=0)
    driver.step()
    driver.abort(request, 0)
    finish(driver)
    followed = driver.requests[request]
    assert followed.finish[0] is FinishReason.ABORT
    assert set(followed.finish.values()) > {FinishReason.ABORT}
    assert len(followed.prompt_logprobs[1]) == 20


def test_forks_are_given_up_when_memory_is_short() -> None:
    driver = Driver(small_config(num_chunks=14, prefix_cache=False, max_running=2, max_adapter_chunks=0))
    driver.submit([1] * 24, n=3, max_tokens=2, ignore_eos=True)
    driver.submit([2] * 36, max_tokens=4, ignore_eos=True)
    driver.run_until(lambda: bool(driver.scheduler._memory.forks))
    for fork in list(driver.scheduler._memory.forks.values()):
        driver.scheduler._memory.drop_fork(fork)
        driver.check()
    finish(driver)


# Aborts and failures


@pytest.mark.parametrize("steps", range(6))
def test_an_abort_ends_a_request_at_once(steps: int) -> None:
    driver = Driver(small_config())
    request = driver.submit([1] * 14, n=2, max_tokens=20, ignore_eos=True)
    other = driver.submit([2] * 14, max_tokens=20, ignore_eos=True)
    for _ in range(steps):
        driver.step()
    driver.abort(request)
    assert set(driver.requests[request].finish.values()) == {FinishReason.ABORT}
    assert len(driver.scheduler._roster.requests) == 1
    finish(driver)
    assert driver.requests[other].finish == {0: FinishReason.LENGTH}


def test_aborting_what_is_unknown_or_over_does_nothing() -> None:
    driver = Driver(small_config())
    request = driver.submit([1])
    driver.run()
    assert driver.scheduler.abort(request, None, 0.0) == []
    assert driver.scheduler.abort(99, 3, 0.0) == []


def test_a_failed_copy_fails_those_who_wait_and_is_tried_again() -> None:
    driver = Driver(small_config(), late_loads=True)
    driver.add("a")
    request, base = driver.submit([1], "a"), driver.submit([1])
    driver.plan()
    driver.fail(driver.scheduler.adapters.load_failed(driver.copying.pop(), "no luck", driver.now))
    failed = driver.requests[request].failed
    assert failed is not None
    assert failed.code is ErrorCode.ADAPTER_UNAVAILABLE
    assert "no luck" in failed.message
    assert driver.scheduler.adapters.info("a").state == "failed"
    again = driver.submit([1], "a")
    driver.late_loads = False
    finish(driver)
    assert driver.requests[again].finish
    assert driver.requests[base].finish


def test_results_of_another_step_are_refused() -> None:
    driver = Driver(small_config())
    driver.submit([1] * 20)
    driver.plan()
    driver.plan()
    assert not driver.plan(), "two plans are out already"
    with pytest.raises(ValueError, match="step 2 is not the next"):
        driver.scheduler.commit(StepResult(2, [], 0.0), 0.0)


# Figures


def test_stats_tell_of_every_chunk_and_observation_once() -> None:
    driver = Driver(small_config())
    driver.add("a", 3)
    driver.submit([1] * 9, "a", max_tokens=3, ignore_eos=True)
    driver.submit([1] * 9, max_tokens=3, ignore_eos=True)
    driver.run()
    stats = driver.scheduler.stats()
    assert sum(stats.chunks.values()) == 24
    assert stats.chunks[ChunkUse.ADAPTER] == 3
    assert stats.tier_bytes == {"arena": 768, "host": 768}
    assert (stats.slots_total, stats.slots_used, stats.resident) == (2, 1, 1)
    assert len(stats.queue_seconds) == 2
    assert sum(stats.step_tokens) == sum(plan.tokens for plan in driver.plans)
    assert [name for name, _ in stats.load_seconds] == ["device"]
    told = {adapter.name: adapter for adapter in stats.adapters}
    assert told["a"].tier == "arena"
    assert (told["a"].requests, told["a"].prompt_tokens, told["a"].generated_tokens) == (1, 9, 3)
    assert told[""].generated_tokens == 3
    again = driver.scheduler.stats()
    assert (again.step_tokens, again.queue_seconds, again.load_seconds) == ([], [], [])
    assert again.counters == stats.counters


def test_a_copy_done_before_its_sequences_turn_is_a_prefetch_hit() -> None:
    driver = Driver(small_config(max_running=1))
    driver.add("a")
    base = driver.submit([1, 2], max_tokens=5, ignore_eos=True)
    driver.step()
    driver.submit([1, 2], "a")
    driver.run_until(lambda: bool(driver.requests[base].finish))
    finish(driver)
    assert (driver.counter("adapter_misses"), driver.counter("skips_not_resident")) == (1, 0)
    assert driver.counter("prefetch_hits") == 1


def test_a_copy_that_a_sequence_waited_for_is_no_prefetch_hit() -> None:
    driver = Driver(small_config())
    driver.add("a")
    driver.submit([1, 2], "a")
    finish(driver)
    driver.submit([1, 2], "a")
    finish(driver)
    assert (driver.counter("adapter_misses"), driver.counter("adapter_hits")) == (1, 1)
    assert driver.counter("prefetch_hits") == 0


def test_the_queues_age_is_that_of_the_oldest_request_not_yet_started() -> None:
    driver = Driver(small_config(max_running=1))
    driver.submit([1, 2], max_tokens=5, ignore_eos=True)
    driver.step()
    scheduler = driver.scheduler
    assert scheduler.stats(1000.0).queue_age == 0
    driver.submit([1, 2])
    late = scheduler.stats(1000.0).queue_age
    assert late > 0
    assert scheduler.stats(1001.0).queue_age == late + 1
    finish(driver)
    assert scheduler.stats(1002.0).queue_age == 0
