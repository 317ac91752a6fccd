"""Pickles read as data: the opcodes are followed one by one, and nothing that they name is ever called.

What a pickle builds with a class or a function becomes a `Standin` that holds the name and what was
given to it. The names that may occur are listed; any other is refused. Reading takes memory in
proportion to the pickle, which is bounded, whatever it claims to hold.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tomocpt_stream.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST_PICKLE = 16 * 2**20
# The program's own configuration and what stands beside it in a Lightning checkpoint.
_PACKAGES = frozenset(
    {"tomocpt", "omegaconf", "pytorch_lightning", "lightning", "lightning_fabric", "pathlib"}
)
_TENSORS = {
    "torch": {
        *(f"{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short")),
        *(f"{kind}Storage" for kind in ("Char", "Byte", "Bool")),
        *("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool", "Size", "device"),
    },
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch.optim.swa_utils": {"SWALR"},
    "torch.storage": {"UntypedStorage"},
    "collections": {"OrderedDict", "defaultdict"},
    "argparse": {"Namespace"},
    "typing": {"Any"},
    # Older releases of torch keep a static method of SWALR in its state; `getattr` is how it is named.
    **{
        module: {"getattr", "set", "frozenset", "dict", "list", "tuple", "int", "float", "str", "bool"}
        for module in ("builtins", "__builtin__")
    },
    **{module: {"_reconstructor"} for module in ("copyreg", "copy_reg")},
    "_codecs": {"encode"},
    "numpy": {"dtype"},
    **{f"numpy.{part}.multiarray": {"scalar"} for part in ("core", "_core")},
}
_DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict"})
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "SHORT_BINSTRING"),
        *("BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    }
)


@dataclass(eq=False)
class Standin:
    """Something that a pickle names or makes: `name` is "module.name", `made` says whether it was called.

    `arguments` are those of the call, `state` what was set on it, `items` and `entries` what was put
    into it as a table or a list.
    """

    name: str
    made: bool = False
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Persistent:
    """What a pickle keeps outside of itself; torch: ("storage", type, key, place, elements)."""

    identity: Any


def read_pickle(data: bytes, address: str) -> Any:
    """Return what a pickle (protocol 0 to 4) holds: plain containers and numbers, `Standin`, `Persistent`.

    `address` is for messages. Raises CheckpointError where the pickle names anything that is not on
    the list, is damaged, or is longer than LARGEST_PICKLE bytes.
    """
    if len(data) > LARGEST_PICKLE:
        raise refusal(address, f"a pickle of {len(data)} bytes", f"at most {LARGEST_PICKLE} bytes")
    machine = _Machine(address)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack[-1]
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise refusal(address, f"a damaged pickle ({str(error)[:200]})", "a whole pickle") from error
    raise refusal(address, "a pickle without an end", "a whole pickle")


def refusal(address: str, found: str, expected: str) -> CheckpointError:
    """Return the error of a checkpoint that is not read."""
    return CheckpointError(
        f"{address} has {found}",
        expected=expected,
        remedy="take the checkpoint from its source again; do not load it with other programs if you do not "
        "trust it",
    )


class _Machine:
    """The stack of a pickle."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.steps: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "POP": lambda _: self._drop(1),
            "POP_MARK": lambda _: self._drop(),
            "DUP": lambda _: self.stack.append(self.stack[-1]),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "EMPTY_SET": lambda _: self.stack.append(Standin("builtins.set", made=True)),
            "LIST": lambda _: self.stack.append(self._cut()),
            "TUPLE": lambda _: self.stack.append(tuple(self._cut())),
            "TUPLE1": lambda _: self.stack.append(tuple(self._pop(1))),
            "TUPLE2": lambda _: self.stack.append(tuple(self._pop(2))),
            "TUPLE3": lambda _: self.stack.append(tuple(self._pop(3))),
            "DICT": lambda _: self._table(),
            "APPEND": lambda _: self._append(self._pop(1)),
            "APPENDS": lambda _: self._append(self._cut()),
            "ADDITEMS": lambda _: self._append(self._cut()),
            "SETITEM": lambda _: self._set(self._pop(2)),
            "SETITEMS": lambda _: self._set(self._cut()),
            "MEMOIZE": lambda _: self._remember(len(self.memo)),
            "GLOBAL": lambda name: self._name(*name.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._name(*self._pop(2)),
            "BINPERSID": lambda _: self.stack.append(Persistent(self._pop(1)[0])),
            "REDUCE": lambda _: self._call(),
            "NEWOBJ": lambda _: self._call(),
            "BUILD": lambda _: self._build(),
        }
        self.steps |= dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._remember)
        self.steps |= dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), self._recall)

    def step(self, opcode: str, argument: Any) -> None:
        """Follow one opcode."""
        if opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in self.steps:
            self.steps[opcode](argument)
        else:
            raise refusal(self.address, f"the pickle opcode {opcode}", "those that torch.save writes")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack is empty")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _cut(self) -> list[Any]:
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def _drop(self, count: int | None = None) -> None:
        _ = self._cut() if count is None else self._pop(count)

    def _remember(self, key: int) -> None:
        self.memo[int(key)] = self.stack[-1]

    def _recall(self, key: int) -> None:
        self.stack.append(self.memo[int(key)])

    def _table(self) -> None:
        entries = self._cut()
        self.stack.append({})
        self._set(entries)

    def _append(self, entries: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list | Standin):
            raise TypeError("entries for something that is no list")
        (target if isinstance(target, list) else target.entries).extend(entries)

    def _set(self, entries: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict | Standin) or len(entries) % 2:
            raise TypeError("items for something that is no table")
        table = target if isinstance(target, dict) else target.items
        for key, value in zip(entries[::2], entries[1::2], strict=True):
            # Tuples in tuples would take for ever to hash, and objects would be compared by their place.
            if not isinstance(key, str | int | float | bytes | None):
                raise TypeError(f"a table with a key that is a {type(key).__name__}")
            table[key] = value

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        if module.split(".")[0] not in _PACKAGES and name not in _TENSORS.get(module, ()):
            raise refusal(
                self.address,
                f"a pickle that asks for {f'{module}.{name}'[:200]!r}",
                "tensors, plain containers and the settings of tomoCPT",
            )
        self.stack.append(Standin(f"{module}.{name}"))

    def _call(self) -> None:
        called, arguments = self._pop(2)
        if not isinstance(called, Standin) or called.made or not isinstance(arguments, tuple):
            raise TypeError("a call of something that has no name")
        if called.name in _DICTS and not any(isinstance(value, list | dict) for value in arguments):
            self.stack.append({})
        else:
            self.stack.append(Standin(called.name, made=True, arguments=arguments))

    def _build(self) -> None:
        target, state = self.stack[-2:]
        self._pop(1)
        if isinstance(target, Standin):
            target.state = state
        elif not isinstance(target, dict):
            raise TypeError("a state for something that has none")
