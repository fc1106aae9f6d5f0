"""Passes that are made ahead for a GPU: the same as one by one, and one at a time beside the work."""

import threading

import pytest
import torch
from torch.utils.data import DataLoader

from stackllm.finetune.model import Batch
from stackllm.finetune.trainer import Ahead

PASSES = [[0, 1], [2], [3, 4, 5], [6]]
PATIENCE = 60.0


def ahead(gather, passes=PASSES):
    return Ahead(range(7), batch_sampler=passes, collate_fn=gather)


def test_they_are_those_of_a_plain_loader_in_its_order():
    plain = DataLoader(range(7), batch_sampler=PASSES, collate_fn=list)
    for _ in range(2):  # every epoch
        assert list(ahead(list)) == list(plain) == PASSES
    assert list(ahead(list, [])) == []


def test_the_next_is_made_while_one_is_at_work_and_no_more():
    made, begun = [], {i: threading.Event() for i in range(len(PASSES))}

    def gather(chosen):
        begun[len(made)].set()
        made.append(chosen)
        return chosen

    passes = iter(ahead(gather))
    for number in range(len(PASSES)):
        assert next(passes) == PASSES[number]
        if number + 1 < len(PASSES):
            assert begun[number + 1].wait(PATIENCE)
        assert len(made) <= number + 2


def test_what_goes_wrong_with_a_pass_is_raised_where_it_is_wanted():
    def gather(chosen):
        if chosen == [2]:
            raise OSError("the trunk is not there")
        return chosen

    passes = iter(ahead(gather))
    assert next(passes) == [0, 1]
    with pytest.raises(OSError, match="the trunk is not there"):
        next(passes)


def test_an_epoch_that_is_left_early_leaves_no_thread():
    before = threading.active_count()
    passes = iter(ahead(list))
    next(passes)
    passes.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("from_trunk", [False, True])
def test_loaders_pin_every_tensor_of_a_batch(monkeypatch, from_trunk):
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda it, *_: pinned.append(it) or it)
    part = torch.zeros(2, 3)
    batch = (
        Batch(None, part, torch.ones(2, 3)) if from_trunk else Batch(part, None, torch.ones(2, 3))
    )
    again = pin_memory({"batch": batch})["batch"]
    assert [it is part for it in pinned] == [True, False]
    assert (again.ids is None, again.states is None) == (from_trunk, not from_trunk)
