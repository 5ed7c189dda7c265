import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from penjing.core.errors import Refused
from penjing.core.number_format import NumberFormat, number_format

NAMES = [
    "int8",
    "uint8",
    "int4 group 32",
    "uint4 symmetric channel",
    "int8 asymmetric narrow token",
    "int2",
    "uint16 token",
    "nf4",
    "nf4 tensor",
    "nf4 group 32",
    "mxfp4",
    "mxfp8",
    "mxfp8_e5m2",
    "nvfp4",
    "ternary channel",
    "binary group 128",
    "fp8_e4m3 channel",
    "fp8_e5m2",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_format_prints_as_its_name_and_reads_back(name):
    format = number_format(name)
    assert str(format) == name
    assert repr(format) == f"number_format({name!r})"
    assert json.loads(format.model_dump_json()) == name
    assert NumberFormat.model_validate_json(format.model_dump_json()) == format
    assert NumberFormat(**format.__dict__) == format
    assert hash(NumberFormat(**format.__dict__)) == hash(format)


@given(
    signed=st.booleans(),
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    narrow=st.booleans(),
    where=st.sampled_from([("tensor", 0), ("channel", 0), ("token", 0), ("group", 2), ("group", 100)]),
)
def test_every_integer_format_reads_back(signed, bits, symmetric, narrow, where):
    format = NumberFormat(
        bits=bits,
        signed=signed,
        symmetric=symmetric,
        narrow=narrow and signed,
        granularity=where[0],
        group=where[1],
    )
    assert number_format(str(format)) == format
    assert format.highest - format.lowest == 2**bits - 1 - format.narrow


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("int1", "2 to 16 bits"),
        ("int17", "less than or equal to 16"),
        ("uint4 narrow", "narrow needs a signed"),
        ("mxfp4 group 16", "mxfp4 must have groups of 32"),
        ("nvfp4 channel", "nvfp4 must have groups of 16"),
        ("nf4 asymmetric", "only integers can be asymmetric"),
        ("int8 group 1", "a group must have at least 2"),
        ("int8 channel token", "must say each thing once"),
        ("int4 group", "words of a number format"),
        ("int4 grup 32", "words of a number format"),
        ("fp8", "number format must be known"),
        ("", "number format must be known"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(name, rule):
    with pytest.raises(Refused, match=rule):
        number_format(name)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"kind": "nf4", "bits": 3}, "nf4 must have 4 bits"),
        ({"kind": "ternary", "signed": False}, "only integers can be unsigned"),
        ({"granularity": "channel", "group": 32}, "a group length needs"),
        ({"bit": 4}, "cannot take a field 'bit'"),
        ({"bits": "many"}, "integer"),
    ],
)
def test_bad_fields_are_refused(fields, rule):
    with pytest.raises(Refused, match=rule):
        NumberFormat(**fields)


def test_a_field_of_another_value_takes_the_name():
    class Holder(BaseModel):
        weights: NumberFormat = number_format("int8")

    assert Holder(weights="int4 group 32").weights == NumberFormat(bits=4, group=32)
    assert Holder.model_validate_json('{"weights": "mxfp4"}').model_dump(mode="json") == {"weights": "mxfp4"}
    with pytest.raises(Refused, match="known"):
        Holder(weights="int99x")


@pytest.mark.parametrize(
    ("name", "shape", "scales", "bits"),
    [
        ("int8", (4, 8), (), 8 + 32 / 32),
        ("uint4 channel", (4, 3, 3, 3), (4,), 4 + 36 / 27),
        ("int4 group 32", (2, 70), (2, 3), 4 + 32 * 6 / 140),
        ("nvfp4", (4, 64), (4, 4), 4 + 8 / 16 + 32 / 256),
        ("mxfp8", (1, 32), (1, 1), 8.25),
        ("uint8 token", (2, 3, 10), (2, 3), 8 + 4),
    ],
)
def test_scales_count_in_the_bits(name, shape, scales, bits):
    assert number_format(name).scale_shape(shape) == scales
    assert number_format(name).bits_per_value(shape) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("name", "shape"), [("int8 channel", ()), ("int4 group 32", (64,)), ("int8", (0, 3))]
)
def test_a_shape_that_does_not_fit_is_refused(name, shape):
    with pytest.raises(Refused, match="scale for each"):
        number_format(name).scale_shape(shape)
