"""Methods of installed packages: loading a class and checking that it is a method."""

from __future__ import annotations

import dataclasses
import inspect
from importlib.metadata import EntryPoint
from typing import Any

from secateur.calibration.statistics import GradientStatistic, StateStatistic, Statistic
from secateur.errors import UserError
from secateur.methods.base import ExpertMethod, LayerMethod, LearnedMethod, RemovalMethod, WeightMethod, WidthMethod

__all__ = ["load_plugin"]

#: base class -> the kinds of statistics a method of it may need; all of one kind, since each kind takes its own walk
_STATISTICS: dict[type, tuple[type, ...]] = {
    LayerMethod: (StateStatistic, GradientStatistic),
    RemovalMethod: (),
    WidthMethod: (Statistic, GradientStatistic),
    WeightMethod: (Statistic,),
    LearnedMethod: (),
    ExpertMethod: (),
}


def load_plugin(entry: EntryPoint) -> type[Any]:
    """Load the class that an entry point names.

    Raises:
        UserError: if its package cannot be imported, or the class is not a complete method.
    """
    try:
        cls = entry.load()
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{entry.name}: the package of this method cannot be loaded: {text}") from None
    if defect := _type_defect(cls) or _missing_attributes(cls) or _statistics_defect(cls):
        raise UserError(f"{entry.name}: its entry point names {cls!r}, {defect}")
    return cls


def _type_defect(cls: Any) -> str:
    if not (isinstance(cls, type) and issubclass(cls, tuple(_STATISTICS))):
        return f"which is no subclass of {', '.join(base.__name__ for base in _STATISTICS)}"
    return "" if dataclasses.is_dataclass(cls) else "which is not decorated with secateur.config.spec"


def _missing_attributes(cls: type[Any]) -> str:
    options = {field.name for field in dataclasses.fields(cls)}
    declared = {name for base in cls.__mro__ for name in inspect.get_annotations(base)} - options
    missing = {name for name in declared if not hasattr(cls, name)} | cls.__abstractmethods__
    return f"which does not define {', '.join(sorted(missing))}" if missing else ""


def _statistics_defect(cls: type[Any]) -> str:
    base = next(base for base in _STATISTICS if issubclass(cls, base))
    kinds = _STATISTICS[base]
    if not cls.needs or any(all(issubclass(need, kind) for need in cls.needs) for kind in kinds):
        return ""
    needs = " and ".join(need.__name__ for need in cls.needs)
    allowed = " or of ".join(kind.__name__ for kind in kinds) or "nothing"
    return f"which needs {needs}, but a {base.__name__} can need kinds of {allowed}"
