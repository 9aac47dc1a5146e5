"""Collectives read from compiled programs: against arithmetic by hand, on excerpts and on programs compiled here."""
# ruff: noqa: E501 (XLA's lines are long)

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax.config import ModelConfig, OptimizerConfig
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.planning.collectives import Collective, Total, axes_of, read_collectives, totals
from gpt2_jax.planning.device_groups import permute_groups, replica_groups
from gpt2_jax.planning.topology import devices, parse_topologies
from gpt2_jax.sharding import MESH_AXES, use_mesh
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.steps import StepSettings, train_step
from gpt2_jax.training.train_state import abstract_state

# TPU: the gather of c_attn's kernel over 16 devices, within a loop over 4 layers, as permutes in both directions: one
# before the inner loop and four in its body, whose counter goes 0, 2, 4, 6.
RING = """HloModule jit_step, is_scheduled=true, num_partitions=16

%fused_product (p.0: bf16[512,256], p.1: bf16[1,16,3,256]) -> bf16[512,768] {
  %p.0 = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.1 = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[512,768]{1,0:T(8,128)(2,1)S(1)} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%wide.windowed_dot_general_body_ag.clone.sunk (wide.param.18: (bf16[1,16,3,256], bf16[1,16,3,256], u32[])) -> (bf16[1,16,3,256], bf16[1,16,3,256], u32[]) {
  %constant.2 = u32[]{:T(128)} constant(2)
  %wide.param.18 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.1 = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.18), index=0
  %collective-permute-start.40 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.1), channel_id=5, source_target_pairs={BACK}, metadata={op_name="jit(step)/while/body/attn/c_attn/dot_general" stack_frame_id=123}
  %get-tuple-element.2 = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.18), index=1
  %collective-permute-start.42 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.2), channel_id=6, source_target_pairs={FORTH}, metadata={op_name="jit(step)/while/body/attn/c_attn/dot_general" stack_frame_id=123}
  %get-tuple-element.3 = u32[]{:T(128)} get-tuple-element(%wide.param.18), index=2
  %custom-call.1 = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.1 = bf16[512,768]{1,0:T(8,128)(2,1)S(1)} fusion(%custom-call.1, %get-tuple-element.1), kind=kOutput, calls=%fused_product
  %add.1 = u32[]{:T(128)} add(%get-tuple-element.3, %constant.2)
  %collective-permute-done.40 = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start.40)
  %collective-permute-start.41 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%collective-permute-done.40), channel_id=7, source_target_pairs={BACK}, metadata={op_name="jit(step)/while/body/attn/c_attn/dot_general" stack_frame_id=123}
  %collective-permute-done.42 = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start.42)
  %collective-permute-start.43 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%collective-permute-done.42), channel_id=8, source_target_pairs={FORTH}, metadata={op_name="jit(step)/while/body/attn/c_attn/dot_general" stack_frame_id=123}
  %fusion.2 = bf16[512,768]{1,0:T(8,128)(2,1)S(1)} fusion(%custom-call.1, %collective-permute-done.42), kind=kOutput, calls=%fused_product
  %collective-permute-done.41 = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start.41)
  %collective-permute-done.43 = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start.43)
  ROOT %tuple.1 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) tuple(%collective-permute-done.41, %collective-permute-done.43, %add.1)
}

%wide.windowed_dot_general_cond_ag.clone (wide.param.86: (bf16[1,16,3,256], bf16[1,16,3,256], u32[])) -> pred[] {
  %constant.8 = u32[]{:T(128)} constant(8)
  %wide.param.86 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.4 = u32[]{:T(128)} get-tuple-element(%wide.param.86), index=2
  ROOT %compare.52 = pred[]{:T(512)} compare(%get-tuple-element.4, %constant.8), direction=LT
}

%body (param: (s32[], bf16[1,16,3,256])) -> (s32[], bf16[1,16,3,256]) {
  %param = (s32[]{:T(128)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.5 = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} get-tuple-element(%param), index=1
  %collective-permute-start.56 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.5), channel_id=4, source_target_pairs={FORTH}, metadata={op_name="jit(step)/while/body/attn/c_attn/dot_general" stack_frame_id=123}
  %collective-permute-done.56 = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start.56)
  %constant.0 = u32[]{:T(128)} constant(0)
  %copy.473 = u32[]{:T(128)} copy(%constant.0)
  %tuple.2 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) tuple(%get-tuple-element.5, %collective-permute-done.56, %copy.473)
  %while.171 = (bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) while(%tuple.2), condition=%wide.windowed_dot_general_cond_ag.clone, body=%wide.windowed_dot_general_body_ag.clone.sunk, metadata={op_name="jit(step)/while/body/attn/c_attn/dot_general" stack_frame_id=123}
  %get-tuple-element.6 = s32[]{:T(128)} get-tuple-element(%param), index=0
  %constant.1 = s32[]{:T(128)} constant(1)
  %add.2 = s32[]{:T(128)} add(%get-tuple-element.6, %constant.1)
  ROOT %tuple.3 = (s32[]{:T(128)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}) tuple(%add.2, %get-tuple-element.5)
}

%condition (param.1: (s32[], bf16[1,16,3,256])) -> pred[] {
  %param.1 = (s32[]{:T(128)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.7 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  %constant.4 = s32[]{:T(128)} constant(4)
  ROOT %lt.46 = pred[]{:T(512)} compare(%get-tuple-element.7, %constant.4), direction=LT
}

ENTRY %main (p: bf16[1,16,3,256]) -> (s32[], bf16[1,16,3,256]) {
  %p = bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)} parameter(0)
  %constant.9 = s32[]{:T(128)} constant(0)
  %tuple.4 = (s32[]{:T(128)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}) tuple(%constant.9, %p)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[1,16,3,256]{3,1,0,2:T(8,128)(2,1)S(1)}) while(%tuple.4), condition=%condition, body=%body
}
""".replace("{FORTH}", "{" + ",".join(f"{{{i},{(i + 1) % 16}}}" for i in range(16)) + "}").replace(
    "{BACK}", "{" + ",".join(f"{{{i},{(i - 1) % 16}}}" for i in range(16)) + "}"
)

