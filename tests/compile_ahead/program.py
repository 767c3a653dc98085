"""A program with loops, a fusion and collectives, as a compiler writes it."""

TEXT = """\
HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%turn (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %doubled = f32[8,4]{1,0} add(%x, %x)
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %doubled)
}

%any (q: (s32[], f32[8,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%q), index=0
  ROOT %less.1 = pred[] compare(%i.1, %i.1), direction=NE
}

%unknown_body (r: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%r), index=0
  %x.2 = f32[8,4]{1,0} get-tuple-element(%r), index=1
  ROOT %unknown_body_root = (s32[], f32[8,4]{1,0}) tuple(%i.2, %x.2)
}

%outer_condition (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%s), index=0
  %limit = s32[]{:T(128)} constant(9)
  ROOT %less = pred[]{:T(512)} compare(%i.3, %limit), direction=LT
}

%outer (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%t), index=0
  %two = s32[] constant(2)
  %advanced = s32[] add(%i.4, %two)
  %x.4 = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %gathered = f32[32,4]{1,0} all-gather(%x.4), channel_id=1, replica_groups=[2,4]<=[8], \
dimensions={0}, use_global_device_ids=true
  %multiplied = f32[8,8]{1,0} dot(%x.4, %x.4), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %start = (s32[], f32[8,4]{1,0}) tuple(%i.4, %x.4)
  %inner = (s32[], f32[8,4]{1,0}) while(%start), condition=%any, body=%turn, \
backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[], f32[8,4]{1,0}) while(%inner), condition=%any, body=%unknown_body
  %x.5 = f32[8,4]{1,0} get-tuple-element(%unknown), index=1
  ROOT %again = (s32[], f32[8,4]{1,0}) tuple(%advanced, %x.5)
}

%fused (u: f32[8,4]) -> f32[8,4] {
  %u = f32[8,4]{1,0} parameter(0)
  ROOT %inside = f32[8,4]{1,0} multiply(%u, %u)
}

ENTRY %main (v: f32[8,4]) -> f32[8,4] {
  %v = f32[8,4]{1,0} parameter(0)
  %scaled = f32[8,4]{1,0} fusion(%v), kind=kLoop, calls=%fused
  %one = s32[] constant(1)
  %first = (s32[], f32[8,4]{1,0}) tuple(%one, %scaled)
  %loop = (s32[], f32[8,4]{1,0}) while(%first), condition=%outer_condition, body=%outer
  %top = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %summed = f32[8,4]{1,0} all-reduce(%top), channel_id=2, \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}
"""
