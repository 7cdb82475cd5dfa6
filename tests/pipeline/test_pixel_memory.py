"""Memory for pixels is used again, but never while anybody looks at it."""

import os
from pathlib import Path

import pytest

from pipeline import pixel_memory
from pipeline.pixel_memory import PixelPool, SeenMemory


def lent(pool, size_bytes):
    """Memory just taken, and its bytes."""
    memory = pool.take(size_bytes)
    return memory, pool.lend(memory)


def test_it_is_taken_again_once_no_view_is_left():
    pool = PixelPool()
    memory, array = lent(pool, 100)
    view = array[10:].reshape(9, 10)[::2]
    del array
    assert pool.take(100) is not memory
    del view
    assert pool.take(100) is memory


@pytest.mark.parametrize(("size_bytes", "is_same"), [(40, True), (100, True), (101, False)])
def test_it_is_taken_again_only_where_it_is_large_enough(size_bytes, is_same):
    pool = PixelPool()
    memory, array = lent(pool, 100)
    del array
    taken = pool.take(size_bytes)
    assert (taken is memory) == is_same
    assert taken.size_bytes >= size_bytes


def test_what_a_copy_of_the_process_sees_is_left_alone():
    pool = PixelPool()
    memory, array = lent(pool, 8)
    array[:] = 7
    ready, told = os.pipe()
    if (pid := os.fork()) == 0:
        os.read(ready, 1)
        os._exit(int((array == 7).all()))
    del array
    _, again = lent(pool, 8)
    again[:] = 9
    os.write(told, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert pool.take(8) is not memory
    os.close(ready)
    os.close(told)


def num_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_descriptor_is_left():
    before = num_descriptors()
    pool = PixelPool()
    arrays = [lent(pool, 1000)[1] for _ in range(20)]
    assert num_descriptors() >= before + 20
    del arrays
    # Its own, and its mapping's.
    assert num_descriptors() == before + 2 * pixel_memory._MAX_FREE
    del pool
    assert num_descriptors() == before


def test_the_child_sees_what_its_parent_lends_and_the_parent_what_it_writes():
    pool, seen = PixelPool(), SeenMemory()
    for turn in range(9):
        pairs = [lent(pool, 50 + turn) for _ in range(1 + turn % 3)]
        for number, (memory, _) in enumerate(pairs):
            seen.array(os.dup(memory.fd))[:] = number
        assert [set(array.tolist()) for _, array in pairs] == [{n} for n in range(len(pairs))]
        del pairs


def num_mapped():
    return Path("/proc/self/maps").read_text().count("decoded-pixels")


def test_the_child_maps_the_latest_memory_alone():
    before = num_mapped()
    pool, seen = PixelPool(), SeenMemory()
    pairs = [lent(pool, 8) for _ in range(3)]
    for memory, _ in pairs:
        for _ in range(2):
            seen.array(os.dup(memory.fd))
            assert num_mapped() == before + len(pairs) + 1
    del pairs, memory, pool
    assert num_mapped() == before + 1
