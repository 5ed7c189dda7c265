"""Rules of sums of products: linear layers, matrix products, einsum and attention.

All of them are one rule on letters, as in einsum: a letter that two operands share must have equal labels;
one that is missing in the output is summed, so that without its channel the sum has one term less; one that
stays in the output passes its labels on. Where a product of two activations runs over letters that are
batches to it (heads), channels go by whole heads, or by positions of the heads' width, as the view asks.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penjing.arrays.structure.labels import Labels, varying
from penjing.backends.torch.graph.steps import Part, Rule, Step, Value, agree, part


@dataclass(frozen=True)
class _Letters:
    """The axes of a product: positions of its letters, and what each is to it."""

    order: str
    output: str
    shared: frozenset[int]
    summed: frozenset[int]
    batches: frozenset[int]


def contract(step: Step, operands: Sequence[Value], subscripts: Sequence[str], output: str) -> Value:
    """Pass labels through a sum of products.

    Args:
        operands: the tensors; weights among them make and consume channels.
        subscripts: a letter for each axis of each, none twice in one.
        output: the letters of the result.
    """
    letters = _letters(subscripts, output)
    rank = len(letters.order)
    parts = [
        part(value, [letters.order.index(letter) for letter in word], rank)
        for value, word in zip(operands, subscripts, strict=True)
    ]
    activations = sum(not value.weight for value in operands)
    parts = [_by_heads(step, p, letters) for p in parts]
    if activations > 1:
        parts = _whole_heads(step, parts, letters)
        for p in parts:
            _mark(step, p, letters)
    for value, p in zip(operands, parts, strict=True):
        for factor in p.factors:
            axes = set(varying(factor))
            if axes <= letters.summed:
                (step.coupling.consume if value.weight else step.coupling.eat)(factor.reshape(-1))
            elif value.weight and activations and not axes & letters.summed:
                step.coupling.make(factor.reshape(-1))
    merged = agree(step, parts, "its input is fixed")
    left = [f for f in merged if not letters.summed.intersection(varying(f))]
    places = [letters.order.index(letter) for letter in output]
    return step.value([_placed(f, places) for f in left], weight=not activations)


def _letters(subscripts: Sequence[str], output: str) -> _Letters:
    order = "".join(dict.fromkeys("".join([output, *subscripts])))
    shared = frozenset(i for i, letter in enumerate(order) if sum(letter in w for w in subscripts) > 1)
    kept = frozenset(i for i, letter in enumerate(order) if letter in output)
    return _Letters(order, output, shared, frozenset(range(len(order))) - kept, shared & kept)


def _placed(factor: Labels, places: Sequence[int]) -> Labels:
    """Return a factor with its axes in the output's order; it has size 1 on all others."""
    rest = [axis for axis in range(factor.ndim) if axis not in places]
    return factor.transpose([*places, *rest]).reshape([factor.shape[axis] for axis in places])


def _by_heads(step: Step, p: Part, letters: _Letters) -> Part:
    """Tie labels that vary both over batches (heads) and within them, one way or the other."""
    factors = []
    for factor in p.factors:
        axes = varying(factor)
        inside = [axis for axis in axes if axis not in letters.batches]
        over = [axis for axis in axes if axis in letters.batches]
        if inside and over:
            factor = step.tied(factor, inside if step.heads == "whole" else over, "is one head")
        factors.append(factor)
    return Part(tuple(factors), p.full)


def _whole_heads(step: Step, parts: list[Part], letters: _Letters) -> list[Part]:
    """Freeze the width of keys and values that all heads share, where heads go as a whole."""
    if step.heads == "width" or not any(letters.batches & set(varying(f)) for p in parts for f in p.factors):
        return parts
    for factor in (f for p in parts for f in p.factors if not letters.batches & set(varying(f))):
        step.freeze(factor, "serves several heads")
    return [Part(tuple(f for f in p.factors if letters.batches & set(varying(f))), p.full) for p in parts]


def _mark(step: Step, p: Part, letters: _Letters) -> None:
    for factor in p.factors:
        axes = set(varying(factor))
        if axes <= letters.batches:
            step.coupling.mark(factor.reshape(-1), "head")
        elif step.heads == "width" and not axes & letters.batches:
            step.coupling.mark(factor.reshape(-1), "head width")


