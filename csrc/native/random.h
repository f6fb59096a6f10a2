// A counter-based generator: the n-th number of a stream is a function of the stream's keys and n alone, so draws do
// not depend on which worker makes them, in which order, or on what was drawn before.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace lcr2s::native {

// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64 bits in which every output bit
// depends on every input bit.
inline uint64_t mix(uint64_t value) {
  value ^= value >> 30;
  value *= 0xbf58476d1ce4e5b9ull;
  value ^= value >> 27;
  value *= 0x94d049bb133111ebull;
  return value ^ (value >> 31);
}

class CounterRandom {
 public:
  CounterRandom(std::initializer_list<uint64_t> keys) {
    for (uint64_t key : keys) state_ = mix(state_ + kStep + mix(key + kStep));
  }

  uint64_t next() {
    state_ += kStep;
    return mix(state_);
  }

  // Uniform in [0, bound) by the high half of a 128-bit product; its bias is below bound / 2^64.
  uint64_t below(uint64_t bound) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(next()) * bound) >> 64);
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15ull;
  uint64_t state_ = 0;
};

}  // namespace lcr2s::native
