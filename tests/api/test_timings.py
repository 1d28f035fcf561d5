"""The `timings` object: where the time of an answer went, when it is asked for and only then."""

import pytest

NAMES = [
    "queue_ms", "prompt_ms", "predicted_ms", "total_ms", "cache_n", "prompt_n", "predicted_n", "prompt_per_second",
    "predicted_per_second", "hops_us",
]  # fmt: skip


def check(found):
    """Of one choice."""
    assert list(found) == NAMES and list(found["hops_us"]) == ["receive", "prepare", "transport"]
    hops = sum(found["hops_us"].values()) / 1e3
    assert all(value >= 0 for value in found["hops_us"].values())
    # the parts lie side by side on one path, so that they make up the whole but for what sending takes
    parts = found["queue_ms"] + found["prompt_ms"] + found["predicted_ms"] + hops
    assert parts - 0.01 <= found["total_ms"] < 5000
    return found


def test_of_a_whole_answer(server):
    server.fake.cached, server.fake.first_delay, server.fake.delay, server.fake.waits = 4, 0.06, 0.02, (0.01, 0.04)
    status, _, answer = server.chat(timings=True)
    found = check(answer["timings"])
    assert status == 200 and (found["queue_ms"], found["prompt_ms"]) == (10, 40)
    assert (found["cache_n"], found["prompt_n"], found["predicted_n"]) == (4, answer["usage"]["prompt_tokens"] - 4, 4)
    assert found["prompt_per_second"] == pytest.approx(found["prompt_n"] / 0.04, abs=0.01)
    assert found["predicted_ms"] >= 50 and found["predicted_per_second"] == pytest.approx(3e3 / found["predicted_ms"], 0.01)
    assert found["hops_us"]["transport"] >= 5_000  # of the 60 ms, 50 were the engine's; timers may be a little early


def test_of_a_stream(server):
    server.fake.first_delay = 0.01  # the fake engine says that 6 ms were its own
    *chunks, last, done = server.stream(timings=True)
    assert done == "[DONE]" and last["choices"] == [] and "usage" not in last and check(last["timings"])
    assert not any("timings" in chunk for chunk in chunks)
    *_, last, done = server.stream(timings=True, stream_options={"include_usage": True})
    assert check(last["timings"])["predicted_n"] == last["usage"]["completion_tokens"] == 4
    *_, last, done = server.stream("/v1/completions", prompt="a", timings=True, n=2)
    assert last["timings"]["predicted_n"] == 8 and last["timings"]["queue_ms"] == 2


def test_of_answers_without_times(server):
    _, _, answer = server.chat(timings=True, max_tokens=1)
    assert answer["timings"]["predicted_ms"] is None and answer["timings"]["predicted_per_second"] is None
    server.fake.waits = None  # an engine that does not tell
    found = server.chat(timings=True)[2]["timings"]
    assert found["queue_ms"] is None and found["prompt_per_second"] is None and found["hops_us"]["transport"] is None
    status, _, body = server.raw("POST", "/v1/completions", {"prompt": "a", "echo": True, "max_tokens": 0, "timings": True})
    assert status == 200 and b'"predicted_n":0' in body


@pytest.mark.parametrize("fields", [{}, {"timings": False}, {"timings": None}])
def test_not_unless_asked_for(server, fields):
    assert "timings" not in server.chat(**fields)[2]
    assert not any("timings" in chunk for chunk in server.stream(**fields)[:-1])


def test_it_is_a_boolean(server):
    status, _, answer = server.chat(timings=1)
    assert status == 400 and answer["error"]["param"] == "timings" and answer["error"]["code"] == "invalid_type"


def test_the_official_client_shows_it(server):
    answer = server.client().chat.completions.create(
        model="", messages=[{"role": "user", "content": "hi"}], extra_body={"timings": True}
    )
    assert answer.timings["predicted_n"] == 4
