"""Arrays that reach the device in one copy."""

from __future__ import annotations

import numpy as np
import torch

from model_core.engine.packed import Packed

FIELDS = [("a", 3, "int32"), ("b", 2, "int64"), ("c", 5, "float32"), ("d", 0, "int64"), ("e", 1, "int64")]


def test_every_field_arrives_as_it_was_written():
    packed = Packed(FIELDS, torch.device("cpu"))
    host = packed.turn()
    for number, (name, count, kind) in enumerate(FIELDS):
        host[name][:] = np.arange(count, dtype=kind) + 10 * number
    packed.send()
    for number, (name, count, kind) in enumerate(FIELDS):
        assert packed.device[name].tolist() == [10 * number + i for i in range(count)]
        assert packed.device[name].numpy().dtype == kind


def test_the_device_keeps_what_was_sent_while_the_host_writes_the_next():
    packed = Packed(FIELDS, torch.device("cpu"))
    packed.turn()["b"][:] = 1
    packed.send()
    packed.turn()["b"][:] = 2
    assert packed.device["b"].tolist() == [1, 1]
    packed.send()
    assert packed.device["b"].tolist() == [2, 2]


def test_a_part_of_the_last_field_is_sent_with_all_others():
    packed = Packed(FIELDS[:3], torch.device("cpu"))
    host = packed.turn()
    for name, *_ in FIELDS[:3]:
        host[name][:] = 7
    packed.send(2)
    assert [packed.device[name].tolist() for name in "abc"] == [[7] * 3, [7] * 2, [7, 7, 0, 0, 0]]


def test_host_buffers_are_used_in_turn():
    packed = Packed(FIELDS, torch.device("cpu"))
    seen = [packed.turn()["a"] for _ in range(6)]
    assert len({array.ctypes.data for array in seen}) == 5 and seen[0].ctypes.data == seen[5].ctypes.data
