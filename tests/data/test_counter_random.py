"""Random numbers as pure functions: the same for ever, uniform, and independent from one kind of choice to the next."""

import numpy as np

from pretrain.data.counter_random import Namespace, PlanChoice, bits, permutation, uniform


def test_counter_random_numbers_are_uniform_and_fixed_for_ever():
    assert bits(0).tolist() == [0xE220A8397B1DCDAF]  # the first output of splitmix64 from seed 0
    assert bits(1, 2, 3).tolist() == [0xD0734750FDE362B3]
    values = uniform(5, np.arange(100_000))
    assert abs(values.mean() - 0.5) < 0.005
    assert abs(values.var() - 1 / 12) < 0.002
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))


def test_every_kind_of_choice_has_a_number_of_its_own_but_two_whose_keys_differ_in_length():
    numbers = {name: int(member) for name, member in Namespace.__members__.items()}
    assert numbers == {
        "SHARD_ORDER": 1,
        "ROW_PLAN": 2,
        "TRAIN_MASKS": 3,
        "VALID_MASKS": 4,
        "CONTEXT_BLOCKS": 6,
        "CONTEXT_OFFSETS": 7,
        "CONTEXT_MASKS": 8,
        "SOURCE_REPEATS": 10,
        "TASK_CANDIDATES": 10,
        "TASK_FILLER": 11,
        "TASK_PAIR": 12,
        "TASK_DISTRACTORS": 13,
    }, "other numbers make other rows, masks and targets of every run"
    assert len(set(numbers.values())) == len(numbers) - 1
    assert [(int(choice), choice.name) for choice in PlanChoice] == [
        (0, "ROW_ORDER"),
        (1, "ORDER_IN_ROW"),
        (2, "WHICH_PIECE"),
        (3, "DOCUMENT_ORDER"),
    ]


def test_the_two_namespaces_of_one_number_give_unlike_values():
    candidates = uniform(7, Namespace.TASK_CANDIDATES, np.arange(500))
    repeats = uniform(7, Namespace.SOURCE_REPEATS, np.arange(500)[:, None], np.arange(500))
    assert not np.isin(candidates, repeats).any()
    assert abs(np.corrcoef(candidates, repeats[:, 0])[0, 1]) < 0.15
    assert abs(np.corrcoef(candidates, repeats[0])[0, 1]) < 0.15
