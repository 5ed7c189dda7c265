"""What methods that train have in common: a strategy, whose fields may be given beside their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from penjing.core.errors import Exit, Refused, nearest
from penjing.core.method import Method, Stage
from penjing.train.strategy import Strategy, StrategyFields

if TYPE_CHECKING:

    class _Method(StrategyFields, Method):
        """For type checkers: the fields of a strategy are keywords and attributes of a method."""

else:
    _Method = Method


class TrainingMethod(_Method):
    """A method that trains, by a strategy.

    The fields of the strategy are given, read, printed and saved beside the method's own:
    `FineTune(epochs=2)` is `FineTune(strategy=Strategy(epochs=2))`, its `epochs` are 2, and in JSON it is
    `{"method": "FineTune", "epochs": 2, ...}`. Given both, the single fields replace those of the strategy.
    Abstract: it has no handler.

    Attributes:
        strategy: how the method trains, for example one that `pj.tune` found.
        unsupported: fields of a strategy that make no sense here, and why (a clause with "where").

    Raises:
        Refused: a field that neither the method nor a strategy has, one out of its range, or an unsupported
            one that is not at its default.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    unsupported: ClassVar[Mapping[str, str]] = {}
    strategy: Strategy = Strategy()

    @model_validator(mode="before")
    @classmethod
    def _gather_strategy(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        flat = {name: value for name, value in given.items() if name in Strategy.model_fields}
        own = {name: value for name, value in given.items() if name not in flat}
        _refuse_unknown(cls, own)
        base = own.get("strategy", {})
        if isinstance(base, Strategy):
            base = base.model_dump(exclude_unset=True)
        if not isinstance(base, Mapping):
            raise Refused(
                "must be a Strategy",
                value=repr(base)[:80],
                place=f"{cls.__name__}.strategy",
                fix="write strategy=Strategy(epochs=2), or its fields alone",
                code=Exit.USAGE,
            )
        try:
            return own | {"strategy": Strategy(**{**base, **flat})}
        except Refused as error:
            raise error.at(error.place.replace("Strategy", cls.__name__, 1)) from None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        for name, where in self.unsupported.items():
            value = getattr(self.strategy, name)
            if value != Strategy.model_fields[name].default:
                raise Refused(
                    f"cannot be used {where}",
                    value=value,
                    place=f"{type(self).__name__}.{name}",
                    fix="leave it out",
                    code=Exit.USAGE,
                )
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed, its own or those of its strategy; they are not checked."""
        given = dict(update or {})
        flat = {name: given.pop(name) for name in list(given) if name in StrategyFields.model_fields}
        if flat:
            given["strategy"] = given.get("strategy", self.strategy).model_copy(update=flat)
        return super().model_copy(update=given, deep=deep)

    def __getattr__(self, name: str) -> Any:
        if name in StrategyFields.model_fields:
            return getattr(self.strategy, name)
        return super().__getattr__(name)  # type: ignore[misc]

    @model_serializer(mode="wrap")
    def _flatten(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        return {**data.pop("strategy", {}), **data}

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        yield from self.strategy.__repr_args__()
        yield from (pair for pair in super().__repr_args__() if pair[0] != "strategy")


def _refuse_unknown(method: type[TrainingMethod], given: Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in method.model_fields]
    if unknown:
        raise Refused(
            f"cannot take a field {unknown[0]!r}",
            place=method.__name__,
            fix=nearest(unknown[0], {*method.model_fields, *Strategy.model_fields}),
            code=Exit.USAGE,
        )


class DistillationMethod(TrainingMethod):
    """A method that trains towards a teacher: the model before the plan, or one given; abstract."""
