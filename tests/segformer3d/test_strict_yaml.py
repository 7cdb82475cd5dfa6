"""YAML of strangers: plain data or one line."""

import time

import pytest

from segformer3d.strict_yaml import StrictYamlError, parse_yaml


def bomb(levels: int = 9) -> str:
    """A billion laughs."""
    first = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"
    rest = (
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels)
    )
    return "\n".join([first, *rest])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [x, 2.5, true, null]", {"a": 1, "b": ["x", 2.5, True, None]}),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("", None),
    ],
)
def test_plain_data_is_read(text, expected):
    assert parse_yaml(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch executed']",
        "!!python/object:jobs.spec.JobSpec {}",
        "!!python/name:os.system",
        "!!python/module:os",
        "a: !!python/object/new:os.system ['touch executed']",
        "!custom x",
        bomb(),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: 1\na: 2",
        "? [1, 2]\n: x",
        "? {a: 1}\n: x",
        "[" * 5000,
        "a: [",
        "a: b: c",
        *("!!int ''", "!!float ''", "!!bool abc", "!!timestamp abc", "!!int []"),
        "a: 1" + ":59" * 2000 + ".5",
        "\x00",
        "--- a\n--- b",
    ],
)
def test_anything_else_is_one_line_and_runs_nothing(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    with pytest.raises(StrictYamlError) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 5
    assert not list(tmp_path.iterdir())


def test_bombs_as_keys_are_not_compared():
    text = f"{bomb()}\nb0: &b0 [ha]\nc:\n  ? *a8\n  : 1\n  ? *a7\n  : 2"
    with pytest.raises(StrictYamlError):
        parse_yaml(text)


def test_a_long_mapping_is_read_in_no_time():
    started = time.process_time()
    assert len(parse_yaml("\n".join(f"k{index}: 1" for index in range(3000)))) == 3000
    assert time.process_time() - started < 5
