"""What a function tells of itself: its options, its name, how it can be called."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast

T = TypeVar("T")

GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR

_ATTRIBUTE = "__postlude_options__"


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What `task` noted on a function; the defaults stand for a plain one."""

    name: str | None = None
    always: bool = False


_PLAIN = Options()


def task(*, name: str | None = None, always: bool = False) -> Callable[[T], T]:
    """Declares how a function behaves as a background task.

    The function stays what it was: the same object, called as before. Only a callable
    that cannot carry attributes (a builtin, a bound method) comes back as a
    `functools.partial` of it. `staticmethod` and `classmethod` objects are noted on the
    function they hold. What an earlier `task` declared stays unless it is given anew.

    To declare options for one use of somebody else's function, decorate a
    `functools.partial` of it: `task(always=True)(functools.partial(os.remove, path))`.

    Example:
        .. code-block:: python

            from postlude import task


            @task(name="receipts.send", always=True)
            async def send_receipt(order: int) -> None: ...

    Args:
        name: What logs and notes call the task. By default the dotted name
            of the function, such as `shop.receipts.send_receipt`.
        always: Whether the task also runs when the request was cancelled or, with
            `postlude.responses`, when the response could not be sent completely.

    Raises:
        TypeError: If `name` is not a string, `always` is not a bool, or what is
            decorated is not callable.
        ValueError: If `name` is empty.

    .. versionadded:: 0.1.0
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string, not {name!r}")
    if name == "":
        raise ValueError("name must not be empty; leave it out for the function's own")
    if not isinstance(always, bool):
        raise TypeError(f"always must be True or False, not {always!r}")

    def declare(func: T) -> T:
        target: Any = func
        if isinstance(target, staticmethod | classmethod):
            target = cast("Any", target).__func__
        if not callable(target):
            raise TypeError(f"task() decorates a callable, not {func!r}")
        earlier = options_of(target)
        options = dataclasses.replace(
            earlier, name=name or earlier.name, always=always or earlier.always
        )
        try:
            setattr(target, _ATTRIBUTE, options)
        except (AttributeError, TypeError):
            target = functools.partial(target)
            setattr(target, _ATTRIBUTE, options)
            return cast(T, target)
        return func

    return declare


def options_of(func: object) -> Options:
    """Returns the options of a callable, looked for through partials and `__call__`."""
    while True:
        options = getattr(func, _ATTRIBUTE, None)
        # A mock answers any attribute, so the type decides.
        if type(options) is Options:
            return options
        if not isinstance(func, functools.partial):
            break
        func = func.func
    options = getattr(_call_method(func), _ATTRIBUTE, None)
    return options if type(options) is Options else _PLAIN


def name_of(func: object) -> str:
    """Returns what a callable is called: its declared name, or its dotted one."""
    declared = options_of(func).name
    if declared is not None:
        return declared
    while isinstance(func, functools.partial):
        func = func.func
    qualname = getattr(func, "__qualname__", None)
    if not isinstance(qualname, str):
        func = type(func)
        qualname = func.__qualname__
    module = getattr(func, "__module__", None)
    return f"{module}.{qualname}" if isinstance(module, str) else qualname


def check_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuses what would fail, or run nothing, by the time it is called.

    Raises:
        TypeError: If `func` is not callable, is a generator function, or does not take
            these arguments.
    """
    if not callable(func):
        if inspect.isawaitable(func):
            name = getattr(func, "__name__", "func")
            raise TypeError(
                "a background task needs the function, not what calling it returned: "
                f"pass {name} and its arguments, not {name}(...)"
            )
        raise TypeError(f"a background task needs a callable, not {func!r}")
    function: Any = func
    given, named = args, kwargs
    while type(function) is not FunctionType:
        if isinstance(function, functools.partial):
            given, named = function.args + given, function.keywords | named
            function = function.func
        elif isinstance(function, MethodType):
            given = (function.__self__, *given)
            function = function.__func__
        elif type(call := _call_method(function)) is FunctionType:
            given = (function, *given)
            function = call
        else:
            return
    flags = function.__code__.co_flags
    # A function under types.coroutine looks like a generator function.
    if flags & GENERATOR and not flags & inspect.CO_ITERABLE_COROUTINE:
        raise TypeError(
            f"{name_of(func)} is a generator function: calling it would run nothing; "
            "pass a function that loops over it"
        )
    if not call_fits(function, given, named):
        try:
            inspect.signature(func, follow_wrapped=False).bind(*args, **kwargs)
        except TypeError as exc:
            message = f"{name_of(func)} cannot be called with these arguments: {exc}"
            if func is function and function.__code__.co_varnames[:1] == ("self",):
                message += "; pass the method of an instance, not of its class"
            raise TypeError(message) from None


def call_fits(
    func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether a function takes these arguments, told faster than by its signature."""
    code = func.__code__
    names, count, given = code.co_varnames, code.co_argcount, len(args)
    nameless = code.co_posonlyargcount
    if (
        len(kwargs) == count - given
        and nameless <= given
        and not code.co_kwonlyargcount
    ):
        for name in names[given:count]:
            if name not in kwargs:
                break
        else:
            return True
    required = count - len(func.__defaults__ or ())
    if not kwargs and required <= given <= count and not code.co_kwonlyargcount:
        return True
    if given > count:
        if not code.co_flags & inspect.CO_VARARGS:
            return False
        given = count
    end = count + code.co_kwonlyargcount
    if code.co_flags & inspect.CO_VARKEYWORDS:
        unwanted = kwargs.keys() & set(names[nameless:given])
    else:
        unwanted = kwargs.keys() - set(names[max(given, nameless) : end])
    wanted = {*names[max(given, nameless) : required], *names[count:end]}
    return (
        not unwanted
        and given >= min(nameless, required)
        and wanted <= kwargs.keys() | (func.__kwdefaults__ or {}).keys()
    )


def _call_method(func: object) -> Any:
    return getattr(type(func), "__call__", None)  # noqa: B004
