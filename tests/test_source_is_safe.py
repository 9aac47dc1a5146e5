"""Nothing in the source runs code of a file, opens a shell or asks the network, but for what is listed with a reason.

Names are followed through `import ... as` and `from ... import`, and any use of one counts, not only a call. What hides
a name on purpose (`getattr` with a built string) is not found; this guards against slips, not against us.
"""

import ast
import builtins
import pathlib
from collections.abc import Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ("gpt2_jax", "configs", "benchmarks", "train.py")

# Modules whose import alone is refused: what they read can run code, or they talk to the network.
MODULES = {
    **dict.fromkeys(("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"), "pickles"),
    **dict.fromkeys(("builtins", "runpy", "code", "codeop", "imp"), "runs code"),
    **dict.fromkeys(("urllib", "urllib3", "requests", "http", "httpx", "aiohttp", "ftplib", "socket"), "network"),
    **dict.fromkeys(("fsspec", "gcsfs", "huggingface_hub", "tensorflow_datasets", "wandb", "tiktoken.load"), "network"),
    "flax.training.checkpoints": "deprecated, and reads msgpack of any type",
}
# Functions, by the name that they have where they are defined.
FUNCTIONS = {
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.__builtins__"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "pandas.read_pickle", "numpy.lib.format.read_array"),
    *("os.system", "os.popen", "os.execl", "os.execv", "os.execvp", "os.spawnl", "os.spawnv", "pty.spawn"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("flax.serialization.from_bytes", "flax.serialization.msgpack_restore", "tempfile.mktemp"),
    *("shutil.unpack_archive", "importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader"),
    *("ctypes.CDLL", "ctypes.cdll"),
}
METHODS = {"exec_module", "extractall"}  # of whatever object
LOADS = {"numpy.load", "jax.numpy.load"}  # fine with allow_pickle=False, written out

# (file, what is found there): why it is right.
EXCEPTIONS = {
    ("gpt2_jax/config_file.py", "importlib.util.spec_from_file_location"): "a config is Python that the user names",
    ("gpt2_jax/config_file.py", "exec_module"): "a config is Python that the user names",
    ("gpt2_jax/__init__.py", "importlib.import_module"): "of this package's own table, to import lazily",
    ("gpt2_jax/cli/main.py", "importlib.import_module"): "of this package's own table, to import lazily",
    ("gpt2_jax/run/rendezvous.py", "socket"): "the processes of a run meet",
    ("gpt2_jax/run/hosts.py", "socket"): "the name of this host, for messages",
    ("gpt2_jax/run/lease_holder.py", "socket"): "the name of this host, for the lease",
    ("gpt2_jax/remote_folder.py", "fsspec"): "gs:// addresses that the user gives",
    ("gpt2_jax/remote_folder.py", "gcsfs"): "the errors of gs:// addresses",
    ("gpt2_jax/remote_folder.py", "aiohttp"): "the errors of gs:// addresses",
    ("gpt2_jax/tokenizer/gpt2_merges.py", "requests"): "GPT-2's merges, where nothing on the disk has them",
    ("gpt2_jax/tokenizer/gpt2_merges.py", "tiktoken.load"): "the same",
    ("gpt2_jax/data/tfds_documents.py", "tensorflow_datasets"): "data.source=tfds:NAME",
    ("gpt2_jax/run/metrics.py", "wandb"): "--wandb",
    ("gpt2_jax/cli/malloc.py", "os.execv"): "train.py itself, once more, with another allocator",
}


def found(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) for everything in the source that is refused."""
    tree = ast.parse(source)
    origins: dict[str, str] = {}  # the names that imports make, and what they stand for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from ((node.lineno, module) for module in refused_modules(alias.name))
                origins[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from ((node.lineno, module) for module in refused_modules(name))
                if name in FUNCTIONS or alias.name == "*":
                    yield node.lineno, name
                origins[alias.asname or alias.name] = name
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}

    def origin(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            base = origin(node.value)
            return f"{base}.{node.attr}" if base else ""
        if isinstance(node, ast.Name):
            built_in = node.id not in bound and (hasattr(builtins, node.id) or node.id == "__builtins__")
            return origins.get(node.id, f"builtins.{node.id}" if built_in else "")
        return ""

    safe_loads = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = origin(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in LOADS and is_literally(keywords.get("allow_pickle"), False):
                safe_loads.add(node.func)
            if "shell" in keywords and not is_literally(keywords["shell"], False):
                yield node.lineno, "shell"
            if name.startswith("subprocess.") and None in keywords:
                yield node.lineno, "subprocess with **"
            if name == "importlib.import_module" and node.args and isinstance(node.args[0], ast.Constant):
                yield from ((node.lineno, module) for module in refused_modules(str(node.args[0].value)))
            elif name == "importlib.import_module":
                yield node.lineno, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = origin(node)
            if name in FUNCTIONS | LOADS | set(MODULES) and node not in safe_loads and "." in name:
                yield node.lineno, name
            elif isinstance(node, ast.Attribute) and node.attr in METHODS:
                yield node.lineno, node.attr


def refused_modules(name: str) -> list[str]:
    """The entries of MODULES that `import name` would import."""
    return [module for module in MODULES if f"{name}.".startswith(f"{module}.")]


def is_literally(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def files() -> list[pathlib.Path]:
    roots = [REPOSITORY / name for name in SOURCES]
    return sorted(file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py")))


def in_repository() -> list[tuple[str, int, str]]:
    return [
        (str(file.relative_to(REPOSITORY)), line, what)
        for file in files()
        for line, what in found(file.read_text(encoding="utf-8"))
    ]


def test_nothing_is_there_but_what_is_excepted() -> None:
    assert len(files()) > 100
    unexpected = [f"{file}:{line}: {what}" for file, line, what in in_repository() if (file, what) not in EXCEPTIONS]
    assert not unexpected, "mend it, or list it in EXCEPTIONS with a reason"


def test_no_exception_is_left_over() -> None:
    assert set(EXCEPTIONS) == {(file, what) for file, _, what in in_repository()}


@pytest.mark.parametrize(
    "snippet",
    [
        *(f"import {module}" for module in MODULES),
        "import pickle as p",
        "from pickle import loads",
        "from urllib.request import urlopen",
        "import http.client",
        "from http import client",
        "from flax.training import checkpoints",
        "import flax\nflax.training.checkpoints.restore_checkpoint('x', None)",
        "eval('1')",
        "exec('x = 1')",
        "compile('1', 'x', 'eval')",
        "__import__('os')",
        "__builtins__['eval']('1')",
        "list(map(eval, ['1']))",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml as y\ny.unsafe_load(text)",
        "from yaml import full_load",
        "import numpy\nnumpy.load(file)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import numpy as np\nnp.load(file, allow_pickle=flag)",
        "import numpy as np\nread = np.load",
        "from numpy import load as read\nread(file)",
        "import jax.numpy as jnp\njnp.load(file)",
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=True)",
        "from torch import load",
        "import os\nos.system('true')",
        "from os import popen",
        "import subprocess\nsubprocess.run('true', shell=True)",
        "import subprocess\nsubprocess.Popen('true', shell=1)",
        "from subprocess import check_output as ask\nask('true', shell=flag)",
        "import subprocess\nsubprocess.run('true', **options)",
        "import subprocess\nsubprocess.getoutput('true')",
        "from flax import serialization\nserialization.from_bytes(target, data)",
        "import flax.serialization as s\ns.msgpack_restore(data)",
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp",
        "import tarfile\ntarfile.open(file).extractall()",
        "import shutil\nshutil.unpack_archive(file)",
        "import importlib\nimportlib.import_module(name)",
        "import importlib\nimportlib.import_module('pickle')",
        "import importlib.util\nimportlib.util.spec_from_file_location('x', file)",
        "spec.loader.exec_module(module)",
        "from os import *",
        "def inner():\n    import pickle",
    ],
)
def test_each_of_them_is_found(snippet: str) -> None:
    assert list(found(snippet))


@pytest.mark.parametrize(
    "snippet",
    [
        "import re\nre.compile('x')",
        "lowered.compile()",
        "model.eval()",
        "import jax\njax.eval_shape(f)",
        "from gpt2_jax.planning.x import compile\ncompile(1)",
        "import numpy as np\nnp.load(file, allow_pickle=False)",
        "import subprocess\nsubprocess.run(['true'], shell=False)",
        "import importlib\nimportlib.import_module('numpy')",
        "import json\njson.load(file)",
        "import importlib.util\nimportlib.util.find_spec('torch')",
        "from gpt2_jax.exchange import plain_pickle",
        "import tempfile\ntempfile.mkdtemp()",
        "text = 'import pickle; eval(1)'",
    ],
)
def test_what_is_harmless_is_not(snippet: str) -> None:
    assert not list(found(snippet))
