"""Which way to train is the fastest within a budget."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from qlora_kit.memory.allocator import holes_left_by
from qlora_kit.memory.kept import Growth, Kept
from qlora_kit.memory.ways import (
    Situation,
    Way,
    room_for_kept,
    room_for_residents,
    room_for_unpacked,
    turned_bytes,
)
from qlora_kit.model.fused.residents import Room


def situation(device: str = "cpu", counts: Any = range(5), tokens: int = 50) -> Situation:
    """Four layers that keep 100 bytes a token each, beside inputs of 10 and a rest of 7."""
    kept = Kept((Growth(0, 100, 0),) * 4, Growth(0, 10, 0), Growth(0, 7, 0))
    return Situation(kept, [(tokens,)] * 8, 1000.0, device, counts)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_the_fastest_way_leaves_holes_in_a_cpus_heap_and_others_do_not() -> None:
    one = situation()
    passing = replace(one.kept, passing=Growth(10, 20, 0))
    holes = holes_left_by(8 * (10 + 20 * 50))
    assert holes > 0
    for device, way, wanted in (
        ("cpu", Way(8, 0), holes),
        ("cpu", Way(8, 1), 0),
        ("cuda", Way(8, 0), 0),
    ):
        without = situation(device)
        found = replace(without, kept=passing).peak_bytes(way) - without.peak_bytes(way)
        assert found == pytest.approx(wanted)


class TestTheFastest:
    def test_nothing_is_given_up_where_all_fits(self) -> None:
        one = situation()
        assert one.fastest(one.peak_bytes(Way(8, 0))) == Way(8, 0)

    def test_on_a_cpu_fewer_sequences_at_a_time_before_recomputing(self) -> None:
        one = situation()
        assert one.fastest(one.peak_bytes(Way(8, 0)) - 1) == Way(4, 0)

    def test_a_gpu_recomputes_before_its_kernels_run_empty(self) -> None:
        one = situation("cuda")
        assert one.fastest(one.peak_bytes(Way(8, 2))) == Way(8, 2)

    def test_layers_recompute_where_one_sequence_is_too_much(self) -> None:
        one = situation()
        assert one.fastest(one.peak_bytes(Way(1, 3))) == Way(1, 3)

    def test_activations_leave_a_gpu_only_where_nothing_else_helps(self) -> None:
        one = situation("cuda")
        on_it = min(one.peak_bytes(way) for way in one.ways() if not way.offloads)
        found = one.fastest(on_it - 1)
        assert found is not None
        assert found.offloads
        assert not any(way.offloads for way in situation().ways())

    def test_what_the_recipe_says_of_recomputing_holds(self) -> None:
        one = situation(counts=(4,))
        assert one.fastest(1e9) == Way(8, 4)

    def test_none_where_nothing_fits_and_the_leanest_is_known(self) -> None:
        one = situation()
        assert one.fastest(one.peak_bytes(one.leanest()) - 1) is None
        assert one.leanest() == Way(1, 3), "the last layer's turn comes at once"

    def test_a_run_that_goes_on_takes_as_many_at_a_time_as_before_if_that_fits(self) -> None:
        one = situation()
        assert one.fastest(1e9, at_a_time=2) == Way(2, 0)
        assert one.fastest(one.peak_bytes(Way(1, 0)), at_a_time=4) in (Way(4, 4), Way(1, 0))


class TestHeldOutRows:
    def test_as_many_at_a_time_as_fit(self) -> None:
        one, rows = situation(), [(400,)] + [(100,)] * 7
        for size in (8, 4, 2, 1):
            enough = one.held_out_bytes(rows[:size])
            assert one.most_held_out(rows, enough) == size
            assert one.most_held_out(rows, enough - 1) == max(size // 2, 1)
        assert one.most_held_out([], 0.0) == 0

    def test_nothing_is_kept_of_them(self) -> None:
        one = situation()
        assert one.standing_bytes < one.held_out_bytes([(50,)] * 8) < one.peak_bytes(Way(8, 0))


def test_logits_take_no_more_than_those_of_a_batch_or_of_a_chunk() -> None:
    """Three times, of 256 places where the vocabulary is large."""
    few, many = (room_for_kept(1e9, 0, 100_000, tokens, "cpu") for tokens in (10, 10_000))
    assert room_for_kept(1e9, 0, 0, 10, "cpu") - few == 3 * 4 * 10 * 100_000
    assert room_for_kept(1e9, 7, 0, 10, "cpu") - many == 3 * 4 * 256 * 100_000 - 7


class TestWeightsThatStay:
    def test_get_what_activations_leave_and_no_more_than_all_of_them_take(self) -> None:
        packed = bnb.nn.Linear4bit(64, 2, bias=False).to("cpu")
        kept, lengths = situation().kept, [50]
        needed = kept.peak_bytes(0, lengths)
        all_of_them = 2 * 64 * 4
        for room, count, device, wanted in (
            (needed + 5, 0, "cpu", 5),
            (needed + 5000, 0, "cpu", all_of_them),
            (needed - 5, 0, "cpu", 0),
            (needed + 5000, 1, "cpu", 0),
            (needed + 5000, 0, "cuda", 0),
        ):
            is_enough = room - needed >= 2 * all_of_them and not count and device == "cpu"
            for can_reorder in (False, True)[: 2 - is_enough]:
                how = (kept, count, lengths, device, partial(bool, can_reorder))
                assert room_for_unpacked(packed, room, *how) == Room(wanted)

    def test_are_reordered_where_there_is_room_for_both_directions_of_all(self) -> None:
        head = torch.nn.Linear(64, 8, bias=False).requires_grad_(False)
        layers = torch.nn.ModuleList([bnb.nn.Linear4bit(64, 2, bias=False).to("cpu"), head])
        trained = torch.nn.Linear(64, 8)
        model = torch.nn.ModuleList([layers, trained])
        unpacked, both = 4 * 64 * 2, 2 * 4 * 64 * (2 + 8)
        for left, can_reorder, wanted in (
            (both, True, Room(both, is_for_reordered=True)),
            (both + 1000, True, Room(both, is_for_reordered=True)),
            (both - 1, True, Room(unpacked)),
            (both, False, Room(unpacked)),
            (-5, True, Room()),
        ):
            assert room_for_residents(model, left, partial(bool, can_reorder)) == wanted

    def test_leave_room_for_a_head_that_is_turned_round(self) -> None:
        """A second time for a moment, when its gradient's is there and of no other layer."""

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.head = (torch.nn.Linear(64, one, False) for one in (2, 100))

            def get_output_embeddings(self) -> torch.nn.Module:
                return self.head

        model = Model().requires_grad_(False)
        both = 2 * 4 * 64 * 102
        turned = 4 * 64 * (100 - 2)
        assert turned_bytes(model) == turned
        whole = Room(both, is_for_reordered=True)
        assert room_for_residents(model, both + turned, lambda: True) == whole
        assert room_for_residents(model, both + turned - 1, lambda: True) == Room()
        model.head.requires_grad_(True)
        assert turned_bytes(model) == 0

    def test_nothing_that_is_frozen_needs_no_room(self) -> None:
        assert room_for_residents(torch.nn.Linear(64, 8), 1000, lambda: True) == Room()

    def test_without_room_for_it_nobody_asks_whether_the_layout_is_faster(self) -> None:
        def timed() -> bool:
            raise AssertionError

        layer = torch.nn.Linear(64, 8, bias=False).requires_grad_(False)
        both = 2 * 4 * 64 * 8
        assert room_for_residents(layer, both - 1, timed) == Room()
        with pytest.raises(AssertionError):
            room_for_residents(layer, both, timed)
