#pragma once
// How much randomised suites do.

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <utility>
#include <vector>

namespace qcow::test {

/// QCOW_EFFORT, a factor: 1 is what fits into a build.
inline unsigned effort() {
    const char* given = std::getenv("QCOW_EFFORT");
    const auto factor = given == nullptr ? 1UL : std::strtoul(given, nullptr, 10);
    return factor == 0 ? 1U : static_cast<unsigned>(factor);
}

/// Sanitizers, which are slow, look for other mistakes than searches do: these are shorter then.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool sanitized = true;
#elif defined(__has_feature)
inline constexpr bool sanitized = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
inline constexpr bool sanitized = false;
#endif

/// How many rounds a search takes of which a build without sanitizers takes n, times QCOW_EFFORT.
inline unsigned rounds(unsigned n) { return std::max(1U, sanitized ? n / 4 : n) * effort(); }

/// All of these; under sanitizers one in four. For cases that take the same way through the code.
template <class T>
std::vector<T> fewer(std::vector<T> all) {
    if (!sanitized) return all;
    std::vector<T> some;
    for (std::size_t i = 0; i < all.size(); i += 4) some.push_back(std::move(all[i]));
    return some;
}

}  // namespace qcow::test
