"""Classes that make a relative bias or hand one on, found by the names in their code.

Source files of transformers are parsed, not imported, so all of them are read in seconds. Classes
of a model at hand are read from their compiled code, so that needs no source.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FunctionType

from torch import nn

# Names that code with a bias between positions is written with.
SIGN = re.compile(
    r"(?<![a-zA-Z])(position_bias\b|rel(ative)?_(pos|att|bias|shift|key|k_proj|embeddings)|alibi"
    r"|s_aux\b|sinks\b|attention_biases\b|pos_bias|pair_bias|r_r_bias)"
)
# Names with which attention is computed: one of the first, or a softmax beside a product.
_CALLS = {
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "ALL_ATTENTION_FUNCTIONS",
    "eager_attention_forward",
    "_flash_attention_forward",
}
_SOFTMAX = {"softmax", "Softmax", "XSoftmax"}
_PRODUCTS = {"matmul", "einsum", "bmm", "baddbmm", "@"}
_ONLY_INITIALISES = {"_init_weights", "init_weights", "__init_weights__"}


@dataclass(frozen=True)
class Seen:
    """One class of a file.

    Attributes:
        path: dotted. bases: names it derives from. signs: names of a bias, sorted. uses: names of
            its code. own: names of its methods. attends: whether it computes attention.
    """

    path: str
    bases: tuple[str, ...]
    signs: tuple[str, ...]
    uses: frozenset[str]
    own: frozenset[str]
    attends: bool

    @property
    def name(self) -> str:
        """The class name."""
        return self.path.rpartition(".")[2]


def attends(names: Iterable[str]) -> bool:
    """Whether code that uses these names computes attention."""
    found = set(names)
    return bool(found & _CALLS) or (bool(found & _SOFTMAX) and bool(found & _PRODUCTS))


def signs(names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that speak of a bias between positions."""
    return tuple(sorted(name for name in set(names) if SIGN.search(name)))


# Source files -------------------------------------------------------------------------------------


def _names(node: ast.AST) -> set[str]:
    found = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            found.add(one.id)
        elif isinstance(one, ast.Attribute):
            found.add(one.attr)
        elif isinstance(one, (ast.arg, ast.keyword)):
            found.add(one.arg or "")
        elif isinstance(one, ast.BinOp) and isinstance(one.op, ast.MatMult):
            found.add("@")
    return found


def _seen(node: ast.ClassDef, module: str) -> Seen:
    used: set[str] = set()
    biased: set[str] = set()
    functions = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    for one in node.body:
        names = _names(one)
        used |= names
        # What only fills its weights makes no bias.
        if not (isinstance(one, ast.FunctionDef) and one.name in _ONLY_INITIALISES):
            biased |= names
    return Seen(
        f"{module}.{node.name}",
        tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases),
        signs(biased),
        frozenset(used),
        frozenset(one.name for one in functions),
        attends(used),
    )


def read(text: str, module: str) -> dict[str, Seen]:
    """The classes of one file by name; empty where nothing in it speaks of a bias."""
    if not SIGN.search(text):
        return {}
    body = ast.parse(text).body
    # Classes are also chosen from tables at the top of a file: `CLASSES[config.kind](...)`.
    tables = {
        target.id: _names(one.value)
        for one in body
        if isinstance(one, ast.Assign)
        for target in one.targets
        if isinstance(target, ast.Name)
    }
    found = {one.name: _seen(one, module) for one in body if isinstance(one, ast.ClassDef)}
    for name, one in found.items():
        more = [tables[use] & found.keys() for use in one.uses if use in tables]
        if more:
            found[name] = replace(one, uses=one.uses.union(*more))
    return found


def model_files() -> Iterator[tuple[str, Path]]:
    """Module name and file of each model of the installed transformers."""
    import transformers

    root = Path(transformers.__file__).parent
    for path in sorted(root.glob("models/**/modeling_*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        yield ".".join(parts), path


def reached(start: Seen, classes: dict[str, Seen]) -> list[Seen]:
    """The classes that compute attention among those a class names, and those they name."""
    found: dict[str, Seen] = {}
    known, waiting = {start.name}, [start]
    while waiting:
        here = waiting.pop()
        if here.attends and here is not start:
            found[here.path] = here
        for name in (here.uses & classes.keys()) - known:
            known.add(name)
            waiting.append(classes[name])
    return [found[path] for path in sorted(found)]


def reaching(start: Seen, classes: dict[str, Seen]) -> list[Seen]:
    """The attending classes that name a class, or that stand beside it in what names it."""
    found: dict[str, Seen] = {}
    for above in classes.values():
        if start.name in above.uses and above is not start:
            if above.attends:
                found[above.path] = above
            found.update((one.path, one) for one in reached(above, classes))
    return [found[path] for path in sorted(found)]


# Classes at hand ----------------------------------------------------------------------------------


def _code_names(code: CodeType) -> set[str]:
    found = {*code.co_names, *code.co_varnames}
    for one in code.co_consts:
        if isinstance(one, CodeType):
            found |= _code_names(one)
        elif isinstance(one, tuple):  # names of keyword arguments of a call
            found |= {name for name in one if isinstance(name, str)}
    return found


@functools.cache
def biased(kind: type) -> tuple[str, ...]:
    """The signs of a bias in a class that computes attention; empty in any other."""
    names: set[str] = set()
    for owner in kind.__mro__:
        if owner.__name__ == "PreTrainedModel":
            return ()  # whole models hold attention and compute none
        if owner is nn.Module:
            break
        for name, value in vars(owner).items():
            function = inspect.unwrap(value) if callable(value) else value
            if isinstance(function, FunctionType) and name not in _ONLY_INITIALISES:
                names |= _code_names(function.__code__)
    return signs(names) if names & (_CALLS | _SOFTMAX) else ()  # products have no name there


def changed(kind: type, known: type) -> tuple[str, ...]:
    """Methods that `kind` or a class between it and its base `known` defines anew, sorted."""
    found: set[str] = set()
    for owner in kind.__mro__[: kind.__mro__.index(known)]:
        for name, value in vars(owner).items():
            code = isinstance(value, (FunctionType, property, staticmethod, classmethod))
            if code and name not in _HARMLESS:
                found.add(name)
    return tuple(sorted(found))


_HARMLESS = {"__init__", "extra_repr", "__repr__", *_ONLY_INITIALISES}


def replaced(kind: type) -> tuple[str, ...]:
    """Methods of a class (or its bases) that another package has put there, sorted."""
    found: set[str] = set()
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        home = owner.__module__.partition(".")[0]
        for name, value in vars(owner).items():
            if isinstance(value, FunctionType) and value.__module__.partition(".")[0] != home:
                found.add(name)
    return tuple(sorted(found))


def shadowed(module: nn.Module) -> tuple[str, ...]:
    """Methods of its class that a module holds anew as attributes of its own, sorted.

    The forward that accelerate puts around the original is harmless: that one stands beside it.
    """
    own = vars(module)
    found = {name for name in own if isinstance(getattr(type(module), name, None), FunctionType)}
    return tuple(sorted(found - ({"forward"} if "_old_forward" in own else set())))
