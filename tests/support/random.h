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
inline std::uint64_t run_seed() {
    static const std::uint64_t seed = []() -> std::uint64_t {
        const char* given = std::getenv("QCOW_SEED");
        if (given == nullptr) return std::uint64_t{1};
        return given == std::string_view("random") ? std::random_device{}()
                                                   : std::uint64_t{std::strtoull(given, nullptr, 0)};
    }();
    return seed;
}

/// What to put into a failure's message.
inline std::string replay_hint() { return "to repeat this: QCOW_SEED=" + std::to_string(run_seed()); }

class Random {
public:
    explicit Random(std::uint64_t seed) : engine_(seed) {}

    /// Other numbers for each `name`, the same ones in each run with the same seed.
    static Random named(std::string_view name) {
        std::uint64_t hash = 14695981039346656037ULL;  // FNV-1a: std::hash need not be the same everywhere
        for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
        return Random(hash ^ (run_seed() * 0x9e3779b97f4a7c15ULL));
    }

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
    std::string bytes(std::size_t count) {
        std::string result;
        result.reserve(count + 8);
        while (result.size() < count) {
            const auto word = engine_();
            if (word % 2 == 0) {
                result.append(8, static_cast<char>(word >> 8));
            } else {
                result.append(reinterpret_cast<const char*>(&word), 8);
            }
        }
        result.resize(count);
        return result;
    }

private:
    std::mt19937_64 engine_;
};

}  // namespace qcow::test
