"""Finding, choosing and opening backends.

A plugin is loaded by name, alone: one broken SDK must not stop the users of another device.  Every
way in which a plugin can misbehave ends in an :class:`isthmus.errors.BackendError` of one line.
"""

from __future__ import annotations

import difflib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from types import ModuleType
from typing import Any, Final, TypeVar

import pluggy

from isthmus import hookspecs
from isthmus.contract import (
    Backend,
    Capabilities,
    DeviceInfo,
    ExecutorBackend,
    require_compatible,
)
from isthmus.errors import BackendError, BackendNotFound, BackendUnavailable, ContractMismatch
from isthmus.hookspecs import ENTRY_POINT_GROUP, PROJECT_NAME

T = TypeVar("T")

LOOK_DEADLINE_S: Final = 20.0
"""How long importing and probing one plugin may take before it is passed over."""

AUTO: Final = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledBackend:
    """An entry point, not loaded."""

    name: str
    distribution: str
    version: str
    extra: str
    """The distribution's extra of the same name, if it has one: what would install the SDK."""

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}"

    @property
    def remedy(self) -> str:
        if self.extra:
            return f"pip install '{self.distribution}[{self.extra}]'"
        return f"reinstall or upgrade {self.distribution}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """One line of ``isthmus backends``."""

    name: str
    distribution: str
    devices: tuple[DeviceInfo, ...] = ()
    capabilities: Capabilities | None = None
    """Of the first device."""
    reason: str = ""
    """Why it cannot be used and what would change that; empty if it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A device that was found, and the backends passed over on the way, each with its reason."""

    plugin: LoadedPlugin
    device: DeviceInfo
    passed_over: tuple[str, ...] = ()

    def open(self, options: dict[str, str]) -> Backend | ExecutorBackend:
        return self.plugin.open(self.device, options)


class LoadedPlugin:
    """One plugin's hooks, imported and checked."""

    def __init__(self, installed: InstalledBackend, manager: pluggy.PluginManager) -> None:
        self.installed = installed
        self._hooks = manager.hook

    def probe(self) -> tuple[DeviceInfo, ...]:
        """Its devices, at least one.  Raises :class:`BackendUnavailable` where there is none."""
        found = self._call("isthmus_probe", lambda: self._hooks.isthmus_probe())
        if not isinstance(found, (list, tuple)) or not all(isinstance(device, DeviceInfo) for device in found):
            raise self._error(f"isthmus_probe returned {type(found).__name__}, not a list of DeviceInfo")
        if not found:
            raise BackendUnavailable(f"backend {self.installed.name!r} sees no device of its kind on this machine")
        return tuple(found)

    def open(self, device: DeviceInfo, options: dict[str, str]) -> Backend | ExecutorBackend:
        handed = dict(options)
        opened = self._call("isthmus_open", lambda: self._hooks.isthmus_open(device=device, options=handed))
        if not isinstance(opened, (Backend, ExecutorBackend)):
            missing = [part for part in BACKEND_PARTS if not hasattr(opened, part)]
            raise self._error(f"isthmus_open returned a {type(opened).__name__} that lacks {', '.join(missing)}")
        return opened

    @property
    def states_capabilities(self) -> bool:
        """Whether the plugin has the optional hook that says what a device can do without opening it."""
        return bool(self._hooks.isthmus_capabilities.get_hookimpls())

    def capabilities(self, device: DeviceInfo) -> Capabilities:
        """From the hook if the plugin has it, else from the device, opened and closed again."""
        if not self.states_capabilities:
            backend = self.open(device, {})
            try:
                return backend.capabilities
            finally:
                backend.close()
        found = self._call("isthmus_capabilities", lambda: self._hooks.isthmus_capabilities(device=device))
        if not isinstance(found, Capabilities):
            raise self._error(f"isthmus_capabilities returned {type(found).__name__}, not Capabilities")
        return found

    def _call(self, hook: str, call: Callable[[], T]) -> T:
        if not getattr(self._hooks, hook).get_hookimpls():
            raise self._error(f"it does not implement {hook}")
        try:
            answer = call()
        except BackendError:
            raise
        except (Exception, SystemExit) as error:
            raise BackendUnavailable(f"backend {self.installed.name!r}: {hook} failed: {describe(error)}") from error
        if answer is None:
            raise self._error(f"{hook} returned None")
        return answer

    def _error(self, what: str) -> BackendError:
        name, origin = self.installed.name, self.installed.origin
        return BackendError(f"backend {name!r} of {origin} breaks the contract: {what}; report it to its vendor")


