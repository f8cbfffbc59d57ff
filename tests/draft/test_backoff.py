"""Who is asked: what answers bring, less what their rows cost, against the time that they take."""

from __future__ import annotations

import random

from specgen.draft.backoff import DrafterBackoff, DrafterHistory

STEPS = 60


def brought(rng: random.Random, mean: float) -> int:
    """Tokens of one answer: as noisy as drafts are, which go wrong at each token with the same chance."""
    count = 0
    while rng.random() < mean / (1.0 + mean):
        count += 1
    return count


def asked(everyone: DrafterHistory, rng: random.Random, mean: float, cost: float) -> float:
    """Share of a sequence's steps in which the drafter is asked."""
    pace, count = DrafterBackoff(everyone), 0
    for _ in range(STEPS):
        if pace.ready(1.0):
            count += 1
            pace.observe(brought(rng, mean), cost, token_seconds=1.0)
    return count / STEPS


def test_noise_does_not_stop_a_drafter_that_pays_in_every_sequence() -> None:
    """Half of its answers bring nothing, and four in a row often do."""
    rng, everyone = random.Random(0), DrafterHistory()
    shares = [asked(everyone, rng, mean=0.9, cost=0.3) for _ in range(100)]
    assert sum(shares[5:]) / 95 > 0.97


def test_sequences_are_told_apart() -> None:
    """The drafter pays on average, but in one sequence of four it never does; and in one of four by far."""
    rng, everyone = random.Random(0), DrafterHistory()
    means = (0.1, 0.3, 0.8, 1.5)
    shares: dict[float, list[float]] = {mean: [] for mean in means}
    for _ in range(60):
        for mean in means:
            shares[mean].append(asked(everyone, rng, mean, cost=0.5))
    share = {mean: sum(found) / len(found) for mean, found in shares.items()}
    assert share[0.1] < 0.4
    assert share[1.5] > 0.85
    assert share[0.1] < share[0.3] < share[0.8] < share[1.5]


def test_reading_a_prompt_is_no_reason_not_to_ask_again() -> None:
    rng, everyone = random.Random(0), DrafterHistory()
    for _ in range(10):
        asked(everyone, rng, mean=0.9, cost=0.3)
    pace = DrafterBackoff(everyone)
    assert pace.ready(1.0)
    pace.observe(0, seconds=20.0, token_seconds=1.0)
    assert pace.ready(1.0)


def test_a_drafter_that_pays_nowhere_costs_little() -> None:
    """Sixteen sequences at a time, all of which might try."""
    rng, everyone = random.Random(0), DrafterHistory()
    count = steps = 0
    for _ in range(20):
        paces = [DrafterBackoff(everyone) for _ in range(16)]
        for _ in range(STEPS):
            for pace in paces:
                steps += 1
                if pace.ready(1.0):
                    count += 1
                    pace.observe(brought(rng, 0.3), 1.0, token_seconds=1.0)
    assert 0 < count / steps < 0.03


def test_a_drafter_is_asked_where_a_token_is_worth_its_time() -> None:
    """As the batch around a sequence grows and shrinks, and at once: no pause has to pass."""
    rng, everyone = random.Random(0), DrafterHistory()
    pace = DrafterBackoff(everyone)
    for _ in range(40):
        pace.observe(brought(rng, 0.9), seconds=0.3, token_seconds=1.0)
    asked = 0
    for _ in range(60):
        assert pace.ready(1.0)
        if pace.ready(0.01):
            asked += 1
            pace.observe(brought(rng, 0.9), seconds=0.3, token_seconds=0.01)
    assert asked <= 4


def test_new_sequences_that_ask_a_few_times_do_not_pay_for_reading_their_prompts() -> None:
    """Answers that come after it pay; where they are many, so does reading the prompt."""

    def asked_after(answers: int) -> int:
        rng, everyone = random.Random(0), DrafterHistory()
        for _ in range(60):
            pace = DrafterBackoff(everyone)
            pace.observe(brought(rng, 0.9), seconds=8.0, token_seconds=1.0)
            for _ in range(answers - 1):
                pace.observe(brought(rng, 0.9), seconds=0.3, token_seconds=1.0)
        return sum(DrafterBackoff(everyone).ready(1.0) for _ in range(60))

    assert asked_after(answers=50) == 60
    assert asked_after(answers=2) < 10
