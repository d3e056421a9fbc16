#pragma once
// Chance that can be repeated.

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace qcow::test {

/// QCOW_SEED, where "random" is something new each time; without it always the same, so that a run can be compared with
/// the one before.
std::uint64_t run_seed();

/// What to put into a failure's message.
inline std::string replay_hint() { return "to repeat this: QCOW_SEED=" + std::to_string(run_seed()); }

class Random {
public:
    explicit Random(std::uint64_t seed) : engine_(seed) {}

    /// Other numbers for each `name`, the same ones in each run with the same seed.
    static Random named(std::string_view name);

    /// From 0 to n - 1.
    std::uint64_t below(std::uint64_t n) { return n == 0 ? 0 : engine_() % n; }
    std::uint64_t between(std::uint64_t first, std::uint64_t last) { return first + below(last - first + 1); }
    bool chance(unsigned percent) { return below(100) < percent; }

    template <class Container>
    auto pick(const Container& choices) {
        return *std::next(std::begin(choices), static_cast<std::ptrdiff_t>(below(std::size(choices))));
    }
    template <class T>
    T pick(std::initializer_list<T> choices) {
        return *(choices.begin() + below(choices.size()));
    }

    /// Bytes that compress to about half of their size.
    std::string bytes(std::size_t count);

private:
    std::mt19937_64 engine_;
};

}  // namespace qcow::test