BACKEND_PARTS: Final = (
    *("name", "device", "capabilities", "attention", "ops", "sampling", "inputs", "graphs", "memory", "collectives"),
    *("providers", "close"),
)


def installed_backends() -> list[InstalledBackend]:
    """Every entry point of the group, by distribution and then as listed there; nothing is imported."""
    found: list[InstalledBackend] = []
    seen: set[tuple[str, str]] = set()
    for distribution in distributions():
        for entry in distribution.entry_points:
            if entry.group != ENTRY_POINT_GROUP:
                continue
            key = (entry.name, distribution.name)
            # An editable install may leave the same distribution on the path twice.
            if key not in seen:
                seen.add(key)
                found.append(_installed(entry.name, distribution))
    return sorted(found, key=lambda backend: backend.distribution)


def _installed(name: str, distribution: Distribution) -> InstalledBackend:
    extras = distribution.metadata.get_all("Provides-Extra") or []
    return InstalledBackend(
        name=name,
        distribution=distribution.name,
        version=distribution.version,
        extra=name if name in extras else "",
    )


def find_backend(name: str) -> InstalledBackend:
    """The one plugin of that name.  Raises :class:`BackendNotFound`, or :class:`BackendError` for two of one name."""
    everything = installed_backends()
    named = [backend for backend in everything if backend.name == name]
    if not named:
        known = sorted({backend.name for backend in everything})
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "install the package that provides it"
        raise BackendNotFound(f"no backend {name!r} is installed; there are: {', '.join(known) or 'none'}; {hint}")
    _refuse_rivals(named)
    return named[0]


def _refuse_rivals(named: Sequence[InstalledBackend]) -> None:
    if len(named) > 1:
        origins = " and ".join(backend.origin for backend in named)
        raise BackendError(f"backend {named[0].name!r} is provided by both {origins}; uninstall one of them")


