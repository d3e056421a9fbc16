#pragma once
// Assertions that stay on in release builds.

#include <cstdio>
#include <cstdlib>

namespace qcow {

/// Ends the process: going on would destroy data.
[[noreturn]] inline void invariant_broken(const char* condition, const char* file, int line) {
    std::fprintf(stderr, "qcowkit: internal error, please report it: %s:%d: not true: %s\n", file, line, condition);
    std::abort();
}

}  // namespace qcow

/// Asserts what a caller cannot break and data depend on. It costs a comparison.
#define INVARIANT(condition) \
    (static_cast<bool>(condition) ? static_cast<void>(0) : ::qcow::invariant_broken(#condition, __FILE__, __LINE__))