# TPU, 4 devices: a scatter of a kernel's gradient as five permutes one after another, the first two of zeros; a gather
# of the same size and name beside it; and a permute of nobody's.
UNROLLED = """HloModule jit_step, is_scheduled=true, num_partitions=4

%fused_add (p.0: f32[64,64], p.1: f32[64,64]) -> (f32[64,64], f32[64,64]) {
  %p.0 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %convolution.1 = bf16[64,64]{1,0:T(8,128)(2,1)} convolution(%p.0, %p.1), dim_labels=bf_io->bf
  %add.1 = bf16[64,64]{1,0:T(8,128)(2,1)} add(%p.0, %convolution.1)
  ROOT %tuple.1 = (bf16[64,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0:T(8,128)(2,1)}) tuple(%add.1, %add.1)
}

ENTRY %main (p: bf16[64,64]) -> bf16[64,64] {
  %p = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %constant.1 = bf16[]{:T(256)} constant(0)
  %broadcast.468 = bf16[64,64]{1,0:T(8,128)(2,1)} broadcast(%constant.1), dimensions={}
  %copy.1 = bf16[64,64]{0,1:T(8,128)(2,1)} copy(%p)
  %bitcast.1 = bf16[64,64]{0,1:T(8,128)(2,1)} bitcast(%copy.1)
  START(%ag.1, %copy.1, FORTH)
  START(%ag.2, %bitcast.1, BACK)
  DONE(%ag.1)
  START(%ag.3, %ag.1.done, FORTH)
  DONE(%ag.2)
  DONE(%ag.3)
  START(%rs.1, %broadcast.468, BACK)
  START(%rs.2, %broadcast.468, FORTH)
  DONE(%rs.1)
  DONE(%rs.2)
  %fusion.1 = (bf16[64,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0:T(8,128)(2,1)}) fusion(%rs.1.done, %rs.2.done), kind=kOutput, calls=%fused_add
  %get-tuple-element.1 = bf16[64,64]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.1), index=0
  START(%rs.3, %get-tuple-element.1, FORTH)
  %get-tuple-element.2 = bf16[64,64]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.1), index=1
  START(%rs.4, %get-tuple-element.2, BACK)
  DONE(%rs.3)
  %fusion.2 = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%rs.3.done, %ag.3.done), kind=kOutput, calls=%fused_add
  START(%rs.5, %fusion.2, FORTH)
  DONE(%rs.4)
  DONE(%rs.5)
  ROOT %collective-permute.9 = bf16[64,64]{1,0:T(8,128)(2,1)} collective-permute(%rs.5.done), channel_id=9, source_target_pairs={{0,1},{2,3}}, metadata={op_name="jit(step)/reshape"}
}
"""

