"""Choosing the next token: penalties, top-k, top-p, min-p, temperature, draw, in llama.cpp's order and meaning.

Each step is a pure function on rows of logits. A step that drops a candidate sets its logit to -inf: shapes stay
static, and the softmax of what is left is the distribution of the token. All arithmetic is in f32.
"""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key


def penalise(
    logits: Float[Array, "B V"], history: Int[Array, "B P"], repeat: float, presence: float, frequency: float
) -> Float[Array, "B V"]:
    """Makes the tokens of the history less likely (or more, by values below 1 and 0).

    The logit l of a token that occurs n > 0 times becomes l * repeat if l <= 0, else l / repeat, and then loses
    n * frequency + presence. Entries of the history below 0 are empty; its order is of no matter.
    """
    vocabulary = logits.shape[1]
    ids = jnp.where(history < 0, vocabulary, history)  # a negative index would count from the end; this one is dropped
    count = jnp.zeros_like(logits).at[jnp.arange(len(ids))[:, None], ids].add(1, mode="drop")
    seen = count > 0
    factor = jnp.where(seen, repeat, 1.0)  # an array, as XLA divides by a scalar inexactly: times its reciprocal
    scaled = jnp.where(logits <= 0, logits * factor, logits / factor)
    return scaled - (count * frequency + jnp.where(seen, presence, 0.0))


def top_p(logits: Float[Array, "B C"], p: float) -> Float[Array, "B C"]:
    """Of logits in descending order, keeps the shortest head, never empty, as likely as `p` (arXiv:1904.09751)."""
    total = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
    before = jnp.pad(total[:, :-1], ((0, 0), (1, 0)), constant_values=-1.0)  # -1: the first stays even at p = 0
    return jnp.where(before < p, logits, -jnp.inf)


def min_p(logits: Float[Array, "B C"], p: float) -> Float[Array, "B C"]:
    """Keeps candidates at least `p` times as likely as the best one, in any order of candidates (arXiv:2407.01082)."""
    return jnp.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(p), logits, -jnp.inf)


def draw(keys: Key[Array, "B"], logits: Float[Array, "B C"]) -> Int[Array, "B"]:
    """Draws one index per row by the softmax of its logits: the first whose cumulative mass is above u times the total.

    The inverse of the distribution takes one random number u per row, where Gumbel noise takes one per candidate, which
    is four times slower on a CPU for 50k candidates. u has 23 bits, so probabilities are met to about 1e-7.
    """
    mass = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0)  # a parallel sum may rise by an ulp where no mass is
    u = jax.vmap(jax.random.uniform)(keys)
    return jnp.argmax(total > (u * total.max(axis=-1))[:, None], axis=-1)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A rule for choosing tokens; a static argument under jit, with llama.cpp's defaults.

    Two samplers that differ by their seed only are equal, so that another seed never compiles anew: the host turns the
    seed into keys, and traced code must not read it.

    Attributes:
        temperature: divides the logits that are left at the end; 0 takes the best token, the lowest id of equals.
        top_k: keeps this many of the largest logits; 0 keeps all.
        top_p: keeps the most likely candidates that together have this probability; 1 keeps all.
        min_p: keeps candidates with this fraction of the best one's probability; 0 keeps all.
        repeat_penalty: divides positive and multiplies negative logits of tokens in the history; 1 is off.
        presence_penalty: subtracted from the logits of tokens in the history; 0 is off.
        frequency_penalty: subtracted from them once per occurrence; 0 is off.
        repeat_last_n: how many last tokens, the prompt's included, are the history; 0 switches the penalties off.
        seed: of the random numbers, 0 to 2**32 - 1.

    Raises:
        ValueError: a field is not a number of its type or out of its range.
    """

    temperature: float | int = 0.8
    top_k: int = 40
    top_p: float | int = 0.95
    min_p: float | int = 0.05
    repeat_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    repeat_last_n: int = 64
    seed: int = field(default=0, compare=False)

    def __post_init__(self):
        finite, huge = "a finite number in f32", 2.0**127
        for name, kind, holds, rule in (
            ("temperature", Real, lambda x: 0 <= x < huge, f"{finite}, 0 or more"),
            ("top_k", Integral, lambda x: x >= 0, "a whole number, 0 or more"),
            ("top_p", Real, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
            ("min_p", Real, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
            ("repeat_penalty", Real, lambda x: 2.0**-126 <= x < huge, f"{finite} above 0"),
            ("presence_penalty", Real, lambda x: -huge < x < huge, finite),
            ("frequency_penalty", Real, lambda x: -huge < x < huge, finite),
            ("repeat_last_n", Integral, lambda x: x >= 0, "a whole number, 0 or more"),
            ("seed", Integral, lambda x: 0 <= x < 2**32, "a whole number from 0 to 2**32 - 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
                raise ValueError(f"{name}={value!r} must be {rule}")

    @classmethod
    def greedy(cls) -> "Sampler":
        """Always the most likely token."""
        return cls(temperature=0)

    @property
    def window(self) -> int:
        """Number of columns of the history that this sampler wants; 0 if its penalties are off."""
        off = self.repeat_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
        return 0 if off else self.repeat_last_n

    def __call__(
        self, keys: Key[Array, "B"], logits: Float[Array, "B V"], history: Int[Array, "B P"]
    ) -> Int[Array, "B"]:
        """Chooses the next token of each row, by that row's key, logits and history alone.

        Args:
            keys: one per row; the same key, logits and history give the same token. Not read if the temperature is 0.
            logits: of any float type.
            history: the last `window` tokens of each row, prompt included, in any order; -1 where there is none.
        Raises:
            ValueError: the history has not `window` columns.
        """
        if self.temperature == 0:  # no cut drops the largest logit, so none is made
            return jnp.argmax(self._penalised(logits, history), axis=-1).astype(jnp.int32)
        logits, ids = self.filter(logits, history)
        return jnp.take_along_axis(ids, draw(keys, logits)[:, None], axis=1)[:, 0]

    def filter(
        self, logits: Float[Array, "B V"], history: Int[Array, "B P"]
    ) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
        """The candidates: their final logits in f32, the best one's 0 and -inf where dropped, and their ids.

        The distribution of the draw is the softmax of these logits. Of use at a temperature above 0 only.
        C is min(top_k, V), or V without top-k. Candidates are in descending order of logits, or of ids if neither top-k
        nor top-p is on: only those two need an order, and to sort a large vocabulary takes longer than all the rest.
        """
        logits = self._penalised(logits, history)
        vocabulary = logits.shape[1]
        if self.top_k or self.top_p < 1:
            logits, ids = lax.top_k(logits, min(self.top_k or vocabulary, vocabulary))
        else:
            ids = jnp.broadcast_to(jnp.arange(vocabulary, dtype=jnp.int32), logits.shape)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = min_p(logits, self.min_p)
        # From the best one down and never by a subnormal: 0 / T is 0 and not NaN for any temperature that is allowed.
        return (logits - logits.max(axis=-1, keepdims=True)) / max(self.temperature, 1e-30), ids

    def _penalised(self, logits: Float[Array, "B V"], history: Int[Array, "B P"]) -> Float[Array, "B V"]:
        if history.shape[1] != self.window:
            raise ValueError(f"{history.shape=} must have {self.window=} columns")
        logits = logits.astype(jnp.float32)
        if not self.window:
            return logits
        return penalise(logits, history, self.repeat_penalty, self.presence_penalty, self.frequency_penalty)
