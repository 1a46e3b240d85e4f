// Elementary functions of 16 numbers at once, with the same bits on every instruction set. Included after a simd header.
#pragma once

namespace {

// e^x as (1 + rest) power, for x in [-87, 88]; what is beyond counts as these. Cody-Waite reduction by ln 2 and the
// polynomial of Cephes' expf (Moshier).
struct Exponential {
  Floats rest, power;
};
inline Exponential exponential_parts(Floats x) {
  const Floats limited = min(max(x, broadcast(-87.0f)), broadcast(88.0f));
  const Ints n = round_to_int(mul(limited, broadcast(1.44269504088896341f)));
  const Floats whole = to_float(n);
  Floats r = fma(whole, broadcast(-0.693359375f), limited);
  r = fma(whole, broadcast(2.12194440e-4f), r);
  Floats p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  return {fma(mul(r, r), p, r), from_bits(shift_left<23>(add(n, broadcast(127))))};
}

// e^x to 2 ulp for x in [-87, 88]; 0 below, and no infinity above.
inline Floats exponential(Floats x) {
  const Exponential e = exponential_parts(x);
  return mul(add(e.rest, broadcast(1.0f)), e.power);
}

// e^x - 1, near zero as exact as elsewhere: nothing is taken from 1 there, as power is 1.
inline Floats exponential_less_one(Floats x) {
  const Exponential e = exponential_parts(x);
  return fma(e.rest, e.power, sub(e.power, broadcast(1.0f)));
}

// cap tanh(x / cap) = cap - 2 cap / (e^(2 x / cap) + 1), to 3e-7 of cap. What is no number stays none.
inline Floats soft_capped(Floats x, float cap) {
  const Floats power = exponential(mul(x, broadcast(2.0f / cap)));
  const Floats capped = sub(broadcast(cap), div(broadcast(2.0f * cap), add(power, broadcast(1.0f))));
  return fma(x, zero(), capped);  // the exponential takes a number that is none for a small one
}

}  // namespace
