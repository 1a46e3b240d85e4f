// Loops whose counter is an immediate of an instruction.
#pragma once

namespace {

// The numbers 0 .. N-1 as template arguments (std::index_sequence would do, but see simd/scalar.h).
template <int... I> struct Sequence {};
template <int N, int... I> struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I> struct MakeSequence<0, I...> { using type = Sequence<I...>; };

// Calls body.template operator()<I>() for I = 0 .. N-1, one after the other in the source's place.
template <int N, typename Body> __attribute__((always_inline)) inline void repeat(Body&& body) {
  [&]<int... I>(Sequence<I...>) __attribute__((always_inline)) { (body.template operator()<I>(), ...); }(
      typename MakeSequence<N>::type{});
}

}  // namespace