# TPU: two kernels' gradients scattered by one fusion, and a gather that is under way while other fusions compute.
FUSED = """HloModule jit_step, is_scheduled=true, num_partitions=16

%all-reduce-scatter.5 (input_0.2: bf16[256,3,128], input_1.2: bf16[128,256]) -> (bf16[64,3,128], bf16[128,64]) {
  %input_0.2 = bf16[256,3,128]{2,0,1:T(8,128)(2,1)S(1)} parameter(0)
  %input_1.2 = bf16[128,256]{0,1:T(8,128)(2,1)S(1)} parameter(1)
  %all-reduce.126 = (bf16[256,3,128]{2,0,1:T(8,128)(2,1)}, bf16[128,256]{0,1:T(8,128)(2,1)}) all-reduce(%input_0.2, %input_1.2), channel_id=1, replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, use_global_device_ids=true, to_apply=%add.15
  %constant.1541 = u32[] constant(64)
  %get-tuple-element.3233 = bf16[256,3,128]{2,0,1:T(8,128)(2,1)} get-tuple-element(%all-reduce.126), index=0
  %dynamic-slice.515 = bf16[64,3,128]{2,0,1:T(8,128)(2,1)} dynamic-slice(%get-tuple-element.3233, %constant.1541), dynamic_slice_sizes={64,3,128}
  %get-tuple-element.3234 = bf16[128,256]{0,1:T(8,128)(2,1)} get-tuple-element(%all-reduce.126), index=1
  %dynamic-slice.516 = bf16[128,64]{0,1:T(8,128)(2,1)} dynamic-slice(%get-tuple-element.3234, %constant.1541), dynamic_slice_sizes={128,64}
  ROOT %tuple.186 = (bf16[64,3,128]{2,0,1:T(8,128)(2,1)}, bf16[128,64]{0,1:T(8,128)(2,1)}) tuple(%dynamic-slice.515, %dynamic-slice.516)
}

%fused_computation.663 (param_0.2047: bf16[1024,16]) -> (bf16[1024,16], bf16[1024,256]) {
  %param_0.2047 = bf16[1024,16]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.38 = bf16[1024,256]{0,1:T(8,128)(2,1)} all-gather(%param_0.2047), channel_id=93, replica_groups=mesh['axis_0'=1,'axis_1'=16] {'axis_1'}, dimensions={1}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %tuple.1 = (bf16[1024,16]{0,1:T(8,128)(2,1)S(1)}, bf16[1024,256]{0,1:T(8,128)(2,1)}) tuple(%param_0.2047, %all-gather.38)
}

%async_collective_fusion.640 (param_0.2050: bf16[1024,16], param_1.2269: bf16[1024,256]) -> (bf16[1024,16], bf16[1024,256]) {
  %param_0.2050 = bf16[1024,16]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.2269 = bf16[1024,256]{0,1:T(8,128)(2,1)} parameter(1)
  %all-gather.40 = bf16[1024,256]{0,1:T(8,128)(2,1)} all-gather(%param_0.2050), channel_id=93, replica_groups=mesh['axis_0'=1,'axis_1'=16] {'axis_1'}, dimensions={1}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %tuple.2 = (bf16[1024,16]{0,1:T(8,128)(2,1)S(1)}, bf16[1024,256]{0,1:T(8,128)(2,1)}) tuple(%param_0.2050, %all-gather.40)
}

%fused_computation.666 (param_0.2059: bf16[1024,16], param_1.2278: bf16[1024,256]) -> bf16[1024,256] {
  %param_0.2059 = bf16[1024,16]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.2278 = bf16[1024,256]{0,1:T(8,128)(2,1)} parameter(1)
  ROOT %all-gather.44 = bf16[1024,256]{0,1:T(8,128)(2,1)} all-gather(%param_0.2059), channel_id=93, replica_groups=mesh['axis_0'=1,'axis_1'=16] {'axis_1'}, dimensions={1}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

ENTRY %main (a: bf16[256,3,128], b: bf16[128,256], c: bf16[1024,16]) -> bf16[1024,256] {
  %a = bf16[256,3,128]{2,0,1:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,256]{0,1:T(8,128)(2,1)} parameter(1)
  %c = bf16[1024,16]{0,1:T(8,128)(2,1)} parameter(2)
  %fusion.373 = (bf16[64,3,128]{2,0,1:T(8,128)(2,1)S(1)}, bf16[128,64]{0,1:T(8,128)(2,1)S(1)}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.5, metadata={op_name="jit(step)/transpose(jvp(GPT2))/attn/c_attn/dot_general" stack_frame_id=145}
  %async-collective-start = (bf16[1024,16]{0,1:T(8,128)(2,1)S(1)}, bf16[1024,256]{0,1:T(8,128)(2,1)S(1)}) fusion(%c), kind=kCustom, calls=%fused_computation.663
  %get-tuple-element.5313 = bf16[1024,16]{0,1:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start), index=0
  %get-tuple-element.5314 = bf16[1024,256]{0,1:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start), index=1
  %fusion.640 = (bf16[1024,16]{0,1:T(8,128)(2,1)S(1)}, bf16[1024,256]{0,1:T(8,128)(2,1)}) fusion(%get-tuple-element.5313, %get-tuple-element.5314), kind=kOutput, calls=%async_collective_fusion.640
  ROOT %async-collective-done = bf16[1024,256]{0,1:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.5313, %get-tuple-element.5314), kind=kCustom, calls=%fused_computation.666
}
"""

