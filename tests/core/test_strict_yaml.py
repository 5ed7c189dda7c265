import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.core.errors import Exit, Refused
from penjing.core.strict_yaml import dump_yaml, load_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("007", "007"),
        ("10", 10),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("5ms", "5ms"),
        ("1%", "1%"),
        ("'1e-3'", "1e-3"),
    ],
)
def test_scalars_mean_what_they_say(text, value):
    read = load_yaml(f"x: {text}", "f")["x"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", r"f\.yaml:3:1: .*'a' is written twice"),
        ("x:\n - {r: 1, r: 2}", "'r' is written twice"),
        ("? [a]\n: 1", "a key is a word"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.mkdir [marker]", "could not determine a constructor"),
        ("a: [1", r"f\.yaml:"),
        ("{" * 3000, "YAML"),
        ("a\x00: 1", "YAML"),
        ("x" * 2_000_000, "256 kB"),
    ],
)
def test_refused_with_the_place(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=words) as caught:
        load_yaml(text, "f.yaml")
    assert caught.value.code == Exit.USAGE
    assert not (tmp_path / "marker").exists()


def test_files(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(tmp_path / "a") == {"a": 1}
    (tmp_path / "b").write_bytes(b"a: \xff")
    for name in ("b", "none"):
        with pytest.raises(Refused, match=name):
            read_yaml(tmp_path / name)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029\ufeff"), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
scalars |= st.sampled_from(["1e-3", "1e5", ".5", "true", "null", "~", "no", "1:30", "0x1f", "0o7", "=", "<<"])


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=8
    )
)
def test_written_data_reads_back_equal(value):
    assert load_yaml(dump_yaml({"x": value}), "f") == {"x": value}
