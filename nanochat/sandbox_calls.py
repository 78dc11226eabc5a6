"""Put before each of the two programs of sandbox.run_tests, never imported: the tests call functions of the answer in
another process. Only plain data crosses, so an answer can bring neither objects that are equal to everything nor code.
"""

import builtins
import json
import sys
import types


def pack(value):
    """Plain data -> what JSON holds; a subclass becomes its base."""
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    for kind in tuple, set, frozenset:
        if isinstance(value, kind):
            return {kind.__name__: [pack(item) for item in value]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if hasattr(value, "__iter__"):  # a generator, map, keys: tests take them apart
        return {"iterator": [pack(item) for item in value]}
    raise TypeError(f"a {type(value).__name__} is no plain data: it cannot be handed over")


def unpack(value):
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind in ("complex", "range"):
        return {"complex": complex, "range": range}[kind](*content)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}[kind](map(unpack, content))


def send(pipe, message):
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()


def allow_long_numbers():
    if hasattr(sys, "set_int_max_str_digits"):  # Python 3.11 and later
        sys.set_int_max_str_digits(0)


def answer_calls(source, incoming, outgoing):
    """Run the answer as a module, then its functions as they are called, until the tests are over."""
    allow_long_numbers()
    module = sys.modules["answer"] = types.ModuleType("answer")
    exec(compile(source, "answer", "exec"), module.__dict__)
    with open(incoming, encoding="ascii") as calls, open(outgoing, "w", encoding="ascii") as values:
        for line in calls:
            name, args, kwargs = unpack(json.loads(line))
            try:
                reply = {"value": pack(getattr(module, name)(*args, **kwargs))}
            except Exception as error:  # an answer may raise what it likes: it is for the tests to judge
                reply = {"error": [kind.__name__ for kind in type(error).__mro__], "said": str(error)}
            send(values, reply)


def test_answer(tests, name, incoming, outgoing):
    """Run the tests, for which the function of this name runs in the answer's process."""
    allow_long_numbers()
    values, calls = open(incoming, encoding="ascii"), open(outgoing, "w", encoding="ascii")

    def function(*args, **kwargs):
        try:
            send(calls, pack([name, args, kwargs]))
            line = values.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit("the answer's program ended before the tests did")
        reply = json.loads(line)
        if "error" in reply:
            raise error_of(reply["error"])(reply["said"])
        return unpack(reply["value"])

    exec(compile(tests, "tests", "exec"), {"__name__": "tests", name: function})


def error_of(names):
    """The kind of error that stands first among these bases, of those that take any text and end nothing."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind if not issubclass(kind, (StopIteration, StopAsyncIteration, UnicodeError)) else RuntimeError
    return Exception