# GPU and the rest: starts and waits, wrapped computations, branches, groups of one device.
STARTED = """HloModule jit_step, is_scheduled=true, replica_count=2, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}

%wrapped (w: f32[80]) -> f32[10] {
  %w = f32[80]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[10]{0} reduce-scatter(%w), channel_id=3, replica_groups=[1,8]<=[8], use_global_device_ids=true, dimensions={0}, to_apply=%add
}

%branch (u: f32[6]) -> f32[6] {
  %u = f32[6]{0} parameter(0)
  ROOT %collective-broadcast.1 = f32[6]{0} collective-broadcast(%u), channel_id=4, replica_groups={{0,1}}
}

ENTRY %main (a: f32[4,10], b: pred[3], i: s32[]) -> f32[6] {
  %a = f32[4,10]{1,0} parameter(0)
  %b = pred[3]{0} parameter(1)
  %i = s32[] parameter(2)
  %all-gather-start = ((f32[4,10]{1,0}, pred[3]{0}), (f32[8,10]{1,0}, pred[6]{0})) all-gather-start(f32[4,10]{1,0} %a, pred[3]{0} %b), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/gather"}
  %dot.1 = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %all-gather-done = (f32[8,10]{1,0}, pred[6]{0}) all-gather-done(%all-gather-start)
  %g = f32[8,10]{1,0} get-tuple-element(%all-gather-done), index=0
  %all-reduce-start = f32[8,10]{1,0} all-reduce-start(%g), channel_id=2, replica_groups={}, use_global_device_ids=true, to_apply=%add
  %buffer = f32[9]{0} custom-call(), custom_call_target="AllocateBuffer"
  %all-reduce-done = f32[8,10]{1,0} all-reduce-done(%all-reduce-start)
  %flat = f32[80]{0} bitcast(%all-reduce-done)
  %async-start = ((f32[80]{0}), f32[10]{0}, u32[]) async-start(%flat), calls=%wrapped
  %async-done = f32[10]{0} async-done(%async-start)
  %all-to-all.1 = f32[8,10]{1,0} all-to-all(%g), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %all-reduce.9 = f32[8,10]{1,0} all-reduce(%g), channel_id=6, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %six = f32[6]{0} slice(%async-done), slice={[0:6]}
  ROOT %conditional.1 = f32[6]{0} conditional(%i, %six, %six), branch_computations={%branch, %branch}
}
"""