def load_plugin(installed: InstalledBackend) -> LoadedPlugin:
    """Import one plugin and check its version and hooks."""
    manager = pluggy.PluginManager(PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    try:
        manager.load_setuptools_entrypoints(ENTRY_POINT_GROUP, name=installed.name)
        plugin = manager.get_plugin(installed.name)
        _check_version(installed, plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        # A plugin of another contract may well differ in its hooks: the version says more.
        _check_version(installed, error.plugin)
        raise BackendError(
            f"backend {installed.name!r} of {installed.origin} breaks the contract: {one_line(error)}; "
            "report it to its vendor"
        ) from error
    except BackendError:
        raise
    except (Exception, SystemExit) as error:
        raise BackendUnavailable(
            f"backend {installed.name!r} of {installed.origin} cannot be imported: {describe(error)}; "
            f"try: {installed.remedy}"
        ) from error
    return LoadedPlugin(installed, manager)


def _check_version(installed: InstalledBackend, plugin: ModuleType | Any) -> None:
    stated = getattr(plugin, "CONTRACT_VERSION", None)
    if stated is None:
        raise ContractMismatch(
            f"backend {installed.name!r} of {installed.origin} states no CONTRACT_VERSION; "
            f"upgrade {installed.distribution} to a version that does"
        )
    if not (isinstance(stated, tuple) and len(stated) == 2 and all(isinstance(part, int) for part in stated)):
        raise ContractMismatch(
            f"backend {installed.name!r} of {installed.origin} states CONTRACT_VERSION {stated!r}; "
            f"it must be (major, minor); upgrade {installed.distribution}"
        )
    require_compatible(installed.name, stated)


def look(installed: InstalledBackend, deadline_s: float) -> tuple[LoadedPlugin, tuple[DeviceInfo, ...]]:
    """Import a plugin and probe its devices, giving up after ``deadline_s`` seconds."""

    def load_and_probe() -> tuple[LoadedPlugin, tuple[DeviceInfo, ...]]:
        plugin = load_plugin(installed)
        return plugin, plugin.probe()

    return within(
        deadline_s,
        load_and_probe,
        f"backend {installed.name!r} of {installed.origin} did not answer its probe within {deadline_s:g} s; "
        f"its driver may hang: try its vendor's own tools, or name another device",
    )


def within(deadline_s: float, call: Callable[[], T], late: str) -> T:
    """Run ``call`` on a thread of its own and return what it returns, or raise what it raises.

    Raises :class:`BackendUnavailable` with ``late`` as its message when the time is over; the
    thread is then left behind, since a hung driver call cannot be ended from outside.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name="isthmus-probe", daemon=True).start()
    try:
        answer, error = answers.get(timeout=deadline_s)
    except queue.Empty:
        raise BackendUnavailable(late) from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def select_backend(name: str, deadline_s: float = LOOK_DEADLINE_S) -> Selection:
    """Choose a plugin and one of its devices: ``"auto"``, a backend's name, or ``"name:index"``.

    ``auto`` takes the first device that is not the host itself, in the order of the entry points,
    and the host's only if there is no other.  Raises a :class:`BackendError`.
    """
    if name == AUTO:
        return _select_auto(deadline_s)
    backend_name, _, index = name.partition(":")
    plugin, devices = look(find_backend(backend_name), deadline_s)
    if not index:
        return Selection(plugin=plugin, device=devices[0])
    for device in devices:
        if str(device.index) == index:
            return Selection(plugin=plugin, device=device)
    there = ", ".join(f"{backend_name}:{device.index}" for device in devices)
    raise BackendUnavailable(f"there is no device {name!r}; backend {backend_name!r} sees {there}")


def _select_auto(deadline_s: float) -> Selection:
    passed_over: list[str] = []
    fallback: tuple[LoadedPlugin, DeviceInfo] | None = None
    alone, rivals = _distinct()
    passed_over.extend(status.reason for status in rivals)
    for installed in alone:
        try:
            plugin, devices = look(installed, deadline_s)
        except BackendError as error:
            passed_over.append(str(error))
            continue
        usable = [device for device in devices if device.auto]
        others = [device for device in usable if not device.host]
        if others:
            return Selection(plugin=plugin, device=others[0], passed_over=tuple(passed_over))
        if not usable:
            passed_over.append(f"backend {installed.name!r} has to be asked for by name")
        elif fallback is None:
            fallback = plugin, usable[0]
    if fallback is None:
        reasons = "; ".join(passed_over) or "no backend is installed"
        raise BackendUnavailable(f"no device was found: {reasons}")
    return Selection(plugin=fallback[0], device=fallback[1], passed_over=tuple(passed_over))


def _distinct() -> tuple[list[InstalledBackend], list[BackendStatus]]:
    """The installed backends whose name is theirs alone, and what is wrong with the others."""
    by_name: dict[str, list[InstalledBackend]] = {}
    for backend in installed_backends():
        by_name.setdefault(backend.name, []).append(backend)
    alone: list[InstalledBackend] = []
    rivals: list[BackendStatus] = []
    for name, named in by_name.items():
        try:
            _refuse_rivals(named)
        except BackendError as error:
            origins = " and ".join(backend.origin for backend in named)
            rivals.append(BackendStatus(name=name, distribution=origins, reason=str(error)))
        else:
            alone.append(named[0])
    return alone, rivals


def open_backend(name: str, options: dict[str, str]) -> Backend | ExecutorBackend:
    """Choose a device as :func:`select_backend` does and open it.  Raises a :class:`BackendError`."""
    return select_backend(name).open(options)


def list_backends(deadline_s: float = LOOK_DEADLINE_S) -> list[BackendStatus]:
    """Every installed backend with its devices and capabilities, or the reason it cannot be used."""
    alone, rivals = _distinct()
    return [_status(installed, deadline_s) for installed in alone] + rivals


def _status(installed: InstalledBackend, deadline_s: float) -> BackendStatus:
    devices: tuple[DeviceInfo, ...] = ()
    try:
        plugin, devices = look(installed, deadline_s)
        capabilities = plugin.capabilities(devices[0])
    except BackendError as error:
        return BackendStatus(
            name=installed.name, distribution=installed.origin, devices=devices, reason=one_line(error)
        )
    return BackendStatus(name=installed.name, distribution=installed.origin, devices=devices, capabilities=capabilities)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
