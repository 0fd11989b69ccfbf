"""Rounding, and the choices that quantizing takes, lane by lane, as numba intrinsics.

They do in float32 exactly what the torch reference does, so that both write the same codes.
"""

from __future__ import annotations

from numba import njit, types
from numba.extending import intrinsic

from vllm_quest.kernels.cpu.elements import F32, I32, ir, join, split
from vllm_quest.kernels.cpu.simd import call, splat_like


def by_lane(name: str):
    """An intrinsic that calls the LLVM intrinsic `name` on each vector of a tile."""

    def typed(typingctx, tile):
        def codegen(context, builder, sig, args):
            return join(builder, [call(builder, name, x.type, [x]) for x in split(builder, args[0])])

        return tile(tile), codegen

    return intrinsic(typed)


floor = by_lane("floor")
ceil = by_lane("ceil")
nearest = by_lane("nearbyint")  # to even


def to_bfloat16(grows_if_negative: bool):
    """An intrinsic that rounds to a bfloat16, in float32: down, or up."""

    def typed(typingctx, tile):
        wide = ir.VectorType(I32, tile.lanes)

        def rounded(builder, x):
            # Cutting bits off makes a number's magnitude smaller; adding them all first, larger.
            bits = builder.bitcast(x, wide)
            is_negative = builder.icmp_signed("<", bits, wide([0] * tile.lanes))
            grow, stay = wide([0xFFFF] * tile.lanes), wide([0] * tile.lanes)
            larger = builder.select(is_negative, *((grow, stay) if grows_if_negative else (stay, grow)))
            cut = builder.and_(builder.add(bits, larger), wide([0xFFFF0000] * tile.lanes))
            return builder.bitcast(cut, x.type)

        return tile(tile), lambda context, builder, sig, args: join(
            builder, [rounded(builder, x) for x in split(builder, args[0])]
        )

    return intrinsic(typed)


bfloat16_below = to_bfloat16(grows_if_negative=True)
bfloat16_above = to_bfloat16(grows_if_negative=False)


@intrinsic
def divide(typingctx, a, b):
    """The quotient of two tiles."""
    return a(a, a), lambda context, builder, sig, args: join(
        builder,
        [builder.fdiv(x, y) for x, y in zip(split(builder, args[0]), split(builder, args[1]), strict=True)],
    )


def choose(condition: str):
    """An intrinsic: `yes` in the lanes where ``a condition b``, `no` in the others."""

    def typed(typingctx, a, b, yes, no):
        def codegen(context, builder, sig, args):
            vectors = zip(*(split(builder, tile) for tile in args), strict=True)
            return join(
                builder,
                [builder.select(builder.fcmp_ordered(condition, x, y), p, q) for x, y, p, q in vectors],
            )

        return a(a, a, a, a), codegen

    return intrinsic(typed)


where_equal = choose("==")
where_above = choose(">")


@njit(error_model="numpy")
def limited(values, largest):
    """The values, those beyond the largest number of a dtype as that; NaN stays NaN."""
    top, bottom = splat_like(largest, values), splat_like(-largest, values)
    return where_above(bottom, values, bottom, where_above(values, top, top, values))


@intrinsic
def min_lane(typingctx, vector):
    """The smallest lane of one vector, float32."""
    return types.float32(vector), lambda context, builder, sig, args: call(
        builder, "vector.reduce.fmin", F32, split(builder, args[0]), ("nsz",)
    )