def expand(text: str) -> str:
    """Writes the permutes of `UNROLLED` out."""
    pairs = {"FORTH": "{{0,1},{1,2},{2,3},{3,0}}", "BACK": "{{0,3},{1,0},{2,1},{3,2}}"}
    shape, lines = "bf16[64,64]{1,0:T(8,128)(2,1)}", []
    for line in text.splitlines():
        if line.startswith("  START("):
            name, operand, way = line.removeprefix("  START(").rstrip(")").split(", ")
            line = (
                f"  {name} = ({shape}, {shape}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start({operand}), "
                f'channel_id=1, source_target_pairs={pairs[way]}, metadata={{op_name="jit(step)/h/c_proj/dot_general"}}'
            )
        elif line.startswith("  DONE("):
            name = line.removeprefix("  DONE(").rstrip(")")
            line = f"  {name}.done = {shape} collective-permute-done({name})"
        lines.append(line)
    return "\n".join(lines)


def figures(collective: Collective) -> tuple:
    return (
        collective.kind,
        collective.dtype,
        collective.payload_bytes,
        collective.wire_bytes,
        collective.group_size,
        collective.executions,
        collective.overlapped,
    )


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("channel_id=1, replica_groups={}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("channel_id=1", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("replica_groups=[4,2]<=[8], use_global_device_ids=true", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x=1", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a','c'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ],
)
def test_every_notation_of_groups(attributes: str, groups: tuple) -> None:
    assert replica_groups(attributes, 8) == groups


def test_groups_of_a_permute_and_unknown_notations() -> None:
    assert permute_groups("source_target_pairs={{0,2},{3,1},{2,4}}, x=1") == ((0, 2, 4), (1, 3))
    with pytest.raises(ValueError, match="unknown notation of groups"):
        replica_groups("replica_groups=<0 to 7>", 8)


def test_a_ring_in_a_loop_is_one_gather_per_layer() -> None:
    (gather,) = read_collectives(RING)
    shard = 16 * 3 * 256 * 2
    # 1 + 4 trips of 4: a device sends 17 shards where a ring of 16 needs 15.
    assert figures(gather) == ("all-gather", "bf16", 16 * shard, 17 * shard, 16, 4, True)
    assert gather.groups == (tuple(range(16)),)
    assert gather.op_name == "jit(step)/while/body/attn/c_attn/dot_general"
    assert totals([gather]) == {"all-gather": Total(4, 4 * 16 * shard, 4 * 17 * shard, 1.0)}


def test_permutes_one_after_another_are_told_apart() -> None:
    shard = 64 * 64 * 2
    gather, scatter, permute = read_collectives(expand(UNROLLED))
    assert figures(gather) == ("all-gather", "bf16", 4 * shard, 3 * shard, 4, 1, False)
    assert figures(scatter)[:-1] == ("reduce-scatter", "bf16", 4 * shard, 5 * shard, 4, 1)
    assert figures(permute) == ("collective-permute", "bf16", shard, shard, 2, 1, False)
    assert permute.groups == ((0, 1), (2, 3))


def test_fusions_of_a_tpu() -> None:
    scatter, gather = read_collectives(FUSED)
    gradients = (256 * 3 * 128 + 128 * 256) * 2
    assert figures(scatter) == ("reduce-scatter", "bf16", gradients, gradients * 3 / 4, 4, 1, False)
    assert scatter.op_name.endswith("c_attn/dot_general") and not scatter.asynchronous
    table = 1024 * 256 * 2
    # Once, although three fusions hold it; between first and last one computes.
    assert figures(gather) == ("all-gather", "bf16", table, table * 15 / 16, 16, 1, True)


def test_started_and_awaited() -> None:
    found = {one.kind: one for one in read_collectives(STARTED)}
    assert len(found) == 5  # the all-reduce of groups of one moves nothing
    assert figures(found["all-gather"]) == ("all-gather", "f32,pred", 326, 163.0, 2, 1, True)
    assert found["all-gather"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert figures(found["all-reduce"]) == ("all-reduce", "f32", 320, 560.0, 8, 1, False)
    assert found["all-reduce"].asynchronous
    assert figures(found["reduce-scatter"]) == ("reduce-scatter", "f32", 320, 280.0, 8, 1, False)
    assert found["reduce-scatter"].asynchronous
    assert figures(found["all-to-all"]) == ("all-to-all", "f32", 320, 240.0, 4, 1, False)
    assert figures(found["collective-broadcast"]) == ("collective-broadcast", "f32", 24, 24.0, 2, 2, False)
    assert found["collective-broadcast"].note == "one branch of a conditional"


def test_a_trip_count_that_nobody_knows_is_noted() -> None:
    (gather,) = read_collectives(RING.replace("s32[]{:T(128)} constant(4)", "s32[]{:T(128)} custom-call()"))
    assert (gather.executions, gather.note.partition("; ")[2]) == (1, "trip count unknown, counted as 1")
    printed = RING.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert read_collectives(printed)[0].executions == 7


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        read_collectives("module @jit_step {}")


def test_axes_of_a_mesh() -> None:
    (permute,) = [one for one in read_collectives(expand(UNROLLED)) if one.kind == "collective-permute"]
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), MESH_AXES)

    def axes(*groups: tuple[int, ...]) -> tuple[str, ...]:
        return axes_of(dataclasses.replace(permute, groups=groups), mesh)

    assert axes((0, 1), (2, 3), (4, 5), (6, 7)) == ("tensor",)
    assert axes((0, 4), (1, 5), (2, 6), (3, 7)) == ("data",)
    assert axes((0, 2, 4, 6), (1, 3, 5, 7)) == ("data", "fsdp")
    assert axes(tuple(range(8))) == MESH_AXES


