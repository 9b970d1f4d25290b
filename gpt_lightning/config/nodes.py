"""Nodes of the configuration with a `_target_`: they are checked against its signature, and built.

Names and types of arguments are read from the signature; ranges are checked by the class itself.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.errors import ConfigError, one_line

TRAINING = ("optimizers.", "muon.", "schedules.")
BUILDERS = ("gpt_lightning.model.", *(f"gpt_lightning.training.{name}" for name in TRAINING))
# types that a value from YAML can have, with their names in messages
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "keys with values",
    types.NoneType: "null",
}
ALIASES: dict[Any, Any] = {Path: str, os.PathLike: str, Mapping: dict}
ALIASES |= dict.fromkeys((tuple, Sequence, Iterable), list)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration in dicts, lists and scalars."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def build(cfg: DictConfig, key: str, /, **kwargs: Any) -> Any:
    """Instantiate a node of the configuration; errors of the class itself come out as they are.

    Raises:
        ConfigError, ValueError: If there is no such class, or it does not take these arguments.
    """
    inspect_node(cfg, key, without=kwargs)
    try:
        # plain containers: a class may keep its arguments, and what reaches a checkpoint must be plain
        return hydra.utils.instantiate(OmegaConf.select(cfg, key), _convert_="all", **kwargs)
    except (InstantiationException, TypeError) as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError):
            raise ConfigError(f"{key} cannot be made of its values: {one_line(cause or error)}") from error
        raise cause from error


def inspect_node(cfg: DictConfig, key: str, *, without: Any = ()) -> None:
    """Import the class that a node names, and check that it takes what it is given."""
    node = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(node):
        raise ConfigError(f"{key}={node} must be keys with values, of which _target_ names a class")
    if not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}._target_={node.get('_target_')} must be the name of a class")
    try:
        target = hydra.utils.get_object(node._target_)
    except Exception as error:  # whatever goes wrong in the user's own module
        remedy = f"correct {key}._target_={node._target_}"
        if (module := node._target_.partition(".")[0]) and not importlib.util.find_spec(module):
            remedy += ", or start where that module is, or name its folder in PYTHONPATH"
        raise ConfigError(f"{key}: {one_line(error)}; {remedy}") from error
    if not callable(target):
        raise ConfigError(f"{key}._target_={node._target_} is no class and no function")
    check_arguments(target, cfg, key, without=without)
    for name, child in node.items():
        if OmegaConf.is_dict(child) and "_target_" in child:
            inspect_node(cfg, f"{key}.{name}")


def targets(node: Any) -> set[str]:
    """Every class and function that a node names, at any depth."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        found = set().union(*map(targets, node.values()))
        return found | ({str(node["_target_"])} if "_target_" in node else set())
    return set().union(*map(targets, node)) if isinstance(node, list) else set()


def is_defined_in(target: str, packages: str) -> bool:
    """Whether a _target_ is a class that packages (a pattern) define, rather than import.

    Functions that build a model, an optimizer or a schedule are accepted, too; others may do anything when
    they are called.
    """
    inside = re.compile(rf"({packages})\.")
    try:
        found = hydra.utils.get_object(target) if inside.match(target) else None
    except Exception:  # hydra raises errors of several types
        return False
    where = f"{getattr(found, '__module__', '')}."
    builds = isinstance(found, types.FunctionType) and where.startswith(BUILDERS)
    return (isinstance(found, type) or builds) and bool(inside.match(where))


def build_with(cfg: DictConfig, key: str, members: tuple[str, ...], **kwargs: Any) -> Any:
    """As `build`; refuses an object without these members, which is of another kind."""
    found = build(cfg, key, **kwargs)
    for name in members:
        if inspect.getattr_static(found, name, None) is None:  # does not call a property
            raise ConfigError(f"{key} is a {type(found).__name__}, which has no {name}; correct its _target_")
    return found


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Errors of a call of a partly configured function, in terms of the key of its arguments."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{key} cannot be made of its values: {one_line(error)}") from error


def check_arguments(
    target: Callable[..., Any], cfg: DictConfig, key: str, *, without: Iterable[str] = ()
) -> None:
    """Refuse arguments that a class does not have, and values of a type that its annotations exclude.

    A type that YAML cannot say is not judged; a range is the class's own business.

    Raises:
        ValueError: If one does not fit; names the key that the user set.
    """
    try:
        everything = _signature(target).parameters.values()
    except (TypeError, ValueError):  # some that are written in C have none
        return
    known = {p.name: p for p in everything if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in everything)
    for name in (str(name) for name in OmegaConf.select(cfg, key) if not str(name).startswith("_")):
        if name in without:
            continue
        if name in known:
            _check_value(cfg, f"{key}.{name}", known[name])
        elif not takes_all:
            names = [one for one in known if one not in without]
            close = difflib.get_close_matches(name, names, 1)
            remedy = f"did you mean {close[0]}?" if close else f"it takes {', '.join(names) or 'none'}"
            raise ValueError(f"{key}.{name} is no argument of {target.__name__}; {remedy}")


def _signature(target: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except NameError:  # annotations that are for type checkers alone
        return inspect.signature(target)


def _check_value(cfg: DictConfig, key: str, parameter: inspect.Parameter) -> None:
    value, allowed = OmegaConf.select(cfg, key), _alternatives(parameter.annotation)
    if allowed is None or (OmegaConf.is_dict(value) and "_target_" in value):  # any, or an object
        return
    if parameter.default is None:
        allowed.append(types.NoneType)
    if not any(_fits(value, choice) for choice in allowed):
        key = _key_to_set(cfg, key)
        wanted = dict.fromkeys(WORDS.get(choice, str(choice)) for choice in allowed)
        quote = isinstance(value, (int, float)) and str in allowed
        remedy = f"; quote it, as in {key}=\"'{value}'\"" if quote else ""
        raise ValueError(f"{key}={value!r} must be {' or '.join(wanted)}{remedy}")


def _alternatives(annotation: Any) -> list[Any] | None:
    """The types of an annotation, or its literal values; None if it has one that YAML cannot say."""
    origin = typing.get_origin(annotation) or annotation
    if origin in (typing.Union, types.UnionType):
        parts = [_alternatives(part) for part in typing.get_args(annotation)]
        found = [choice for part in parts for choice in part or ()]
        return None if None in parts else [c for c in found if c is not int or float not in found]
    if origin is typing.Literal:
        return list(typing.get_args(annotation))
    origin = ALIASES.get(origin, origin)
    return [origin] if origin in WORDS else None


def _fits(value: Any, choice: Any) -> bool:
    if choice not in WORDS:  # a literal value
        return type(value) is type(choice) and value == choice
    if choice in (int, float):
        return isinstance(value, (int, choice)) and not isinstance(value, bool)
    if choice in (list, dict):
        return OmegaConf.is_list(value) if choice is list else OmegaConf.is_dict(value)
    return isinstance(value, choice)


def _key_to_set(cfg: DictConfig, key: str) -> str:
    """The key that gives a value: where it refers to another key, that one."""
    group, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, group) if group else cfg
    raw = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))[name]
    found = re.fullmatch(r"\$\{([\w.]+)\}", str(raw))
    return _key_to_set(cfg, found[1]) if found else key
