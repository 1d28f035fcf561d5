"""What other threads leave for the engine's, and when it takes no more."""

import threading
from itertools import islice

from model_core.engine.inbox import Inbox
from model_core.engine.request import Request

A, B = Request("a", [1]), Request("b", [1])


def test_what_was_left_is_read_in_its_order() -> None:
    inbox = Inbox()
    assert inbox.submit(A, None) and inbox.submit(B, None)
    inbox.abort("a")
    inbox.wake()
    assert len(inbox) == 4 and inbox.left == {"a"}
    assert list(inbox.read(wait=None)) == [(A, None), (B, None), "a"]
    assert not inbox and not inbox.left and list(inbox.read()) == []


def test_a_wait_ends_with_nothing_to_read_if_it_is_told_so() -> None:
    inbox = Inbox()
    timer = threading.Timer(0.05, inbox.wake)
    timer.start()
    assert list(inbox.read(wait=None)) == []
    timer.join()


def test_a_closed_one_names_what_was_not_read_and_takes_no_more() -> None:
    inbox = Inbox()
    inbox.submit(A, None)
    inbox.abort("nobody")
    inbox.submit(B, None)
    assert inbox.close() == ["a", "b"]
    assert not inbox.submit(A, None) and not inbox
    inbox.abort("a")  # of no use, and no error


def test_each_request_is_read_or_named_or_refused() -> None:
    for _ in range(50):
        inbox, taken = Inbox(), list[str]()

        def leave(inbox: Inbox = inbox, taken: list[str] = taken) -> None:
            while inbox.submit(Request(str(len(taken)), [1]), None):
                taken.append(str(len(taken)))

        thread = threading.Thread(target=leave)
        thread.start()
        read = [item[0].request_id for item in islice(inbox.read(wait=None), 3) if isinstance(item, tuple)]
        unread = inbox.close()
        thread.join()
        assert read + unread == taken
