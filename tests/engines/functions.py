"""Functions that tests declare, where the suite's are of a module of their own."""

from collections.abc import Callable
from typing import Any

from postlude import task


def declared(engine: Any, func: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of that engine, as if a module defined it."""
    func.__qualname__ = func.__name__
    return task(engine=engine)(func)


def returning(engine: Any) -> Callable[..., Any]:
    """Returns a function of that engine that returns its arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return [args, kwargs]

    return declared(engine, call)
