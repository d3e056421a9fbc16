#include "support/random.h"

namespace qcow::test {

std::uint64_t run_seed() {
    static const std::uint64_t seed = []() -> std::uint64_t {
        const char* given = std::getenv("QCOW_SEED");
        if (given == nullptr) return std::uint64_t{1};
        return given == std::string_view("random") ? std::random_device{}()
                                                   : std::uint64_t{std::strtoull(given, nullptr, 0)};
    }();
    return seed;
}

Random Random::named(std::string_view name) {
    std::uint64_t hash = 14695981039346656037ULL;  // FNV-1a: std::hash need not be the same everywhere
    for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
    return Random(hash ^ (run_seed() * 0x9e3779b97f4a7c15ULL));
}

std::string Random::bytes(std::size_t count) {
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

}  // namespace qcow::test
