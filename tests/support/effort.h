#pragma once
// How much randomised suites do.

#include <cstdlib>

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

}  // namespace qcow::test
