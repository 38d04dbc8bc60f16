"""What a function tells of itself: its options, its name, how it can be called."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Coroutine, Mapping
from types import FunctionType, MethodType
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import anyio
import anyio.lowlevel
from starlette.background import BackgroundTask as StockTask

T = TypeVar("T")

GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR

_ATTRIBUTE = "__postlude_options__"
_numbers = itertools.count(1)

# The classes of other libraries' tasks, and how such a task is given to `add_task`.
_FOREIGN = {
    ("celery.app.task", "Task"): "task.delay, ...",
    ("dramatiq.actor", "Actor"): "task.send, ...",
    ("huey.api", "TaskWrapper"): "huey.enqueue, task.s(...)",
    ("procrastinate.tasks", "Task"): "task.defer_async, ...",
    ("taskiq.decor", "AsyncTaskiqDecoratedTask"): "task.kiq, ...",
}
# Callables that hold another one, and are certainly of none of these.
_HOLDING = (MethodType, functools.partial)


class Receipt(NamedTuple):
    """What is left of a task that has been handed over.

    Example:
        .. code-block:: python

            from postlude.engines import Receipt

            receipt = Receipt(engine="spool", id="17")
            assert receipt._asdict() == {"engine": "spool", "id": "17"}

    .. versionadded:: 0.1.0
    """

    engine: str
    """The name of the engine, or `here`."""
    id: str
    """What the engine knows the task by. Of one that runs here, `BackgroundTask.id`."""


class Engine(Protocol):
    """What runs functions in processes of its own, as `task(engine=...)` takes it.

    It may also have a method `headers()`, called when a task is added, that returns
    what is to travel beside its arguments: a mapping of strings, such as a trace
    context. If it is an async context manager, the application's lifespan enters it.
    If that starts more than handing over takes, such as a worker, it has a method
    `submitting()`, too: it returns an async context manager that starts nothing else,
    which `enqueue_sync()` enters where there is no event loop.

    .. versionadded:: 0.1.0
    """

    def register(self, func: Callable[..., Any], name: str) -> None:
        """Hears of a function when that is decorated, perhaps again.

        Args:
            func: The function, which has to stay what it is.
            name: Its dotted name.
        """

    def prepare(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> Any:
        """Returns a call as it is to be sent; at once, and from any thread.

        Raises:
            postlude.engines.NotSerialisable: If it cannot be sent.
        """
        ...

    async def submit(self, message: Any) -> Receipt:
        """Sends what `prepare` has returned, within a time limit of its own.

        It may be given the same message again, if a response is sent again.

        Raises:
            postlude.engines.EngineError: If it cannot tell that it has been taken.
        """
        ...


class Limiter:
    """How many calls of a function may go on at once.

    Args:
        limit: A number, of which each event loop has its own, or a limiter that belongs
            to the event loop that uses it first.
    """

    # Where those given to us are in use.
    _loops: ClassVar[WeakKeyDictionary[anyio.CapacityLimiter, object]] = (
        WeakKeyDictionary()
    )

    def __init__(self, limit: int | anyio.CapacityLimiter) -> None:
        self._limit = limit
        # Older versions of AnyIO know these by their names.
        self._made: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = (
            anyio.lowlevel.RunVar(f"postlude_limiter_{next(_numbers)}")
        )

    def here(self) -> anyio.CapacityLimiter:
        """Returns the limiter for the running event loop.

        Raises:
            RuntimeError: If it belongs to another one.
        """
        if isinstance(self._limit, int):
            return limiter_here(self._made, self._limit)
        loop = event_loop()
        if self._loops.setdefault(self._limit, loop) != loop:
            raise RuntimeError(
                f"{self._limit!r} is in use in another event loop: give task() an int "
                "as limiter, which makes one for each"
            )
        return self._limit

    def __repr__(self) -> str:
        return repr(self._limit)


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What `task` noted on a function; the defaults stand for a plain one."""

    name: str | None = None
    timeout: float | None = None
    limiter: Limiter | None = None
    process: bool = False
    always: bool = False
    engine: Engine | None = None
    # What it was noted on, as `functools.wraps` copies it to other functions.
    owner: object = None
    # The name that the engine has registered it under.
    registered: str = ""

    @property
    def are_limits(self) -> bool:
        """Whether they say more than what to call a task, and when to run it."""
        limits = self.timeout is not None or self.limiter is not None
        return limits or self.process or self.engine is not None


_PLAIN = Options()
_ALWAYS = Options(always=True)


