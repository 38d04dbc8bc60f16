"""What a function tells of itself, and what is refused where the mistake is made."""

import functools
import inspect
import math
import os
import re
import types
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from unittest.mock import MagicMock, Mock

import anyio
import fastapi
import pytest
import starlette.background
from hypothesis import given
from hypothesis import strategies as st

from postlude import BackgroundTask, BackgroundTasks, task
from postlude._options import call_fits, name_of, options_of


def label(value: object) -> str:
    """Names a parameter alike in each process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


def function() -> None: ...


async def coroutine_function() -> None: ...


class Mailer:
    def __call__(self) -> None: ...

    def send(self, to: str) -> None: ...

    @task(name="mailer.close")
    def close(self) -> None: ...

    @task(name="mailer.static")
    @staticmethod
    def static() -> None: ...

    @task(name="mailer.class")
    @classmethod
    def class_method(cls) -> None: ...

    @staticmethod
    @task(name="mailer.inner")
    def inner() -> None: ...


class AsyncCall:
    async def __call__(self) -> None: ...


class Slotted:
    __slots__ = ()

    def __call__(self) -> None: ...


class Declared:
    @task(name="declared", always=True)
    def __call__(self) -> None: ...


# --- task() --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "func",
    [function, coroutine_function, Mailer(), Mailer, functools.partial(print)],
    ids=label,
)
def test_a_decorated_callable_is_the_same_object(func: Any) -> None:
    try:
        assert task(name="name", always=True)(func) is func
        declared = BackgroundTask(func)
        assert declared.name == "name"
        assert options_of(func).always
    finally:
        del func.__postlude_options__


@pytest.mark.parametrize("func", [print, Mailer().send, Slotted(), int], ids=label)
def test_what_cannot_carry_options_comes_back_as_a_partial(func: Any) -> None:
    declared: Any = task(name="name")(func)
    assert isinstance(declared, functools.partial)
    assert declared.func == func
    assert name_of(declared) == "name"
    assert name_of(func) != "name"


def test_methods_static_methods_and_class_methods_can_be_decorated() -> None:
    assert isinstance(inspect.getattr_static(Mailer, "static"), staticmethod)
    assert isinstance(inspect.getattr_static(Mailer, "class_method"), classmethod)
    mailer = Mailer()
    names = [
        name_of(func)
        for func in [mailer.close, Mailer.static, mailer.class_method, mailer.inner]
    ]
    assert names == ["mailer.close", "mailer.static", "mailer.class", "mailer.inner"]


def test_the_options_of_a_class_of_callables_are_those_of_its_call() -> None:
    assert name_of(Declared()) == "declared"
    assert options_of(Declared()).always


def test_one_use_of_a_function_can_have_options_of_its_own() -> None:
    once = task(always=True)(functools.partial(os.remove, "path"))
    assert options_of(once).always
    assert not options_of(os.remove).always
    assert name_of(once) == f"{os.remove.__module__}.remove"


def test_options_are_kept_by_a_later_decorator_a_partial_and_a_wrapper() -> None:
    @task(name="first", always=True)
    def declared() -> None: ...

    @functools.wraps(declared)
    def wrapper() -> None: ...

    for func in declared, wrapper, functools.partial(functools.partial(declared)):
        assert (name_of(func), options_of(func).always) == ("first", True)
    second = task(name="second")(functools.partial(declared))
    assert (name_of(second), options_of(second).always) == ("second", True)
    assert name_of(declared) == "first"


@pytest.mark.parametrize("mock", [Mock(), MagicMock()], ids=["Mock", "MagicMock"])
def test_a_mock_has_no_options_and_the_name_of_its_class(mock: Any) -> None:
    assert name_of(mock) == f"unittest.mock.{type(mock).__name__}"
    assert not options_of(mock).always


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": ""}, ValueError, "name must not be empty; leave it out"),
        ({"name": 5}, TypeError, "name must be a string, not 5"),
        ({"always": 1}, TypeError, "always must be True or False, not 1"),
        ({"process": "yes"}, TypeError, "process must be True or False, not 'yes'"),
        ({"timeout": 0}, ValueError, "timeout must be more than 0, or None .*, not 0"),
        ({"timeout": -1}, ValueError, "timeout must be more than 0, or .*, not -1"),
        ({"timeout": math.nan}, ValueError, "timeout must be more than 0, .*, not nan"),
        ({"timeout": "5"}, TypeError, "timeout must be seconds, or None .*, not '5'"),
        ({"timeout": True}, TypeError, "timeout must be seconds, or None .*, not True"),
        ({"limiter": 0}, ValueError, "limiter must be at least 1, not 0"),
        ({"limiter": True}, TypeError, "limiter must be an int or an .*, not True"),
        (
            {"limiter": anyio.Semaphore},
            TypeError,
            r"limiter must be an int or an anyio\.CapacityLimiter, not <class",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        task(**options)


def test_only_callables_can_be_decorated() -> None:
    with pytest.raises(TypeError, match=r"task\(\) decorates a callable, not 5"):
        task()(5)


@pytest.mark.parametrize(
    "func",
    [coroutine_function, functools.partial(coroutine_function), AsyncCall()],
    ids=label,
)
def test_an_async_function_is_refused_for_a_process(func: Any) -> None:
    with pytest.raises(TypeError, match=r"process=True is for .* not async, not .*: "):
        task(process=True)(func)


def test_a_process_has_to_be_the_outermost_decorator() -> None:
    @task(process=True)
    def inner() -> None: ...

    @functools.wraps(inner)
    def wrapper() -> None: ...

    message = r"task\(process=True\) must be the outermost decorator of .*inner"
    for func in wrapper, functools.partial(wrapper):
        with pytest.raises(TypeError, match=message):
            BackgroundTasks().add_task(func)
        with pytest.raises(TypeError, match=message):
            task(timeout=1)(func)
    # Above it, or as an option of the wrapper itself, it is told of what is called.
    assert options_of(task(process=True)(functools.partial(print))).process


@pytest.mark.parametrize(
    "func",
    [
        function,
        coroutine_function,
        Mailer(),
        Mailer().send,
        functools.partial(print),
        functools.partial(coroutine_function),
        print,
        Slotted(),
    ],
    ids=label,
)
def test_limits_are_kept_by_each_kind_of_callable(func: Any) -> None:
    declared: Any = task(timeout=1.5, limiter=3)(func)
    try:
        options = options_of(task(always=True)(functools.partial(declared)))
        assert (options.timeout, repr(options.limiter)) == (1.5, "3")
        assert options.are_limits
        assert options.always
        assert options_of(declared).limiter is options.limiter
        if declared is not func:
            assert not options_of(func).are_limits
    finally:
        if declared is func:
            del func.__postlude_options__


@pytest.mark.anyio
async def test_what_a_function_with_a_time_limit_returns_is_awaited() -> None:
    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    await BackgroundTask(task(timeout=30)(lambda: run()))()  # noqa: PLW0108
    assert ran == [1]


# --- names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (function, f"{__name__}.function"),
        (functools.partial(functools.partial(function)), f"{__name__}.function"),
        (Mailer().send, f"{__name__}.Mailer.send"),
        (Mailer(), f"{__name__}.Mailer"),
        (Mailer, f"{__name__}.Mailer"),
        (print, "builtins.print"),
        ([].append, "list.append"),
        (starlette.background.BackgroundTask(print), "builtins.print"),
    ],
    ids=label,
)
def test_a_task_is_named_after_its_function(func: Any, name: str) -> None:
    assert name_of(getattr(func, "func", func)) == name


# --- what is refused -----------------------------------------------------------------


def generator_function() -> Iterator[int]:
    yield 1


async def async_generator_function() -> AsyncIterator[int]:
    yield 1


class GeneratorCall:
    def __call__(self) -> Iterator[int]:
        yield 1

    async def stream(self) -> AsyncIterator[int]:
        yield 1


add = pytest.mark.parametrize(
    "add",
    [BackgroundTask, lambda *args: BackgroundTasks().add_task(*args)],
    ids=["BackgroundTask", "add_task"],
)


@add
@pytest.mark.parametrize("func", [None, 5, "send", object], ids=label)
def test_what_is_not_callable_is_refused(add: Any, func: Any) -> None:
    func = func() if func is object else func
    with pytest.raises(TypeError, match="a background task needs a callable, not "):
        add(func)


@add
def test_a_coroutine_is_refused(add: Any) -> None:
    coroutine = coroutine_function()
    with pytest.raises(
        TypeError,
        match=r"pass coroutine_function and its arguments, not coroutine_function\(",
    ):
        add(coroutine)
    coroutine.close()


@add
@pytest.mark.parametrize(
    "func",
    [
        generator_function,
        async_generator_function,
        GeneratorCall(),
        GeneratorCall().stream,
        functools.partial(generator_function),
    ],
    ids=label,
)
def test_a_generator_function_is_refused(add: Any, func: Any) -> None:
    with pytest.raises(TypeError, match=r"is a generator function: .* loops over it"):
        add(func)


@add
def test_a_coroutine_of_the_old_style_is_accepted(add: Any) -> None:
    @types.coroutine
    def old_style() -> Iterator[int]:
        yield 1

    add(old_style)


def test_a_method_of_a_class_is_refused_for_want_of_an_instance() -> None:
    with pytest.raises(
        TypeError,
        match=r"Mailer\.send cannot be called with these arguments: "
        r"missing a required argument: 'to'; pass the method of an instance",
    ):
        BackgroundTasks().add_task(Mailer.send, "ada@example.org")  # type: ignore[call-arg]


@add
@pytest.mark.parametrize(
    "func",
    [
        function,
        coroutine_function,
        Mailer(),
        Mailer().close,
        functools.partial(function),
    ],
    ids=label,
)
def test_arguments_that_do_not_fit_are_refused(add: Any, func: Any) -> None:
    with pytest.raises(TypeError, match="cannot be called with these arguments: too"):
        add(func, "one too many")


def test_arguments_that_a_partial_holds_count() -> None:
    BackgroundTask(functools.partial(Mailer().send, "ada@example.org"))
    BackgroundTask(functools.partial(Mailer().send, to="ada@example.org"))
    BackgroundTask(functools.partial(Mailer().send, to="ada"), to="eve")


def test_a_signature_that_lies_is_believed_only_where_it_is_milder() -> None:
    def lenient(*args: Any) -> None: ...

    def strict() -> None: ...

    one = inspect.signature(lambda one: None)
    lenient.__signature__ = strict.__signature__ = one  # type: ignore[attr-defined]
    BackgroundTask(lenient)
    BackgroundTask(strict, 1)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


def shapes() -> list[Callable[..., None]]:
    return [
        lambda: None,
        lambda a: None,
        lambda a, b=2: None,
        lambda a=1, b=2: None,
        lambda *args: None,
        lambda a, *args, b: None,
        lambda a, *, b, c=3: None,
        lambda *, a=1: None,
        lambda **kwargs: None,
        lambda a, b=2, **kwargs: None,
        lambda a, /: None,
        lambda a, /, b: None,
        lambda a, b=2, /, c=3, **kwargs: None,
        lambda a=1, /, *args, b, **kwargs: None,
    ]


@given(
    index=st.integers(0, len(shapes()) - 1),
    args=st.lists(st.just(0), max_size=4).map(tuple),
    kwargs=st.dictionaries(st.sampled_from("abcd"), st.just(0)),
)
def test_a_call_fits_if_python_could_make_it(
    index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    func = shapes()[index]
    try:
        func(*args, **kwargs)
    except TypeError:
        fits = False
    else:
        fits = True
    assert isinstance(func, types.FunctionType)
    assert call_fits(func, args, kwargs) is fits


@pytest.mark.parametrize("item", [None, 5, print, lambda: None, [function]], ids=label)
def test_a_list_of_something_else_than_tasks_is_refused(item: Any) -> None:
    with pytest.raises(TypeError, match=r"is not a task; write Back|needs a callable"):
        BackgroundTasks([item])


def test_a_group_may_start_with_any_iterable_of_tasks() -> None:
    task = BackgroundTask(print)
    first, second = BackgroundTasks(iter((task, coroutine_function))).tasks
    assert first is task
    assert isinstance(second, BackgroundTask)
    assert second.func is coroutine_function


@pytest.mark.parametrize(
    ("concurrency", "error", "message"),
    [
        (0, ValueError, "concurrency must be at least 1, not 0"),
        (-1, ValueError, "concurrency must be at least 1, not -1"),
        ("2", TypeError, "concurrency must be an int, not '2'"),
        (None, TypeError, "concurrency must be an int, not None"),
    ],
)
def test_a_concurrency_that_makes_no_sense_is_refused(
    concurrency: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BackgroundTasks(concurrency=concurrency)


def test_fastapi_is_told_where_its_own_class_is() -> None:
    app = fastapi.FastAPI()

    def endpoint(tasks: BackgroundTasks) -> None: ...

    with pytest.raises(
        TypeError, match=r"import BackgroundTasks from postlude\.fastapi"
    ):
        app.get("/")(endpoint)
