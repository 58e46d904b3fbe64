"""Names of what an operation does, which stand in the programs that are traced: for `explain`, and for profiles."""

import jax


def form(name: str, why: str | None = None):
    """A scope, or a decorator, for what is traced within: `[name]`, or `[name; why]` with why it is not the fastest."""
    return jax.named_scope(f"[{name}]" if why is None else f"[{name}; {why}]")