def task(
    *,
    name: str | None = None,
    timeout: float | None = None,
    limiter: int | anyio.CapacityLimiter | None = None,
    process: bool = False,
    always: bool = False,
    engine: Engine | None = None,
) -> Callable[[T], T]:
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


            @task(name="receipts.send", timeout=30, limiter=5)
            async def send_receipt(order: int) -> None: ...

    Args:
        name: What logs and notes call the task. By default the dotted name
            of the function, such as `shop.receipts.send_receipt`.
        timeout: How long the task may take, in seconds; then it fails with
            `TimeoutError`. An async function is cancelled, a process killed. A thread
            cannot be stopped: it goes on, keeps its place among the threads until it
            ends, and may delay the exit. The time that the task waits for its turn,
            a thread, or the start of a process does not count.
        limiter: How many tasks of this function may run at once in an event loop, or
            the limiter that they share with whatever else uses it, in one event loop.
        process: Whether to run the function, which must not be async, in a process of
            its own, which it may keep busy. Function and arguments are pickled when
            the task is added. Context variables do not go there, and neither what it
            returns nor what it prints comes back.
        always: Whether the task also runs when the request failed or was cancelled,
            with `BackgroundTasksMiddleware` or `postlude.responses`.
        engine: What the task is handed over to, so that it runs elsewhere; see
            `postlude.engines`. By default it runs here. The function must be one of a
            module, and this the outermost decorator. `timeout`, `limiter` and `process`
            are for tasks that run here: to the hand-over they do not apply.

    Raises:
        TypeError: If an option is of the wrong type, `process` is declared for an async
            function, `engine` for one that cannot be found by its name, or what is
            decorated is not callable.
        ValueError: If `name` is empty, or `timeout` or `limiter` is too small.

    .. versionadded:: 0.1.0
    """
    _check(name, timeout, limiter, process=process, always=always)
    _check_engine(engine)

    def declare(func: T) -> T:
        target: Any = func
        if isinstance(target, staticmethod | classmethod):
            target = cast("Any", target).__func__
        if not callable(target):
            raise TypeError(f"task() decorates a callable, not {func!r}")
        if process and StockTask(target).is_async:
            raise TypeError(
                f"process=True is for functions that are not async, not {target!r}: "
                "leave it out, or make that a plain function"
            )
        if engine is not None:
            _check_findable(target)
        earlier = options_of(target)
        if earlier.process or earlier.engine is not None:
            check_outermost(target)
        handed_to = earlier.engine if engine is None else engine
        options = Options(
            name=name or earlier.name,
            timeout=timeout or earlier.timeout,
            limiter=earlier.limiter if limiter is None else Limiter(limiter),
            process=process or earlier.process,
            always=always or earlier.always,
            engine=handed_to,
            owner=target,
            registered="" if handed_to is None else dotted_name_of(target),
        )
        try:
            setattr(target, _ATTRIBUTE, options)
        except (AttributeError, TypeError):
            if engine is not None:
                raise _not_findable(target) from None
            target = functools.partial(target)
            options = dataclasses.replace(options, owner=target)
            setattr(target, _ATTRIBUTE, options)
            return cast(T, target)
        if engine is not None:
            engine.register(target, options.registered)
        return func

    return declare


def _check(
    name: Any, timeout: Any, limiter: Any, *, process: object, always: object
) -> None:
    """Refuses options that make no sense."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string, not {name!r}")
    if name == "":
        raise ValueError("name must not be empty; leave it out for the function's own")
    check_timeout(timeout)
    kinds = int | anyio.CapacityLimiter | None
    if not isinstance(limiter, kinds) or isinstance(limiter, bool):
        raise TypeError(
            f"limiter must be an int or an anyio.CapacityLimiter, not {limiter!r}"
        )
    if isinstance(limiter, int) and limiter < 1:
        raise ValueError(f"limiter must be at least 1, not {limiter!r}")
    for option, value in {"process": process, "always": always}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{option} must be True or False, not {value!r}")


def check_timeout(timeout: Any) -> None:
    """Refuses a time limit that is none."""
    if not isinstance(timeout, int | float | None) or isinstance(timeout, bool):
        raise TypeError(
            f"timeout must be seconds, or None for no limit, not {timeout!r}"
        )
    if timeout is not None and not timeout > 0:
        raise ValueError(
            f"timeout must be more than 0, or None for no limit, not {timeout!r}"
        )


