"""What XLA on CPU makes of the train step: products in their fast form, the state updated where it lies.

Each of these was once otherwise, and cost a tenth of the step or more.
"""

import dataclasses
import re

import jax
import pytest

from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt2_jax.run.fit_memory import lower_train_step
from gpt2_jax.run.step_settings import make_settings
from gpt2_jax.sharding import make_mesh
from gpt2_jax.training.train_state import abstract_state

RATES = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIG = RunConfig(
    # No two widths alike: 96, 288, 384; 64 tokens a row, 4 rows.
    model=ModelConfig(n_layer=3, n_head=4, n_embd=96, n_positions=64, vocab_size=1000, **RATES),
    optimizer=OptimizerConfig(warmup_steps=0),
    train=TrainConfig(batch_size=4),
    mesh=MeshConfig(data=1),
)
MESH = make_mesh(CONFIG.mesh, jax.devices()[:1])
LOOPS = {"scanned": 1, "one after another": 3}
_DOT = re.compile(r"= \S+\[([\d,]*)\]\S* dot\(.*lhs_contracting_dims=\{([\d,]*)\}, rhs_contracting_dims=\{([\d,]*)\}")


@pytest.fixture(scope="module", params=LOOPS)
def compiled(request: pytest.FixtureRequest) -> jax.stages.Compiled:
    model = dataclasses.replace(CONFIG.model, scan_unroll=LOOPS[request.param])
    return lower_train_step(
        dataclasses.replace(CONFIG, model=model), make_mesh(CONFIG.mesh, jax.devices()[:1])
    ).compile()


def test_products_contract_one_axis_and_transpose_one_operand_at_most(compiled: jax.stages.Compiled) -> None:
    """A weight gradient that contracts rows and positions apart transposes both operands, at half the speed."""
    text = compiled.as_text()
    dots = [(shape.split(","), lhs, rhs) for shape, lhs, rhs in _DOT.findall(text)]
    products = [dot for dot in dots if len(dot[0]) == 2]  # attention has batches of them
    # Forward, and two backward: four kernels of a layer, or of three layers, and the head.
    assert len(products) >= 3 * (4 + 1)
    assert [dot for dot in products if dot[1:] == ("0", "1") or "," in dot[1] + dot[2]] == []


def test_every_array_of_the_state_is_updated_where_it_lies(compiled: jax.stages.Compiled) -> None:
    settings = make_settings(CONFIG, MESH)
    state = abstract_state(settings.model, settings.optimizer, MESH, ema=False)
    header = compiled.as_text().splitlines()[0]
    aliased = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
    assert [(int(out), int(argument)) for out, argument in aliased] == [
        (number, number) for number in range(len(jax.tree.leaves(state)))
    ]


def test_no_kernel_or_moment_is_copied(compiled: jax.stages.Compiled) -> None:
    """But for the zeros that a scan adds gradients to."""
    copies = re.findall(r"= f32\[(1024,96|3,96,3,96|3,96,384|3,384,96)\]\S* copy\((\S+?)\)", compiled.as_text())
    assert [(shape, of) for shape, of in copies if "broadcast" not in of] == []
