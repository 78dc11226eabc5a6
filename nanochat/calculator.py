"""The calculator tool: a walk over the syntax tree of an expression, never `eval`."""

import ast
import operator
import re

MAX_LENGTH, MAX_DEPTH, MAX_VALUE = 500, 100, 10**18
STRING = r"'[^'\\\n]*'|\"[^\"\\\n]*\""  # no escapes: a backslash is refused
ARITHMETIC = re.compile(r"(?:[\d\s.,+\-*/%()]|\.count\b)*")  # what may stand outside string literals
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculator(expression: str) -> str | None:
    """The value of an arithmetic expression, or of `.count()` on a string literal; None if it is anything else.

    Numbers with + - * / // % and parentheses; commas between thousands are dropped; no power.
    Whole values print without a decimal point, others rounded to 10 decimals. Never raises; takes microseconds.
    """
    if len(expression) > MAX_LENGTH:
        return None
    pieces = re.split(f"({STRING})", expression.strip())  # the odd pieces are string literals
    pieces[::2] = [THOUSANDS.sub("", piece) for piece in pieces[::2]]
    if not all(ARITHMETIC.fullmatch(piece) for piece in pieces[::2]):
        return None
    try:
        value = round(_value(ast.parse("".join(pieces), mode="eval").body, MAX_DEPTH), 10)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return str(int(value)) if value == int(value) else str(value)


def _value(node, depth):
    """The number that the tree stands for; ValueError for a node, a size or a depth that is not allowed."""
    if depth == 0:
        raise ValueError("too deep")
    match node:
        case ast.Constant(value=int() | float() as value):
            pass
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign):
            value = _value(node.operand, depth - 1) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(op=ast.Div()):
            left, right = _value(node.left, depth - 1), _value(node.right, depth - 1)
            value = left // right if left % right == 0 else left / right  # whole quotients stay exact
        case ast.BinOp() if type(node.op) in BINARY:
            value = BINARY[type(node.op)](_value(node.left, depth - 1), _value(node.right, depth - 1))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = text.count(part)
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")
    if not abs(value) <= MAX_VALUE:
        raise ValueError("too large")
    return value