def _check_engine(engine: Any) -> None:
    """Refuses what is no engine."""
    methods = ("register", "prepare", "submit")
    has_all = all(callable(getattr(engine, method, None)) for method in methods)
    if engine is not None and (isinstance(engine, type) or not has_all):
        raise TypeError(
            "engine must be an object with the methods register, prepare and submit, "
            f"not {engine!r}"
        )


def _check_findable(func: object) -> None:
    """Refuses what no other process finds by its name."""
    qualname = getattr(func, "__qualname__", None)
    if not isinstance(qualname, str) or "<" in qualname:
        raise _not_findable(func)


def _not_findable(func: object) -> TypeError:
    return TypeError(
        "task(engine=...) is for functions defined with def in a module or a class, "
        f"which a worker finds by their names, not {func!r}"
    )


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


def run_options_of(func: object) -> Options | None:
    """Returns the options that matter to how a callable runs, if there are any."""
    options = options_of(func)
    if options.are_limits:
        return options
    # One object, so that it is told at once which tasks may share a thread.
    return _ALWAYS if options.always else None


def check_outermost(func: object) -> None:
    """Refuses a function that has the note only from another one, which it calls.

    Raises:
        TypeError: If it is such a function.
    """
    options = options_of(func)
    owner = options.owner
    while func is not owner:
        if isinstance(func, functools.partial):
            func = func.func
        elif isinstance(func, MethodType):
            func = func.__func__
        elif _call_method(func) is owner:
            return
        else:
            option = "process=True" if options.engine is None else "engine=..."
            raise TypeError(
                f"task({option}) must be the outermost decorator of "
                f"{name_of(func)}, so write it above the others"
            )


def check_foreign(func: Any) -> None:
    """Refuses the task object of another library, which would run here, or not at all.

    Raises:
        TypeError: If it is one.
    """
    if type(func) is FunctionType:
        # RQ's is a function that has been given another one.
        delay = vars(func).get("delay")
        if delay is not None and (
            getattr(delay, "__globals__", {}).get("__name__") == "rq.decorators"
        ):
            raise _foreign(func, "rq", "task.delay, ...")
    elif type(func) not in _HOLDING:
        for (module, name), spelling in _FOREIGN.items():
            # Without its module there is no object of the class.
            kind = getattr(sys.modules.get(module), name, None)
            if isinstance(kind, type) and isinstance(func, kind):
                raise _foreign(func, module.partition(".")[0], spelling)


def _foreign(func: object, library: str, spelling: str) -> TypeError:
    return TypeError(
        f"{func!r} is a task of {library}: write add_task({spelling}) with it, or add "
        "the plain function, declared with postlude's task(engine=...)"
    )


def handing_over(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Coroutine[Any, Any, Receipt]]:
    """Prepares a call for the engine of its function; returns what sends it.

    Raises:
        TypeError: If no worker could find the function, or it is not the one that has
            been registered.
    """
    options = options_of(func)
    if func is not options.owner:
        check_outermost(func)
    name = options.registered
    if name.startswith("__main__."):
        raise TypeError(
            f"{name} cannot be handed over, as every process has a __main__ of its "
            "own: move it to a module that the worker imports as well"
        )
    engine = cast("Engine", options.engine)
    function: Any = func
    while isinstance(function, _HOLDING):
        if isinstance(function, functools.partial):
            args, kwargs = function.args + args, function.keywords | kwargs
            function = function.func
        else:
            args = (function.__self__, *args)
            function = function.__func__
    if _call_method(function) is options_of(function).owner:
        # It is an object, which its `__call__` gets first.
        args = (function, *args)
    headers = getattr(engine, "headers", None)
    message = engine.prepare(name, args, kwargs, headers() if headers else {})
    return functools.partial(engine.submit, message)


def name_of(func: object) -> str:
    """Returns what a callable is called: its declared name, or its dotted one."""
    declared = options_of(func).name
    return dotted_name_of(func) if declared is None else declared


def dotted_name_of(func: object) -> str:
    """Returns the name of a callable's function, its module's included."""
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


def limiter_here(
    variable: anyio.lowlevel.RunVar[anyio.CapacityLimiter], limit: float
) -> anyio.CapacityLimiter:
    """Returns the running event loop's limiter."""
    limiter = variable.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(limit)
        variable.set(limiter)
    return limiter


def event_loop() -> asyncio.AbstractEventLoop | object:
    """Returns what is one for the running event loop, and no other.

    Raises:
        RuntimeError: If there is none.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return anyio.lowlevel.current_token()


def in_event_loop() -> bool:
    """Whether an event loop is running in this thread."""
    try:
        event_loop()
    except RuntimeError:
        return False
    return True
