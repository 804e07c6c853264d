"""What may be sent again, and how often at all (RESILIENCE.md, 3)."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.retry import IDEMPOTENT, RetryBudget, backoff, may_resend

METHODS = ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "POST", "PATCH", "PURGE"]


def resend(method: str = "GET", **facts: Any) -> float | None:
    usual = {"retried": 0, "retries": 1, "time_left": 60.0, "random": lambda: 0.5, "dispatched": True}
    return may_resend(method=method, **{**usual, **facts})


# --- what is safe


def test_a_request_that_was_never_dispatched_may_go_again_whatever_its_method() -> None:
    assert resend("POST", dispatched=False) == 0.025


@pytest.mark.parametrize("method", METHODS)
def test_a_dispatched_request_without_an_answer_may_go_again_if_idempotent(method: str) -> None:
    assert (resend(method) is not None) == (method in IDEMPOTENT)


@pytest.mark.parametrize("why", [{"keyed": True}, {"all_methods": True}])
def test_a_post_may_go_again_where_someone_vouches_for_it(why: dict[str, bool]) -> None:
    assert resend("POST", **why) is not None


def test_an_idle_connection_that_closed_is_replaced_at_once_but_not_for_a_post() -> None:
    assert resend("GET", reused_and_silent=True) == 0
    assert resend("POST", reused_and_silent=True) is None


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_outright_is_waited_for_whatever_the_method(status: int) -> None:
    assert resend("POST", status=status, retry_after=1) == 1.025
    assert resend("POST", status=status, retry_after=0) == 0.025


def test_a_wait_of_more_than_a_second_is_for_the_client_to_decide() -> None:
    assert resend("GET", status=503, retry_after=2) is None


@pytest.mark.parametrize(
    ("status", "again"),
    [(500, True), (502, True), (503, True), (504, True), (501, False), (505, False), (429, False), (404, False)],
)
def test_an_answer_without_retry_after_is_tried_again_only_where_it_may_pass(status: int, again: bool) -> None:
    assert (resend("GET", status=status) is not None) == again
    assert resend("POST", status=status) is None


@pytest.mark.parametrize(
    "obstacle",
    [{"sent_to_client": True}, {"probe": True}, {"replayable": False}, {"retried": 1}, {"retries": 0}],
    ids=lambda obstacle: next(iter(obstacle)),
)
def test_nothing_goes_again_against_an_obstacle(obstacle: dict[str, Any]) -> None:
    assert resend("GET", **obstacle) is None
    assert resend("GET", dispatched=False, **obstacle) is None


def test_a_retry_that_the_deadline_has_no_room_for_is_not_made() -> None:
    assert resend("GET", time_left=0.025) is None
    assert resend("GET", time_left=0.026) == 0.025
    assert resend("GET", status=503, retry_after=1, time_left=1) is None
    assert resend("GET", reused_and_silent=True, time_left=0) is None


def test_the_wait_is_anything_up_to_a_bound_that_doubles() -> None:
    assert [backoff(retried, lambda: 1.0) for retried in range(7)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff(10_000, lambda: 0.5) == 0.5
    assert backoff(3, lambda: 0.0) == 0


FACTS: dict[str, st.SearchStrategy[Any]] = {
    "method": st.sampled_from(METHODS),
    "retried": st.integers(0, 3),
    "retries": st.integers(0, 3),
    "time_left": st.floats(-1, 5),
    "dispatched": st.booleans(),
    "reused_and_silent": st.booleans(),
    "status": st.none() | st.sampled_from([200, 429, 500, 501, 503, 504]),
    "retry_after": st.none() | st.floats(0, 3),
    "keyed": st.booleans(),
    "all_methods": st.booleans(),
    "replayable": st.booleans(),
    "sent_to_client": st.booleans(),
    "probe": st.booleans(),
}


@given(st.fixed_dictionaries(FACTS), st.floats(0, 1, exclude_max=True))
def test_a_byte_sent_to_the_client_or_a_dispatched_post_means_no_second_sending(
    facts: dict[str, Any], chance: float
) -> None:
    wait = may_resend(**facts, random=lambda: chance)
    if wait is None:
        return
    assert not facts["sent_to_client"]
    assert 0 <= wait < facts["time_left"]
    refused_outright = facts["status"] in (429, 503) and facts["retry_after"] is not None and facts["retry_after"] <= 1
    assert (
        not facts["dispatched"]
        or facts["method"] in IDEMPOTENT
        or refused_outright
        or facts["keyed"]
        or facts["all_methods"]
    )


# --- how many


def test_a_budget_begins_with_ten_and_grows_by_one_a_second() -> None:
    budget = RetryBudget()
    assert [budget.take(100) for _ in range(11)] == [True] * 10 + [False]
    assert not budget.take(100.5)
    assert budget.take(101)
    assert not budget.take(101)
    assert sum(budget.take(10_000) for _ in range(100)) == 10


def test_five_requests_pay_for_a_retry_and_leave_the_reserve_alone() -> None:
    budget = RetryBudget()
    for _ in range(50):
        budget.deposit(100)
    assert sum(budget.take(100) for _ in range(100)) == 10 + 10


def test_deposits_serve_for_nine_to_ten_seconds() -> None:
    for later, retries in [(108.9, 10 + 10), (110, 10)]:
        budget = RetryBudget()
        for _ in range(50):
            budget.deposit(100)
        assert sum(budget.take(later) for _ in range(100)) == retries


def test_the_oldest_deposits_are_spent_first() -> None:
    budget = RetryBudget()
    for now in (100, 105):
        for _ in range(25):
            budget.deposit(now)
    for _ in range(5):
        assert budget.take(105)
    assert sum(budget.take(112) for _ in range(100)) == 5 + 10


@given(st.lists(st.tuples(st.sampled_from([0, 0.01, 0.1, 0.5, 1, 3, 9.5]), st.integers(0, 30), st.integers(0, 30))))
def test_retries_are_at_most_a_fifth_of_the_requests_and_twenty(turns: list[tuple[float, int, int]]) -> None:
    budget, now = RetryBudget(), 0.0
    requests: list[tuple[float, int]] = []
    retries: list[tuple[float, int]] = []
    for gap, arriving, wanted in turns:
        now += gap
        for _ in range(arriving):
            budget.deposit(now)
        requests.append((now, arriving))
        retries.append((now, sum(budget.take(now) for _ in range(wanted))))
    for start, _ in retries:
        spent = sum(count for at, count in retries if start <= at <= start + 10)
        asked = sum(count for at, count in requests if start - 10 <= at <= start + 10)
        assert spent <= 0.2 * asked + 20


@given(st.lists(st.tuples(st.floats(0, 15), st.integers(0, 12), st.integers(0, 12)), max_size=40))
def test_what_is_left_of_the_deposits_equals_a_recount(turns: list[tuple[float, int, int]]) -> None:
    budget, now = RetryBudget(), 0.0
    for gap, arriving, wanted in turns:
        now += gap
        for _ in range(arriving):
            budget.deposit(now)
        for _ in range(wanted):
            budget.take(now)
        assert budget._total == sum(budget._deposits)
        assert min(budget._deposits) >= 0


class Recount:
    """The budget as RESILIENCE.md has it, counted anew each time: every deposit by itself, the reserve as it grows."""

    def __init__(self) -> None:
        self.deposits: list[float] = []
        self.reserve = 10.0
        self.seen_at: float | None = None

    def take(self, now: float) -> bool:
        self.reserve = min(10.0, self.reserve + now - (now if self.seen_at is None else self.seen_at))
        self.seen_at = now
        self.deposits = [at for at in self.deposits if int(at) + 10 > int(now)]
        if len(self.deposits) >= 5:
            del self.deposits[:5]
            return True
        if self.reserve >= 1:
            self.reserve -= 1
            return True
        return False

    def left(self, now: float) -> int:
        count = 0
        kept = self.deposits.copy(), self.reserve, self.seen_at
        while self.take(now):
            count += 1
        self.deposits, self.reserve, self.seen_at = kept
        return count


EIGHTHS = st.integers(0, 130).map(lambda eighths: eighths / 8)  # of a second: sums of them are exact


@given(st.integers(0, 100), st.lists(st.tuples(EIGHTHS, st.integers(0, 40), st.integers(0, 30)), max_size=60))
def test_t1_the_budget_decides_as_a_recount_of_all_that_came_before(
    start: int, turns: list[tuple[float, int, int]]
) -> None:
    budget, recount, now = RetryBudget(), Recount(), float(start)
    for gap, arriving, wanted in turns:
        now += gap
        for _ in range(arriving):
            budget.deposit(now)
            recount.deposits.append(now)
        assert budget.left(now) == recount.left(now)
        assert [budget.take(now) for _ in range(wanted)] == [recount.take(now) for _ in range(wanted)]


@given(st.lists(st.tuples(st.floats(0, 12), st.integers(0, 40), st.integers(0, 30)), max_size=60), st.floats(0, 9.99))
def test_t1_retries_in_any_ten_seconds_are_a_fifth_of_the_requests_of_twenty_and_twenty_at_most(
    turns: list[tuple[float, int, int]], offset: float
) -> None:
    budget, now = RetryBudget(), 0.0
    requests: list[float] = []
    retries: list[float] = []
    for gap, arriving, wanted in turns:
        now += gap
        for _ in range(arriving):
            budget.deposit(now)
            requests.append(now)
        retries += [now for _ in range(wanted) if budget.take(now)]
    for edge in {*requests, *retries}:
        for start in (edge, edge - offset, edge - 10):
            spent = sum(start <= at <= start + 10 for at in retries)
            assert spent <= 0.2 * sum(start - 10 <= at <= start + 10 for at in requests) + 20


@pytest.mark.parametrize("rate", [0.5, 3, 50, 1000])
def test_a_long_outage_costs_a_service_a_fifth_and_one_a_second_more(rate: float) -> None:
    budget, requests, retries = RetryBudget(), 0, 0
    seconds = 100 if rate > 100 else 3600
    while requests < seconds * rate:
        now = requests / rate
        budget.deposit(now)
        requests += 1
        retries += budget.take(now + 0.01)
    assert retries <= 0.2 * requests + seconds + 10, "the reserve is full at the start"
    assert retries >= min(requests, 0.19 * requests + 0.9 * seconds)
