"""Where compiled programs are kept from one process to the next."""

import jax

from gpt2_jax.user_paths import expand_user


def set_compile_cache(folder: str) -> None:
    """Keeps every compiled program in `folder`; empty for none."""
    # None, because JAX would take the folder from the environment otherwise.
    jax.config.update("jax_compilation_cache_dir", str(expand_user(folder)) if folder else None)
    if folder:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
