"""A worked example of a tool: a calculator that the policy calls by writing <calc>12 * (3 + 4)</calc>.

A turn without a call ends the episode. Expressions are parsed, never evaluated by Python: numbers and + - * / // % ** ( ) are
all there is, and what would be astronomically large is refused.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_rl.rollout.environment import Environment, Observation
from megatron_rl.types import Prompt

_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_LARGEST = 10**50
_OPERATIONS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


@dataclass
class Calculator(Environment):
    """Answers calls; `call_reward` is given for each that can be computed."""

    role: str = "tool"  # of its answers in the conversation
    call_reward: float = 0.0
    longest: int = 200  # characters of an expression

    async def reset(self, prompt: Prompt) -> None:
        """Nothing is remembered between calls."""

    async def step(self, text: str) -> Observation:
        calls = _CALL.findall(text)
        if not calls:
            return Observation(done=True)
        try:
            answer, reward = f"{self._compute(calls[-1]):.12g}", self.call_reward
        except (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError) as error:
            answer, reward = f"error: {error}", 0.0
        return Observation(({"role": self.role, "content": answer},), reward)

    def _compute(self, expression: str) -> float:
        if len(expression) > self.longest:
            raise ValueError(f"the expression is longer than {self.longest} characters")
        return _value(ast.parse(expression.strip(), mode="eval").body)


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
            a, b = _value(left), _value(right)
            if isinstance(operation, ast.Pow) and (abs(b) > 64 or abs(a) > 10**6):
                raise ValueError("the power is too large")
            result = _OPERATIONS[type(operation)](a, b)
            if isinstance(result, complex) or abs(result) > _LARGEST:
                raise ValueError("the result is too large")
            return result
    raise ValueError(f"{ast.unparse(node)} is not arithmetic")