LAYERS, WIDTH = 6, 256


def compile_layers(mesh: Mesh, spec: PartitionSpec) -> list[Collective]:
    """The gradient of a scan over square layers in bfloat16, whose kernels are laid out by `spec`."""
    one, all_layers = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec(None, *spec))
    rows = jax.ShapeDtypeStruct(
        (mesh.size * 128, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("x"))
    )
    kernels = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16, sharding=all_layers)

    def loss(kernels: jax.Array, rows: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(kernel, one)), None

        return (jax.lax.scan(layer, rows, kernels)[0].astype(jnp.float32) ** 2).mean()

    compiled = jax.jit(jax.grad(loss), out_shardings=all_layers).lower(kernels, rows).compile()
    return read_collectives(compiled.as_text())


def test_data_parallel_on_cpu_reduces_each_gradient_once() -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    found = compile_layers(mesh, PartitionSpec())
    payload = LAYERS * WIDTH * WIDTH * 4  # the CPU multiplies in float32
    assert totals(found) == {"all-reduce": Total(LAYERS, payload, payload * 2 * 7 / 8, 0.0)}
    assert {axes_of(one, mesh) for one in found} == {("x",)}


@pytest.mark.tpu
def test_fsdp_for_a_tpu_gathers_in_each_pass_and_scatters_once() -> None:
    mesh = Mesh(np.array(devices(parse_topologies("v5e:2x2")[0])), ("x",))
    found = totals(compile_layers(mesh, PartitionSpec("x")))
    payload = LAYERS * WIDTH * WIDTH * 2
    assert set(found) == {"all-gather", "reduce-scatter"}
    assert (found["all-gather"].count, found["all-gather"].payload_bytes) == (2 * LAYERS, 2 * payload)
    assert (found["reduce-scatter"].count, found["reduce-scatter"].payload_bytes) == (LAYERS, payload)
    assert found["reduce-scatter"].wire_bytes == payload * 3 / 4


@pytest.mark.tpu
def test_kernels_of_gpt2_for_a_tpu() -> None:
    layers, width, context = 4, 256, 256
    mesh = Mesh(np.array(devices(parse_topologies("v5e:4x4")[0])).reshape(1, 16, 1), MESH_AXES)
    config = ModelConfig(layers, 4, width, context, 1024, 0.0, 0.0, 0.0, dtype="bfloat16")
    optimizer = OptimizerConfig(warmup_steps=2)
    step = StepSettings(GPT2(config), make_optimizer(optimizer, 10), learning_rate_schedule(optimizer, 10))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    types: dict[str, Any] = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((32, context), dtype, sharding=rows) for name, dtype in types.items()}
    state = abstract_state(step.model, step.optimizer, mesh, ema=False)
    with use_mesh(mesh):
        text = train_step.lower(state, batch, settings=step).compile().as_text()
    found = [one for one in read_collectives(text) if "/h/" in one.op_name]
    kernels = totals(found)
    payload = layers * 12 * width**2 * 2
    assert kernels["all-gather"].payload_bytes == 2 * payload
    assert kernels["reduce-scatter"].payload_bytes == payload
    assert kernels["all-gather"].wire_bytes + kernels["reduce-scatter"].wire_bytes < 1.25 * 3 * payload * 15 / 16
    assert {axes_of(one, mesh) for one in found} == {("fsdp",)}
