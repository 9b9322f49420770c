import numpy as np
import pytest
import torch

from fqt import philox
from tests.fqt import oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Random123's known answers, kat_vectors: philox4x32 10 rounds
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
KEYS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -0x0123456789ABCDEF, 2**32, -(2**32)]


def signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_random123_known_answers(counter, key, answer):
    key64 = torch.tensor(signed(key[0] | key[1] << 32))
    words = philox.philox_4x32(torch.tensor(counter).unsqueeze(1), key64)
    assert words[:, 0].tolist() == answer
    assert list(oracle.philox(tuple(counter), key[0] | key[1] << 32)) == answer  # the model is held to them too


@pytest.mark.parametrize("key", KEYS)
def test_random_counters_equal_the_independent_implementation(key, rng):
    counters = rng.integers(0, 2**32, (4, 61))
    words = philox.philox_4x32(torch.from_numpy(counters), torch.tensor(key))
    expected = [oracle.philox(tuple(map(int, counter)), key) for counter in counters.T]
    assert words.T.tolist() == [list(answer) for answer in expected]


def test_counters_are_not_changed_in_place():
    counter, key = torch.arange(8).view(4, 2), torch.tensor(77)
    philox.philox_4x32(counter, key)
    assert torch.equal(counter, torch.arange(8).view(4, 2))
    assert int(key) == 77


@pytest.mark.parametrize("elements", [0, 1, 2, 3, 4, 5, 7, 8, 9, 33])
@pytest.mark.parametrize("stream", [0, 5, 2**32 - 1])
def test_an_element_draws_from_its_block_group_and_stream(elements, stream):
    key = -0x7EDCBA9876543210
    groups = torch.tensor([0, 3, 4, 2**31 + 7])
    draws = philox.uniform_u24(groups, elements, torch.tensor(key), stream)
    assert draws.dtype == torch.float32
    expected = [[oracle.u24(e, g, stream, key) for e in range(elements)] for g in groups.tolist()]
    assert draws.tolist() == expected


def test_a_kept_group_draws_what_it_would_draw_unpruned():
    key = torch.tensor(99)
    every = philox.uniform_u24(torch.arange(9), 11, key, 4)
    kept = torch.tensor([1, 2, 7])
    assert torch.equal(philox.uniform_u24(kept, 11, key, 4), every[kept])


def test_no_groups_draw_nothing():
    none = philox.uniform_u24(torch.empty(0, dtype=torch.int64), 5, torch.tensor(1), 0)
    assert none.shape == (0, 5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_the_length_of_a_chunk_changes_nothing(chunk, monkeypatch):
    key, groups = torch.tensor(12345), torch.tensor([2, 0, 5])
    expected = philox.uniform_u24(groups, 23, key, 6)
    monkeypatch.setattr(philox, "_CHUNK", chunk)
    assert torch.equal(philox.uniform_u24(groups, 23, key, 6), expected)


@pytest.mark.parametrize("elements", [4 * philox._CHUNK - 1, 4 * philox._CHUNK, 4 * philox._CHUNK + 5])
def test_elements_beside_the_border_of_a_chunk(elements):
    key = 31415926535
    draws = philox.uniform_u24(torch.tensor([1, 6]), elements, torch.tensor(key), 2)
    border = 4 * philox._CHUNK
    for group, row in ((1, 0), (6, 1)):
        for e in {0, 1, elements // 2, elements - 1, *range(border - 6, min(border + 6, elements))} & set(range(elements)):
            assert draws[row, e] == oracle.u24(e, group, 2, key), (group, e)


def test_one_and_two_threads_draw_the_same():
    draws = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        draws.append(philox.uniform_u24(torch.arange(70), 1001, torch.tensor(3), 0))
    assert torch.equal(*draws)


def test_all_24_bits_are_used_and_fair():
    draws = philox.uniform_u24(torch.arange(64), 4096, torch.tensor(2024), 0).long().numpy().reshape(-1)
    assert draws.min() >= 0
    assert draws.max() < 2**24
    ones = np.array([(draws >> bit & 1).sum() for bit in range(24)])
    oracle.assert_mean(ones, draws.size, np.full(24, 0.5), np.full(24, 0.25))


def test_streams_groups_and_keys_do_not_repeat_each_other():
    def draw(group=0, key=1, stream=0):
        return philox.uniform_u24(torch.tensor([group]), 64, torch.tensor(key), stream)[0].tolist()

    seen = [draw(), draw(group=1), draw(key=2), draw(key=1 + 2**32), draw(stream=1), draw(stream=2)]
    assert len({tuple(s) for s in seen}) == len(seen)
