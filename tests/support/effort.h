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

}  // namespace qcow::test
