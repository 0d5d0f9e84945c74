"""Loads, unloads and pins as the loader drives them, with requests around."""

import pytest

from engine.adapters.adapter import Hosted
from engine.adapters.control import LOAD_ERROR_SECONDS
from engine.adapters.residency import HostFullError
from engine.types import AdapterState, EngineError, ErrorCode, FinishReason
from tests.engine.simulated import Driver, small_config


def state(driver: Driver, name: str) -> AdapterState:
    return driver.scheduler.adapters.info(name).state


def test_an_adapters_life() -> None:
    driver = Driver(small_config(), late_loads=True)
    control = driver.scheduler.adapters
    info, ours = control.begin_load("a", "somewhere", now=1.0)
    assert ours
    assert (info.state, info.source, info.rank) == (AdapterState.LOADING, "somewhere", 0)
    control.make_host_room(info.adapter_id, 2)
    assert control.host_done(info.adapter_id, Hosted(2, 16, ("q_proj", "v_proj"), "c")) == info.adapter_id
    driver.worker.host[info.adapter_id] = "c/1"
    driver.sources["a"] = ("c/1", 2)
    told = control.info("a")
    assert (told.state, told.rank, told.modules, told.bytes) == ("host", 16, ("q_proj", "v_proj"), 512)
    request = driver.submit([1, 2], "a")
    driver.plan()
    assert state(driver, "a") is AdapterState.HOST
    driver.finish_copies()
    assert state(driver, "a") is AdapterState.RESIDENT
    control.begin_unload("a")
    assert state(driver, "a") is AdapterState.DRAINING
    with pytest.raises(EngineError, check=lambda error: error.code is ErrorCode.ADAPTER_NOT_FOUND):
        driver.submit([1], "a")
    driver.run()
    assert driver.requests[request].finish, "an accepted request ends"
    assert control.drained("a")
    assert control.finish_unload("a") == info.adapter_id
    assert control.infos() == []
    driver.check()
    assert driver.scheduler.stats().chunks["adapter"] == 0


def test_a_drain_waits_for_the_step_under_way() -> None:
    driver = Driver(small_config())
    control = driver.scheduler.adapters
    driver.add("a")
    request = driver.submit([1], "a", max_tokens=20, ignore_eos=True)
    driver.run_until(lambda: len(driver.requests[request].tokens[0]) > 2)
    control.begin_unload("a")
    driver.abort(request)
    assert driver.flights
    assert not control.drained("a")
    while driver.commit():
        pass
    assert control.drained("a")


def test_a_drain_that_takes_too_long_ends_what_is_left() -> None:
    driver = Driver(small_config())
    driver.add("a")
    requests = [driver.submit([1] * 30, "a", n=2, max_tokens=10) for _ in range(9)]
    driver.run_until(lambda: driver.scheduler.stats().running > 0)
    driver.scheduler.adapters.begin_unload("a")
    driver.fail(driver.scheduler.adapters.fail_requests("a", "adapter 'a' was unloaded"))
    failures = [driver.requests[request].failed for request in requests]
    assert {failed and failed.code for failed in failures} == {ErrorCode.ADAPTER_UNAVAILABLE}
    driver.run()
    assert driver.scheduler.adapters.drained("a")


def test_a_first_load_that_fails_leaves_no_trace() -> None:
    driver = Driver(small_config())
    control = driver.scheduler.adapters
    info, _ = control.begin_load("a", "x")
    assert control.host_failed(info.adapter_id, "no such file", 0.0) == []
    assert control.find(info.adapter_id) is None
    assert driver.add("a") != info.adapter_id


def test_requests_wait_for_a_first_load_and_fail_with_it() -> None:
    driver = Driver(small_config())
    driver.sources["a"] = ("a/1", 2)
    info, _ = driver.scheduler.adapters.begin_load("a", "x")
    request = driver.submit([1], "a")
    driver.fail(driver.scheduler.adapters.host_failed(info.adapter_id, "it is a pickle", 0.0))
    failed = driver.requests[request].failed
    assert failed is not None
    assert failed.code is ErrorCode.ADAPTER_UNAVAILABLE
    assert failed.message == "adapter 'a' could not be loaded: it is a pickle"


def test_a_cold_adapter_is_fetched_when_named() -> None:
    driver = Driver(small_config(), late_loads=True)
    driver.add("a", cold=True)
    assert state(driver, "a") is AdapterState.COLD
    assert driver.scheduler.take_fetches() == []
    request = driver.submit([1, 2], "a")
    driver.plan()
    assert driver.fetching == [driver.adapter_id("a")]
    assert state(driver, "a") is AdapterState.LOADING
    assert driver.scheduler.take_fetches() == [], "it is asked for once"
    driver.late_loads = False
    driver.run()
    driver.check_outputs()
    assert driver.requests[request].finish


