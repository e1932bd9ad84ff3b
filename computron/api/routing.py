"""From a method and a path to the handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from computron.errors import ComputronError

Handler = Callable[..., Awaitable[web.StreamResponse]]
"""Called with the context, the request, and the model's id where the path has one."""

MODEL = "{model}"


class RouteNotFound(ComputronError):
    """There is nothing at that path."""

    status = 404
    type = "invalid_request_error"
    code = "route_not_found"


class MethodNotAllowed(ComputronError):
    """The path exists, but not for that method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Router:
    """Paths are fixed, or /before/{model}/after or /before/{model}, where a model's id may contain slashes."""

    def __init__(self, routes: Iterable[tuple[str, str, Handler]]) -> None:
        self._fixed: dict[str, dict[str, Handler]] = {}
        self._of_model: list[tuple[str, str, dict[str, Handler]]] = []
        for method, path, handler in routes:
            if MODEL not in path:
                self._fixed.setdefault(path, {})[method] = handler
                continue
            before, after = path.split(MODEL)
            self._of_model.append((before, after, {method: handler}))
        self._of_model.sort(key=lambda route: len(route[1]), reverse=True)  # the more definite ones first

    def find(self, method: str, path: str) -> tuple[Handler, tuple[str, ...]]:
        """The handler and what it gets besides. Raises RouteNotFound or MethodNotAllowed."""
        methods = self._fixed.get(path)
        if methods is not None and method in methods:
            return methods[method], ()
        allowed = set(methods or ())
        for before, after, methods in self._of_model:
            if path.startswith(before) and path.endswith(after) and len(path) > len(before) + len(after):
                if method in methods:
                    return methods[method], (path[len(before) : len(path) - len(after)],)
                allowed |= set(methods)
        if allowed:
            raise MethodNotAllowed(f"{path} does not take {method}; it takes {', '.join(sorted(allowed))}")
        raise RouteNotFound(f"there is nothing at {method} {path}")
