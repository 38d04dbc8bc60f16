import builtins
from importlib import metadata

project = "postlude"
author = "the postlude authors"
copyright = f"2026, {author}"
release = version = metadata.version("postlude")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"postlude {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
default_role = "code"

# Builds need no network, so no inventory of others' names: only ours are checked.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(anyio|collections|contextlib|datetime|fastapi|starlette|types|typing)\..*",
    ),
    (
        "py:.*",
        r"(celery|dramatiq|huey|opentelemetry|prometheus_client|rq|taskiq)\..*",
    ),
    ("py:.*", "|".join(dir(builtins))),
    ("py:class", r"postlude\.fastapi\._inject"),
    # What annotations are short for.
    ("py:class", r"ASGIApp|AsyncBroker|DBOSConfig|Headers|Huey|Observer|Restore"),
    ("py:class", r"URL|ContentStream"),
    ("py:class", r"os\..*|postlude\.engines\.\w+\._\w+"),
    ("py:class", r"(~|postlude\._\w+\.)?[PRT](\.args|\.kwargs)?"),  # type variables
]