def test_a_known_adapter_whose_source_is_gone_fails_and_is_tried_again_when_named() -> None:
    driver = Driver(small_config(), late_loads=True)
    driver.add("a", cold=True)
    first = driver.submit([1], "a")
    driver.plan()
    driver.fail(driver.scheduler.adapters.host_failed(driver.fetching.pop(), "gone", driver.now))
    assert driver.requests[first].failed is not None
    assert state(driver, "a") is AdapterState.FAILED
    assert driver.scheduler.adapters.info("a").error == "gone"
    driver.late_loads = False
    for _ in range(3):
        with pytest.raises(EngineError, match="could not be loaded: gone") as refused:
            driver.submit([1], "a")
        assert refused.value.code is ErrorCode.ADAPTER_UNAVAILABLE
        assert driver.scheduler.take_fetches() == [], "its source is left alone"
    driver.now += LOAD_ERROR_SECONDS
    second = driver.submit([1], "a")
    driver.run()
    assert driver.requests[second].finish
    assert driver.scheduler.adapters.info("a").error is None


def test_a_changed_source_is_another_adapter() -> None:
    driver = Driver(small_config(max_loaded=2))
    prompt = list(range(20))
    old = driver.add("a")
    driver.submit(prompt, "a")
    driver.run()
    driver.check_outputs()
    driver.add("b")
    driver.add("c")
    assert state(driver, "a") is AdapterState.COLD
    driver.change_source("a")
    request = driver.submit(prompt, "a")
    driver.run()
    assert driver.adapter_id("a") != old
    assert driver.requests[request].cached_tokens[0] == 0
    driver.check_outputs()
    renewed = driver.scheduler.adapters.catalog.for_request(old)
    assert renewed.adapter_id == driver.adapter_id("a"), "a request that was on its way gets what the name means now"


def test_an_unchanged_source_keeps_its_id_and_its_kv() -> None:
    driver = Driver(small_config(max_loaded=2))
    prompt = list(range(20))
    old = driver.add("a")
    driver.submit(prompt, "a")
    driver.run()
    driver.add("b")
    driver.add("c")
    request = driver.submit(prompt, "a")
    driver.run()
    assert driver.adapter_id("a") == old
    assert driver.requests[request].cached_tokens[0] == 16
    driver.check_outputs()


def test_a_full_host_postpones_a_fetch_until_something_may_leave() -> None:
    driver = Driver(small_config(max_host_pages=6, max_slots=3, max_adapter_chunks=3))
    for name in ("a", "b"):
        driver.add(name, 3)
        driver.submit([1], name, max_tokens=20, ignore_eos=True)
    driver.run_until(lambda: driver.scheduler.stats().running == 2)
    driver.add("c", 3, cold=True)
    waiting = driver.submit([1], "c", max_tokens=2)
    for _ in range(5):
        driver.step()
    assert not driver.requests[waiting].finish
    assert state(driver, "c") is AdapterState.COLD
    assert driver.scheduler.take_fetches() == [], "a fetch that found no room is not repeated in vain"
    driver.run()
    driver.check_outputs()
    assert driver.requests[waiting].finish


def test_a_load_is_refused_when_everything_on_the_host_is_in_use() -> None:
    driver = Driver(small_config(max_loaded=2))
    for name in ("a", "b"):
        driver.add(name)
        driver.submit([1], name, max_tokens=20, ignore_eos=True)
    driver.run_until(lambda: driver.scheduler.stats().running == 2)
    with pytest.raises(HostFullError, match="no room on the host for adapter 'c'"):
        driver.add("c")


def test_one_slot_allows_no_pin() -> None:
    driver = Driver(small_config(max_slots=1))
    driver.add("a")
    with pytest.raises(EngineError, match="at most 0", check=lambda e: e.code is ErrorCode.INVALID_REQUEST):
        driver.scheduler.adapters.pin("a")
    with pytest.raises(EngineError, match="at most 0"):
        driver.add("b", pinned=True)
    assert [info.name for info in driver.scheduler.adapters.infos()] == ["a"], "a refused load leaves no trace"


def test_a_small_adapter_may_be_pinned_once_its_size_is_known() -> None:
    driver = Driver(small_config(num_chunks=19, max_slots=4, max_adapter_chunks=4))
    driver.add("a", 2, pinned=True)
    with pytest.raises(EngineError, match="6 chunks of pinned adapters"):
        driver.add("b", 2, pinned=True)
    driver.add("b", 2)
    driver.scheduler.adapters.pin("b")
    driver.run()
    assert (state(driver, "a"), state(driver, "b")) == (AdapterState.RESIDENT, AdapterState.RESIDENT)


def test_pinned_cold_adapters_are_fetched_unasked() -> None:
    driver = Driver(small_config())
    driver.add("a", cold=True, pinned=True)
    driver.step()
    driver.run()
    assert state(driver, "a") is AdapterState.RESIDENT


def test_an_unpinned_adapter_can_go() -> None:
    driver = Driver(small_config(num_chunks=18, prefix_cache=False))
    driver.add("a", 4, pinned=True)
    driver.run()
    assert driver.scheduler.adapters.unpin("a").pinned is False
    for start in (1, 2):
        driver.submit([start] * 20, max_tokens=20, ignore_eos=True)
    driver.run()
    driver.check_outputs()
    assert state(driver, "a") is AdapterState.HOST


def test_the_same_answer_after_pinning() -> None:
    driver = Driver(small_config())
    driver.add("a")
    before = driver.submit([1, 2, 3], "a")
    driver.run()
    driver.scheduler.adapters.pin("a")
    after = driver.submit([1, 2, 3], "a")
    driver.run()
    assert driver.requests[before].tokens == driver.requests[after].tokens
    assert driver.requests[after].finish[0] in (FinishReason.STOP, FinishReason.LENGTH)