def _words(*ranks: int) -> list[str]:
    """Return words of different letters, aligned at their ends: `(2, 3)` gives `bc` and `abc`."""
    longest = string.ascii_lowercase[: max(ranks)]
    return [longest[len(longest) - rank :] for rank in ranks]


def linear(step: Step) -> Value:
    """Contract the last axis with the weight's columns."""
    x, w = step.args[0], step.args[1]
    before = string.ascii_lowercase[: len(x.shape) - 1]
    out = "y" * (len(w.shape) - 1)
    value = contract(step, [x, w], [before + "z", out + "z"], before + out)
    return add_bias(step, value, step.arg(2, "bias"))


def add_bias(step: Step, value: Value, bias: Value | None) -> Value:
    """Unite the labels of a bias with those that it is added to, axis by axis from the last."""
    if bias is None:
        return value
    rank = len(value.shape)
    parts = [part(v, range(rank - len(v.shape), rank), rank) for v in (value, bias)]
    return step.value(agree(step, parts, "meets a bias that is fixed"), weight=value.weight and bias.weight)


def matmul(step: Step) -> Value:
    """A matrix product with batches, of activations or with a weight (`matmul`, `mm`, `bmm`, `mv`, `dot`)."""
    return _product(step, step.args[0], step.args[1])


def _product(step: Step, a: Value, b: Value) -> Value:
    batches = max(len(a.shape), len(b.shape)) - 2
    left, right = _words(max(len(a.shape) - 2, 0), max(len(b.shape) - 2, 0)) if batches > 0 else ("", "")
    rows, columns = "y" * (len(a.shape) > 1), "x" * (len(b.shape) > 1)
    longest = max(left, right, key=len)
    return contract(step, [a, b], [left + rows + "z", right + "z" + columns], longest + rows + columns)


def addmm(step: Step) -> Value:
    """A bias plus a matrix product (`addmm`, `baddbmm`)."""
    bias, a, b = step.args[:3]
    return add_bias(step, _product(step, a, b), bias)


def einsum(step: Step) -> Value | None:
    """Any sum of products; None where the equation names an axis twice or leaves its output open."""
    equation, operands = step.args[0].replace(" ", ""), list(step.args[1])
    if "->" not in equation:
        return None
    inputs, output = equation.split("->")
    words = inputs.split(",")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    dots = max(len(v.shape) - len(w.replace("...", "")) for v, w in zip(operands, words, strict=True))
    ellipsis = "".join(spare[:dots])
    words = [
        w.replace("...", ellipsis[dots - (len(v.shape) - len(w.replace("...", ""))) :])
        for v, w in zip(operands, words, strict=True)
    ]
    output = output.replace("...", ellipsis)
    if any(len(set(word)) < len(word) for word in (*words, output)):
        return None
    return contract(step, operands, words, output)


def attention(step: Step) -> Value:
    """Scaled dot-product attention: heads of query, key, value and mask belong together.

    With grouped queries each key head serves several queries; the labels repeat, and the unit is the group.
    """
    q, k, v = step.args[:3]
    mask = step.arg(3, "attn_mask")
    if step.arg(7, "enable_gqa", False):
        k, v = (_repeated(step, x, q.shape[-3]) for x in (k, v))
    batch = string.ascii_lowercase[: len(q.shape) - 2]
    operands, words = [q, k, v], [batch + "TD", batch + "SD", batch + "SE"]
    if mask is not None:
        operands.append(mask)
        words.append((batch + "TS")[len(q.shape) - len(mask.shape) :])
    return contract(step, operands, words, batch + "TE")


def _repeated(step: Step, value: Value, heads: int) -> Value:
    times = heads // value.shape[-3]
    shape = (*value.shape[:-3], heads, *value.shape[-2:])
    factors = [np.repeat(f, times, -3) if f.shape[-3] > 1 else f for f in value.factors]
    return step.value(factors, shape)


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), addmm),
    "scaled_dot_product_attention": attention,
}
